//! Restore and recover on folders as nodes leave them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::type_config::TypeConfigExt;
use regent_types::{ClusterId, TemplateName};
use tempfile::TempDir;

use super::*;
use crate::config::{Entry, LeaderId, LogId, Member, Payload, TypeConfig, Vote};
use crate::folder::DataFolder;
use crate::identity::{Incarnation, Record, Settled, Settlement};
use crate::log::{self, Log, ONE_SLED};
use crate::machine::Machine;
use crate::machine::tests::entry;
use crate::start;

/// A node's folder after `entries`, of which so many are known to be committed.
struct Left {
    data: TempDir,
}

impl Left {
    async fn make(node: u64, store: LogStore, vote: u64, committed: u64, entries: Vec<Entry>) -> Self {
        let data = tempfile::tempdir().unwrap();
        let mut log = Log::open(log::open(data.path(), store).unwrap()).unwrap();
        let settled = |_| Settled {
            incarnation: Incarnation([1; 16]),
            member: Member::default(),
        };
        let record = Record {
            incarnation: Incarnation([1; 16]),
            settlement: Some(Settlement {
                cluster: "old".to_owned(),
                members: (1..=3).map(|id| (id, settled(id))).collect(),
            }),
            ..Record::new(NodeId(node))
        };
        start::store_record(&log, &record).await.unwrap();
        log.save_vote(&Vote::new(vote, node)).await.unwrap();
        let known = entries.iter().find(|entry| entry.log_id.index == committed);
        let known = known.map(|entry| entry.log_id);
        append(&mut log, entries).await;
        log.save_committed(known).await.unwrap();
        // It is written with what follows.
        log.save_vote(&Vote::new(vote, node)).await.unwrap();
        close(log).await;
        Self { data }
    }

    async fn inspect(&self) -> Result<Survivor, OfflineError> {
        let scratch = tempfile::tempdir().unwrap();
        let survivor = Survivor::inspect(self.data.path(), scratch.path()).await;
        assert_eq!(
            fs::read_dir(scratch.path()).unwrap().count(),
            0,
            "the copy is left"
        );
        survivor
    }
}

async fn append(log: &mut Log, entries: Vec<Entry>) {
    let (sender, flushed) = TypeConfig::oneshot();
    log.append(entries, IOFlushed::signal(sender)).await.unwrap();
    flushed.await.unwrap().unwrap();
}

async fn close(log: Log) {
    let mut ended = log.ended();
    drop(log);
    let _ = ended.changed().await;
}

/// The membership of three, and then writes of which the first gives the cluster its identity.
fn written(term: u64, until: u64) -> Vec<Entry> {
    let mut entries = vec![members(term, 0)];
    entries.extend((1..=until).map(|index| of_term(term, entry(index, 50))));
    entries
}

fn members(term: u64, index: u64) -> Entry {
    let nodes: BTreeMap<u64, Member> = (1..=3).map(|id| (id, Member::default())).collect();
    let voters = vec![(1..=3).collect()];
    Entry {
        log_id: LogId {
            leader_id: LeaderId { term, node_id: 1 },
            index,
        },
        payload: Payload::Membership(openraft::Membership::new(voters, nodes).unwrap()),
    }
}

fn of_term(term: u64, entry: Entry) -> Entry {
    let leader_id = LeaderId { term, node_id: 1 };
    Entry {
        log_id: LogId {
            leader_id,
            index: entry.log_id.index,
        },
        ..entry
    }
}

fn founder(data: &Path, log_store: LogStore) -> Founder {
    Founder {
        node: NodeId(9),
        data: data.to_owned(),
        peer: "10.0.0.9:7000".to_owned(),
        http: "http://10.0.0.9:8000".to_owned(),
        log_store,
    }
}

fn terms() -> Terms {
    Terms {
        at: 5_000,
        above: Revision(0),
        keep_tokens: false,
        old_cluster_is_dead: false,
        admin_token: Some((regent_types::TokenId::new("fresh").unwrap(), [9; 32])),
    }
}

/// Every file below with what is in it.
fn content(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for item in fs::read_dir(folder).unwrap() {
        let path = item.unwrap().path();
        if path.is_dir() {
            found.extend(content(&path));
        } else {
            let bytes = fs::read(&path).unwrap();
            found.insert(path, bytes);
        }
    }
    found
}

#[tokio::test]
async fn a_folder_is_looked_into_without_a_change_and_not_while_it_is_in_use() {
    let _alone = ONE_SLED.lock().await;
    for store in [LogStore::Sled, LogStore::Segments] {
        let left = Left::make(2, store, 4, 8, written(3, 10)).await;
        let before = content(left.data.path());
        let found = left.inspect().await.unwrap();
        assert_eq!(content(left.data.path()), before);
        let at = |index| {
            Some(Position {
                term: 3,
                leader: NodeId(1),
                index,
            })
        };
        assert_eq!(
            (found.node, &*found.cluster, found.log_store),
            (NodeId(2), "old", store)
        );
        assert_eq!(
            (found.vote, found.last, found.committed),
            (Some((4, NodeId(2))), at(10), at(8))
        );
        assert_eq!(found.snapshot, None);
        assert_eq!(found.voters, [BTreeSet::from([1, 2, 3].map(NodeId))]);

        let running = DataFolder::open(left.data.path()).unwrap();
        let before = content(left.data.path());
        let refused = left.inspect().await.unwrap_err();
        assert!(refused.to_string().contains("in use"), "{refused}");
        assert_eq!(content(left.data.path()), before);
        drop(running);
    }
    let nothing = tempfile::tempdir().unwrap();
    let refused = Survivor::inspect(nothing.path(), nothing.path())
        .await
        .unwrap_err();
    assert!(matches!(refused, OfflineError::NoData(_)), "{refused}");
}

#[tokio::test]
async fn the_later_leadership_counts_for_more_than_the_longer_log() {
    let _alone = ONE_SLED.lock().await;
    let longer = Left::make(1, LogStore::Segments, 3, 9, written(3, 20)).await;
    let mut later = written(3, 12);
    later.push(of_term(5, entry(13, 50)));
    let later = Left::make(2, LogStore::Segments, 5, 11, later).await;
    let all = vec![longer.inspect().await.unwrap(), later.inspect().await.unwrap()];
    let survivors = Survivors::new(all).unwrap();
    assert_eq!(survivors.chosen().node, NodeId(2));
    let words = survivors.losses().join("\n");
    for word in [
        "majority of the voters are here (without node 3)",
        "after entry 11, the last one that node 2 knew to be acknowledged, up to entry 13",
        "The log of node 1 ends in an older leadership, at index 20 of term 3",
    ] {
        assert!(words.contains(word), "{word} is not in: {words}");
    }

    let alone = Survivors::new(vec![later.inspect().await.unwrap()]).unwrap();
    let words = alone.losses().join("\n");
    assert!(words.contains("The data of nodes 1 and 3 is missing"), "{words}");
    assert!(words.contains("are lost"), "{words}");
}

#[tokio::test]
async fn a_recovered_cluster_has_the_whole_log_and_begins_above_it() {
    let _alone = ONE_SLED.lock().await;
    for store in [LogStore::Sled, LogStore::Segments] {
        let left = Left::make(2, store, 7, 8, written(3, 10)).await;
        let survivors = Survivors::new(vec![left.inspect().await.unwrap()]).unwrap();
        let parent = tempfile::tempdir().unwrap();
        let data = parent.path().join("new");
        let founded = survivors.recover(&founder(&data, store), &terms()).await.unwrap();
        assert_eq!(founded.former, ClusterId::new("test").unwrap());
        assert_eq!(founded.revision.0, regent_state::BASE_STEP + 11);
        assert_eq!(
            fs::read_dir(parent.path()).unwrap().count(),
            1,
            "something is left beside it"
        );

        // As the node will find it.
        let mut log = Log::open(log::open(&data, store).unwrap()).unwrap();
        let record = start::whose(&log, &data).unwrap().unwrap();
        let settlement = record.settlement.unwrap();
        assert_eq!(
            (record.node, settlement.cluster.as_str()),
            (9, founded.cluster.as_str())
        );
        let vote = openraft::storage::RaftLogReader::read_vote(&mut log)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(vote.leader_id.term, 8, "after every term that was voted in");
        let (machine, published) = Machine::open(&data, &log).await.unwrap();
        let view = published.load();
        assert_eq!(view.revision, founded.revision);
        assert!(
            view.state.template(&TemplateName::new("t10").unwrap()).is_some(),
            "the last entry"
        );
        assert_eq!(view.state.cluster_id(), Some(&founded.cluster));
        drop(machine);
        close(log).await;

        let again = survivors
            .recover(&founder(&data, store), &terms())
            .await
            .unwrap_err();
        assert!(matches!(again, OfflineError::NotEmpty(_)), "{again}");
    }
}

#[tokio::test]
async fn a_damaged_log_and_mixed_folders_are_refused() {
    let _alone = ONE_SLED.lock().await;
    let one = Left::make(1, LogStore::Segments, 3, 9, written(3, 20)).await;
    let folder = one.data.path().join("log-segments");
    let found = one.inspect().await.unwrap();
    let same = one.inspect().await.unwrap();
    let twice = Survivors::new(vec![found, same]).unwrap_err();
    assert!(
        matches!(twice, OfflineError::Twice { node: NodeId(1), .. }),
        "{twice}"
    );
    let mut other = one.inspect().await.unwrap();
    (other.node, other.cluster) = (NodeId(2), "another".to_owned());
    let mixed = Survivors::new(vec![one.inspect().await.unwrap(), other]).unwrap_err();
    assert!(mixed.to_string().contains("of cluster old"), "{mixed}");

    let needle = b"{\"n\":10,";
    let found = content(&folder).into_iter().find_map(|(path, bytes)| {
        let at = bytes.windows(needle.len()).position(|window| window == needle)?;
        Some((path, bytes, at))
    });
    let (path, mut bytes, at) = found.expect("an entry in the middle");
    bytes[at] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let refused = one.inspect().await.unwrap_err();
    assert!(
        matches!(refused, OfflineError::Log(LogError::Damaged { .. })),
        "{refused}"
    );
}

#[tokio::test]
async fn a_backup_that_is_not_whole_makes_no_folder() {
    let _alone = ONE_SLED.lock().await;
    let left = Left::make(2, LogStore::Segments, 3, 8, written(3, 300)).await;
    let survivor = left.inspect().await.unwrap();
    let parent = tempfile::tempdir().unwrap();
    let file = parent.path().join("a.backup");
    let meta = crate::config::SnapshotMeta {
        last_log_id: survivor.last_id,
        ..crate::config::SnapshotMeta::default()
    };
    let mut bytes = Vec::new();
    crate::snapshot::format::write(&mut bytes, &survivor.state, &meta).unwrap();
    let data = parent.path().join("new");
    let founder = founder(&data, LogStore::Segments);
    for damage in ["cut", "flipped", "empty", "longer"] {
        let mut damaged = bytes.clone();
        let middle = damaged.len() / 2;
        match damage {
            "cut" => damaged.truncate(middle),
            "flipped" => damaged[middle] ^= 4,
            "empty" => damaged.clear(),
            _ => damaged.push(0),
        }
        fs::write(&file, &damaged).unwrap();
        let refused = restore(&file, &founder, &terms()).await.unwrap_err();
        let text = refused.to_string();
        assert!(
            text.contains("damaged") && text.contains("a.backup"),
            "{damage}: {text}"
        );
        assert!(!data.exists());
        assert!(BackupInfo::read(&file).is_err());
    }
    fs::write(&file, &bytes).unwrap();
    assert_eq!(
        BackupInfo::read(&file).unwrap().cluster,
        Some(ClusterId::new("test").unwrap())
    );
    fs::create_dir(&data).unwrap();
    restore(&file, &founder, &terms()).await.unwrap();
    let refused = restore(&file, &founder, &terms()).await.unwrap_err();
    assert!(matches!(refused, OfflineError::NotEmpty(_)), "{refused}");
}
