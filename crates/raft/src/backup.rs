//! Backups: a snapshot file, written for somebody instead of for this node.
//!
//! A [`Backup`] is the state at one revision, which never changes, so it may be written as slowly as its reader
//! reads: at most one frame of it is in memory at a time, besides what the state shares with the node.

use std::fs::File;
use std::io::{self, BufReader, Write};
use std::path::Path;

use regent_state::State;
use regent_types::{ClusterId, Revision};

use crate::config::{SnapshotMeta, StoredMembership};
use crate::machine::View;
use crate::snapshot::{SnapshotError, format};

/// Buffer of the sequential reader: some frames.
const BUFFER: usize = 1024 * 1024;

/// The state at one revision, to be written as a backup.
pub struct Backup {
    state: State,
    meta: SnapshotMeta,
}

/// What is in a backup that was found whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupInfo {
    /// The cluster that it is of.
    pub cluster: Option<ClusterId>,
    /// The last revision in it.
    pub revision: Revision,
    /// The cluster's time then, in milliseconds since the Unix epoch.
    pub at: u64,
    /// How many sessions, agents and users are in it.
    pub sessions: usize,
    /// Agents.
    pub agents: usize,
    /// Users.
    pub users: usize,
}

impl View {
    /// A backup of this view.
    pub fn backup(&self) -> Backup {
        Backup {
            state: self.state.clone(),
            meta: SnapshotMeta {
                last_log_id: self.last,
                last_membership: StoredMembership::clone(&self.membership),
            },
        }
    }
}

impl Backup {
    /// The last revision in it.
    pub fn revision(&self) -> Revision {
        self.state.revision()
    }

    /// Writes the file. Blocks as long as `output` does.
    pub fn write_to(&self, output: impl Write) -> io::Result<()> {
        format::write(output, &self.state, &self.meta)
    }
}

impl BackupInfo {
    /// Reads a whole backup and checks every byte of it, and that its records are what their digest says.
    pub fn read(path: &Path) -> Result<Self, SnapshotError> {
        load(path).map(|(_, state)| Self::of(&state))
    }

    pub(crate) fn of(state: &State) -> Self {
        Self {
            cluster: state.cluster_id().cloned(),
            revision: state.revision(),
            at: state.now(),
            sessions: state.sessions().len(),
            agents: state.agents().len(),
            users: state.users().len(),
        }
    }
}

/// Reads and checks a backup.
pub(crate) fn load(path: &Path) -> Result<(SnapshotMeta, State), SnapshotError> {
    let file = File::open(path).map_err(|source| SnapshotError::Io {
        path: path.to_owned(),
        what: "cannot open the backup",
        source,
    })?;
    let (header, state) = format::read(path, &mut BufReader::with_capacity(BUFFER, file))?;
    Ok((header.meta(), state))
}
