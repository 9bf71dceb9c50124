//! The data folder of one node: who may use it.
//!
//! Two processes on one folder would write two logs over each other and vote twice, so the folder is locked
//! for as long as the node lives. The lock belongs to the open file: the kernel releases it with the process,
//! however that ends, so there is no stale lock to clean up.
//!
//! It is made so that nobody but its owner may enter: the state has hashes of passwords and tokens, and whoever could
//! write there would be the cluster. One that others may enter is refused by who starts a node.
//!
//! ```text
//! <data>/lock         this lock, with the pid of the holder for people
//! <data>/log/         the sled database: log, vote, metadata
//! <data>/log-segments/  or the same in segment files
//! <data>/log.mark     the watermark of what was promised
//! <data>/snapshots/   snapshot files
//! ```

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

/// A locked data folder. The lock is held until this is dropped.
#[derive(Debug)]
pub(crate) struct DataFolder {
    lock: File,
}

/// Why a data folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// Another process has it.
    #[error("the data folder {} is in use by another process{}", path.display(), pid.as_ref().map(|pid| format!(" (pid {pid})")).unwrap_or_default())]
    InUse {
        /// The folder.
        path: PathBuf,
        /// The process that has it, as it noted itself.
        pid: Option<String>,
    },
    /// It cannot be created, read or locked.
    #[error("the data folder {} cannot be used", path.display())]
    Io {
        /// The folder.
        path: PathBuf,
        /// What the operating system says.
        #[source]
        source: io::Error,
    },
}

impl DataFolder {
    /// Locks a folder as it is, without changing anything in it. One without a lock file was never used by a node.
    pub(crate) fn hold(path: &Path) -> Result<Option<Self>, FolderError> {
        let failed = |source| FolderError::Io {
            path: path.to_owned(),
            source,
        };
        let lock = match File::open(path.join("lock")) {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(failed(source)),
        };
        Self::lock(path, lock).map(Some)
    }

    /// Creates the folder if it is missing and locks it.
    pub(crate) fn open(path: &Path) -> Result<Self, FolderError> {
        let failed = |source| FolderError::Io {
            path: path.to_owned(),
            source,
        };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(failed)?;
        let lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path.join("lock"))
            .map_err(failed)?;
        let folder = Self::lock(path, lock)?;
        let mut lock = &folder.lock;
        lock.set_len(0).and_then(|()| lock.rewind()).map_err(failed)?;
        writeln!(lock, "{}", std::process::id()).map_err(failed)?;
        Ok(folder)
    }

    fn lock(path: &Path, mut lock: File) -> Result<Self, FolderError> {
        match lock.try_lock() {
            Ok(()) => Ok(Self { lock }),
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                // The pid only makes the message better; without it the message is still right.
                let _ = lock.read_to_string(&mut pid);
                let pid = Some(pid.trim().to_owned()).filter(|pid| !pid.is_empty());
                Err(FolderError::InUse {
                    path: path.to_owned(),
                    pid,
                })
            }
            Err(TryLockError::Error(source)) => Err(FolderError::Io {
                path: path.to_owned(),
                source,
            }),
        }
    }
}

impl Drop for DataFolder {
    /// A child that was forked and has not yet become its program has the open file too, and with it the lock.
    /// Unlocking takes it from both; closing would leave it to the child.
    fn drop(&mut self) {
        // The kernel releases it with the last of the open files in any case.
        let _ = self.lock.unlock();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_user_at_a_time() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("node-1");
        let first = DataFolder::open(&path).unwrap();
        let refused = DataFolder::open(&path).unwrap_err();
        let own_pid = std::process::id().to_string();
        assert!(matches!(&refused, FolderError::InUse { pid: Some(pid), .. } if *pid == own_pid));
        assert!(refused.to_string().contains("in use by another process"));
        drop(first);
        DataFolder::open(&path).unwrap();
    }

    #[test]
    fn a_new_folder_is_its_owners_alone() {
        use std::os::unix::fs::PermissionsExt as _;
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("node-1");
        drop(DataFolder::open(&path).unwrap());
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    /// Another thread starts a program: between fork and exec its child has a copy of every open file.
    #[test]
    fn a_copy_of_the_open_file_does_not_keep_the_folder() {
        let parent = tempfile::tempdir().unwrap();
        let first = DataFolder::open(parent.path()).unwrap();
        let in_a_child = first.lock.try_clone().unwrap();
        drop(first);
        DataFolder::open(parent.path()).unwrap();
        drop(in_a_child);
    }
}
