//! The data folder of a new cluster's only member.
//!
//! Made aside, synced and then renamed: there is a whole folder or none. What is in it is what a node has that took a
//! snapshot and purged its log: a vote, an identity, a snapshot and no entries.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;

use openraft::storage::RaftLogStorage;
use regent_state::{Plan, State};
use regent_types::ClusterId;

use super::{Founded, Founder, OfflineError, Terms, failed, private};
use crate::BackupInfo;
use crate::config::{LeaderId, LogId, Member, SnapshotMeta, StoredMembership, Vote};
use crate::identity::{Record, Settled, Settlement, new_cluster_id};
use crate::log::{self, Log};
use crate::offload::Offload;
use crate::snapshot::SnapshotStore;
use crate::start;

/// Refuses a folder that has something in it.
pub(super) fn refuse_existing(data: &Path) -> Result<(), OfflineError> {
    match fs::read_dir(data) {
        Ok(mut items) => match items.next() {
            None => Ok(()),
            Some(_) => Err(OfflineError::NotEmpty(data.to_owned())),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(source) => Err(failed(data, "cannot look into the folder")(source)),
    }
}

/// Makes a new cluster of `state`, whose last entry was `last`. `voted` is the highest term that is known to have
/// been voted in.
pub(super) async fn found(
    founder: &Founder,
    terms: &Terms,
    state: &State,
    last: Option<LogId>,
    voted: u64,
) -> Result<Founded, OfflineError> {
    let parent = match founder.data.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    fs::create_dir_all(parent).map_err(failed(parent, "cannot create the folder"))?;
    let aside = tempfile::Builder::new()
        .permissions(private())
        .prefix(".regent-new-")
        .tempdir_in(parent)
        .map_err(failed(parent, "cannot create a folder in it"))?;

    let identity = identity(founder);
    let settlement = identity.settlement.as_ref().expect("it was just made with one");
    let cluster = ClusterId::new(&settlement.cluster).expect("hexadecimal digits make a cluster id");
    let place = place(founder, last, voted);
    let state = state.restored_as(&Plan {
        cluster: cluster.clone(),
        node: founder.node,
        incarnation: identity.incarnation.0,
        peer: founder.peer.clone(),
        http: founder.http.clone(),
        index: place.index,
        term: place.leader_id.term,
        at: terms.at,
        above: terms.above,
        keep_tokens: terms.keep_tokens,
        old_cluster_is_dead: terms.old_cluster_is_dead,
        admin_token: terms.admin_token.clone(),
    })?;
    let meta = SnapshotMeta {
        last_log_id: Some(place),
        last_membership: StoredMembership::new(Some(place), membership(founder)),
    };
    let (snapshots, _) = SnapshotStore::open(aside.path(), None, Offload::Threads)?;
    snapshots.write(&state, &meta)?;
    write_log(founder, aside.path(), place.leader_id.term, &identity).await?;

    sync_all(aside.path()).map_err(failed(aside.path(), "cannot sync the new folder"))?;
    // It goes onto an empty folder, or onto nothing; anything else is refused by the system.
    fs::rename(aside.path(), &founder.data)
        .map_err(failed(&founder.data, "cannot give the new folder its name"))?;
    // There is nothing under the old name any more.
    drop(aside.keep());
    File::open(parent)
        .and_then(|parent| parent.sync_all())
        .map_err(failed(parent, "cannot sync the folder"))?;
    let restored = state.restored().expect("the state was just restored");
    Ok(Founded {
        cluster,
        former: restored.from[0].clone(),
        revision: restored.revision,
        no_lease_before: Some(restored.no_lease_before).filter(|at| *at > 0),
        content: BackupInfo::of(&state),
    })
}

/// Where the new cluster's log begins: after everything that was, in a term of its own.
fn place(founder: &Founder, last: Option<LogId>, voted: u64) -> LogId {
    let (term, index) = last.map_or((0, 0), |last| (last.leader_id.term, last.index));
    LogId {
        leader_id: LeaderId {
            term: term.max(voted) + 1,
            node_id: founder.node.0,
        },
        index: index + 1,
    }
}

/// Who the node is: the only one that founded its cluster.
fn identity(founder: &Founder) -> Record {
    let record = Record::new(founder.node);
    let settled = Settled {
        incarnation: record.incarnation,
        member: member(founder),
    };
    Record {
        settlement: Some(Settlement {
            cluster: new_cluster_id(),
            members: BTreeMap::from([(founder.node.0, settled)]),
        }),
        ..record
    }
}

fn member(founder: &Founder) -> Member {
    Member {
        peer: founder.peer.clone(),
        http: founder.http.clone(),
    }
}

/// Consensus of one.
fn membership(founder: &Founder) -> openraft::Membership<u64, Member> {
    let voters = vec![std::collections::BTreeSet::from([founder.node.0])];
    let nodes = BTreeMap::from([(founder.node.0, member(founder))]);
    openraft::Membership::new(voters, nodes).expect("the only voter is among the nodes")
}

async fn write_log(founder: &Founder, data: &Path, term: u64, identity: &Record) -> Result<(), OfflineError> {
    let mut log = Log::open(log::open(data, founder.log_store)?)?;
    let mut ended = log.ended();
    start::store_record(&log, identity).await?;
    log.save_vote(&Vote::new(term, founder.node.0))
        .await
        .map_err(failed(data, "cannot store the vote"))?;
    drop(log);
    // An error says that the store is closed.
    let _ = ended.changed().await;
    Ok(())
}

/// Syncs every file and folder below.
fn sync_all(folder: &Path) -> std::io::Result<()> {
    for item in fs::read_dir(folder)? {
        let item = item?;
        if item.file_type()?.is_dir() {
            sync_all(&item.path())?;
        } else {
            File::open(item.path())?.sync_all()?;
        }
    }
    File::open(folder)?.sync_all()
}
