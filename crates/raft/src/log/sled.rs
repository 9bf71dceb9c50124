//! The log in sled 0.34.7, within the limits that this version sets.
//!
//! - `flush` is `pwrite` plus `sync_file_range`: it makes nothing durable. After it we sync a handle of our
//!   own to sled's file, and only then is a promise kept.
//! - A value over 131,052 bytes goes to a blob file that is never synced, and so does a consolidated leaf of
//!   that size, which holds up to 17 entries. So no value is larger than a part, which is small enough that a
//!   full leaf of them stays below: nothing is ever too large, and nothing leaves the synced file.
//! - An insert costs sled some microseconds and, when a leaf is rewritten, its bytes again. So records that
//!   are appended together are one value, as many as fit one part; a longer record is cut into parts.
//! - Plain inserts from one thread, in order. No batches, no transactions, no subscribers, no `flush_async`:
//!   the first use of those flips a process-wide lock or can deadlock.
//! - The flusher must run (`flush_every_ms`): segments are freed only there.
//!
//! One such database per process; two are unsupported by sled.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tracing::warn;

use super::mark::Mark;
use super::{Engine, LogError, Promise, Visit};
use crate::folder::DataFolder;

/// Bytes of one part. sled splits a leaf when it has more than 16 entries, so at most 17 are written
/// together: 17 x (7,168 + key and header) stays below 131,052.
const PART: usize = 7 * 1024;
/// Key: index and number of the part, big-endian, so that keys sort as the log does.
const KEY: usize = 10;
/// The number that says: a group of whole records, each after its length.
const GROUP: u16 = 0;
/// Set in the number of parts when a link follows it.
const LINKED: u16 = 1 << 15;
/// The length before each record of a group, little-endian.
const LENGTH: usize = 2;
/// sled's page cache. The default of 1 GiB is more than a control plane should take; the log's tail is in
/// our own memory, so sled reads only on start and for a follower that is far behind.
const CACHE_BYTES: u64 = 16 * 1024 * 1024;
/// What may be written between two syncs, in bytes, by the estimate of [`SledEngine::wrote`]. A segment of sled has
/// 512 KiB. It counts one as stable when it is written, synced or not: it then lets go of what the pages in it
/// replace, and after a crash it passes over what it cannot read in it. So between two syncs at most one segment
/// may be begun.
const UNSYNCED: usize = 192 * 1024;
/// What a write may cost beyond its own bytes: sled writes out a leaf, of up to 17 parts, after some ten changes.
const REWRITTEN: usize = 8 * 1024;
/// How often sled flushes by itself and frees segments, in milliseconds.
const FLUSH_EVERY_MS: u64 = 500;

/// How long sled's own lock may be held by a database that is being closed: a second, far more than it takes.
const LOCK_TRIES: usize = 100;
const LOCK_EVERY: Duration = Duration::from_millis(10);
/// Extension of a file that is being written; sled's own word.
const UNFINISHED: &str = "generating";
/// What sled 0.34 writes of the settings in [`SledEngine::open`], without the checksum behind it.
const SETTINGS: &[u8] = b"segment_size: 524288\nuse_compression: false\nversion: 0.34\n";

/// The sled engine.
pub(crate) struct SledEngine {
    folder: PathBuf,
    database: sled::Db,
    records: sled::Tree,
    values: sled::Tree,
    /// Our own handle to sled's file, for the sync that sled does not do.
    file: File,
    mark: Mark,
    promised: Option<Promise>,
    /// What [`UNSYNCED`] bounds. Only the writer thread writes.
    unsynced: AtomicUsize,
    /// The record that was appended last: the index that follows it, and its checksum.
    end: Mutex<Option<(u64, u32)>>,
    // Last: the folder is free for others once the database is closed.
    _lock: DataFolder,
}

impl SledEngine {
    /// Locks the data folder and opens or creates the database and the watermark in it. The lock is held
    /// until this is dropped.
    pub(crate) fn open(data: &Path) -> Result<Self, LogError> {
        let lock = DataFolder::open(data)?;
        let folder = data.join("log");
        let (mark, promised) = Mark::open(&data.join("log.mark"))?;
        remove_unfinished(&folder)?;
        begin(&folder)?;
        let config = sled::Config::new()
            .path(&folder)
            .mode(sled::Mode::HighThroughput)
            .cache_capacity(CACHE_BYTES)
            .flush_every_ms(Some(FLUSH_EVERY_MS))
            .use_compression(false);
        let database = guard(&folder, || open(&config))?;
        let records = guard(&folder, || database.open_tree("records"))?;
        let values = guard(&folder, || database.open_tree("values"))?;
        let path = folder.join("db");
        let file = File::open(&path).map_err(|source| LogError::File {
            path,
            what: "cannot open the database file for syncing",
            source,
        })?;
        // The names of a fresh database's files must survive a loss of power as well.
        for dir in [&folder, &data.to_owned()] {
            sync_folder(dir)?;
        }
        Ok(Self {
            folder,
            database,
            records,
            values,
            file,
            mark,
            promised,
            unsynced: AtomicUsize::new(0),
            end: Mutex::new(None),
            _lock: lock,
        })
    }

    /// Calls sled.
    fn sled<T>(&self, call: impl FnOnce() -> sled::Result<T>) -> Result<T, LogError> {
        guard(&self.folder, call)
    }

    fn damaged(&self, what: String) -> LogError {
        LogError::Damaged {
            place: self.place(),
            what,
        }
    }
}

/// What the value of a record's first part, or of a group, begins with: the number of parts, two bytes, and mostly
/// a link, four bytes, little-endian.
///
/// The link is the checksum of the record before. sled may lose something from the middle when its file is damaged,
/// and what was there earlier then comes up again: a record that was cut off and written anew is the old one, whole
/// and with the right index. The one behind it tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    parts: u16,
    link: Option<u32>,
}

impl Head {
    /// Most bytes.
    const LARGEST: usize = 6;

    fn push_to(self, value: &mut Vec<u8>) {
        let flag = if self.link.is_some() { LINKED } else { 0 };
        value.extend_from_slice(&(self.parts | flag).to_le_bytes());
        if let Some(link) = self.link {
            value.extend_from_slice(&link.to_le_bytes());
        }
    }

    /// Reads it, and gives what follows.
    fn parse(value: &[u8]) -> Option<(Self, &[u8])> {
        let (number, rest) = value.split_first_chunk()?;
        let number = u16::from_le_bytes(*number);
        let parts = number & !LINKED;
        if number & LINKED == 0 {
            return Some((Self { parts, link: None }, rest));
        }
        let (link, rest) = rest.split_first_chunk()?;
        let link = Some(u32::from_le_bytes(*link));
        Some((Self { parts, link }, rest))
    }
}

/// Records in a row that are stored as one value.
struct Group {
    first: u64,
    value: Vec<u8>,
    /// Bytes before the first record.
    head: usize,
}

impl Group {
    /// The longest record that a group takes.
    const LARGEST: usize = PART - LENGTH;

    fn at(first: u64, link: Option<u32>) -> Self {
        let mut value = Vec::with_capacity(Head::LARGEST);
        Head { parts: GROUP, link }.push_to(&mut value);
        let head = value.len();
        Self { first, value, head }
    }

    fn is_empty(&self) -> bool {
        self.value.len() == self.head
    }

    fn fits(&self, record: &[u8]) -> bool {
        self.value.len() - self.head + LENGTH + record.len() <= PART
    }

    fn push(&mut self, record: &[u8]) {
        let len = u16::try_from(record.len()).expect("a record that fits a part has a small length");
        self.value.extend_from_slice(&len.to_le_bytes());
        self.value.extend_from_slice(record);
    }
}

impl SledEngine {
    fn insert_group(&self, group: &Group) -> Result<(), LogError> {
        if group.is_empty() {
            return Ok(());
        }
        self.store(&key(group.first, 0), &group.value)
    }

    /// Stores a record that is longer than a part.
    fn insert_parts(&self, index: u64, record: &[u8], link: Option<u32>) -> Result<(), LogError> {
        let parts = u16::try_from(record.len().div_ceil(PART))
            .ok()
            .filter(|parts| *parts < LINKED)
            .ok_or_else(|| self.damaged(format!("the record of index {index} is impossibly large")))?;
        for (part, bytes) in (0..).zip(record.chunks(PART)) {
            if part > 0 {
                self.store(&key(index, part), bytes)?;
                continue;
            }
            let mut value = Vec::with_capacity(Head::LARGEST + bytes.len());
            Head { parts, link }.push_to(&mut value);
            value.extend_from_slice(bytes);
            self.store(&key(index, part), &value)?;
        }
        Ok(())
    }

    fn store(&self, key: &[u8], value: &[u8]) -> Result<(), LogError> {
        self.sled(|| self.records.insert(key, value))?;
        self.wrote(value.len())
    }

    fn take(&self, key: &[u8]) -> Result<(), LogError> {
        self.sled(|| self.records.remove(key))?;
        self.wrote(0)
    }

    /// Notes that something was written, and syncs when it is enough.
    fn wrote(&self, bytes: usize) -> Result<(), LogError> {
        let before = self.unsynced.fetch_add(bytes + REWRITTEN, Ordering::Relaxed);
        if before + bytes + REWRITTEN > UNSYNCED {
            self.make_durable()?;
        }
        Ok(())
    }

    fn make_durable(&self) -> Result<(), LogError> {
        self.sled(|| self.database.flush())?;
        self.file.sync_data().map_err(|source| {
            // Never closed: sled would sync once more then, and nothing may be synced after a failure. It also
            // panics when that fails.
            std::mem::forget(self.database.clone());
            LogError::File {
                path: self.folder.join("db"),
                what: "cannot sync the database",
                source,
            }
        })?;
        self.unsynced.store(0, Ordering::Relaxed);
        Ok(())
    }

    fn end(&self) -> MutexGuard<'_, Option<(u64, u32)>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The checksum of the record before `index`, if there is one.
    fn link_before(&self, index: u64) -> Result<Option<u32>, LogError> {
        if let Some((next, checksum)) = *self.end()
            && next == index
        {
            return Ok(Some(checksum));
        }
        let mut found = None;
        if let Some(before) = index.checked_sub(1) {
            self.scan(before..index, &mut |_, record| {
                found = Some(crc32fast::hash(record));
                Ok(true)
            })?;
        }
        Ok(found)
    }

    /// The value that holds `index`, if any does: the last one that does not begin after it.
    fn at_or_before(&self, index: u64) -> Result<Option<(sled::IVec, sled::IVec)>, LogError> {
        self.sled(|| {
            self.records
                .range(..=key(index, u16::MAX))
                .next_back()
                .transpose()
        })
    }

    fn parse_key(&self, key: &[u8]) -> Result<(u64, u16), LogError> {
        parse_key(key).ok_or_else(|| self.damaged("a key has the wrong length".to_owned()))
    }

    /// What the value of a first part begins with, and the rest.
    fn parse_value<'a>(&self, index: u64, value: &'a [u8]) -> Result<(Head, &'a [u8]), LogError> {
        Head::parse(value).ok_or_else(|| self.damaged(format!("the record of index {index} is empty")))
    }

    /// Calls `visit` with each record of a group until it answers `false`.
    fn visit_group(&self, first: u64, mut bytes: &[u8], visit: &mut Visit<'_>) -> Result<(), LogError> {
        for index in first.. {
            if bytes.is_empty() {
                break;
            }
            let Some((record, rest)) = bytes
                .split_first_chunk()
                .and_then(|(len, rest)| rest.split_at_checked(usize::from(u16::from_le_bytes(*len))))
            else {
                return Err(self.damaged(format!("the record of index {index} is cut short")));
            };
            if !visit(index, record)? {
                break;
            }
            bytes = rest;
        }
        Ok(())
    }
}

impl Engine for SledEngine {
    fn append(&self, first: u64, records: &[Vec<u8>]) -> Result<(), LogError> {
        let mut link = self.link_before(first)?;
        let mut group = Group::at(first, link);
        for (index, record) in (first..).zip(records) {
            if group.fits(record) {
                group.push(record);
                link = Some(crc32fast::hash(record));
                continue;
            }
            self.insert_group(&group)?;
            if record.len() > Group::LARGEST {
                self.insert_parts(index, record, link)?;
                link = Some(crc32fast::hash(record));
                group = Group::at(index + 1, link);
            } else {
                group = Group::at(index, link);
                group.push(record);
                link = Some(crc32fast::hash(record));
            }
        }
        self.insert_group(&group)?;
        *self.end() = link.map(|checksum| (first + records.len() as u64, checksum));
        Ok(())
    }

    fn remove(&self, index: u64) -> Result<(), LogError> {
        *self.end() = None;
        let Some((found, value)) = self.at_or_before(index)? else {
            return Ok(());
        };
        let (first, part) = self.parse_key(&found)?;
        let (head, bytes) = match part {
            0 => self.parse_value(first, &value)?,
            _ => (
                Head {
                    parts: part + 1,
                    link: None,
                },
                &value[..],
            ),
        };
        if head.parts == GROUP {
            let mut kept = Group::at(first, head.link);
            let mut holds_it = false;
            self.visit_group(first, bytes, &mut |at, record| {
                if at < index {
                    kept.push(record);
                } else {
                    holds_it |= at == index;
                }
                Ok(true)
            })?;
            if !holds_it {
                return Ok(());
            }
            // A shorter value under the same key: sled replaces it in one step.
            return if kept.is_empty() {
                self.take(&found)
            } else {
                self.insert_group(&kept)
            };
        }
        if first != index {
            return Ok(());
        }
        // From the tail backward: a crash in between leaves a record that is incomplete at its end.
        for part in (0..head.parts).rev() {
            self.take(&key(index, part))?;
        }
        Ok(())
    }

    fn purge(&self, below: u64, at_most: usize) -> Result<bool, LogError> {
        // Key by key and not record by record: a crash during an earlier purge may have left half a record.
        let mut removed = 0;
        let mut items = self.records.range(..key(below, 0)).take(at_most);
        while let Some((found, value)) = self.sled(|| items.next().transpose())? {
            let (first, part) = self.parse_key(&found)?;
            if part == 0
                && let (Head { parts: GROUP, .. }, bytes) = self.parse_value(first, &value)?
            {
                let mut ends_below = true;
                self.visit_group(first, bytes, &mut |index, _| {
                    ends_below = index < below;
                    Ok(ends_below)
                })?;
                if !ends_below {
                    return Ok(false);
                }
            }
            self.take(&found)?;
            removed += 1;
        }
        Ok(removed == at_most)
    }

    fn scan(&self, range: Range<u64>, visit: &mut Visit<'_>) -> Result<(), LogError> {
        if range.is_empty() {
            return Ok(());
        }
        let mut begin = key(range.start, 0);
        // The group that begins before the range may reach into it.
        if let Some((found, value)) = self.at_or_before(range.start)? {
            let (first, part) = self.parse_key(&found)?;
            if part == 0 && self.parse_value(first, &value)?.0.parts == GROUP {
                begin = key(first, 0);
            }
        }
        let mut record: Vec<u8> = Vec::new();
        // The index that follows what was read last, and its checksum.
        let mut before: Option<(u64, u32)> = None;
        // Index of the record being gathered, the part that comes next, and how many it has.
        let mut gathering: Option<(u64, u16, u16)> = None;
        let mut items = self.records.range(begin..key(range.end, 0));
        while let Some((found, value)) = self.sled(|| items.next().transpose())? {
            let (index, part) = self.parse_key(&found)?;
            let (parts, bytes) = match gathering {
                Some((at, next, parts)) if at == index && next == part => (parts, &value[..]),
                Some((at, next, parts)) => {
                    return Err(
                        self.damaged(format!("the record of index {at} lacks part {next} of {parts}"))
                    );
                }
                None if part == 0 => {
                    record.clear();
                    let (head, bytes) = self.parse_value(index, &value)?;
                    if let (Some((next, checksum)), Some(link)) = (before, head.link)
                        && next == index
                        && checksum != link
                    {
                        return Err(self.damaged(format!(
                            "the record of index {} is not the one that was there last",
                            index - 1
                        )));
                    }
                    (head.parts, bytes)
                }
                None => {
                    return Err(self.damaged(format!("the record of index {index} has no beginning")));
                }
            };
            if parts == GROUP {
                let mut goes_on = true;
                self.visit_group(index, bytes, &mut |at, record| {
                    before = Some((at + 1, crc32fast::hash(record)));
                    if range.contains(&at) {
                        goes_on = visit(at, record)?;
                    }
                    Ok(goes_on)
                })?;
                if !goes_on {
                    return Ok(());
                }
                continue;
            }
            record.extend_from_slice(bytes);
            if part + 1 < parts {
                gathering = Some((index, part + 1, parts));
                continue;
            }
            gathering = None;
            before = Some((index + 1, crc32fast::hash(&record)));
            if !visit(index, &record)? {
                return Ok(());
            }
        }
        if let Some((index, next, parts)) = gathering {
            // Nothing follows it in the range. At the end of the log that is a write that a crash cut
            // short; it was never synced, and the watermark would tell if it had been.
            let mut behind = self.records.range(key(range.end, 0)..);
            if self.sled(|| behind.next().transpose())?.is_some() {
                return Err(self.damaged(format!(
                    "the record of index {index} lacks part {next} of {parts}"
                )));
            }
            warn!(
                index,
                next, parts, "the last record of the log is incomplete, leaving it out"
            );
        }
        Ok(())
    }

    fn put(&self, name: &str, value: &[u8]) -> Result<(), LogError> {
        self.sled(|| self.values.insert(name, value))?;
        self.wrote(value.len())
    }

    fn get(&self, name: &str) -> Result<Option<Vec<u8>>, LogError> {
        let found = self.sled(|| self.values.get(name))?;
        Ok(found.map(|value| value.to_vec()))
    }

    fn sync(&self, promise: &Promise) -> Result<(), LogError> {
        self.make_durable()?;
        self.mark.write(promise)
    }

    fn lower(&self, promise: &Promise) -> Result<(), LogError> {
        self.mark.write_durably(promise)
    }

    fn promised(&self) -> Result<Option<Promise>, LogError> {
        Ok(self.promised)
    }

    fn place(&self) -> String {
        self.folder.display().to_string()
    }
}

/// Opens the database. A thread of the last one in this process may hold sled's own lock for a moment after it was
/// closed; no other process does, as the data folder is locked.
fn open(config: &sled::Config) -> sled::Result<sled::Db> {
    for _ in 0..LOCK_TRIES {
        match config.open() {
            Err(sled::Error::Io(error)) if error.to_string().starts_with("could not acquire lock") => {
                std::thread::sleep(LOCK_EVERY);
            }
            opened => return opened,
        }
    }
    config.open()
}

fn key(index: u64, part: u16) -> [u8; KEY] {
    let mut key = [0; KEY];
    key[..8].copy_from_slice(&index.to_be_bytes());
    key[8..].copy_from_slice(&part.to_be_bytes());
    key
}

fn parse_key(key: &[u8]) -> Option<(u64, u16)> {
    let (index, part) = key.split_first_chunk()?;
    Some((
        u64::from_be_bytes(*index),
        u16::from_be_bytes(part.try_into().ok()?),
    ))
}

/// Gives a new database its settings, whole and durable. sled would write them without a sync: after a loss of
/// power they could be cut short when entries are promised already, and sled would open no more.
fn begin(folder: &Path) -> Result<(), LogError> {
    let failed = |path: &Path, what| {
        let path = path.to_owned();
        move |source| LogError::File { path, what, source }
    };
    let settings = folder.join("conf");
    if settings.exists() || folder.join("db").exists() {
        return Ok(());
    }
    std::fs::create_dir_all(folder).map_err(failed(folder, "cannot create the folder of the database"))?;
    let mut bytes = SETTINGS.to_vec();
    bytes.extend_from_slice(&crc32fast::hash(SETTINGS).to_le_bytes());
    let aside = settings.with_extension(UNFINISHED);
    File::create(&aside)
        .and_then(|mut file| {
            file.write_all(&bytes)?;
            file.sync_all()
        })
        .and_then(|()| std::fs::rename(&aside, &settings))
        .map_err(failed(&settings, "cannot write the settings of the database"))?;
    sync_folder(folder)
}

/// Removes what a crash left of a `snap` file that was being written. sled writes it under this name first, but
/// does not leave it out when it looks for the newest one, finds it cut short, and opens no more.
fn remove_unfinished(folder: &Path) -> Result<(), LogError> {
    let failed = |path: &Path, what| {
        let path = path.to_owned();
        move |source| LogError::File { path, what, source }
    };
    let items = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        items => items.map_err(failed(folder, "cannot list the folder of the database"))?,
    };
    for item in items {
        let path = item
            .map_err(failed(folder, "cannot list the folder of the database"))?
            .path();
        if path.extension().is_some_and(|extension| extension == UNFINISHED) {
            std::fs::remove_file(&path).map_err(failed(&path, "cannot remove an unfinished file"))?;
        }
    }
    Ok(())
}

/// Calls sled, which asserts its way through a damaged file: a panic there is damage, not a bug of ours.
fn guard<T>(folder: &Path, call: impl FnOnce() -> sled::Result<T>) -> Result<T, LogError> {
    let damaged = |what| LogError::Damaged {
        place: folder.display().to_string(),
        what,
    };
    let called = catch_unwind(AssertUnwindSafe(call))
        .map_err(|panic| damaged(format!("sled cannot read its database: {}", panic_text(&*panic))))?;
    called.map_err(|source| match source {
        sled::Error::Corruption { at, .. } => damaged(format!("sled finds a damaged page ({at:?})")),
        sled::Error::ReportableBug(what) => damaged(format!("sled cannot read its database: {what}")),
        // As an error of the file, where it is one.
        sled::Error::Io(source) => LogError::File {
            path: folder.join("db"),
            what: "cannot read or write the database",
            source: system_error(source),
        },
        source => LogError::Engine {
            place: folder.display().to_string(),
            source,
        },
    })
}

/// The error of the operating system. sled hands it on as another error with its debug text.
fn system_error(error: io::Error) -> io::Error {
    let text = error.to_string();
    let code = text
        .split_once("Os { code: ")
        .and_then(|(_, rest)| rest.split_once(','))
        .and_then(|(code, _)| code.parse().ok());
    code.map_or(error, io::Error::from_raw_os_error)
}

fn sync_folder(folder: &Path) -> Result<(), LogError> {
    File::open(folder)
        .and_then(|handle| handle.sync_all())
        .map_err(|source| LogError::File {
            path: folder.to_owned(),
            what: "cannot sync the folder",
            source,
        })
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::ONE_SLED;

    #[tokio::test]
    async fn the_settings_are_those_that_sled_writes() {
        let _alone = ONE_SLED.lock().await;
        let folder = tempfile::tempdir().unwrap();
        let config = sled::Config::new().path(folder.path()).use_compression(false);
        drop(config.open().unwrap());
        let written = std::fs::read(folder.path().join("conf")).unwrap();
        let ours = tempfile::tempdir().unwrap();
        begin(ours.path()).unwrap();
        assert_eq!(std::fs::read(ours.path().join("conf")).unwrap(), written);
    }

    /// A crash while sled writes its `snap` file leaves one that it takes for the newest, and refuses.
    #[tokio::test]
    async fn an_unfinished_file_of_sled_is_no_damage() {
        let _alone = ONE_SLED.lock().await;
        let data = tempfile::tempdir().unwrap();
        let engine = SledEngine::open(data.path()).unwrap();
        engine.append(0, &[b"record".to_vec()]).unwrap();
        engine.sync(&Promise::default()).unwrap();
        drop(engine);
        let unfinished = data.path().join("log/snap.FFFFFFFFFFFFFFFF.generating");
        std::fs::write(&unfinished, b"half").unwrap();
        let engine = SledEngine::open(data.path()).unwrap();
        assert_eq!(records(&engine).unwrap(), [b"record"]);
        assert!(!unfinished.exists());
    }

    fn records(engine: &SledEngine) -> Result<Vec<Vec<u8>>, LogError> {
        let mut found = Vec::new();
        engine.scan(0..u64::MAX, &mut |_, record| {
            found.push(record.to_vec());
            Ok(true)
        })?;
        Ok(found)
    }

    /// What sled does when it passes over a damaged part of an older segment: entries that were cut off and written
    /// anew are what they were before, between others that are right.
    #[tokio::test]
    async fn a_record_of_before_in_the_place_of_a_newer_one_is_found() {
        let _alone = ONE_SLED.lock().await;
        // Each record a value of its own, or several parts.
        for len in [PART - LENGTH, 3 * PART] {
            let record = |index: u64, life: u8| [index.to_le_bytes().to_vec(), vec![life; len - 8]].concat();
            let data = tempfile::tempdir().unwrap();
            let engine = SledEngine::open(data.path()).unwrap();
            let appended: Vec<Vec<u8>> = (0..6).map(|index| record(index, 1)).collect();
            engine.append(0, &appended).unwrap();
            let old = engine.records.range(key(3, 0)..key(4, 0));
            let old: Vec<_> = old.map(Result::unwrap).collect();
            for index in (3..6).rev() {
                engine.remove(index).unwrap();
            }
            for index in 3..6 {
                engine.append(index, &[record(index, 2)]).unwrap();
            }
            let right: Vec<Vec<u8>> = (0..6)
                .map(|index| record(index, if index < 3 { 1 } else { 2 }))
                .collect();
            assert_eq!(records(&engine).unwrap(), right);
            drop(engine);

            let engine = SledEngine::open(data.path()).unwrap();
            assert_eq!(records(&engine).unwrap(), right);
            engine.append(6, &[record(6, 2)]).unwrap();
            assert_eq!(records(&engine).unwrap().len(), 7);
            for (key, value) in old {
                engine.records.insert(key, value).unwrap();
            }
            let refused = records(&engine).unwrap_err().to_string();
            assert!(
                refused.contains("the record of index 3 is not the one that was there last"),
                "{refused}"
            );
        }
    }

    #[test]
    fn an_error_that_sled_copied_is_that_of_the_system_again() {
        let original = io::Error::from_raw_os_error(28);
        let copied = io::Error::new(original.kind(), format!("{original:?}"));
        assert_eq!(system_error(copied).raw_os_error(), Some(28));
        assert_eq!(system_error(original).raw_os_error(), Some(28));
        assert_eq!(system_error(io::Error::other("else")).to_string(), "else");
    }
}
