//! Where each record is: twelve bytes an entry, in memory.

use std::collections::VecDeque;

/// Where a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Location {
    /// Sequence number of its segment.
    pub(super) segment: u32,
    /// Where in that file it begins.
    pub(super) offset: u32,
    /// Its bytes.
    pub(super) len: u32,
}

impl Location {
    /// Where it ends.
    pub(super) fn end(&self) -> u64 {
        u64::from(self.offset) + u64::from(self.len)
    }
}

/// The live records. Their places ascend with their indexes: a record that replaces a truncated one is
/// written after everything that is still there.
#[derive(Debug, Default)]
pub(super) struct Index {
    /// Everything below is purged.
    first: u64,
    /// Index of the first location. It differs from `first` only while segments are read: the oldest one
    /// begins with entries that are in none, and later items must say that those are gone.
    held: u64,
    locations: VecDeque<Location>,
}

impl Index {
    /// The records `first..next` exist, but where is not known.
    pub(super) fn at_base(first: u64, next: u64) -> Self {
        Self {
            first,
            held: next.max(first),
            locations: VecDeque::new(),
        }
    }

    /// Everything below is purged.
    pub(super) fn first(&self) -> u64 {
        self.first
    }

    /// The index of the record that comes next.
    pub(super) fn next(&self) -> u64 {
        self.held + self.locations.len() as u64
    }

    /// The first record that is there, if any.
    pub(super) fn front(&self) -> Option<&Location> {
        self.locations.front()
    }

    /// The live records whose place is not known.
    pub(super) fn unknown(&self) -> std::ops::Range<u64> {
        self.first..self.held
    }

    /// The locations from `index` on, or from the first one that is there.
    pub(super) fn from(&self, index: u64) -> impl Iterator<Item = (u64, &Location)> {
        let skip = usize::try_from(index.saturating_sub(self.held))
            .unwrap_or(usize::MAX)
            .min(self.locations.len());
        (self.held + skip as u64..).zip(self.locations.range(skip..))
    }

    /// Takes the place of the record that comes next.
    pub(super) fn push(&mut self, location: Location) {
        self.locations.push_back(location);
    }

    /// Forgets the records from `from` on.
    pub(super) fn truncate(&mut self, from: u64) {
        let from = from.max(self.first);
        if from < self.held {
            self.locations.clear();
            self.held = from;
        } else {
            self.locations
                .truncate(usize::try_from(from - self.held).unwrap_or(usize::MAX));
        }
    }

    /// Forgets the records below `below`; the next one is at least `below` then.
    pub(super) fn purge(&mut self, below: u64) {
        self.first = self.first.max(below);
        while self.held < self.first && self.locations.pop_front().is_some() {
            self.held += 1;
        }
        self.held = self.held.max(self.first);
        // After a snapshot's worth of entries nothing should remember how many there were.
        if self.locations.len() < self.locations.capacity() / 4 {
            self.locations.shrink_to(self.locations.len() * 2);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn location(offset: u32) -> Location {
        Location {
            segment: 1,
            offset,
            len: 1,
        }
    }

    #[test]
    fn both_ends_move() {
        let mut index = Index::default();
        for offset in 0..10 {
            index.push(location(offset));
        }
        index.truncate(7);
        index.purge(3);
        assert_eq!((index.first(), index.next()), (3, 7));
        let found: Vec<u64> = index.from(0).map(|(i, _)| i).collect();
        assert_eq!(found, [3, 4, 5, 6]);
        assert_eq!(index.from(5).next(), Some((5, &location(5))));
        assert!(index.from(7).next().is_none());
        index.purge(20);
        assert_eq!((index.first(), index.next()), (20, 20));
        index.truncate(5);
        assert_eq!(index.next(), 20, "what is purged cannot be cut off");
    }

    #[test]
    fn records_in_segments_that_are_gone_must_be_purged_or_cut_off() {
        let mut index = Index::at_base(5, 9);
        index.push(location(9));
        assert_eq!(index.unknown(), 5..9);
        index.purge(7);
        assert_eq!(index.unknown(), 7..9);
        index.purge(9);
        assert!(index.unknown().is_empty());
        let mut index = Index::at_base(5, 9);
        index.truncate(6);
        assert_eq!((index.unknown(), index.next()), (5..6, 6));
    }
}
