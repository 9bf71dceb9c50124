//! The newest entries, in memory.
//!
//! Replication, apply and the openraft core read what was just appended; almost every read ends here. An
//! entry that the writer has not handed to the engine yet exists nowhere else, so it is never evicted: the
//! writer's queue bounds how many of those there are.

use std::collections::VecDeque;

use crate::config::{Entry, Payload};

/// Bytes of written entries that stay in memory. It covers a second of full load, so a follower that lags by
/// less is served without touching the engine. More would cost every node memory, and every write a
/// little: what is allocated is then always memory that no cache holds any more.
const TAIL_BYTES: usize = 8 * 1024 * 1024;
/// Entries that stay in memory at most: small ones cost more in overhead than in bytes.
const TAIL_ENTRIES: usize = 25_000;

/// Consecutive entries up to the end of the log.
#[derive(Debug, Default)]
pub(super) struct Tail {
    entries: VecDeque<Entry>,
    bytes: usize,
    /// Entries below this index are in the engine.
    written: u64,
}

impl Tail {
    /// Index of the first entry held, if any is.
    pub(super) fn first(&self) -> Option<u64> {
        self.entries.front().map(|entry| entry.log_id.index)
    }

    /// Takes the next entry.
    pub(super) fn push(&mut self, entry: Entry) {
        if let Some(last) = self.entries.back() {
            assert_eq!(last.log_id.index + 1, entry.log_id.index, "the tail has no holes");
        }
        self.bytes += weight(&entry);
        self.entries.push_back(entry);
    }

    /// Everything below `next` is in the engine now and may be evicted.
    pub(super) fn written_below(&mut self, next: u64) {
        self.written = next;
        while (self.bytes > TAIL_BYTES || self.entries.len() > TAIL_ENTRIES)
            && self.first().is_some_and(|first| first < self.written)
        {
            self.pop_front();
        }
    }

    /// Forgets the entries from `index` on.
    pub(super) fn truncate(&mut self, index: u64) {
        self.written = self.written.min(index);
        while let Some(entry) = self.entries.back() {
            if entry.log_id.index < index {
                break;
            }
            self.bytes -= weight(entry);
            self.entries.pop_back();
        }
    }

    /// Forgets the entries up to `index`, inclusive.
    pub(super) fn purge(&mut self, index: u64) {
        while self.first().is_some_and(|first| first <= index) {
            self.pop_front();
        }
    }

    /// The entries with indexes in `start..end` that are held, until their weight reaches `max_bytes`; at
    /// least one if there is one.
    pub(super) fn read(&self, start: u64, end: u64, max_bytes: usize) -> Vec<Entry> {
        let Some(first) = self.first() else {
            return Vec::new();
        };
        let position = |index: u64| {
            usize::try_from(index.saturating_sub(first))
                .unwrap_or(usize::MAX)
                .min(self.entries.len())
        };
        let (from, to) = (position(start), position(end));
        let mut bytes = 0;
        let mut taken = Vec::new();
        for entry in self.entries.range(from..to.max(from)) {
            bytes += weight(entry);
            if bytes > max_bytes && !taken.is_empty() {
                break;
            }
            taken.push(entry.clone());
        }
        taken
    }

    fn pop_front(&mut self) {
        if let Some(entry) = self.entries.pop_front() {
            self.bytes -= weight(&entry);
        }
    }
}

/// What an entry costs in memory and, closely enough, on the wire.
pub(super) fn weight(entry: &Entry) -> usize {
    /// The struct, the reference-counted buffer and the allocator's rounding.
    const OVERHEAD: usize = 128;
    match &entry.payload {
        Payload::Blank => OVERHEAD,
        Payload::Normal(proposal) => OVERHEAD + proposal.body.len(),
        // Memberships are rare and small; a node is an id and two addresses.
        Payload::Membership(membership) => OVERHEAD + 256 * membership.nodes().count(),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::config::{LeaderId, LogId, Proposal};

    fn entry(index: u64, len: usize) -> Entry {
        Entry {
            log_id: LogId {
                leader_id: LeaderId { term: 1, node_id: 1 },
                index,
            },
            payload: Payload::Normal(Proposal {
                at: 0,
                body: Bytes::from(vec![0; len]),
            }),
        }
    }

    fn indexes(entries: &[Entry]) -> Vec<u64> {
        entries.iter().map(|e| e.log_id.index).collect()
    }

    #[test]
    fn reads_are_clamped_and_capped() {
        let mut tail = Tail::default();
        assert!(tail.read(0, 9, 100).is_empty());
        for index in 5..10 {
            tail.push(entry(index, 1_000));
        }
        assert_eq!(indexes(&tail.read(0, 7, usize::MAX)), [5, 6]);
        assert_eq!(indexes(&tail.read(8, 99, usize::MAX)), [8, 9]);
        assert_eq!(indexes(&tail.read(5, 10, 2_500)), [5, 6]);
        assert_eq!(
            indexes(&tail.read(5, 10, 0)),
            [5],
            "never nothing while there is something"
        );
        assert!(tail.read(10, 20, 10).is_empty());
    }

    #[test]
    fn what_is_not_written_is_never_evicted() {
        let mut tail = Tail::default();
        let len = 1024 * 1024;
        for index in 0..64 {
            tail.push(entry(index, len));
            tail.written_below(0);
        }
        assert_eq!(tail.first(), Some(0));
        tail.written_below(64);
        assert!(tail.first().unwrap() > 30);
        assert_eq!(indexes(&tail.read(63, 64, usize::MAX)), [63]);
    }

    #[test]
    fn truncate_and_purge_cut_both_ends() {
        let mut tail = Tail::default();
        for index in 0..10 {
            tail.push(entry(index, 1));
        }
        tail.truncate(7);
        tail.purge(2);
        assert_eq!(indexes(&tail.read(0, 99, usize::MAX)), [3, 4, 5, 6]);
        tail.push(entry(7, 1));
        tail.truncate(0);
        assert_eq!((tail.first(), tail.bytes), (None, 0));
    }
}
