//! Crashes and damage: the folder as it was at every sync, and every way to spoil it.
//!
//! The rule for all of them: what is opened holds exactly what it held after one of its syncs, and not an
//! older one than the watermark knows; or it is refused with the damaged file named.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tempfile::TempDir;

use super::*;
use crate::config::{LeaderId, LogId, Vote};

/// Small, so that a short workload goes through many segments.
const SMALL: Geometry = Geometry {
    segment: 16 * 1024,
    ahead: 8 * 1024,
};
/// What a disk writes whole or not at all.
const SECTOR: usize = 512;

/// What the log should hold.
#[derive(Clone, Default, PartialEq, Eq)]
struct Content {
    first: u64,
    records: BTreeMap<u64, Vec<u8>>,
    values: BTreeMap<String, Vec<u8>>,
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sums: Vec<u32> = self.records.values().map(|r| crc32fast::hash(r)).collect();
        write!(f, "from {}: {sums:x?}, {:?}", self.first, self.values)
    }
}

impl Content {
    fn next(&self) -> u64 {
        self.records
            .last_key_value()
            .map_or(self.first, |(index, _)| index + 1)
    }

    fn of(engine: &SegmentsEngine) -> Self {
        let mut records = BTreeMap::new();
        engine
            .scan(0..u64::MAX, &mut |index, record| {
                assert!(records.insert(index, record.to_vec()).is_none());
                Ok(true)
            })
            .unwrap();
        let view = engine.view();
        Self {
            first: view.index.first(),
            records,
            values: view.values.clone(),
        }
    }
}

fn promise(next: u64, vote: u64) -> Promise {
    Promise {
        last: next.checked_sub(1).map(|index| LogId {
            leader_id: LeaderId { term: 1, node_id: 1 },
            index,
        }),
        vote: Some(Vote::new(vote, 1)),
    }
}

fn open(data: &Path) -> Result<SegmentsEngine, LogError> {
    SegmentsEngine::open_with(data, SMALL)
}

/// In memory where that is possible: what a disk does is simulated, and thousands of syncs take their time.
fn folder() -> TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

/// A log that random work is done to.
struct Work {
    data: TempDir,
    engine: Option<SegmentsEngine>,
    random: StdRng,
    content: Content,
    vote: u64,
}

impl Work {
    fn new(seed: u64) -> Self {
        let data = folder();
        Self {
            engine: Some(open(data.path()).unwrap()),
            data,
            random: StdRng::seed_from_u64(seed),
            content: Content::default(),
            vote: 0,
        }
    }

    fn engine(&self) -> &SegmentsEngine {
        self.engine.as_ref().unwrap()
    }

    /// Does what may come between two syncs.
    fn batch(&mut self) {
        for _ in 0..self.random.random_range(1..4) {
            self.step();
        }
    }

    fn step(&mut self) {
        let engine = self.engine.as_ref().unwrap();
        let random = &mut self.random;
        let next = self.content.next();
        match random.random_range(0..20) {
            0..11 => {
                let records: Vec<Vec<u8>> = (0..random.random_range(1..8))
                    .map(|_| {
                        let len = match random.random_range(0..16) {
                            0 => random.random_range(0..6_000),
                            _ => random.random_range(0..400),
                        };
                        (0..len).map(|_| random.random()).collect()
                    })
                    .collect();
                engine.append(next, &records).unwrap();
                self.content.records.extend((next..).zip(records));
            }
            11..13 => {
                let from = random
                    .random_range(self.content.first..=next)
                    .max(next.saturating_sub(6));
                engine.lower(&promise(from, self.vote)).unwrap();
                for index in (from..next).rev() {
                    engine.remove(index).unwrap();
                    self.content.records.remove(&index);
                }
            }
            13..15 => {
                let below = match random.random_range(0..8) {
                    // A snapshot that came from another node.
                    0 => next + random.random_range(0..5),
                    _ => next
                        .saturating_sub(random.random_range(0..60))
                        .max(self.content.first),
                };
                engine.purge(below, 1).unwrap();
                self.content.first = below;
                self.content.records = self.content.records.split_off(&below);
            }
            15 => {
                self.vote += 1;
                self.put("vote", &self.vote.to_le_bytes());
            }
            16 => self.put("meta/x", &next.to_le_bytes()),
            _ => self.put("committed", &next.to_le_bytes()),
        }
    }

    fn put(&mut self, name: &str, value: &[u8]) {
        self.engine().put(name, value).unwrap();
        self.content.values.insert(name.to_owned(), value.to_vec());
    }

    fn sync(&mut self) {
        let promise = promise(self.content.next(), self.vote);
        self.engine().sync(&promise).unwrap();
    }

    /// What is on the disk now.
    fn copy(&self) -> Disk {
        Disk::read(self.data.path())
    }
}

/// The files of a data folder.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Disk {
    files: BTreeMap<PathBuf, Vec<u8>>,
}

impl Disk {
    fn read(data: &Path) -> Self {
        let mut files = BTreeMap::new();
        let segments = fs::read_dir(data.join(FOLDER)).unwrap().map(|item| {
            let name = item.unwrap().file_name();
            Path::new(FOLDER).join(name)
        });
        for name in segments.chain([PathBuf::from("log.mark")]) {
            let bytes = fs::read(data.join(&name)).unwrap();
            files.insert(name, bytes);
        }
        Self { files }
    }

    fn write(&self, data: &Path) {
        let _ = fs::remove_dir_all(data.join(FOLDER));
        fs::create_dir(data.join(FOLDER)).unwrap();
        for (name, bytes) in &self.files {
            fs::write(data.join(name), bytes).unwrap();
        }
    }

    fn segments(&self) -> Vec<PathBuf> {
        let names = self.files.keys().filter(|name| is_segment(name));
        names.cloned().collect()
    }

    /// Opens it and gives what it holds.
    fn content(&self, data: &Path) -> Result<Content, LogError> {
        self.write(data);
        Ok(Content::of(&open(data)?))
    }
}

fn is_segment(name: &Path) -> bool {
    name.extension().is_some_and(|extension| extension == "seg")
}

#[track_caller]
fn assert_names(error: &LogError, name: &Path, context: &str) {
    let LogError::Damaged { place, what } = error else {
        panic!("{context}: refused with {error}");
    };
    assert!(
        place.ends_with(name.to_str().unwrap()),
        "{context}: {place}: {what}"
    );
}

/// Reopened at every sync, the log holds what it held, over many segments that were written over; so does
/// the log that goes on from there.
#[test]
fn it_holds_at_every_sync_what_it_held() {
    let copy = folder();
    for seed in 0..6 {
        let mut work = Work::new(seed);
        let mut reused = 0;
        let mut before = work.copy();
        for step in 0..100_u8 {
            let spares = work.engine().writer.lock().unwrap().spares.len();
            work.batch();
            reused += spares.saturating_sub(work.engine().writer.lock().unwrap().spares.len());
            assert_eq!(
                Content::of(work.engine()),
                work.content,
                "seed {seed}, step {step}: unsynced"
            );
            work.sync();
            assert_eq!(
                Content::of(work.engine()),
                work.content,
                "seed {seed}, step {step}"
            );
            let mut disk = work.copy();
            // A loss of power may undo the last change of a name, and leaves what nobody finished.
            let gone = before.files.iter().filter(|(name, _)| is_segment(name));
            disk.files.extend(
                gone.filter(|_| step % 2 == 0)
                    .map(|(n, b)| (n.clone(), b.clone())),
            );
            disk.files.extend(work.copy().files);
            disk.files
                .insert(Path::new(FOLDER).join("new"), vec![1; usize::from(step)]);
            let found = disk.content(copy.path()).unwrap();
            assert_eq!(found, work.content, "seed {seed}, step {step}: reopened");
            before = work.copy();
            if work.random.random_ratio(1, 10) {
                drop(work.engine.take());
                work.engine = Some(open(work.data.path()).unwrap());
            }
        }
        assert!(reused > 2, "only {reused} segments were written over");
        let disk = work.copy();
        assert!(
            disk.files.len() < 20,
            "what is purged goes: {:?}",
            disk.files.keys()
        );
    }
}

/// The power fails during a sync: any of the sectors that it writes may be on the disk, in any combination.
/// The log is then what it was before, or after.
#[test]
fn a_sync_that_a_loss_of_power_cut_short_happened_or_did_not() {
    let copy = folder();
    let (mut before_it, mut after_it) = (0, 0);
    for seed in 10..14 {
        let mut work = Work::new(seed);
        let mut content = work.content.clone();
        for step in 0..60 {
            work.batch();
            let before = work.copy();
            work.sync();
            let after = work.copy();
            let changed: Vec<&PathBuf> = after
                .files
                .keys()
                .filter(|name| is_segment(name) && before.files.get(*name) != Some(&after.files[*name]))
                .collect();
            if let [name] = changed[..]
                && before.files.contains_key(name)
            {
                for _ in 0..8 {
                    let disk = partly(&before, &after, name, &mut work.random);
                    let context = format!("seed {seed}, step {step}");
                    let found = disk
                        .content(copy.path())
                        .unwrap_or_else(|error| panic!("{context}: {error}"));
                    if found == content {
                        before_it += 1;
                    } else {
                        assert_eq!(found, work.content, "{context}");
                        after_it += 1;
                    }
                    // It goes on, whatever remains of the write behind the end.
                    let again = open(copy.path()).unwrap();
                    let record = vec![7; work.random.random_range(0..700)];
                    again.append(found.next(), std::slice::from_ref(&record)).unwrap();
                    again.sync(&promise(found.next() + 1, work.vote)).unwrap();
                    drop(again);
                    let mut expected = found;
                    expected.records.insert(expected.next(), record);
                    assert_eq!(Content::of(&open(copy.path()).unwrap()), expected, "{context}");
                }
            }
            content = work.content.clone();
        }
    }
    assert!(
        before_it > 100 && after_it > 100,
        "{before_it} before, {after_it} after"
    );
}

/// The disk with some of the sectors of `name` as they are after the sync.
fn partly(before: &Disk, after: &Disk, name: &Path, random: &mut StdRng) -> Disk {
    let mut disk = before.clone();
    let new = &after.files[name];
    let file = disk.files.get_mut(name).unwrap();
    // The length of the file is written on its own.
    if random.random() {
        file.resize(new.len(), 0);
    }
    let all = random.random_ratio(1, 3);
    for (sector, new) in file.chunks_mut(SECTOR).zip(new.chunks(SECTOR)) {
        if all || random.random() {
            let len = sector.len();
            sector.copy_from_slice(&new[..len]);
        }
    }
    disk
}

/// The file is cut, or one bit of it is flipped: it is refused with the file named, or nothing is missing.
#[test]
fn nothing_that_was_synced_is_missing_unnoticed() {
    let copy = folder();
    let (mut refused, mut whole) = (0, 0);
    for seed in 20..26 {
        let mut work = Work::new(seed);
        for step in 0..60 {
            work.batch();
            work.sync();
            if step % 3 != 0 {
                continue;
            }
            let disk = work.copy();
            let segments = disk.segments();
            let mut check = |spoilt: &Disk, name: &Path, context: &str| {
                let context = format!("seed {seed}, step {step}: {} {context}", name.display());
                match spoilt.content(copy.path()) {
                    Ok(found) => {
                        assert_eq!(found, work.content, "{context}");
                        whole += 1;
                    }
                    Err(error) => {
                        assert_names(&error, name, &context);
                        refused += 1;
                    }
                }
            };
            for _ in 0..12 {
                let name = &segments[work.random.random_range(0..segments.len())];
                let used = used(&disk.files[name]);
                let mut spoilt = disk.clone();
                let at = work.random.random_range(0..used + 64);
                if let Some(byte) = spoilt.files.get_mut(name).unwrap().get_mut(at) {
                    *byte ^= 1 << work.random.random_range(0..8);
                }
                check(&spoilt, name, &format!("flipped at {at}"));
            }
            let last = segments.last().unwrap();
            let used = used(&disk.files[last]);
            for _ in 0..8 {
                let mut spoilt = disk.clone();
                let len = work.random.random_range(0..used + 64);
                spoilt.files.get_mut(last).unwrap().truncate(len);
                check(&spoilt, last, &format!("cut to {len}"));
            }
        }
    }
    assert!(refused > 1_000 && whole > 10, "{refused} refused, {whole} whole");
}

/// Bytes up to the end of the content.
fn used(file: &[u8]) -> usize {
    file.iter().rposition(|byte| *byte != 0).map_or(0, |at| at + 1)
}

/// Every single bit and every length of a small log, and what it says.
#[test]
fn every_bit_and_every_cut_of_a_small_log() {
    let data = folder();
    let engine = open(data.path()).unwrap();
    for index in 0..3 {
        engine.append(index, &[vec![b'a'; 9]]).unwrap();
        engine.put("meta/x", &[1]).unwrap();
        engine.sync(&promise(index + 1, 0)).unwrap();
    }
    let content = Content::of(&engine);
    let end = usize::try_from(engine.writer().unwrap().current.position()).unwrap();
    drop(engine);
    let path = data.path().join(FOLDER).join("0000000001.seg");
    let bytes = fs::read(&path).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let refused = |what: &str, at: usize| match open(data.path()) {
        Ok(engine) => {
            assert_eq!(Content::of(&engine), content, "{what} at {at}");
            false
        }
        Err(error) => {
            assert_names(&error, Path::new("0000000001.seg"), &format!("{what} at {at}"));
            true
        }
    };
    let mut unnoticed = 0;
    for at in (0..end).filter(|at| *at < 44 || *at >= frame::PAGE) {
        let bit = at % 8;
        file.write_all_at(&[bytes[at] ^ 1 << bit], at as u64).unwrap();
        unnoticed += u32::from(!refused("flipped", at));
        file.write_all_at(&bytes[at..=at], at as u64).unwrap();
    }
    // Padding between frames means nothing, nor do four bytes of a frame's header.
    assert!(unnoticed <= 4 * (4 + 7), "{unnoticed} flips were not noticed");
    for len in (0..end).filter(|len| *len < 100 || *len >= frame::PAGE - 2) {
        file.set_len(len as u64).unwrap();
        let last_byte = end - 8;
        assert!(refused("cut", len) || len > last_byte, "cut to {len} of {end}");
        file.write_all_at(&bytes, 0).unwrap();
    }
    assert!(!refused("whole", 0));
}

/// The last frame is bad and the watermark does not know of it, as after a loss of power: the frame was
/// never synced and is left out. With a later frame behind it, it was synced, and that is damage.
#[test]
fn a_bad_frame_with_a_good_one_behind_it_is_no_torn_end() {
    let mut work = Work::new(30);
    let mut old = None;
    let mut places = Vec::new();
    for index in 0..4 {
        if index == 2 {
            old = Some((
                work.copy().files[Path::new("log.mark")].clone(),
                work.content.clone(),
            ));
        }
        places.push(usize::try_from(work.engine().writer().unwrap().current.position()).unwrap());
        work.engine().append(index, &[vec![3; 100]]).unwrap();
        work.content.records.insert(index, vec![3; 100]);
        work.sync();
    }
    let (mark, content) = old.unwrap();
    let mut disk = work.copy();
    disk.files.insert("log.mark".into(), mark);
    let name = disk.segments()[0].clone();
    let copy = folder();
    assert_eq!(disk.content(copy.path()).unwrap(), work.content);

    let mut torn = disk.clone();
    torn.files.get_mut(&name).unwrap()[places[3] + 60] ^= 1;
    let mut without = work.content.clone();
    without.records.pop_last();
    assert_eq!(torn.content(copy.path()).unwrap(), without);

    let mut damaged = disk.clone();
    damaged.files.get_mut(&name).unwrap()[places[2] + 60] ^= 1;
    let error = damaged.content(copy.path()).unwrap_err();
    assert_names(&error, &name, "a later frame is whole");
    let text = error.to_string();
    assert!(text.contains(&format!("offset {}", places[2])), "{text}");

    // Both are gone: that may be a torn end as far as this watermark knows, but not more.
    damaged.files.get_mut(&name).unwrap()[places[3] + 60] ^= 1;
    assert_eq!(damaged.content(copy.path()).unwrap(), content);
    damaged.files.get_mut(&name).unwrap()[places[1] + 60] ^= 1;
    let error = damaged.content(copy.path()).unwrap_err();
    assert!(error.to_string().contains("was synced"), "{error}");
}

/// A frame that holds no entry and no vote counts as well.
#[test]
fn a_value_that_was_synced_is_not_lost_unnoticed() {
    let mut work = Work::new(31);
    work.engine().append(0, &[vec![3; 100]]).unwrap();
    work.sync();
    let place = usize::try_from(work.engine().writer().unwrap().current.position()).unwrap();
    work.put("meta/identity", b"settled");
    work.sync();
    let mut disk = work.copy();
    let name = disk.segments()[0].clone();
    disk.files.get_mut(&name).unwrap()[place + 30] ^= 1;
    let copy = folder();
    let error = disk.content(copy.path()).unwrap_err();
    assert_names(&error, &name, "the value's frame");
}

#[test]
fn a_missing_or_foreign_segment_is_refused() {
    let copy = folder();
    let (mut work, mut other) = (Work::new(40), Work::new(41));
    for work in [&mut work, &mut other] {
        for index in 0..60 {
            work.engine().append(index, &[vec![1; 1_500]]).unwrap();
            work.content.records.insert(index, vec![1; 1_500]);
            work.sync();
        }
    }
    let (disk, other) = (work.copy(), other.copy());
    let segments = disk.segments();
    assert!(segments.len() > 4);
    assert_eq!(disk.content(copy.path()).unwrap(), work.content);
    for name in &segments {
        let mut spoilt = disk.clone();
        spoilt.files.remove(name);
        let error = spoilt.content(copy.path()).unwrap_err();
        assert!(
            matches!(error, LogError::Damaged { .. }),
            "{}: {error}",
            name.display()
        );
        let mut spoilt = disk.clone();
        spoilt.files.insert(name.clone(), other.files[name].clone());
        let error = spoilt.content(copy.path()).unwrap_err();
        assert!(
            matches!(error, LogError::Damaged { .. }),
            "{}: {error}",
            name.display()
        );
    }
    let mut spoilt = disk.clone();
    spoilt.files.retain(|name, _| !is_segment(name));
    let error = spoilt.content(copy.path()).unwrap_err();
    assert!(error.to_string().contains("no segment is there"), "{error}");
    // Nothing was repaired or begun anew by any of that.
    assert_eq!(disk.content(copy.path()).unwrap(), work.content);
}

/// The first frame of a segment is durable before the segment has its name, so it is never a torn end.
#[test]
fn a_segment_without_its_first_frame_is_refused() {
    let mut work = Work::new(43);
    while work.copy().segments().len() < 3 {
        work.sync();
        let next = work.content.next();
        work.engine().append(next, &[vec![1; 1_500]]).unwrap();
        work.content.records.insert(next, vec![1; 1_500]);
    }
    work.content.records.pop_last();
    let copy = folder();
    let mut disk = work.copy();
    assert_eq!(disk.content(copy.path()).unwrap(), work.content);
    let last = disk.segments().pop().unwrap();
    disk.files.get_mut(&last).unwrap()[frame::PAGE + 30] ^= 1;
    let error = disk.content(copy.path()).unwrap_err();
    assert_names(&error, &last, "its first frame");
}

/// A newer build may write what this one does not know; that is no reason to cut it off.
#[test]
fn a_newer_format_is_refused_by_its_version() {
    let mut work = Work::new(42);
    work.sync();
    let mut disk = work.copy();
    let name = disk.segments()[0].clone();
    disk.files.get_mut(&name).unwrap()[8] = 2;
    let copy = folder();
    let error = disk.content(copy.path()).unwrap_err();
    assert!(error.to_string().contains("format version 2"), "{error}");
}

/// Nobody knows what the disk holds after an error, so nothing is tried again, not even at the end.
#[test]
fn after_an_error_nothing_is_written() {
    let mut work = Work::new(50);
    work.batch();
    work.sync();
    let before = work.copy();
    work.engine().append(work.content.next(), &[vec![1; 10]]).unwrap();
    work.engine().writer().unwrap().current.break_file();
    let error = work.engine().sync(&Promise::default()).unwrap_err();
    let LogError::File { path, .. } = &error else {
        panic!("{error}");
    };
    assert!(path.starts_with(work.data.path().join(FOLDER)), "{error}");
    let engine = work.engine();
    for refused in [
        engine.append(work.content.next() + 1, &[vec![1]]),
        engine.remove(0),
        engine.purge(1, 1).map(drop),
        engine.put("vote", b"x"),
        engine.sync(&Promise::default()),
        engine.lower(&Promise::default()),
    ] {
        assert!(matches!(refused, Err(LogError::Poisoned(_))), "{refused:?}");
    }
    drop(work.engine.take());
    assert_eq!(work.copy(), before);
}

/// Until a sync is through, what was synced before is there: no file that it needs is gone, or written over.
#[test]
fn a_sync_that_failed_at_once_changed_nothing() {
    for seed in 52..56 {
        let mut work = Work::new(seed);
        let mut content = work.content.clone();
        for step in 0..120 {
            work.batch();
            if step % 6 == 5 {
                work.engine().writer().unwrap().current.break_file();
                let waits = work.engine().sync(&promise(work.content.next(), work.vote));
                drop(work.engine.take());
                let engine = open(work.data.path()).unwrap();
                if waits.is_err() {
                    assert_eq!(Content::of(&engine), content, "seed {seed}, step {step}");
                }
                work.content = Content::of(&engine);
                work.engine = Some(engine);
            } else {
                work.sync();
            }
            content = work.content.clone();
        }
    }
}

/// After a snapshot from another node the log goes on behind a gap, before the purge is done step by step.
#[test]
fn what_lies_before_a_gap_is_purged() {
    let mut work = Work::new(44);
    work.engine().append(0, &[vec![1; 10], vec![2; 10]]).unwrap();
    work.sync();
    work.engine().append(100, &[vec![3; 10]]).unwrap();
    work.content.first = 100;
    work.content.records.insert(100, vec![3; 10]);
    assert_eq!(Content::of(work.engine()), work.content);
    work.sync();
    assert_eq!(work.copy().content(folder().path()).unwrap(), work.content);
}

/// Or a crash during the truncation that follows would leave less than was promised.
#[test]
fn a_lowered_promise_is_noted_at_once() {
    let work = Work::new(45);
    work.engine().append(0, &[vec![1; 10], vec![2; 10]]).unwrap();
    work.engine().sync(&promise(2, 1)).unwrap();
    work.engine().lower(&promise(1, 1)).unwrap();
    let copy = folder();
    work.copy().write(copy.path());
    let engine = open(copy.path()).unwrap();
    assert_eq!(engine.promised().unwrap(), Some(promise(1, 1)));
}

/// What nobody waited for is written when the node ends in order.
#[test]
fn an_orderly_end_forgets_nothing() {
    let mut work = Work::new(51);
    work.sync();
    work.put("committed", b"far");
    drop(work.engine.take());
    assert_eq!(Content::of(&open(work.data.path()).unwrap()), work.content);
}

/// A file is not written over while somebody reads from it.
#[test]
fn a_reader_keeps_what_it_reads_from() {
    let data = folder();
    let engine = open(data.path()).unwrap();
    let mut index = 0;
    let mut fill = |kib: u64| {
        for _ in 0..kib {
            engine.append(index, &[index.to_le_bytes().repeat(128)]).unwrap();
            index += 1;
            engine.sync(&promise(index, 0)).unwrap();
        }
        index
    };
    fill(40);
    let piece = engine.view().piece(&(3..9)).unwrap();
    engine.purge(40, usize::MAX).unwrap();
    let next = fill(80);
    engine.purge(next, usize::MAX).unwrap();
    fill(80);
    let mut bytes = Vec::new();
    engine.read(&piece, &mut bytes).unwrap();
    for (index, location) in &piece.records {
        let at = usize::try_from(u64::from(location.offset) - piece.part.start).unwrap();
        assert_eq!(bytes[at..at + 8], index.to_le_bytes());
    }
}

/// Reads from other threads see right records, or none, whatever the writer does.
#[test]
fn readers_are_never_shown_something_else() {
    /// Far more than the readers need to be scheduled once.
    const AT_MOST: usize = 200_000;
    let data = folder();
    let engine = open(data.path()).unwrap();
    let stop = AtomicBool::new(false);
    let seen = [AtomicUsize::new(0), AtomicUsize::new(0)];
    let record = |index: u64| {
        index
            .to_le_bytes()
            .repeat(1 + usize::try_from(index % 40).unwrap())
    };
    std::thread::scope(|scope| {
        for seen in &seen {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let scanned = engine.scan(0..u64::MAX, &mut |index, found| {
                        assert_eq!(found, record(index));
                        seen.fetch_add(1, Ordering::Relaxed);
                        Ok(true)
                    });
                    scanned.unwrap();
                }
            });
        }
        let mut random = StdRng::seed_from_u64(60);
        let mut next = 0;
        for round in 0..AT_MOST {
            let count = random.random_range(1..20);
            let records: Vec<Vec<u8>> = (next..next + count).map(record).collect();
            engine.append(next, &records).unwrap();
            next += count;
            if random.random_ratio(1, 4) {
                next -= 1;
                engine.remove(next).unwrap();
            }
            engine.purge(next.saturating_sub(200), 1).unwrap();
            engine.sync(&promise(next, 0)).unwrap();
            if round > 400 && seen.iter().all(|seen| seen.load(Ordering::Relaxed) > 5_000) {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(
        seen.iter().all(|seen| seen.load(Ordering::Relaxed) > 0),
        "{seen:?}"
    );
}
