//! The fence of a data folder: the highest fencing token that anybody has acted under here.
//!
//! Two replicas of an agent on one host share the data folder. The one that lost its lease may not know
//! it yet; what stops it is this file. Invariant: the recorded token only grows, and it is durable before
//! the first action under it, so after [`Fence::admit`] has succeeded for a token no process that admits
//! an older one will be let through, whatever crashes in between.
//!
//! What it cannot do: an older leader that passed the check an instant before may still finish that one
//! call. The reconcile loop repairs what it disturbed.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use regent_types::Token;
use serde::{Deserialize, Serialize};

use crate::files;

/// Why a token was not let through.
#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    /// A newer leader has acted here.
    #[error("fencing token {asked} is older than {highest}, under which a newer leader has acted here")]
    Fenced {
        /// The token of who asked.
        asked: Token,
        /// The highest token seen.
        highest: Token,
    },
    /// The file cannot be trusted: better no action than one that is not fenced.
    #[error("the fence file {path} is damaged")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: io::Error,
    },
    /// The file could not be read or written.
    #[error("the fence file {path} cannot be used")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl FenceError {
    /// Whether the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Fenced { .. } | Self::Damaged { .. } => false,
            Self::Io { .. } => true,
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    token: Token,
}

/// A handle to the fence of one data folder. Cheap; every process and thread may have its own.
#[derive(Debug, Clone)]
pub struct Fence {
    path: PathBuf,
    lock: PathBuf,
}

impl Fence {
    /// The fence of this data folder, which is made if it is missing.
    pub fn open(data: &Path) -> Result<Self, FenceError> {
        let path = data.join("fence.json");
        fs::create_dir_all(data).map_err(|source| FenceError::Io {
            path: path.clone(),
            source,
        })?;
        Ok(Self {
            lock: data.join("fence.lock"),
            path,
        })
    }

    /// Lets an action under `token` go on, or refuses it. A token higher than any before is made durable
    /// first. Blocks for a file lock and, when the token is new, for a sync.
    pub fn admit(&self, token: Token) -> Result<(), FenceError> {
        let _held = self.locked()?;
        let highest = self.read()?;
        if token < highest {
            return Err(FenceError::Fenced {
                asked: token,
                highest,
            });
        }
        if token > highest {
            files::write_json(&self.path, &Record { token }).map_err(|source| self.io(source))?;
            tracing::info!(%token, previous = %highest, "fence raised");
        }
        Ok(())
    }

    /// The highest token seen, zero before the first.
    pub fn highest(&self) -> Result<Token, FenceError> {
        let _held = self.locked()?;
        self.read()
    }

    /// The lock is a file of its own, as the record is replaced by renaming. It ends with the handle, and
    /// with the process, so a crash never leaves it held.
    fn locked(&self) -> Result<File, FenceError> {
        let open = || {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&self.lock)?;
            file.lock()?;
            Ok(file)
        };
        open().map_err(|source| self.io(source))
    }

    fn read(&self) -> Result<Token, FenceError> {
        match files::read_json::<Record>(&self.path) {
            Ok(record) => Ok(record.map_or(Token(0), |record| record.token)),
            Err(source) if source.kind() == io::ErrorKind::InvalidData => Err(FenceError::Damaged {
                path: self.path.clone(),
                source,
            }),
            Err(source) => Err(self.io(source)),
        }
    }

    fn io(&self, source: io::Error) -> FenceError {
        FenceError::Io {
            path: self.path.clone(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_token_is_refused_by_every_handle_also_after_a_restart() {
        let data = tempfile::tempdir().unwrap();
        let first = Fence::open(data.path()).unwrap();
        let second = Fence::open(data.path()).unwrap();
        first.admit(Token(5)).unwrap();
        second.admit(Token(7)).unwrap();
        assert!(matches!(
            first.admit(Token(5)),
            Err(FenceError::Fenced {
                asked: Token(5),
                highest: Token(7)
            })
        ));
        first.admit(Token(7)).unwrap();
        drop((first, second));
        assert_eq!(Fence::open(data.path()).unwrap().highest().unwrap(), Token(7));
    }

    #[test]
    fn a_damaged_fence_lets_nobody_through() {
        let data = tempfile::tempdir().unwrap();
        let fence = Fence::open(data.path()).unwrap();
        fence.admit(Token(5)).unwrap();
        fs::write(data.path().join("fence.json"), b"{").unwrap();
        assert!(matches!(fence.admit(Token(9)), Err(FenceError::Damaged { .. })));
    }

    #[test]
    fn of_many_that_race_only_rising_tokens_pass() {
        let data = tempfile::tempdir().unwrap();
        let passed = std::sync::Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for token in (0..8).map(|n| Token(1 + (n * 5) % 8)) {
                let (data, passed) = (data.path(), &passed);
                scope.spawn(move || {
                    if Fence::open(data).unwrap().admit(token).is_ok() {
                        passed.lock().unwrap().push(token);
                    }
                });
            }
        });
        assert_eq!(Fence::open(data.path()).unwrap().highest().unwrap(), Token(8));
        assert!(passed.lock().unwrap().contains(&Token(8)));
    }
}
