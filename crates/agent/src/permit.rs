//! Until when, and under which token, actions may be begun: the session decides it, the executor asks.
//!
//! A replica that was frozen wakes in the middle of anything, so what the session knew when it began a command
//! is not enough: each action is checked against the clock that runs during suspend just before it acts.
//! Invariant: a permit that says yes means that the guard of exactly this token is valid at that moment. What
//! happens between the check and the act is what the fence is for.

use std::sync::{Arc, Mutex, PoisonError};

use regent_client::clock::boot_ms;
use regent_types::Token;

use crate::session::Millis;

/// Nothing may be begun under this token now.
#[derive(Debug, thiserror::Error)]
#[error("not begun: this replica does not lead under token {asked} any more, or does not know that it does")]
pub struct NotPermitted {
    /// The token of the action.
    pub asked: Token,
}

/// A token and when its guard ends.
type Held = Option<(Token, Millis)>;

/// The right to begin actions. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Permit {
    /// `None` where the lease is the gateway's affair, not the agent's.
    held: Option<Arc<Mutex<Held>>>,
}

impl Permit {
    /// For an agent without replicas: the fence alone decides.
    pub fn unlimited() -> Self {
        Self { held: None }
    }

    /// For a replica, which may do nothing before [`Permit::set`].
    pub fn of_replica() -> Self {
        Self {
            held: Some(Arc::default()),
        }
    }

    /// From now on actions under this token may be begun until then, by [`boot_ms`]; others may not.
    pub fn set(&self, held: Option<(Token, Millis)>) {
        if let Some(shared) = &self.held {
            *shared.lock().unwrap_or_else(PoisonError::into_inner) = held;
        }
    }

    /// Whether an action under this token may be begun at this moment.
    pub fn check(&self, token: Token) -> Result<(), NotPermitted> {
        let Some(shared) = &self.held else { return Ok(()) };
        let held = *shared.lock().unwrap_or_else(PoisonError::into_inner);
        // The clock is read after the lock, so waiting for it counts.
        match held {
            Some((own, until)) if own == token && boot_ms() < until => Ok(()),
            Some(_) | None => Err(NotPermitted { asked: token }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_token_that_leads_is_permitted_and_only_while_its_guard_lasts() {
        let permit = Permit::of_replica();
        let shared = permit.clone();
        assert!(permit.check(Token(5)).is_err(), "nothing was set");
        shared.set(Some((Token(5), boot_ms() + 60_000)));
        permit.check(Token(5)).unwrap();
        assert!(permit.check(Token(4)).is_err() && permit.check(Token(6)).is_err());
        shared.set(Some((Token(5), boot_ms())));
        assert!(permit.check(Token(5)).is_err(), "the guard is over");
        shared.set(None);
        assert!(permit.check(Token(5)).is_err());
        Permit::unlimited().check(Token(1)).unwrap();
    }
}
