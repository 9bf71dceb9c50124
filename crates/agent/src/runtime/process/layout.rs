//! Where a session lives on disk, the records in there, and the lock that actions on it take.
//!
//! ```text
//! DATA/sessions/NAME/launch.json      what was asked for, synced before anything is started
//!                    process.json     pids and start times, written by the shim once the program runs
//!                    exit.json        how the program ended, written by the shim as its last act
//!                    hibernated.json  there while the session is hibernated
//!                    log, log.1       the program's output, bounded
//!                    home/            its home, unless it is persistent
//! DATA/homes/USER/TEMPLATE/           persistent homes: a user's next session of a template finds it again
//! DATA/locks/NAME.lock                held by whoever acts on the session, in any process
//! ```
//!
//! Invariant: records are only ever replaced whole, and a session's folder goes last, so at every
//! instant a reader can tell what was asked for, what runs and how it ended.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use regent_types::{SessionName, TemplateName, UserName};
use serde::{Deserialize, Serialize};

use super::super::{Exit, StartSpec};
use super::limits::Applied;
use crate::files;
use crate::lifeline::ProcessId;

/// Marks every process of a session; the value is the session's folder, so that agents with other data
/// folders on the same machine never meet.
pub(crate) const ENV_FOLDER: &str = "REGENT_SESSION_DIR";
/// Marks the shim in the same way; it is not part of the session that it watches.
pub(crate) const ENV_SHIM: &str = "REGENT_SHIM_DIR";

/// `launch.json`: all that the shim needs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Launch {
    pub(crate) spec: StartSpec,
    pub(crate) folder: PathBuf,
    pub(crate) home: PathBuf,
    pub(crate) program: String,
    pub(crate) args: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) port: Option<u16>,
    pub(crate) log_bytes: u64,
    pub(crate) lifeline: Option<ProcessId>,
    /// The session's own control group, not made yet, if the machine lets us make one.
    pub(crate) cgroup: Option<PathBuf>,
}

/// `process.json`: what the shim started.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Running {
    pub(crate) shim: ProcessId,
    pub(crate) program: ProcessId,
    /// Pids and start times mean nothing after a reboot.
    pub(crate) boot: String,
    pub(crate) started_at_ms: u64,
    pub(crate) limits: Applied,
}

/// `exit.json`: how it ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Ended {
    pub(crate) program: ProcessId,
    pub(crate) exit: Exit,
    pub(crate) at_ms: u64,
}

/// `hibernated.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Hibernated {
    pub(crate) at_ms: u64,
}

/// What the shim tells whoever started it, one line on its standard output.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reply {
    Started(Running),
    Failed {
        reason: String,
        /// Whether starting it again cannot help.
        for_good: bool,
    },
}

/// The folders of one data folder.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    data: PathBuf,
}

impl Layout {
    /// Makes the folders. They belong to the agent's user alone: homes and logs are private.
    pub(crate) fn open(data: &Path) -> io::Result<Self> {
        private_folder(data)?;
        // Canonical, because the path is what a process is recognised by.
        let layout = Self {
            data: data.canonicalize()?,
        };
        for folder in ["sessions", "homes", "locks"] {
            private_folder(&layout.data.join(folder))?;
        }
        Ok(layout)
    }

    pub(crate) fn data(&self) -> &Path {
        &self.data
    }

    pub(crate) fn sessions(&self) -> PathBuf {
        self.data.join("sessions")
    }

    pub(crate) fn session(&self, session: &SessionName) -> SessionFolder {
        SessionFolder {
            path: self.sessions().join(files::folder_name(session.as_str())),
        }
    }

    pub(crate) fn home(&self, user: &UserName, template: &TemplateName) -> PathBuf {
        let user = files::folder_name(user.as_str());
        self.data
            .join("homes")
            .join(user)
            .join(files::folder_name(template.as_str()))
    }

    /// Waits for the session's lock and holds it until the guard is dropped. Blocks.
    pub(crate) fn lock(&self, session: &SessionName) -> io::Result<SessionLock> {
        let path = self
            .data
            .join("locks")
            .join(format!("{}.lock", files::folder_name(session.as_str())));
        loop {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)?;
            file.lock()?;
            // A stop removes the lock file; who waited for the removed one must take the new one.
            match fs::metadata(&path) {
                Ok(now) if now.ino() == file.metadata()?.ino() => return Ok(SessionLock { file, path }),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Exclusive right to act on a session, across threads and processes; ends with the process too.
#[derive(Debug)]
pub(crate) struct SessionLock {
    file: File,
    path: PathBuf,
}

impl SessionLock {
    /// Removes the lock file along, for a session that is gone: else they would pile up.
    pub(crate) fn remove(self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "lock file of a stopped session stays");
        }
        drop(self.file);
    }
}

/// One session's folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SessionFolder {
    pub(crate) path: PathBuf,
}

impl SessionFolder {
    pub(crate) fn launch_file(&self) -> PathBuf {
        self.path.join("launch.json")
    }

    pub(crate) fn process_file(&self) -> PathBuf {
        self.path.join("process.json")
    }

    pub(crate) fn exit_file(&self) -> PathBuf {
        self.path.join("exit.json")
    }

    pub(crate) fn hibernated_file(&self) -> PathBuf {
        self.path.join("hibernated.json")
    }

    pub(crate) fn log_file(&self) -> PathBuf {
        self.path.join("log")
    }

    pub(crate) fn home(&self) -> PathBuf {
        self.path.join("home")
    }

    pub(crate) fn launch(&self) -> io::Result<Option<Launch>> {
        tolerant(&self.launch_file())
    }

    pub(crate) fn running(&self) -> io::Result<Option<Running>> {
        tolerant(&self.process_file())
    }

    pub(crate) fn ended(&self) -> io::Result<Option<Ended>> {
        tolerant(&self.exit_file())
    }

    pub(crate) fn is_hibernated(&self) -> io::Result<bool> {
        self.hibernated_file().try_exists()
    }
}

/// Our files are never torn, so a damaged one is the disk's or somebody's doing. It counts as missing:
/// then the processes themselves say what there is.
fn tolerant<T: serde::de::DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match files::read_json(path) {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            tracing::warn!(path = %path.display(), %error, "damaged session record is ignored");
            Ok(None)
        }
        other => other,
    }
}

/// Makes a folder, and those above it, for this user alone.
pub(crate) fn private_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// The id of the machine's last boot; empty if the system does not tell.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// Wall time for people to read, in milliseconds.
pub(crate) fn now_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
