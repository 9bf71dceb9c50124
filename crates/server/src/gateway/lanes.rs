//! Reports of one connection, in order where order matters.
//!
//! What an agent says about one session (or about one command that is about none) must be applied in
//! the order in which it was said; what it says about different ones need not wait for each other. So
//! each subject has a lane with one proposal under way at a time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use regent_state::Operation;

/// Proposals of one connection under way at once.
const MAX_UNDER_WAY: usize = 32;
/// Reports of one connection that wait or are under way; while there are more its frames are not read.
const MAX_REPORTS: usize = 256;

/// Lanes by subject.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    waiting: BTreeMap<String, VecDeque<Operation>>,
    /// Subjects with a proposal under way: exactly one each.
    under_way: BTreeSet<String>,
    count: usize,
}

impl Lanes {
    /// Takes a report; gives what is to be proposed now.
    pub(super) fn push(&mut self, subject: &str, report: Operation) -> Option<(String, Operation)> {
        self.count += 1;
        let waiting = self.waiting.entry(subject.to_owned()).or_default();
        waiting.push_back(report);
        if self.under_way.contains(subject) || self.under_way.len() >= MAX_UNDER_WAY {
            return None;
        }
        self.start(subject)
    }

    /// The proposal of a subject has ended; gives what is to be proposed now.
    pub(super) fn done(&mut self, subject: &str) -> Option<(String, Operation)> {
        if self.under_way.remove(subject) {
            self.count -= 1;
        }
        let next = if self.waiting.contains_key(subject) {
            Some(subject.to_owned())
        } else {
            self.waiting
                .keys()
                .find(|subject| !self.under_way.contains(*subject))
                .cloned()
        };
        next.and_then(|subject| self.start(&subject))
    }

    /// Whether another frame may be read.
    pub(super) fn has_room(&self) -> bool {
        self.count < MAX_REPORTS
    }

    fn start(&mut self, subject: &str) -> Option<(String, Operation)> {
        let waiting = self.waiting.get_mut(subject)?;
        let report = waiting.pop_front();
        if waiting.is_empty() {
            self.waiting.remove(subject);
        }
        let report = report?;
        self.under_way.insert(subject.to_owned());
        Some((subject.to_owned(), report))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(started: Option<(String, Operation)>) -> Option<String> {
        started.map(|(subject, _)| subject)
    }

    #[test]
    fn one_at_a_time_per_subject_and_others_do_not_wait() {
        let mut lanes = Lanes::default();
        assert_eq!(subject(lanes.push("a", Operation::Prune)).as_deref(), Some("a"));
        assert_eq!(subject(lanes.push("a", Operation::Prune)), None);
        assert_eq!(subject(lanes.push("b", Operation::Prune)).as_deref(), Some("b"));
        assert_eq!(subject(lanes.done("a")).as_deref(), Some("a"));
        assert_eq!(subject(lanes.done("a")), None);
        assert_eq!(subject(lanes.done("b")), None);
    }

    #[test]
    fn a_subject_that_found_no_place_gets_the_next_free_one() {
        let mut lanes = Lanes::default();
        for n in 0..MAX_UNDER_WAY {
            assert!(lanes.push(&format!("s{n}"), Operation::Prune).is_some());
        }
        assert_eq!(subject(lanes.push("late", Operation::Prune)), None);
        assert_eq!(subject(lanes.done("s3")).as_deref(), Some("late"));
        assert!(lanes.has_room());
        for _ in 0..MAX_REPORTS {
            lanes.push("x", Operation::Prune);
        }
        assert!(!lanes.has_room());
    }
}
