//! What a node is started with.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;

use regent_types::NodeId;

use crate::config::{SnapshotPolicy, Timing};
use crate::log::LogStore;
use crate::sockets::Sockets;

/// Everything that one node needs to know to be a member of a cluster.
#[derive(Debug)]
pub struct Options {
    /// This node's id. It must be in `members` at the first start, and never changes for a data folder.
    pub node: NodeId,
    /// Folder of log, vote and snapshots; created when it is missing.
    pub data: PathBuf,
    /// Where the peer transport listens.
    pub listen: SocketAddr,
    /// `host:port` at which the other members reach this node's peer transport.
    pub advertise_peer: String,
    /// Base address of this node's public HTTP API, told to the others for redirects and status.
    pub advertise_http: String,
    /// Peer addresses of all members, this node included. The same on every node at the first start;
    /// later only the addresses are used.
    pub members: BTreeMap<NodeId, String>,
    /// What all members know and nobody else does.
    pub secret: ClusterSecret,
    /// Timeouts of consensus.
    pub timing: Timing,
    /// When snapshots are taken.
    pub snapshots: SnapshotPolicy,
    /// A socket that listens already; `listen` is then ignored. Lets a test choose port 0 and know it.
    pub listener: Option<TcpListener>,
    /// Over what the nodes talk: [`Tcp`](crate::Tcp) but in a simulation.
    pub sockets: Arc<dyn Sockets>,
    /// Where log and vote are kept.
    pub storage: Storage,
}

/// Where log, vote and snapshots are kept.
#[derive(Clone, Debug)]
pub enum Storage {
    /// A log store and snapshot files in [`Options::data`]. One such node per process.
    Disk(LogStore),
    /// The in-memory twin, for tests with several nodes in one process. The value outlives the node, so
    /// a node can be started again on what it had.
    Memory(crate::log::MemoryDisk),
}

/// Fewest bytes of a cluster secret; less could be guessed from one recorded handshake.
pub const MIN_SECRET_BYTES: usize = 16;

/// The secret that every member proves to know when it connects. Never sent, never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterSecret(Arc<[u8]>);

/// The cluster secret is too short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the cluster secret has {0} bytes, at least {MIN_SECRET_BYTES} are needed")]
pub struct SecretTooShort(pub usize);

impl ClusterSecret {
    /// Takes the secret; white space around it (a file's last newline) is not part of it.
    pub fn new(secret: impl AsRef<[u8]>) -> Result<Self, SecretTooShort> {
        let secret = secret.as_ref().trim_ascii();
        if secret.len() < MIN_SECRET_BYTES {
            return Err(SecretTooShort(secret.len()));
        }
        Ok(Self(Arc::from(secret)))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for ClusterSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterSecret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_never_printed_and_never_short() {
        let secret = ClusterSecret::new("  sixteen bytes or more\n").unwrap();
        assert_eq!(secret, ClusterSecret::new("sixteen bytes or more").unwrap());
        assert_eq!(format!("{secret:?}"), "ClusterSecret(..)");
        assert_eq!(ClusterSecret::new("short"), Err(SecretTooShort(5)));
    }
}
