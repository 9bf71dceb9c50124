//! The replicated log, the vote and a few small records, behind a trait that can be exchanged.
//!
//! Three layers, from the disk up:
//!
//! - [`Engine`] keeps opaque records by index and small values by name, and can make everything before a
//!   point durable. [`sled`] is the default, [`segments`] another one on plain files ([`choice`]), and
//!   [`memory`] their twin that forgets what was not synced.
//! - [`record`] gives every record a format version, a checksum and its own term and index, so that a
//!   record in the wrong place or with a flipped bit is found, whatever the engine.
//! - [`store::Log`] is what openraft sees: the tail in memory, one [`writer`] thread, one sync for all
//!   that waits, callbacks in order after the sync, poison on the first error.
//!
//! The invariant: what was promised (a callback fired, a vote saved) is there after a crash, or the node
//! refuses to start. sled cuts its own log at the first damaged message without a word, so the engine also
//! keeps a [`Promise`], a lower bound of what was synced, outside of sled (see [`mark`]).

mod choice;
pub(crate) mod fuzzing;
mod mark;
mod memory;
mod record;
mod segments;
mod sled;
mod store;
mod tail;
pub mod workbench;
mod writer;

#[cfg(test)]
mod tests;

/// Two sled databases in one process are unsupported, and tests share one when they run as threads.
#[cfg(test)]
pub(crate) static ONE_SLED: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

use std::io;
use std::ops::Range;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use self::choice::LogStore;
pub(crate) use self::choice::open;
pub use self::memory::MemoryDisk;
pub(crate) use self::store::Log;
use crate::config::{LogId, Vote};
use crate::folder::FolderError;

/// Bytes of entries that one read for replication returns at most (but always one entry): what a peer
/// must buffer per request, and what delays a heartbeat behind it on the same connection.
pub(crate) const READ_BATCH_BYTES: usize = 2 * 1024 * 1024;

/// Largest value of the metadata records, in bytes: it must stay inline in sled like any other value.
pub(crate) const MAX_METADATA: usize = 4 * 1024;

/// Where records live. Writes come from the one writer thread, reads from any thread; all of it blocks.
///
/// Order is the contract: an implementation may lose what was not synced in a crash, but only a suffix of
/// the writes, never something from the middle.
pub(crate) trait Engine: Send + Sync + 'static {
    /// Stores the records of `first` and the indexes that follow it. The caller appends in order and never
    /// overwrites. What is given together may be stored together, but is read and removed one by one.
    fn append(&self, first: u64, records: &[Vec<u8>]) -> Result<(), LogError>;

    /// Removes the record of `index`; nothing happens when there is none.
    fn remove(&self, index: u64) -> Result<(), LogError>;

    /// Removes records below `below` from the front, about `at_most` of them, and says whether there may
    /// be more.
    fn purge(&self, below: u64, at_most: usize) -> Result<bool, LogError>;

    /// Calls `visit` with the records of `range` in order until it answers `false`.
    ///
    /// A last record that was only partly written before a crash is left out when nothing follows it.
    fn scan(&self, range: Range<u64>, visit: &mut Visit<'_>) -> Result<(), LogError>;

    /// Stores a small value of at most [`MAX_METADATA`] bytes.
    fn put(&self, name: &str, value: &[u8]) -> Result<(), LogError>;

    /// Reads a small value.
    fn get(&self, name: &str) -> Result<Option<Vec<u8>>, LogError>;

    /// Makes every write so far durable and remembers what is promised by that.
    fn sync(&self, promise: &Promise) -> Result<(), LogError>;

    /// Lowers the promise, durably, before records that it covers are removed.
    fn lower(&self, promise: &Promise) -> Result<(), LogError>;

    /// The last promise, or nothing when none was ever made.
    fn promised(&self) -> Result<Option<Promise>, LogError>;

    /// Names the place in errors: a folder, or "memory".
    fn place(&self) -> String;
}

/// Takes an index and a record, and answers whether to go on.
pub(crate) type Visit<'a> = dyn FnMut(u64, &[u8]) -> Result<bool, LogError> + 'a;

/// A lower bound of what this node has promised to others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Promise {
    /// The last entry that was durable.
    pub(crate) last: Option<LogId>,
    /// The vote that was durable.
    pub(crate) vote: Option<Vote>,
}

/// Why the log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The log is not what it must be. There is no repair: what is missing may have been acknowledged.
    #[error(
        "the raft log in {place} is damaged: {what}; \
         move the data folder away and let this machine rejoin as a learner under a new node id \
         (never start it empty under the old id: it could vote a second time)"
    )]
    Damaged {
        /// The folder.
        place: String,
        /// What was found, with the index where there is one.
        what: String,
    },
    /// The data folder belongs to another store.
    #[error(
        "the data folder {} was begun with the log store {begun}, which {asked} cannot read: \
         start this node with `--log-store {begun}` \
         (a log is not converted: only a new node, with a folder and an id of its own, may choose anew)",
        data.display()
    )]
    OtherStore {
        /// The folder.
        data: PathBuf,
        /// What it was begun with.
        begun: LogStore,
        /// What was asked for.
        asked: LogStore,
    },
    /// The data folder cannot be used.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The storage engine failed.
    #[error("the raft log in {place} failed")]
    Engine {
        /// The folder.
        place: String,
        /// What the engine says.
        #[source]
        source: ::sled::Error,
    },
    /// A file beside the engine failed.
    #[error("{}: {what}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What was attempted.
        what: &'static str,
        /// What the operating system says.
        #[source]
        source: io::Error,
    },
    /// An earlier error stopped the log; nothing is written any more.
    #[error("the raft log has failed before: {0}")]
    Poisoned(String),
    /// The writer thread is gone: the node is stopping.
    #[error("the raft log is closed")]
    Closed,
    /// A metadata value exceeds what stays inline in the engine.
    #[error("metadata {name:?} has {len} bytes, at most {MAX_METADATA} are kept")]
    MetadataTooLarge {
        /// Its name.
        name: String,
        /// Its size in bytes.
        len: usize,
    },
}

impl LogError {
    /// The error with its causes in one line, for places that keep only text.
    fn describe(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(inner) = cause {
            text.push_str(": ");
            text.push_str(&inner.to_string());
            cause = inner.source();
        }
        text
    }
}

impl From<LogError> for io::Error {
    fn from(error: LogError) -> Self {
        io::Error::other(error.describe())
    }
}
