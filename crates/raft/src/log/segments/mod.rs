//! The log in plain segment files: one write and one sync for all that waits.
//!
//! Everything that happens to the log is an item in the order in which it happened: entries, truncations,
//! purges, small values. What one sync makes durable is one [`frame`], which counts whole or not at all. So
//! after a crash the log is what it was after one of its syncs, and there is no second structure on disk
//! that could disagree: where each record is (the [`index`]) is found again by reading the segments once.
//!
//! A new segment begins with all small values and the bounds of the log, so that the oldest one can go as
//! soon as its entries are purged. It is not removed but written over later, under a new name and a new
//! salt: the file system then has nothing to allocate ([`current`]).
//!
//! What is damaged is refused with file and offset ([`recover`]). The watermark (see [`super::mark`]) also
//! holds the number of the last frame that was synced, so that nothing of the end can be missing unnoticed,
//! be it an entry, a vote or a value.

mod current;
mod files;
mod frame;
pub(super) mod fuzzing;
mod index;
mod recover;
#[cfg(test)]
mod tests;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tracing::warn;

use self::current::{Current, Segment};
use self::files::{Folder, failed};
use self::frame::Header;
use self::index::{Index, Location};
use super::mark::Mark;
use super::{Engine, LogError, Promise, Visit};
use crate::folder::DataFolder;

/// Name of the folder in the data folder.
pub(super) const FOLDER: &str = "log-segments";

/// Bytes that a reading of many records takes at a time.
const READ_BYTES: u64 = 256 * 1024;
/// Spare files kept. After a purge more segments than that may be free at once; they are removed.
const SPARES: usize = 2;

/// Sizes that tests make small.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    /// A segment that has so many bytes is followed by the next one.
    segment: u64,
    /// Zeros written ahead of the end when the file must grow.
    ahead: u64,
}

const GEOMETRY: Geometry = Geometry {
    segment: 32 * 1024 * 1024,
    ahead: 1024 * 1024,
};

/// The engine.
pub(crate) struct SegmentsEngine {
    folder: Folder,
    geometry: Geometry,
    writer: Mutex<Writer>,
    // Taken after `writer` by who needs both.
    view: Mutex<View>,
    mark: Mark<Noted>,
    promised: Option<Promise>,
    // Last: the folder is free for others once all else is closed.
    _lock: DataFolder,
}

/// What only writes need. Only one thread writes.
struct Writer {
    current: Current,
    /// Values that the current frame must hold in the end.
    changed: BTreeSet<String>,
    /// Files to be written over.
    spares: Vec<u32>,
    /// After the first error nothing is written and nothing synced.
    failed: bool,
}

/// What reads need; it shows what is written and what waits to be.
struct View {
    index: Index,
    values: BTreeMap<String, Vec<u8>>,
    /// All segments in order; the last one is written to.
    segments: VecDeque<Arc<Segment>>,
    /// What lies behind this offset of the last segment is not in the file yet.
    written: u64,
}

/// What the watermark holds: the promise, and the last frame that was synced.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Noted {
    promise: Promise,
    frame: u64,
}

impl SegmentsEngine {
    /// Locks the data folder and opens or creates the segments and the watermark in it. The lock is held
    /// until this is dropped.
    pub(crate) fn open(data: &Path) -> Result<Self, LogError> {
        Self::open_with(data, GEOMETRY)
    }

    fn open_with(data: &Path, geometry: Geometry) -> Result<Self, LogError> {
        let lock = DataFolder::open(data)?;
        let (mark, noted) = Mark::<Noted>::open(&data.join("log.mark"))?;
        // This makes the names in the data folder durable, that of the watermark too.
        let folder = Folder::open(data.join(FOLDER))?;
        let listing = folder.list()?;
        let (view, current) = if listing.segments.is_empty() {
            begin(&folder, geometry, noted.as_ref())?
        } else {
            recover::recover(&folder, &listing.segments, noted.map(|noted| noted.frame))?
        };
        let (kept, superfluous) = listing.spares.split_at(listing.spares.len().min(SPARES));
        for spare in superfluous {
            folder.remove_spare(*spare)?;
        }
        let writer = Writer {
            current,
            changed: BTreeSet::new(),
            spares: kept.to_vec(),
            failed: false,
        };
        Ok(Self {
            folder,
            geometry,
            writer: Mutex::new(writer),
            view: Mutex::new(view),
            mark,
            promised: noted.map(|noted| noted.promise),
            _lock: lock,
        })
    }

    fn view(&self) -> MutexGuard<'_, View> {
        // Nothing under the lock can stop half-way.
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The writer, unless it has failed.
    fn writer(&self) -> Result<MutexGuard<'_, Writer>, LogError> {
        let refused = || LogError::Poisoned("a write or sync of a segment failed".to_owned());
        // A panic in the middle of a write is a failed write.
        let writer = self.writer.lock().map_err(|_| refused())?;
        if writer.failed {
            return Err(refused());
        }
        Ok(writer)
    }

    /// The writer, in a segment that has room. Every write begins here.
    fn room(&self) -> Result<MutexGuard<'_, Writer>, LogError> {
        let mut writer = self.writer()?;
        if writer.current.position() >= self.geometry.segment {
            // So all of the full segment is durable, and the new one makes nothing durable on its own.
            assert!(
                !writer.current.waits() && writer.changed.is_empty(),
                "the first write after a sync finds a full segment"
            );
            writer.failed = true;
            self.next_segment(&mut writer)?;
            writer.failed = false;
        }
        Ok(writer)
    }

    fn next_segment(&self, writer: &mut Writer) -> Result<(), LogError> {
        let before = writer.current.segment();
        let sequence = before
            .sequence
            .checked_add(1)
            .expect("four thousand million segments are more than a disk can take");
        let header = Header {
            sequence,
            salt: rand::random(),
            before: before.salt,
            first_frame: writer.current.number(),
        };
        let mut base = Vec::new();
        {
            let view = self.view();
            frame::push_base(&mut base, view.index.first(), view.index.next());
            for (name, value) in &view.values {
                frame::push_put(&mut base, name, value);
            }
        }
        let spare = writer.spares.pop();
        writer.current = Current::create(&self.folder, spare, header, self.geometry, &base)?;
        let mut view = self.view();
        view.segments.push_back(Arc::clone(writer.current.segment()));
        view.written = writer.current.position();
        Ok(())
    }

    /// Writes and syncs what waits, nothing when nothing does.
    fn commit(&self) -> Result<MutexGuard<'_, Writer>, LogError> {
        let mut writer = self.writer()?;
        if !writer.changed.is_empty() {
            let view = self.view();
            for name in std::mem::take(&mut writer.changed) {
                writer.current.push_put(&name, &view.values[&name]);
            }
        }
        writer.failed = true;
        writer.current.commit(self.geometry)?;
        writer.failed = false;
        self.view().written = writer.current.position();
        Ok(writer)
    }

    /// Lets the oldest segment go when none of its entries is needed. Only after a sync: the purge that
    /// frees it must be durable before it is gone. One at a time keeps each sync short.
    fn retire(&self, writer: &mut Writer) -> Result<(), LogError> {
        let mut view = self.view();
        let needed = view
            .index
            .front()
            .map_or(writer.current.segment().sequence, |location| location.segment);
        let Some(oldest) = view.segments.pop_front_if(|oldest| oldest.sequence < needed) else {
            return Ok(());
        };
        drop(view);
        // A reader that took hold of it must not find other bytes in it.
        let unread = Arc::strong_count(&oldest) == 1;
        if unread && writer.spares.len() < SPARES {
            self.folder.spare(oldest.sequence)?;
            writer.spares.push(oldest.sequence);
            Ok(())
        } else {
            self.folder.remove(oldest.sequence)
        }
    }

    /// Reads one piece of a scan into `bytes`.
    fn read(&self, piece: &Piece, bytes: &mut Vec<u8>) -> Result<(), LogError> {
        let part = piece.part.clone();
        if !piece.written {
            let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
            if Arc::ptr_eq(writer.current.segment(), &piece.segment)
                && let Some(buffered) = writer.current.buffered(part.clone())
            {
                bytes.clear();
                bytes.extend_from_slice(buffered);
                return Ok(());
            }
            // Written since.
        }
        let Segment { path, file, .. } = &*piece.segment;
        bytes.resize(
            usize::try_from(part.end - part.start).expect("a piece is small"),
            0,
        );
        file.read_exact_at(bytes, part.start)
            .map_err(|source| match source.kind() {
                ErrorKind::UnexpectedEof => LogError::Damaged {
                    place: path.display().to_string(),
                    what: format!("it ends before offset {}", part.end),
                },
                _ => failed(path, "cannot read the raft log")(source),
            })
    }
}

/// Makes the first segment.
fn begin(folder: &Folder, geometry: Geometry, noted: Option<&Noted>) -> Result<(View, Current), LogError> {
    if let Some(noted) = noted {
        return Err(LogError::Damaged {
            place: folder.path().display().to_string(),
            what: format!("no segment is there, but frame {} was synced", noted.frame),
        });
    }
    let header = Header {
        sequence: 1,
        salt: rand::random(),
        before: 0,
        first_frame: 1,
    };
    let mut base = Vec::new();
    frame::push_base(&mut base, 0, 0);
    let current = Current::create(folder, None, header, geometry, &base)?;
    let view = View {
        index: Index::default(),
        values: BTreeMap::new(),
        segments: VecDeque::from([Arc::clone(current.segment())]),
        written: current.position(),
    };
    Ok((view, current))
}

/// Consecutive records that are read by one call.
struct Piece {
    segment: Arc<Segment>,
    part: Range<u64>,
    records: Vec<(u64, Location)>,
    /// Whether it is in the file.
    written: bool,
}

impl View {
    /// The first records of `range`, as many as one read should take; nothing when there are none.
    fn piece(&self, range: &Range<u64>) -> Option<Piece> {
        let mut locations = self.index.from(range.start).take_while(|(i, _)| *i < range.end);
        let (index, first) = locations.next()?;
        let (oldest, newest) = (self.segments.front()?.sequence, self.segments.back()?.sequence);
        let segment = &self.segments[(first.segment - oldest) as usize];
        let begin = u64::from(first.offset);
        let written = |location: &Location| location.segment < newest || location.end() <= self.written;
        let mut piece = Piece {
            segment: Arc::clone(segment),
            part: begin..first.end(),
            records: vec![(index, *first)],
            written: written(first),
        };
        for (index, location) in locations {
            if location.segment != first.segment
                || location.end() - begin > READ_BYTES
                || written(location) != piece.written
            {
                break;
            }
            piece.part.end = location.end();
            piece.records.push((index, *location));
        }
        Some(piece)
    }
}

impl Engine for SegmentsEngine {
    fn append(&self, first: u64, records: &[Vec<u8>]) -> Result<(), LogError> {
        let mut writer = self.room()?;
        let mut view = self.view();
        if first > view.index.next() {
            // What lies before a gap was purged; the snapshot that came instead ends at the gap.
            writer.current.push_purge(first);
            view.index.purge(first);
        }
        assert_eq!(first, view.index.next(), "a record is never overwritten");
        let segment = writer.current.segment().sequence;
        for (index, record) in (first..).zip(records) {
            let offset = writer.current.push_entry(index, record);
            view.index.push(Location {
                segment,
                offset: u32::try_from(offset).expect("a segment and one queue's worth are below 4 GiB"),
                len: u32::try_from(record.len()).expect("an operation is bounded far below"),
            });
        }
        Ok(())
    }

    fn remove(&self, index: u64) -> Result<(), LogError> {
        let mut writer = self.room()?;
        let mut view = self.view();
        if !(view.index.first()..view.index.next()).contains(&index) {
            return Ok(());
        }
        assert_eq!(index + 1, view.index.next(), "records are removed from the end");
        writer.current.push_truncate(index);
        view.index.truncate(index);
        Ok(())
    }

    fn purge(&self, below: u64, _at_most: usize) -> Result<bool, LogError> {
        let mut writer = self.room()?;
        let mut view = self.view();
        if below > view.index.first() {
            writer.current.push_purge(below);
            view.index.purge(below);
        }
        Ok(false)
    }

    fn scan(&self, range: Range<u64>, visit: &mut Visit<'_>) -> Result<(), LogError> {
        let mut rest = range;
        let mut bytes = Vec::new();
        while !rest.is_empty() {
            let Some(piece) = self.view().piece(&rest) else {
                break;
            };
            self.read(&piece, &mut bytes)?;
            for (index, location) in &piece.records {
                let at =
                    usize::try_from(u64::from(location.offset) - piece.part.start).expect("a piece is small");
                if !visit(*index, &bytes[at..at + location.len as usize])? {
                    return Ok(());
                }
                rest.start = index + 1;
            }
        }
        Ok(())
    }

    fn put(&self, name: &str, value: &[u8]) -> Result<(), LogError> {
        let mut writer = self.room()?;
        // Of a value that changes again before the next sync only the last is written.
        self.view().values.insert(name.to_owned(), value.to_vec());
        if !writer.changed.contains(name) {
            writer.changed.insert(name.to_owned());
        }
        Ok(())
    }

    fn get(&self, name: &str) -> Result<Option<Vec<u8>>, LogError> {
        Ok(self.view().values.get(name).cloned())
    }

    fn sync(&self, promise: &Promise) -> Result<(), LogError> {
        let mut writer = self.commit()?;
        writer.failed = true;
        self.mark.write(&Noted {
            promise: *promise,
            frame: writer.current.number() - 1,
        })?;
        self.retire(&mut writer)?;
        writer.failed = false;
        Ok(())
    }

    fn lower(&self, promise: &Promise) -> Result<(), LogError> {
        let mut writer = self.writer()?;
        writer.failed = true;
        self.mark.write_durably(&Noted {
            promise: *promise,
            frame: writer.current.number() - 1,
        })?;
        writer.failed = false;
        Ok(())
    }

    fn promised(&self) -> Result<Option<Promise>, LogError> {
        Ok(self.promised)
    }

    fn place(&self) -> String {
        self.folder.path().display().to_string()
    }
}

impl Drop for SegmentsEngine {
    /// Writes what nobody waited for, so that an orderly end forgets nothing.
    fn drop(&mut self) {
        match self.commit() {
            Ok(_) | Err(LogError::Poisoned(_)) => {}
            Err(error) => warn!(%error, "the end of the raft log was not written"),
        }
    }
}
