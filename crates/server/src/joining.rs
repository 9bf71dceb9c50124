//! A node that joins a cluster, before it is started: its data folder asks to be admitted, and remembers the answer.

use std::path::Path;

use regent_raft::{KnownMember, LogStore, StartError};
use regent_types::NodeId;
use regent_types::cluster::{Join, Joined};

/// Why a node could not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The data folder cannot be used.
    #[error(transparent)]
    Folder(#[from] StartError),
    /// The answer of the cluster makes no sense.
    #[error("the cluster's answer names no data folder of node {0}")]
    Answer(NodeId),
}

/// The data folder of a node that is to join.
pub struct Joining {
    folder: regent_raft::Joining,
    node: NodeId,
}

impl Joining {
    /// Opens the folder, and names it if it is new.
    ///
    /// # Errors
    /// It is in use, damaged, or of another node.
    pub async fn open(data: &Path, store: LogStore, node: NodeId) -> Result<Self, JoinError> {
        let folder = regent_raft::Joining::open(data, store, node).await?;
        Ok(Self { folder, node })
    }

    /// The cluster that the folder belongs to already, if it does.
    pub fn cluster(&self) -> Option<&str> {
        self.folder.cluster()
    }

    /// What the cluster is asked: `peer` and `http` are where the node will be.
    pub fn request(&self, peer: &str, http: &str) -> Join {
        Join {
            node_id: self.node,
            incarnation: folder_name::write(self.folder.incarnation()),
            peer: peer.to_owned(),
            http: http.to_owned(),
        }
    }

    /// Remembers that the node was admitted.
    ///
    /// # Errors
    /// It cannot be stored, or makes no sense.
    pub async fn admitted(&mut self, joined: &Joined) -> Result<(), JoinError> {
        let known = joined.members.iter().map(|member| {
            Ok(KnownMember {
                id: member.id,
                incarnation: folder_name::read(&member.incarnation).ok_or(JoinError::Answer(member.id))?,
                peer: member.peer.clone(),
                http: member.http.clone(),
            })
        });
        let members = known.collect::<Result<_, JoinError>>()?;
        Ok(self
            .folder
            .settle(&joined.cluster_id, joined.revision, members)
            .await?)
    }

    /// Lets go of the folder, so that the node can be started on it.
    pub async fn close(self) {
        self.folder.close().await;
    }
}

/// The name of a data folder as text: 32 hexadecimal digits.
pub(crate) mod folder_name {
    pub(crate) fn write(name: [u8; 16]) -> String {
        format!("{:032x}", u128::from_be_bytes(name))
    }

    pub(crate) fn read(text: &str) -> Option<[u8; 16]> {
        let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let name = digits.then(|| u128::from_str_radix(text, 16).ok()).flatten()?;
        Some(name.to_be_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::folder_name::{read, write};

    #[test]
    fn the_name_of_a_folder_is_read_back() {
        let name = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255];
        assert_eq!(read(&write(name)), Some(name));
        let long = ["g".repeat(32), "0".repeat(33), format!("+{}", "0".repeat(31))];
        for bad in ["", "12"].into_iter().chain(long.iter().map(String::as_str)) {
            assert_eq!(read(bad), None, "{bad:?}");
        }
    }
}
