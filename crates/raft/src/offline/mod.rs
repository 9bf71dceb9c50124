//! What is done to data folders while no node runs on them: restore and recover.
//!
//! Both end the same way ([`found`]): a new data folder with a new cluster of one member, whose only content is a
//! snapshot of the old cluster's state as the new one begins with it (`regent_state`, `restore`). The cluster id is
//! new, so nodes of the old cluster are refused in the handshake, whatever they hold. [`survivors`] looks into
//! folders that were left behind, without changing a byte in them.

mod found;
mod survivors;
#[cfg(test)]
mod tests;

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use regent_state::RestoreError;
use regent_types::{ClusterId, NodeId, Revision, TokenId};

pub use self::survivors::{Position, Survivor, Survivors};
use crate::folder::FolderError;
use crate::log::{LogError, LogStore};
use crate::snapshot::SnapshotError;
use crate::{BackupInfo, backup};

/// A folder with state in it is its owner's.
fn private() -> Permissions {
    Permissions::from_mode(0o700)
}

/// The one member of a new cluster.
#[derive(Debug, Clone)]
pub struct Founder {
    /// Its id.
    pub node: NodeId,
    /// Its data folder: absent or empty until now.
    pub data: PathBuf,
    /// `host:port` at which the other nodes will reach it.
    pub peer: String,
    /// Base address of its REST API.
    pub http: String,
    /// What keeps its log.
    pub log_store: LogStore,
}

/// What the operator states and wants.
#[derive(Debug, Clone)]
pub struct Terms {
    /// Wall clock, in milliseconds.
    pub at: u64,
    /// A revision that was used already, by a cluster that was restored from the same backup.
    pub above: Revision,
    /// API tokens stay valid.
    pub keep_tokens: bool,
    /// Nobody acts under a lease of the old cluster any more.
    pub old_cluster_is_dead: bool,
    /// A new administrator's token: its id and the SHA-256 of its secret.
    pub admin_token: Option<(TokenId, [u8; 32])>,
}

/// A new cluster.
#[derive(Debug, Clone)]
pub struct Founded {
    /// Its id.
    pub cluster: ClusterId,
    /// The cluster that it came from.
    pub former: ClusterId,
    /// Its first revision.
    pub revision: Revision,
    /// What is in it.
    pub content: BackupInfo,
    /// Until when no lease is granted, in milliseconds since the Unix epoch; `None`: they are granted at once.
    pub no_lease_before: Option<u64>,
}

/// Why it was not done. Nothing was changed then.
#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    /// There is something where the new data folder should be.
    #[error(
        "{} is not empty: a new cluster is made in a folder of its own; give another one, or move this one away",
        .0.display()
    )]
    NotEmpty(PathBuf),
    /// There is no node's data.
    #[error("{} is not a node's data folder: there is neither log nor log-segments in it", .0.display())]
    NoData(PathBuf),
    /// The node of that folder never became part of a cluster.
    #[error("the node of {} never became part of a cluster: there is nothing to recover", .0.display())]
    NeverFormed(PathBuf),
    /// The same node's folder, twice.
    #[error("{} and {} are both of node {node}: give the folder that the node used last", one.display(), other.display())]
    Twice {
        /// The node.
        node: NodeId,
        /// A folder.
        one: PathBuf,
        /// Another.
        other: PathBuf,
    },
    /// Folders of different clusters.
    #[error("{} is of cluster {here}, {} of cluster {there}: give the folders of one cluster", one.display(), other.display())]
    Clusters {
        /// A folder.
        one: PathBuf,
        /// Its cluster.
        here: String,
        /// Another.
        other: PathBuf,
        /// Its cluster.
        there: String,
    },
    /// The state cannot be made a new cluster's.
    #[error(transparent)]
    State(#[from] RestoreError),
    /// The backup or a snapshot cannot be read.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A log cannot be read or written.
    #[error(transparent)]
    Log(#[from] LogError),
    /// A folder is in use or cannot be opened.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The log of a folder cannot be applied.
    #[error("the log of {} cannot be applied", path.display())]
    Replay {
        /// The data folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
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

/// Makes a new cluster of one node from a backup.
///
/// # Errors
/// The backup is damaged, the folder is in use, or the disk fails; then there is no new folder.
pub async fn restore(backup: &Path, founder: &Founder, terms: &Terms) -> Result<Founded, OfflineError> {
    found::refuse_existing(&founder.data)?;
    let (meta, state) = backup::load(backup)?;
    found::found(founder, terms, &state, meta.last_log_id, 0).await
}

fn failed(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> OfflineError {
    move |source| OfflineError::Io {
        path: path.to_owned(),
        what,
        source,
    }
}
