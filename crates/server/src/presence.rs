//! Which processes of nodes are there for those who wait at them. Pure; it is told the time.
//!
//! A candidate for a lease is kept alive by the process at which it waits: a connection or a request cannot
//! outlast that, and everybody at it is there or gone together. So a process says one thing for all of its
//! candidates, and the leader names them to be skipped once it has said nothing for too long. Nothing about
//! safety hangs on it: a candidate that is dropped wrongly stands in the queue again.

use std::collections::BTreeMap;

use regent_state::record::WaitsAt;

/// How often a process that somebody waits at says so.
pub(crate) const SAY_EVERY_MS: u64 = 500;
/// After how long without a word its candidates have lapsed: several words may be lost, and an election passes.
pub(crate) const LAPSE_MS: u64 = 2_500;
/// How long those that were named rest before they are named again, if they are still there.
const RETRY_MS: u64 = 1_000;

/// All times are milliseconds by one clock that runs during suspend.
#[derive(Debug, Default)]
pub(crate) struct Presence {
    /// When each process lapses.
    until: BTreeMap<WaitsAt, u64>,
}

impl Presence {
    /// A process said that it is there. What an earlier process of that node left behind is gone with it.
    pub(crate) fn heard(&mut self, at: WaitsAt, now: u64) {
        for (other, until) in &mut self.until {
            if other.node == at.node && other.start < at.start {
                *until = (*until).min(now);
            }
        }
        self.until.insert(at, now + LAPSE_MS);
    }

    /// Somebody waits there. A process that was never heard gets the whole time.
    pub(crate) fn expect(&mut self, at: WaitsAt, now: u64) {
        self.until.entry(at).or_insert(now + LAPSE_MS);
    }

    /// The processes that have lapsed. They count as lapsed again after a while.
    pub(crate) fn lapsed(&mut self, now: u64) -> Vec<WaitsAt> {
        let mut lapsed = Vec::new();
        for (at, until) in &mut self.until {
            if *until <= now {
                *until = now + RETRY_MS;
                lapsed.push(*at);
            }
        }
        lapsed
    }

    /// Nobody waits there any more.
    pub(crate) fn forget(&mut self, at: WaitsAt) {
        self.until.remove(&at);
    }

    /// When the next one lapses.
    pub(crate) fn next(&self) -> Option<u64> {
        self.until.values().min().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use regent_types::NodeId;

    fn at(node: u64, start: u64) -> WaitsAt {
        WaitsAt {
            node: NodeId(node),
            start,
        }
    }

    #[test]
    fn who_is_heard_stays_and_who_is_not_lapses_and_is_named_again() {
        let mut presence = Presence::default();
        presence.expect(at(1, 1), 0);
        presence.expect(at(2, 1), 0);
        presence.heard(at(1, 1), 1_000);
        assert_eq!(presence.lapsed(LAPSE_MS - 1), []);
        assert_eq!(presence.next(), Some(LAPSE_MS));
        assert_eq!(presence.lapsed(LAPSE_MS), [at(2, 1)]);
        assert_eq!(presence.lapsed(LAPSE_MS + 1), []);
        assert_eq!(presence.lapsed(LAPSE_MS + RETRY_MS), [at(1, 1), at(2, 1)]);
        presence.forget(at(2, 1));
        presence.heard(at(1, 1), 10_000);
        assert_eq!(presence.next(), Some(10_000 + LAPSE_MS));
    }

    #[test]
    fn a_node_that_was_started_anew_leaves_those_of_before_behind_at_once() {
        let mut presence = Presence::default();
        presence.expect(at(1, 1), 0);
        presence.expect(at(2, 9), 0);
        presence.heard(at(1, 2), 100);
        assert_eq!(presence.lapsed(100), [at(1, 1)]);
    }

    #[test]
    fn to_expect_somebody_prolongs_nothing() {
        let mut presence = Presence::default();
        presence.expect(at(1, 1), 0);
        presence.expect(at(1, 1), 2_000);
        assert_eq!(presence.lapsed(LAPSE_MS), [at(1, 1)]);
    }
}
