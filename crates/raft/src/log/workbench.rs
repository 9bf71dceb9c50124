//! The log by itself, for the benches and for the tests that crash it. Not a part of what this crate offers.

use std::io;
use std::path::Path;

use bytes::Bytes;
use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage};
use openraft::type_config::TypeConfigExt;
use serde::{Deserialize, Serialize};

use super::{Log, LogError, LogStore, MemoryDisk, record};
use crate::config::{Entry, LeaderId, LogId, Payload, Proposal, TypeConfig, Vote};
use crate::error::StartError;
use crate::offload::Offload;
use crate::snapshot::SnapshotStore;

/// The node that all entries here are of.
const NODE: u64 = 1;

/// An open log.
#[derive(Clone)]
pub struct Workbench {
    log: Log,
}

impl std::fmt::Debug for Workbench {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workbench").finish_non_exhaustive()
    }
}

/// Everything that a log holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Index of the last purged entry.
    pub purged: Option<u64>,
    /// Index of the last committed entry that was noted.
    pub committed: Option<u64>,
    /// Term and node of the vote, and whether it is a leader's.
    pub vote: Option<(u64, u64, bool)>,
    /// Index of the last entry of the newest snapshot, where there is a folder of them.
    pub snapshot: Option<u64>,
    /// The entries, in order.
    pub entries: Vec<HeldEntry>,
}

/// What identifies an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldEntry {
    /// Its index.
    pub index: u64,
    /// The term it was appended in.
    pub term: u64,
    /// Over all of its record.
    pub checksum: u32,
}

impl Workbench {
    /// Opens the log of a data folder as a node does. Blocks while it reads.
    ///
    /// # Errors
    /// The folder is in use, or what is in it is refused.
    pub fn open(data: &Path, store: LogStore) -> Result<Self, LogError> {
        let log = Log::open(super::open(data, store)?)?;
        Ok(Self { log })
    }

    /// The same over the in-memory twin.
    ///
    /// # Errors
    /// What is on the disk is refused.
    pub fn on(disk: &MemoryDisk) -> Result<Self, LogError> {
        let log = Log::open(disk.engine())?;
        Ok(Self { log })
    }

    /// Appends an entry for each of these bodies, from `first` on; durable on return.
    ///
    /// # Errors
    /// The log has failed.
    pub async fn append(&mut self, term: u64, first: u64, bodies: Vec<Vec<u8>>) -> io::Result<()> {
        let entries: Vec<Entry> = (first..)
            .zip(bodies)
            .map(|(index, body)| entry(term, index, body.into()))
            .collect();
        let (sender, flushed) = TypeConfig::oneshot();
        self.log.append(entries, IOFlushed::signal(sender)).await?;
        flushed.await.map_err(io::Error::other)?
    }

    /// Saves a vote; durable on return.
    ///
    /// # Errors
    /// The log has failed.
    pub async fn vote(&mut self, term: u64, node: u64) -> io::Result<()> {
        self.log.save_vote(&Vote::new(term, node)).await
    }

    /// Removes the entries after `index`; durable on return.
    ///
    /// # Errors
    /// The log has failed.
    pub async fn truncate_after(&mut self, index: u64) -> io::Result<()> {
        let last = self.id_of(index).await?;
        self.log.truncate_after(Some(last)).await
    }

    /// Forgets the entries up to `index`; durable with whatever is made durable next.
    ///
    /// # Errors
    /// The log has failed.
    pub async fn purge(&mut self, index: u64) -> io::Result<()> {
        let upto = self.id_of(index).await?;
        self.log.purge(upto).await
    }

    /// Notes what is committed; durable with whatever is made durable next.
    ///
    /// # Errors
    /// The log has failed.
    pub async fn committed(&mut self, index: u64) -> io::Result<()> {
        let committed = self.id_of(index).await?;
        self.log.save_committed(Some(committed)).await
    }

    /// Reads everything.
    ///
    /// # Errors
    /// An entry cannot be read.
    pub async fn held(&mut self) -> io::Result<Held> {
        let vote = self.log.read_vote().await?;
        let entries = self.log.try_get_log_entries(..).await?;
        Ok(Held {
            purged: self.log.purged().map(|id| id.index),
            committed: self.log.read_committed().await?.map(|id| id.index),
            vote: vote.map(|vote| (vote.leader_id.term, vote.leader_id.node_id, vote.committed)),
            snapshot: None,
            entries: entries
                .iter()
                .map(|entry| HeldEntry {
                    index: entry.log_id.index,
                    term: entry.log_id.leader_id.term,
                    checksum: crc32fast::hash(&record::encode_entry(entry)),
                })
                .collect(),
        })
    }

    /// Closes it, and waits until its folder may be opened again.
    pub async fn close(self) {
        let mut ended = self.log.ended();
        drop(self);
        while ended.changed().await.is_ok() {}
    }

    async fn id_of(&mut self, index: u64) -> io::Result<LogId> {
        let found = self.log.try_get_log_entries(index..=index).await?;
        found
            .first()
            .map(|entry| entry.log_id)
            .ok_or_else(|| io::Error::other(format!("there is no entry {index}")))
    }
}

/// Opens a data folder as a node does when it starts, snapshots too, and says what it holds. The folder must not be
/// needed afterwards: opening completes what a crash interrupted.
///
/// # Errors
/// A node would not start either.
pub async fn look(data: &Path) -> Result<Held, StartError> {
    let store = LogStore::begun_in(data).unwrap_or_default();
    let mut bench = Workbench::open(data, store)?;
    let (snapshots, _) = SnapshotStore::open(data, bench.log.purged(), Offload::Threads)?;
    let newest = snapshots.newest().and_then(|(meta, _)| meta.last_log_id);
    let mut held = bench
        .held()
        .await
        .map_err(|error| StartError::Raft(error.to_string()))?;
    held.snapshot = newest.map(|id| id.index);
    bench.close().await;
    Ok(held)
}

/// An entry as the log stores it.
#[must_use]
pub fn encode_record(term: u64, index: u64, body: Bytes) -> Vec<u8> {
    record::encode_entry(&entry(term, index, body))
}

/// Reads what [`encode_record`] made, and checks it.
///
/// # Errors
/// It is damaged, or of another index.
pub fn decode_record(index: u64, bytes: &[u8]) -> io::Result<Bytes> {
    match record::decode_entry(index, bytes)
        .map_err(io::Error::other)?
        .payload
    {
        Payload::Normal(proposal) => Ok(proposal.body),
        Payload::Blank | Payload::Membership(_) => Ok(Bytes::new()),
    }
}

fn entry(term: u64, index: u64, body: Bytes) -> Entry {
    Entry {
        log_id: log_id(term, index),
        payload: Payload::Normal(Proposal { at: index, body }),
    }
}

fn log_id(term: u64, index: u64) -> LogId {
    LogId {
        leader_id: LeaderId { term, node_id: NODE },
        index,
    }
}
