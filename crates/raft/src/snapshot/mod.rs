//! Snapshots: the whole state in one file.
//!
//! A snapshot is a file from the moment it is taken until it is installed elsewhere: written aside, synced,
//! renamed, folder synced. openraft purges the log behind a snapshot as soon as it is told that one exists, so
//! nothing is told before that. A backup is the same file. [`format`] says what is in it, [`file`] moves it
//! about, [`store`] keeps the newest ones and finds the one to start from.

mod file;
pub(crate) mod format;
pub(crate) mod fuzzing;
mod store;

#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;

pub(crate) use self::file::{Incoming, SnapshotFile};
pub(crate) use self::store::SnapshotStore;

/// Why a snapshot cannot be used, written or found.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It is not what was written.
    #[error("the snapshot {} is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// It is whole, but another build's.
    #[error("the snapshot {} has format version {found}, this build reads {}", path.display(), format::VERSION)]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u16,
    },
    /// The log begins later than any snapshot that can be read ends.
    #[error(
        "the log begins after index {purged}, but {found}; \
         copy the newest *.snapshot of another node into {} and start again; if there is none, \
         move the data folder away and let this machine rejoin as a learner under a new node id \
         (never start it empty under the old id: it could vote a second time)",
        folder.display()
    )]
    Unreachable {
        /// Index of the last purged entry.
        purged: u64,
        /// What there is instead of a snapshot that covers it.
        found: String,
        /// Where snapshots are kept.
        folder: PathBuf,
    },
    /// A file or folder failed.
    #[error("{}: {what}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was attempted.
        what: &'static str,
        /// What the operating system says.
        #[source]
        source: io::Error,
    },
}

impl From<SnapshotError> for io::Error {
    fn from(error: SnapshotError) -> Self {
        let mut text = error.to_string();
        if let Some(cause) = std::error::Error::source(&error) {
            text.push_str(": ");
            text.push_str(&cause.to_string());
        }
        Self::other(text)
    }
}
