//! Which leases are due: the clock of one leadership. Pure; it is told the time.
//!
//! Only the leader's clock expires a lease. It belongs to one process start and one leadership and
//! begins with full TTLs, since a new leader cannot know when its predecessor last heard a holder. A
//! lease is due at TTL x (1 + 2 rho) after the last renewal that was recorded here, while its holder
//! stops at TTL x (1 - 2 rho) after it sent that renewal: with rates that differ by at most rho the
//! holder always stops first. From the moment that a lease is due it takes no more renewals, so that no
//! holder is told "renewed" while its expiry is on the way through the log.
//!
//! A lease that was given to the next in its queue binds nobody before its first renewal: the candidate acts
//! only once that is acknowledged. So until then it may be taken back at any time, and is soon, so that a
//! candidate that nobody could tell of it does not cost the next one a whole TTL.

use std::collections::{BTreeMap, BTreeSet};

use regent_state::Leadership;
use regent_types::{LeaseName, Token};

/// By how much the rates of two clocks may differ, in percent (docs/leases.md, clock model).
pub(crate) const RHO_PERCENT: u64 = 1;
/// How long an expiry that was proposed and not seen applied rests before it is proposed again.
pub(crate) const RETRY_MS: u64 = 1_000;
/// How long a promoted candidate may take to renew for the first time: the way to it and back, many times.
pub(crate) const CONFIRM_MS: u64 = 2_000;

/// All times are milliseconds by one clock that runs during suspend.
#[derive(Debug)]
pub(crate) struct LeaseClock {
    leadership: Leadership,
    entries: BTreeMap<LeaseName, Entry>,
    /// One element per entry.
    deadlines: BTreeSet<(u64, LeaseName)>,
}

#[derive(Debug, Clone)]
struct Entry {
    token: Token,
    ttl_ms: u64,
    renewed_at: u64,
    deadline: u64,
    expiring: bool,
    /// Whether somebody may act under it: promoted candidates only after their first renewal.
    binding: bool,
}

impl LeaseClock {
    /// A clock that begins now, with the full TTL for each lease that is held.
    pub(crate) fn new(
        leadership: Leadership,
        held: impl IntoIterator<Item = (LeaseName, Token, u64)>,
        now: u64,
    ) -> Self {
        let mut clock = Self {
            leadership,
            entries: BTreeMap::new(),
            deadlines: BTreeSet::new(),
        };
        for (name, token, ttl_ms) in held {
            clock.granted(name, token, ttl_ms, now);
        }
        clock
    }

    /// The next in the queue got the lease: it is not binding yet.
    pub(crate) fn promoted(&mut self, name: LeaseName, token: Token, ttl_ms: u64, now: u64) {
        self.take_up(name, token, ttl_ms, now, false);
    }

    /// Ends a lease that is not binding yet; gives whether it was such a one.
    pub(crate) fn give_up(&mut self, name: &LeaseName, token: Token, now: u64) -> bool {
        let entry = self
            .entries
            .get(name)
            .filter(|entry| entry.token == token && !entry.binding && !entry.expiring);
        let Some(mut entry) = entry.cloned() else {
            return false;
        };
        entry.deadline = now;
        self.put(name.clone(), entry);
        true
    }

    /// Whose clock it is.
    pub(crate) fn leadership(&self) -> Leadership {
        self.leadership
    }

    /// Goes on under another leadership with what it knows, as no clock may: see [`regent_state::faults`].
    pub(crate) fn live_on(&mut self, leadership: Leadership) {
        self.leadership = leadership;
    }

    /// A grant was applied. What is known of the same or a newer token stays.
    pub(crate) fn granted(&mut self, name: LeaseName, token: Token, ttl_ms: u64, now: u64) {
        self.take_up(name, token, ttl_ms, now, true);
    }

    fn take_up(&mut self, name: LeaseName, token: Token, ttl_ms: u64, now: u64, binding: bool) {
        if self.entries.get(&name).is_some_and(|entry| entry.token >= token) {
            return;
        }
        let full = due_at(now, ttl_ms);
        let entry = Entry {
            token,
            ttl_ms,
            renewed_at: now,
            deadline: if binding { full } else { full.min(now + CONFIRM_MS) },
            expiring: false,
            binding,
        };
        self.put(name, entry);
    }

    /// The lease was given back, taken or expired under this token.
    pub(crate) fn gone(&mut self, name: &LeaseName, token: Token) {
        if self.entries.get(name).is_some_and(|entry| entry.token <= token) {
            self.remove(name);
        }
    }

    /// Makes the clock agree with all leases that are held: the repair for whatever was missed.
    pub(crate) fn agree(&mut self, held: &BTreeMap<LeaseName, (Token, u64)>, now: u64) {
        let gone: Vec<LeaseName> = self
            .entries
            .keys()
            .filter(|name| !held.contains_key(*name))
            .cloned()
            .collect();
        for name in gone {
            self.remove(&name);
        }
        for (name, (token, ttl_ms)) in held {
            self.granted(name.clone(), *token, *ttl_ms, now);
        }
    }

    /// Renews; gives the TTL, or `None` when the lease is not held under this token or is being expired.
    pub(crate) fn renew(&mut self, name: &LeaseName, token: Token, now: u64) -> Option<u64> {
        let entry = self
            .entries
            .get(name)
            .filter(|entry| entry.token == token && !entry.expiring)?;
        // A due lease is as good as expired even if nobody looked yet.
        if entry.deadline <= now {
            return None;
        }
        let mut entry = entry.clone();
        entry.renewed_at = now;
        entry.binding = true;
        entry.deadline = due_at(now, entry.ttl_ms);
        let ttl_ms = entry.ttl_ms;
        self.put(name.clone(), entry);
        Some(ttl_ms)
    }

    /// Takes up to `most` leases that are due, to be expired. They take no renewals from now on, and are
    /// due again after [`RETRY_MS`] unless they are gone by then.
    pub(crate) fn due(&mut self, now: u64, most: usize) -> Vec<(LeaseName, Token)> {
        let names: Vec<LeaseName> = self
            .deadlines
            .iter()
            .take_while(|(at, _)| *at <= now)
            .take(most)
            .map(|(_, name)| name.clone())
            .collect();
        let mut due = Vec::with_capacity(names.len());
        for name in names {
            let mut entry = self.entries.get(&name).expect("a deadline has its entry").clone();
            entry.expiring = true;
            entry.deadline = now + RETRY_MS;
            due.push((name.clone(), entry.token));
            self.put(name, entry);
        }
        due
    }

    /// When the next lease is due.
    pub(crate) fn next_due(&self) -> Option<u64> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Milliseconds that the holder has left, by what was recorded here; the margins are not in it.
    pub(crate) fn remaining(&self, name: &LeaseName, now: u64) -> Option<u64> {
        let entry = self.entries.get(name)?;
        Some(if entry.expiring {
            0
        } else {
            (entry.renewed_at + entry.ttl_ms).saturating_sub(now)
        })
    }

    fn put(&mut self, name: LeaseName, entry: Entry) {
        self.remove(&name);
        self.deadlines.insert((entry.deadline, name.clone()));
        self.entries.insert(name, entry);
        debug_assert_eq!(self.entries.len(), self.deadlines.len(), "one deadline per lease");
    }

    fn remove(&mut self, name: &LeaseName) {
        if let Some(entry) = self.entries.remove(name) {
            self.deadlines.remove(&(entry.deadline, name.clone()));
        }
    }
}

/// TTL x (1 + 2 rho) after `now`, rounded up.
fn due_at(now: u64, ttl_ms: u64) -> u64 {
    now + ttl_ms + (ttl_ms * 2 * RHO_PERCENT).div_ceil(100)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEADERSHIP: Leadership = Leadership {
        term: 3,
        node: regent_types::NodeId(1),
    };

    fn name(text: &str) -> LeaseName {
        LeaseName::new(text).unwrap()
    }

    fn clock(now: u64) -> LeaseClock {
        LeaseClock::new(LEADERSHIP, [(name("a"), Token(5), 1_000)], now)
    }

    #[test]
    fn a_new_leadership_begins_with_full_ttls_and_expires_after_the_margin() {
        let mut clock = clock(10_000);
        assert_eq!(clock.due(11_019, 10), []);
        assert_eq!(clock.next_due(), Some(11_020));
        assert_eq!(clock.due(11_020, 10), [(name("a"), Token(5))]);
    }

    #[test]
    fn a_renewal_moves_the_deadline_and_needs_the_current_token() {
        let mut clock = clock(0);
        assert_eq!(clock.renew(&name("a"), Token(5), 900), Some(1_000));
        assert_eq!(clock.renew(&name("a"), Token(4), 901), None);
        assert_eq!(clock.renew(&name("b"), Token(5), 901), None);
        assert_eq!(clock.remaining(&name("a"), 1_000), Some(900));
        assert_eq!(clock.due(1_919, 10), []);
        assert_eq!(clock.due(1_920, 10).len(), 1);
    }

    #[test]
    fn a_lease_that_is_being_expired_takes_no_more_renewals() {
        let mut clock = clock(0);
        assert_eq!(clock.due(1_020, 10).len(), 1);
        assert_eq!(clock.renew(&name("a"), Token(5), 1_021), None);
        assert_eq!(clock.remaining(&name("a"), 1_021), Some(0));
        // The proposal may have failed: it is due again, and still takes no renewal.
        assert_eq!(clock.due(1_021, 10), []);
        assert_eq!(clock.due(1_020 + RETRY_MS, 10).len(), 1);
        assert_eq!(clock.renew(&name("a"), Token(5), 2_021), None);
    }

    #[test]
    fn a_renewal_after_the_deadline_is_refused_even_before_anybody_looked() {
        let mut clock = clock(0);
        assert_eq!(clock.renew(&name("a"), Token(5), 1_020), None);
        assert_eq!(clock.due(1_020, 10).len(), 1);
    }

    /// A candidate that cannot be told, as its node is frozen, must not cost the next one its whole TTL; one
    /// that has renewed has all of it.
    #[test]
    fn a_promotion_that_is_not_renewed_is_taken_back_early_and_one_that_is_has_its_ttl() {
        let mut clock = clock(0);
        clock.promoted(name("b"), Token(6), 60_000, 0);
        clock.promoted(name("c"), Token(7), 60_000, 0);
        clock.promoted(name("d"), Token(8), 100, 0);
        assert_eq!(clock.renew(&name("c"), Token(7), 10), Some(60_000));
        assert_eq!(clock.due(102, 10), [(name("d"), Token(8))]);
        clock.gone(&name("d"), Token(8));
        clock.gone(&name("a"), Token(5));
        assert_eq!(clock.due(CONFIRM_MS - 1, 10), []);
        assert_eq!(clock.due(CONFIRM_MS, 10), [(name("b"), Token(6))]);
        assert_eq!(clock.renew(&name("b"), Token(6), CONFIRM_MS), None);
        clock.gone(&name("b"), Token(6));
        assert_eq!(clock.due(61_209, 10), []);
        assert_eq!(clock.due(61_210, 10), [(name("c"), Token(7))]);
    }

    #[test]
    fn only_what_binds_nobody_can_be_given_up() {
        let mut clock = clock(0);
        assert!(!clock.give_up(&name("a"), Token(5), 1), "its holder may act");
        clock.promoted(name("b"), Token(6), 60_000, 0);
        assert!(!clock.give_up(&name("b"), Token(4), 1));
        assert!(clock.give_up(&name("b"), Token(6), 1));
        assert_eq!(clock.renew(&name("b"), Token(6), 1), None);
        assert_eq!(clock.due(1, 10), [(name("b"), Token(6))]);
        clock.promoted(name("c"), Token(7), 60_000, 2);
        clock.renew(&name("c"), Token(7), 3);
        assert!(!clock.give_up(&name("c"), Token(7), 4));
    }

    #[test]
    fn a_new_grant_starts_afresh_and_late_news_of_the_old_one_changes_nothing() {
        let mut clock = clock(0);
        assert_eq!(clock.due(1_020, 10).len(), 1);
        clock.granted(name("a"), Token(9), 2_000, 1_100);
        clock.gone(&name("a"), Token(5));
        clock.granted(name("a"), Token(5), 1_000, 1_200);
        assert_eq!(clock.renew(&name("a"), Token(9), 1_300), Some(2_000));
        clock.gone(&name("a"), Token(9));
        assert_eq!(clock.next_due(), None);
    }

    #[test]
    fn agreeing_repairs_what_was_missed_without_prolonging_what_is_known() {
        let mut clock = clock(0);
        let held = BTreeMap::from([(name("a"), (Token(5), 1_000)), (name("b"), (Token(7), 500))]);
        clock.agree(&held, 600);
        assert_eq!(clock.due(1_020, 10), [(name("a"), Token(5))]);
        assert_eq!(clock.due(1_110, 10), [(name("b"), Token(7))]);
        clock.agree(&BTreeMap::new(), 700);
        assert_eq!(clock.next_due(), None);
    }

    #[test]
    fn no_more_than_asked_for_are_taken_at_once() {
        let held = (0..10).map(|n| (name(&format!("l{n}")), Token(n), 100));
        let mut clock = LeaseClock::new(LEADERSHIP, held, 0);
        assert_eq!(clock.due(200, 4).len(), 4);
        assert_eq!(clock.due(200, 100).len(), 6);
        assert_eq!(clock.due(200, 100).len(), 0);
        assert_eq!(clock.leadership(), LEADERSHIP);
    }
}
