//! The first start of a node that joins a cluster.
//!
//! Its data folder is named before it asks to be admitted, and remembers what it was told before the node starts: from
//! then on it is a member like any other. Asking again after a crash in between is safe, since the folder's name is
//! the same.

use std::path::{Path, PathBuf};
use std::time::Duration;

use regent_types::{ClusterId, NodeId, Revision};

use crate::config::Member;
use crate::error::StartError;
use crate::identity::{Incarnation, Record, Settled, Settlement};
use crate::log::{Log, LogStore};
use crate::options::Storage;
use crate::start::{open_log, store_record, stored_record};

/// A member of the cluster that is joined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownMember {
    /// Its id.
    pub id: NodeId,
    /// The name of its data folder.
    pub incarnation: [u8; 16],
    /// `host:port` of its peer transport.
    pub peer: String,
    /// Base address of its HTTP API.
    pub http: String,
}

/// A data folder that is about to join.
pub struct Joining {
    log: Log,
    record: Record,
    data: PathBuf,
}

impl Joining {
    /// Opens the folder, and names it if it is new.
    ///
    /// # Errors
    /// It is in use, damaged, or of another node.
    pub async fn open(data: &Path, store: LogStore, node: NodeId) -> Result<Self, StartError> {
        let log = open_log(Storage::Disk(store), data).await?;
        let record = if let Some(record) = stored_record(&log, data, node)? {
            record
        } else {
            let record = Record::new(node);
            store_record(&log, &record).await?;
            record
        };
        Ok(Self {
            log,
            record,
            data: data.to_owned(),
        })
    }

    /// The cluster that the folder belongs to, if it does.
    pub fn cluster(&self) -> Option<&str> {
        self.record
            .settlement
            .as_ref()
            .map(|settlement| settlement.cluster.as_str())
    }

    /// The name of the folder, by which the cluster will know it.
    pub fn incarnation(&self) -> [u8; 16] {
        self.record.incarnation.0
    }

    /// Remembers the cluster that has admitted this node, and at which revision. `members` has this node too.
    ///
    /// # Errors
    /// It cannot be stored.
    pub async fn settle(
        &mut self,
        cluster: &ClusterId,
        at: Revision,
        members: Vec<KnownMember>,
    ) -> Result<(), StartError> {
        let members = members.into_iter().map(|known| {
            let settled = Settled {
                incarnation: Incarnation(known.incarnation),
                member: Member {
                    peer: known.peer,
                    http: known.http,
                },
            };
            (known.id.0, settled)
        });
        self.record.settlement = Some(Settlement {
            cluster: cluster.to_string(),
            members: members.collect(),
        });
        self.record.joined = Some(at.0);
        store_record(&self.log, &self.record).await?;
        tracing::info!(node = self.record.node, %cluster, data = %self.data.display(), "admitted to the cluster");
        Ok(())
    }

    /// Closes the folder, so that the node can open it.
    pub async fn close(self) {
        /// What is queued is a record at most; a disk that needs longer is failing.
        const WITHIN: Duration = Duration::from_secs(5);
        let mut ended = self.log.ended();
        drop(self.log);
        let _ = tokio::time::timeout(WITHIN, ended.changed()).await;
    }
}
