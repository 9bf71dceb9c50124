//! How often one token may ask: a program that asks in a circle must not take a node from all others.
//!
//! An admin's token is not limited: whoever has it can do worse, and must get in while others flood. Each node counts
//! by itself, in memory.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::middleware::NoOpMiddleware;
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};
use regent_state::record::Role;
use regent_types::TokenId;

use super::caller::Identity;
use super::problem::{Failure, Result};

/// After so many requests, tokens that asked nothing lately are forgotten. Tokens that ask are in the state, whose
/// size is bounded; this is about those that are not there any more.
const FORGET_EVERY: u32 = 65_536;

/// How often each token may ask. What was not used in a second may be used at once.
pub(crate) struct Rates<C: Clock = DefaultClock> {
    each: NonZeroU32,
    tokens: RateLimiter<TokenId, HashMapStateStore<TokenId>, C, NoOpMiddleware<C::Instant>>,
    clock: C,
    asked: AtomicU32,
}

impl Rates {
    /// So many requests a second for each.
    pub(crate) fn new(each: NonZeroU32) -> Self {
        Self::by(DefaultClock::default(), each)
    }
}

impl<C: Clock + Clone> Rates<C> {
    fn by(clock: C, each: NonZeroU32) -> Self {
        let quota = Quota::per_second(each);
        Self {
            each,
            tokens: RateLimiter::new(quota, HashMapStateStore::default(), clock.clone()),
            clock,
            asked: AtomicU32::new(0),
        }
    }

    /// Counts a request, or refuses it with 429.
    pub(crate) fn admit(&self, caller: &Identity) -> Result<()> {
        if caller.role == Role::Admin {
            return Ok(());
        }
        if self.asked.fetch_add(1, Ordering::Relaxed) % FORGET_EVERY == FORGET_EVERY - 1 {
            self.tokens.retain_recent();
        }
        self.tokens.check_key(&caller.token).map_err(|not_yet| {
            metrics::counter!("regent_requests_limited_total").increment(1);
            let wait: Duration = not_yet.wait_time_from(self.clock.now());
            let detail = format!(
                "this token asks more than {} times a second, which is what a node allows one token",
                self.each
            );
            Failure::busy(detail, wait.as_secs() + 1)
        })
    }
}

#[cfg(test)]
mod tests {
    use governor::clock::FakeRelativeClock;
    use regent_types::{Principal, UserName};

    use super::*;

    fn caller(token: &str, role: Role) -> Identity {
        Identity {
            token: TokenId::new(token).unwrap(),
            principal: Principal::User(UserName::new("alice").unwrap()),
            role,
        }
    }

    #[test]
    fn a_token_that_asks_too_often_waits_and_nobody_else_does() {
        let clock = FakeRelativeClock::default();
        let rates = Rates::by(clock.clone(), NonZeroU32::new(3).unwrap());
        let (one, other) = (caller("tok-1", Role::User), caller("tok-2", Role::Operator));
        for _ in 0..3 {
            rates.admit(&one).unwrap();
        }
        assert!(rates.admit(&one).is_err());
        rates.admit(&other).unwrap();
        clock.advance(Duration::from_millis(334));
        rates.admit(&one).unwrap();
        assert!(rates.admit(&one).is_err());
        for _ in 0..10 {
            rates.admit(&caller("tok-3", Role::Admin)).unwrap();
        }
    }
}
