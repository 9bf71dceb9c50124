//! The state machine as openraft drives it: applies entries, publishes views, takes and installs snapshots.
//!
//! The state is in memory alone; after a restart it is the newest snapshot plus the log. Entries are applied
//! in batches. After each batch its view is published and only then are the writers answered, so whoever got
//! an answer finds the result in the published view. Nothing here decides anything about a request: that is
//! `regent_state`. An entry that does not decode stops the node, because skipping it would let this node
//! differ from the others in silence.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures::{FutureExt, Stream, StreamExt};
use openraft::OptionalSend;
use openraft::storage::{ApplyResponder, EntryResponder, RaftSnapshotBuilder, RaftStateMachine, Snapshot};
use regent_state::{Leadership, Meta, Request, State, encode_applied};
use regent_types::{NodeId, Revision};
use tokio::sync::watch;
use tracing::{debug, info};

use crate::config::{
    Entry, LeaderId, LogId, Member, Payload, Reply, SnapshotMeta, StoredMembership, TypeConfig,
};
use crate::digest::Checkpoint;
use crate::log::Log;
use crate::offload::Offload;
use crate::snapshot::{SnapshotError, SnapshotFile, SnapshotStore};

/// openraft with our types and our state machine.
pub(crate) type Raft = openraft::Raft<TypeConfig, Machine>;

/// Entries applied between two published views at most: what a reader may lag behind under full load, and
/// how long the worker runs without yielding.
const APPLY_BATCH: usize = 256;
/// A checkpoint is taken at every index that is a multiple of this, the same on every node.
const CHECKPOINT_EVERY: u64 = 64;
/// Checkpoints kept. Nodes exchange them every few seconds, so this must span what they can differ in
/// progress: 16,384 entries.
const CHECKPOINTS: usize = 256;

/// The state right after some entry.
#[derive(Clone, Debug)]
pub struct View {
    /// The state.
    pub state: State,
    /// Revision of the last applied entry; the zero revision before the first.
    pub revision: Revision,
    /// Index of the last applied entry; zero before the first, too.
    pub applied_index: u64,
    /// That entry, for a backup.
    pub(crate) last: Option<LogId>,
    /// The membership then.
    pub(crate) membership: Arc<StoredMembership>,
}

/// What the machine publishes; clones share it.
#[derive(Clone)]
pub(crate) struct Published(Arc<Board>);

struct Board {
    view: ArcSwap<View>,
    revision: watch::Sender<Revision>,
    checkpoints: Mutex<VecDeque<Checkpoint>>,
}

impl Published {
    pub(crate) fn new(view: View) -> Self {
        Self(Arc::new(Board {
            revision: watch::Sender::new(view.revision),
            view: ArcSwap::from_pointee(view),
            checkpoints: Mutex::default(),
        }))
    }

    /// The newest view.
    pub(crate) fn load(&self) -> Arc<View> {
        self.0.view.load_full()
    }

    /// Changes after the view that has the revision is published.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Revision> {
        self.0.revision.subscribe()
    }

    /// The newest checkpoints, oldest first.
    pub(crate) fn checkpoints(&self) -> Vec<Checkpoint> {
        self.ring().iter().copied().collect()
    }

    fn publish(&self, view: View) {
        let revision = view.revision;
        self.0.view.store(Arc::new(view));
        self.0.revision.send_replace(revision);
    }

    fn ring(&self) -> MutexGuard<'_, VecDeque<Checkpoint>> {
        // A push or a clear is never half done.
        self.0.checkpoints.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The replicated state, its place in the log, and its snapshots.
pub(crate) struct Machine {
    state: State,
    applied: Option<LogId>,
    membership: Arc<StoredMembership>,
    revision: Revision,
    published: Published,
    snapshots: SnapshotStore,
    offload: Offload,
}

impl Machine {
    /// Restores the newest usable snapshot of the data folder. What follows it is in `log`, and openraft
    /// applies that when it starts.
    ///
    /// # Errors
    /// The log begins after the end of every readable snapshot, or the folder fails.
    pub(crate) async fn open(data: &Path, log: &Log) -> Result<(Self, Published), SnapshotError> {
        let folder = data.to_owned();
        let purged = log.purged();
        let offload = log.offload();
        let opened = offload
            .run(move || SnapshotStore::open(&folder, purged, offload))
            .await;
        let (snapshots, restored) = opened.map_err(|source| SnapshotError::Io {
            path: data.to_owned(),
            what: "reading the snapshots was interrupted",
            source,
        })??;
        let (state, meta) = restored.map_or_else(
            || (State::new(), SnapshotMeta::default()),
            |restored| (restored.state, restored.meta),
        );
        let revision = revision_at(&state, meta.last_log_id);
        let membership = Arc::new(meta.last_membership);
        let view = View {
            state: state.clone(),
            revision,
            applied_index: index_of(meta.last_log_id),
            last: meta.last_log_id,
            membership: membership.clone(),
        };
        let published = Published::new(view);
        let machine = Self {
            state,
            applied: meta.last_log_id,
            membership,
            revision,
            published: published.clone(),
            snapshots,
            offload,
        };
        Ok((machine, published))
    }

    /// Applies one entry. `wanted` says whether somebody waits for the reply.
    fn apply_one(&mut self, entry: &Entry, wanted: bool) -> Result<Reply, io::Error> {
        let LogId { leader_id, index } = entry.log_id;
        let revision = Revision(self.state.revision_base() + index);
        let mut reply = Bytes::new();
        match &entry.payload {
            Payload::Blank => {}
            Payload::Membership(membership) => {
                info!(index, %membership, "the membership has changed");
                let membership = StoredMembership::new(Some(entry.log_id), membership.clone());
                self.membership = Arc::new(membership);
            }
            Payload::Normal(proposal) => {
                let request = Request::decode(&proposal.body).map_err(|error| {
                    let what = format!("the operation at index {index} cannot be decoded: {error}");
                    io::Error::new(io::ErrorKind::InvalidData, what)
                })?;
                let leadership = Leadership {
                    term: leader_id.term,
                    node: NodeId(leader_id.node_id),
                };
                let meta = Meta {
                    revision,
                    leadership,
                    at: proposal.at,
                };
                let applied = self.state.apply(&meta, &request);
                if wanted {
                    reply = Bytes::from(encode_applied(&applied));
                }
            }
        }
        self.applied = Some(entry.log_id);
        self.revision = revision;
        if index.is_multiple_of(CHECKPOINT_EVERY) {
            let mut ring = self.published.ring();
            if ring.len() == CHECKPOINTS {
                ring.pop_front();
            }
            ring.push_back(Checkpoint {
                index,
                level: self.state.feature_level(),
                digest: self.state.digest(),
            });
        }
        Ok(Reply {
            revision: revision.0,
            applied: reply,
        })
    }

    /// Makes apply differ from the other nodes' from now on.
    #[cfg(feature = "faults")]
    pub(crate) fn skew(&mut self, by: u64) {
        self.state.skew(by);
    }

    /// Publishes the state, then answers those who wait.
    fn publish(&mut self, answers: &mut Vec<(ApplyResponder<TypeConfig>, Reply)>) {
        self.published.publish(View {
            state: self.state.clone(),
            revision: self.revision,
            applied_index: index_of(self.applied),
            last: self.applied,
            membership: self.membership.clone(),
        });
        for (responder, reply) in answers.drain(..) {
            responder.send(reply);
        }
    }

    fn meta(&self) -> SnapshotMeta {
        SnapshotMeta {
            last_log_id: self.applied,
            last_membership: StoredMembership::clone(&self.membership),
        }
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotData = SnapshotFile;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.applied, StoredMembership::clone(&self.membership)))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut answers = Vec::new();
        let mut unpublished = 0;
        let outcome = loop {
            let ready = entries.next().now_or_never();
            if ready.is_none() && unpublished > 0 {
                // The next entry must be fetched first: nobody should wait for it.
                self.publish(&mut answers);
                unpublished = 0;
            }
            let next = match ready {
                Some(next) => next,
                None => entries.next().await,
            };
            let (entry, responder) = match next {
                None => break Ok(()),
                Some(Err(error)) => break Err(error),
                Some(Ok(item)) => item,
            };
            match self.apply_one(&entry, responder.is_some()) {
                Ok(reply) => answers.extend(responder.map(|responder| (responder, reply))),
                Err(error) => break Err(error),
            }
            unpublished += 1;
            if unpublished == APPLY_BATCH {
                self.publish(&mut answers);
                unpublished = 0;
                tokio::task::yield_now().await;
            }
        };
        if unpublished > 0 {
            self.publish(&mut answers);
        }
        outcome
    }

    async fn get_snapshot_builder(&mut self) -> Self::SnapshotBuilder {
        Builder {
            state: self.state.clone(),
            meta: self.meta(),
            snapshots: self.snapshots.clone(),
            offload: self.offload,
        }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, file: SnapshotFile) -> Result<(), io::Error> {
        let snapshots = self.snapshots.clone();
        let expected = meta.clone();
        let restored = self
            .offload
            .run(move || snapshots.install(&expected, &file))
            .await??;
        self.state = restored.state;
        self.applied = restored.meta.last_log_id;
        self.membership = Arc::new(restored.meta.last_membership);
        self.revision = revision_at(&self.state, self.applied);
        // They belong to entries that this node did not apply itself.
        self.published.ring().clear();
        self.publish(&mut Vec::new());
        info!(last = ?self.applied, "a snapshot from the leader is installed");
        Ok(())
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> Result<Option<Snapshot<LeaderId, u64, Member, SnapshotFile>>, io::Error> {
        let snapshots = self.snapshots.clone();
        if self.offload.run(move || snapshots.drop_spoiled()).await?? {
            // A follower waits for it, and asks again until it gets one.
            self.get_snapshot_builder().await.build_snapshot().await?;
        }
        Ok(self
            .snapshots
            .newest()
            .map(|(meta, snapshot)| Snapshot { meta, snapshot }))
    }
}

/// Writes a snapshot of the state as it was when this was made, while entries go on being applied.
pub(crate) struct Builder {
    state: State,
    meta: SnapshotMeta,
    snapshots: SnapshotStore,
    offload: Offload,
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    type SnapshotData = SnapshotFile;

    async fn build_snapshot(&mut self) -> Result<Snapshot<LeaderId, u64, Member, SnapshotFile>, io::Error> {
        let (state, meta, snapshots) = (self.state.clone(), self.meta.clone(), self.snapshots.clone());
        let begun = std::time::Instant::now();
        let snapshot = self.offload.run(move || snapshots.write(&state, &meta)).await??;
        debug!(last = ?self.meta.last_log_id, elapsed = ?begun.elapsed(), "a snapshot is written");
        metrics::histogram!("regent_raft_snapshot_seconds").record(begun.elapsed());
        Ok(Snapshot {
            meta: self.meta.clone(),
            snapshot,
        })
    }
}

fn index_of(last: Option<LogId>) -> u64 {
    last.map_or(0, |last| last.index)
}

fn revision_at(state: &State, last: Option<LogId>) -> Revision {
    last.map_or(Revision(0), |last| Revision(state.revision_base() + last.index))
}

#[cfg(test)]
pub(crate) mod tests;
