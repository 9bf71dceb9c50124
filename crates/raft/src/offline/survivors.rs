//! What is left of a cluster that has lost its quorum.
//!
//! Nothing is opened where it is: a store that is opened repairs and cleans. The folder is locked against a node that
//! might start, copied, and the copy is opened the way a node opens its own. So everything that a node would refuse
//! (a damaged log, a log that is older than what was promised) is refused here too.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use futures::StreamExt;
use openraft::storage::{RaftLogReader, RaftLogStorage, RaftStateMachine};
use regent_state::State;
use regent_types::{NodeId, Revision};

use super::{Founded, Founder, OfflineError, Terms, failed, found, private};
use crate::config::{LogId, Vote};
use crate::folder::DataFolder;
use crate::identity::Record;
use crate::log::{self, Log, LogStore};
use crate::machine::Machine;
use crate::start;

/// What of a data folder is copied.
const PARTS: [&str; 4] = ["log", "log-segments", "log.mark", "snapshots"];

/// A place in the log: leadership first, then index. So the greatest of several logs is the one that has everything
/// that can have been acknowledged, as far as it is there at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// The term of the leader that wrote it.
    pub term: u64,
    /// That leader.
    pub leader: NodeId,
    /// The index.
    pub index: u64,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "index {} of term {} (node {})",
            self.index, self.term, self.leader
        )
    }
}

impl From<LogId> for Position {
    fn from(id: LogId) -> Self {
        Self {
            term: id.leader_id.term,
            leader: NodeId(id.leader_id.node_id),
            index: id.index,
        }
    }
}

/// What is in one data folder.
pub struct Survivor {
    /// The folder.
    pub data: PathBuf,
    /// Whose it is.
    pub node: NodeId,
    /// The cluster that it belongs to.
    pub cluster: String,
    /// What keeps its log.
    pub log_store: LogStore,
    /// The term that it voted in last, and for whom.
    pub vote: Option<(u64, NodeId)>,
    /// The last entry of its log.
    pub last: Option<Position>,
    /// The last entry that it knows to be acknowledged.
    pub committed: Option<Position>,
    /// The last entry in the snapshot that can be read.
    pub snapshot: Option<Position>,
    /// The revision of the last entry.
    pub revision: Revision,
    /// The sets of voters of which a majority each had to acknowledge: one, or two while the members change.
    pub voters: Vec<BTreeSet<NodeId>>,
    pub(super) state: State,
    pub(super) last_id: Option<LogId>,
}

impl Survivor {
    /// Looks into a data folder. `scratch` is where its copy goes meanwhile.
    ///
    /// # Errors
    /// It is in use, is not a node's, or is damaged.
    pub async fn inspect(data: &Path, scratch: &Path) -> Result<Self, OfflineError> {
        let log_store = LogStore::begun_in(data).ok_or_else(|| OfflineError::NoData(data.to_owned()))?;
        let copy = tempfile::Builder::new()
            .permissions(private())
            .prefix(".regent-copy-")
            .tempdir_in(scratch)
            .map_err(failed(scratch, "cannot create a folder in it"))?;
        {
            let _lock = DataFolder::hold(data)?;
            for part in PARTS {
                copy_all(&data.join(part), &copy.path().join(part))?;
            }
        }
        let mut log = Log::open(log::open(copy.path(), log_store)?)?;
        let mut ended = log.ended();
        let survivor = Self::read(data, copy.path(), log_store, &mut log).await;
        drop(log);
        // An error says that the store is closed: there is one open at a time.
        let _ = ended.changed().await;
        survivor
    }

    async fn read(
        data: &Path,
        copy: &Path,
        log_store: LogStore,
        log: &mut Log,
    ) -> Result<Self, OfflineError> {
        let replay = |source| OfflineError::Replay {
            path: data.to_owned(),
            source,
        };
        let record = start::whose(log, data)?;
        let formed = record.and_then(|Record { node, settlement, .. }| Some((node, settlement?)));
        let (node, settlement) = formed.ok_or_else(|| OfflineError::NeverFormed(data.to_owned()))?;
        let vote: Option<Vote> = log.read_vote().await.map_err(replay)?;
        let last_id = log.get_log_state().await.map_err(replay)?.last_log_id;
        let committed = log.read_committed().await.map_err(replay)?;
        let (mut machine, published) = Machine::open(copy, log).await?;
        let (snapshot, _) = machine.applied_state().await.map_err(replay)?;
        let next = snapshot.map_or(0, |last| last.index + 1);
        let entries = log.entries_stream(next..u64::MAX).await;
        let entries = Box::pin(entries.map(|entry| entry.map(|entry| (entry, None))));
        machine.apply(entries).await.map_err(replay)?;
        let (applied, membership) = machine.applied_state().await.map_err(replay)?;
        let joint = membership.membership().get_joint_config().iter();
        let view = published.load();
        Ok(Self {
            data: data.to_owned(),
            node: NodeId(node),
            cluster: settlement.cluster,
            log_store,
            vote: vote.map(|vote| (vote.leader_id.term, NodeId(vote.leader_id.node_id))),
            // A snapshot that came from a leader may be ahead of the log.
            last: last_id.max(applied).map(Position::from),
            committed: committed.max(snapshot).map(Position::from),
            snapshot: snapshot.map(Position::from),
            revision: view.revision,
            voters: joint
                .map(|set| set.iter().copied().map(NodeId).collect())
                .collect(),
            state: view.state.clone(),
            last_id: last_id.max(applied),
        })
    }
}

// The state holds the hashes of secrets.
impl fmt::Debug for Survivor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Survivor")
            .field("data", &self.data)
            .field("node", &self.node)
            .field("last", &self.last)
            .finish_non_exhaustive()
    }
}

/// All that was found, of one cluster.
#[derive(Debug)]
pub struct Survivors {
    all: Vec<Survivor>,
    chosen: usize,
}

impl Survivors {
    /// Puts them together and chooses the one with the greatest last entry.
    ///
    /// # Errors
    /// They are of different clusters, or of the same node. There must be at least one.
    pub fn new(all: Vec<Survivor>) -> Result<Self, OfflineError> {
        let mut chosen = 0;
        for (at, one) in all.iter().enumerate() {
            for other in &all[..at] {
                if one.cluster != other.cluster {
                    return Err(OfflineError::Clusters {
                        one: other.data.clone(),
                        here: other.cluster.clone(),
                        other: one.data.clone(),
                        there: one.cluster.clone(),
                    });
                }
                if one.node == other.node {
                    return Err(OfflineError::Twice {
                        node: one.node,
                        one: other.data.clone(),
                        other: one.data.clone(),
                    });
                }
            }
            if one.last > all[chosen].last {
                chosen = at;
            }
        }
        assert!(!all.is_empty(), "nothing can be recovered from nothing");
        Ok(Self { all, chosen })
    }

    /// All of them, as they were given.
    pub fn all(&self) -> &[Survivor] {
        &self.all
    }

    /// The one that the new cluster is made from.
    pub fn chosen(&self) -> &Survivor {
        &self.all[self.chosen]
    }

    /// What may be lost, and what is kept though it may never have been acknowledged, in words.
    pub fn losses(&self) -> Vec<String> {
        let chosen = self.chosen();
        let given: BTreeSet<NodeId> = self.all.iter().map(|survivor| survivor.node).collect();
        let voters: BTreeSet<NodeId> = chosen.voters.iter().flatten().copied().collect();
        let missing: Vec<NodeId> = voters.difference(&given).copied().collect();
        let quorum = !chosen.voters.is_empty()
            && chosen
                .voters
                .iter()
                .all(|set| set.intersection(&given).count() > set.len() / 2);
        let mut words = Vec::new();
        words.push(if missing.is_empty() {
            "The folders of all voters are here: nothing that was acknowledged is lost. Started as they are, these \
             nodes form a quorum; then nothing needs to be recovered."
                .to_owned()
        } else if quorum {
            format!(
                "The folders of a majority of the voters are here (without {}): nothing that was acknowledged is \
                 lost. Started as they are, these nodes form a quorum; then nothing needs to be recovered.",
                nodes(&missing)
            )
        } else {
            format!(
                "The data of {} is missing. Writes that were acknowledged by {} and by no node whose folder is here \
                 are lost; how many there are cannot be known from here.",
                nodes(&missing),
                if missing.len() == 1 { "it" } else { "these" },
            )
        });
        let known = chosen.committed.map_or(0, |position| position.index);
        if let Some(last) = chosen.last.filter(|last| last.index > known) {
            words.push(format!(
                "What comes after entry {known}, the last one that node {} knew to be acknowledged, up to entry {} may \
                 have been acknowledged or not; it is kept.",
                chosen.node, last.index
            ));
        }
        for other in &self.all {
            let older = other.last.zip(chosen.last);
            if let Some((theirs, last)) = older
                && (theirs.term, theirs.leader) < (last.term, last.leader)
                && theirs.index > known
            {
                words.push(format!(
                    "The log of node {} ends in an older leadership, at {theirs}. What it has after index {known} and \
                     the chosen log has not was never acknowledged, or the later leader would have it; it is dropped.",
                    other.node
                ));
            }
        }
        words
    }

    /// Makes the new cluster.
    ///
    /// # Errors
    /// As of [`super::restore`].
    pub async fn recover(&self, founder: &Founder, terms: &Terms) -> Result<Founded, OfflineError> {
        found::refuse_existing(&founder.data)?;
        let voted = self.all.iter().filter_map(|survivor| survivor.vote);
        let voted = voted.map(|(term, _)| term).max().unwrap_or(0);
        let chosen = self.chosen();
        found::found(founder, terms, &chosen.state, chosen.last_id, voted).await
    }
}

fn nodes(ids: &[NodeId]) -> String {
    let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
    match ids.split_last() {
        None => "no node".to_owned(),
        Some((only, [])) => format!("node {only}"),
        Some((last, first)) => format!("nodes {} and {last}", first.join(", ")),
    }
}

/// Copies a file or a folder with all that is in it, if it is there.
fn copy_all(from: &Path, to: &Path) -> Result<(), OfflineError> {
    if from.is_dir() {
        fs::create_dir(to).map_err(failed(to, "cannot create the folder"))?;
        for item in fs::read_dir(from).map_err(failed(from, "cannot be listed"))? {
            let item = item.map_err(failed(from, "cannot be listed"))?;
            copy_all(&item.path(), &to.join(item.file_name()))?;
        }
    } else if from.exists() {
        fs::copy(from, to).map_err(failed(from, "cannot be copied"))?;
    }
    Ok(())
}
