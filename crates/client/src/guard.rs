//! Until when a holder may act under a lease, and when it sends the next keepalive. Pure: it is told the
//! time. Programs use it over REST (`LeaderElector`), agents over their WebSocket.
//!
//! The clock model (docs/leases.md): rates of clocks differ by at most rho. A keepalive counts from before it
//! was **sent**, since the leader's clock began anew at some moment after that; the holder stops at
//! TTL x (1 - 2 rho) from then, the leader expires at TTL x (1 + 2 rho) after it recorded the keepalive. So
//! a guard that is valid means that nobody else holds the lease, whatever is delayed, doubled or reordered.
//! A guard that has lapsed may become valid again: by the acknowledgement of a keepalive under the same token.

use std::collections::BTreeMap;

use regent_types::lease::MAX_TTL_MS;

/// By how much the rates of two clocks may differ, in percent.
pub const RHO_PERCENT: u64 = 1;
/// A keepalive is sent this many times within a TTL.
pub const KEEPALIVES_PER_TTL: u64 = 5;
/// Keepalives that may be unanswered; beyond them the oldest is given up, as its answer would say nothing
/// that later ones do not.
const MAX_UNANSWERED: usize = 64;

/// How long a guard lasts: TTL x (1 - 2 rho), rounded down. In milliseconds.
pub fn hold_ms(ttl_ms: u64) -> u64 {
    ttl_ms - (ttl_ms.saturating_mul(2 * RHO_PERCENT)).div_ceil(100).min(ttl_ms)
}

/// The guard of one token. Times are milliseconds by [`crate::clock::boot_ms`] or a clock like it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guard {
    ttl_ms: u64,
    /// Not valid from here on; 0 before the first acknowledgement.
    valid_until: u64,
    next_keepalive: u64,
    next_seq: u64,
    /// When each unanswered keepalive was sent.
    sent: BTreeMap<u64, u64>,
}

impl Guard {
    /// A guard that is not valid yet: nothing was acknowledged. No TTL counts for more than the longest that there
    /// is, whatever an answer says. The first keepalive is due at once.
    pub fn new(ttl_ms: u64) -> Self {
        Self {
            ttl_ms: ttl_ms.min(MAX_TTL_MS),
            valid_until: 0,
            next_keepalive: 0,
            next_seq: 1,
            sent: BTreeMap::new(),
        }
    }

    /// A keepalive (or the acquire itself) is about to be sent: call this **before** it leaves. Gives its
    /// number.
    pub fn sending(&mut self, now: u64) -> u64 {
        let seq = self.next_seq;
        self.next_seq += 1;
        self.sent.insert(seq, now);
        while self.sent.len() > MAX_UNANSWERED {
            self.sent.pop_first();
        }
        // From now, not from when it was due: a holder that was frozen owes no burst.
        self.next_keepalive = now + self.interval();
        seq
    }

    /// The keepalive of this number was acknowledged with this TTL. Gives whether the guard lasts longer for it;
    /// not when the number is unknown, or a later one was acknowledged before.
    pub fn acknowledged(&mut self, seq: u64, ttl_ms: u64) -> bool {
        let Some(sent_at) = self.sent.remove(&seq) else {
            return false;
        };
        self.ttl_ms = ttl_ms.min(MAX_TTL_MS);
        let until = sent_at + hold_ms(self.ttl_ms);
        let longer = until > self.valid_until;
        self.valid_until = self.valid_until.max(until);
        longer
    }

    /// The lease is lost: nothing may be done under this token any more, and no late answer brings it back.
    pub fn lost(&mut self) {
        self.valid_until = 0;
        self.sent.clear();
    }

    /// Whether its holder may act now.
    pub fn is_valid(&self, now: u64) -> bool {
        now < self.valid_until
    }

    /// The first moment at which its holder may not act any more; 0 before the first acknowledgement.
    pub fn valid_until(&self) -> u64 {
        self.valid_until
    }

    /// When the next keepalive is due.
    pub fn next_keepalive(&self) -> u64 {
        self.next_keepalive
    }

    /// The TTL, in milliseconds.
    pub fn ttl_ms(&self) -> u64 {
        self.ttl_ms
    }

    /// How far apart keepalives are: TTL / 5.
    pub fn interval(&self) -> u64 {
        (self.ttl_ms / KEEPALIVES_PER_TTL).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guard_counts_from_the_sending_and_ends_before_the_ttl() {
        let mut guard = Guard::new(1_000);
        assert!(!guard.is_valid(0) && guard.next_keepalive() == 0);
        let seq = guard.sending(10_000);
        assert!(!guard.is_valid(10_001), "nothing was acknowledged");
        assert!(guard.acknowledged(seq, 1_000));
        assert_eq!(guard.valid_until(), 10_980);
        assert!(guard.is_valid(10_979) && !guard.is_valid(10_980));
        assert_eq!(guard.next_keepalive(), 10_200);
    }

    #[test]
    fn late_doubled_and_reordered_answers_never_shorten_nor_prolong_beyond_their_sending() {
        let mut guard = Guard::new(1_000);
        let (first, second) = (guard.sending(0), guard.sending(200));
        assert!(guard.acknowledged(second, 1_000));
        assert!(!guard.acknowledged(first, 1_000));
        assert!(!guard.acknowledged(second, 1_000));
        assert!(!guard.acknowledged(99, 1_000));
        assert_eq!(guard.valid_until(), 1_180);
    }

    /// The end of the guard overflowed: a panic, or without the check a guard that had ended long ago.
    #[test]
    fn no_ttl_is_longer_than_the_longest_lease() {
        let mut guard = Guard::new(u64::MAX);
        let seq = guard.sending(10_000);
        assert!(guard.acknowledged(seq, u64::MAX));
        assert_eq!(guard.valid_until(), 10_000 + hold_ms(MAX_TTL_MS));
        assert_eq!(guard.next_keepalive(), 10_000 + MAX_TTL_MS / KEEPALIVES_PER_TTL);
    }

    #[test]
    fn a_lapsed_guard_is_won_back_by_the_same_token_but_not_a_lost_one() {
        let mut guard = Guard::new(1_000);
        let first = guard.sending(0);
        guard.acknowledged(first, 1_000);
        assert!(!guard.is_valid(2_000));
        let again = guard.sending(2_000);
        guard.acknowledged(again, 1_000);
        assert!(guard.is_valid(2_100));
        let late = guard.sending(2_200);
        guard.lost();
        assert!(!guard.acknowledged(late, 1_000) && !guard.is_valid(2_201));
    }

    #[test]
    fn short_and_long_ttls_keep_their_margin() {
        for ttl in [1, 7, 100, 999, 1_000, 3_600_000] {
            assert!(hold_ms(ttl) * 100 <= ttl * 98, "{ttl}");
        }
        assert_eq!(hold_ms(3_600_000), 3_528_000);
    }
}
