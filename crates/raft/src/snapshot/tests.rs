//! Snapshots on disk: round trip, damage, retention, which one a start takes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use bytes::Bytes;
use regent_state::{Leadership, Meta, State};
use regent_types::{NodeId, Revision};

use super::store::Restored;
use super::*;
use crate::config::{LeaderId, LogId, Member, SnapshotMeta, StoredMembership};
use crate::machine::tests::request;
use crate::offload::Offload;

fn id(index: u64) -> LogId {
    LogId {
        leader_id: LeaderId { term: 2, node_id: 3 },
        index,
    }
}

fn meta(index: u64) -> SnapshotMeta {
    let membership = openraft::Membership::new(
        vec![BTreeSet::from([3])],
        BTreeMap::from([(3, Member::default())]),
    )
    .expect("the voter is a node");
    let membership = StoredMembership::new(Some(id(1)), membership);
    SnapshotMeta {
        last_log_id: Some(id(index)),
        last_membership: membership,
    }
}

/// A state after `count` operations of about `len` bytes each.
fn state(count: u64, len: usize) -> State {
    let mut state = State::new();
    for index in 1..=count {
        let leadership = Leadership {
            term: 2,
            node: NodeId(3),
        };
        let meta = Meta {
            revision: Revision(index),
            leadership,
            at: index,
        };
        state
            .apply(&meta, &request(index, len))
            .expect("a node may put templates");
    }
    state
}

fn files(data: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(data.join("snapshots"))
        .unwrap()
        .map(|item| item.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    found.sort();
    found
}

#[test]
fn a_snapshot_of_many_frames_round_trips() {
    let data = tempfile::tempdir().unwrap();
    let (store, restored) = SnapshotStore::open(data.path(), None, Offload::Threads).unwrap();
    assert!(restored.is_none());
    let state = state(200, 20_000);
    store.write(&state, &meta(200)).unwrap();
    assert_eq!(store.newest().unwrap().0, meta(200));

    let (store, restored) = SnapshotStore::open(data.path(), Some(id(200)), Offload::Threads).unwrap();
    let restored = restored.unwrap();
    assert_eq!(restored.meta, meta(200));
    assert_eq!(restored.state.content_digest(), state.content_digest());
    assert_eq!(restored.state.digest(), state.digest());
    assert_eq!(store.newest().unwrap().0, meta(200));
}

#[test]
fn a_snapshot_of_the_first_version_is_read() {
    let data = tempfile::tempdir().unwrap();
    let (store, _) = SnapshotStore::open(data.path(), None, Offload::Threads).unwrap();
    let state = state(20, 1_000);
    store.write(&state, &meta(20)).unwrap();
    let path = files(data.path(), "snapshot").remove(0);
    let old = format::in_version_1(&fs::read(&path).unwrap(), state.content_digest());
    fs::write(&path, old).unwrap();
    let (_, restored) = SnapshotStore::open(data.path(), Some(id(20)), Offload::Threads).unwrap();
    let restored = restored.unwrap();
    assert_eq!(restored.meta, meta(20));
    assert_eq!(restored.state.content_digest(), state.content_digest());
}

#[test]
fn the_newest_two_are_kept_and_unfinished_ones_are_removed() {
    let data = tempfile::tempdir().unwrap();
    let (store, _) = SnapshotStore::open(data.path(), None, Offload::Threads).unwrap();
    for count in [5, 10, 15] {
        store.write(&state(count, 10), &meta(count)).unwrap();
    }
    assert_eq!(files(data.path(), "snapshot").len(), 2);
    fs::write(data.path().join("snapshots/written-7.part"), b"half").unwrap();
    let (_, restored) = SnapshotStore::open(data.path(), None, Offload::Threads).unwrap();
    assert_eq!(restored.unwrap().meta, meta(15));
    assert!(files(data.path(), "part").is_empty());
}

#[test]
fn every_cut_and_every_flipped_bit_is_refused() {
    let data = tempfile::tempdir().unwrap();
    let (store, _) = SnapshotStore::open(data.path(), None, Offload::Threads).unwrap();
    store.write(&state(6, 40), &meta(6)).unwrap();
    let path = files(data.path(), "snapshot").remove(0);
    let whole = fs::read(&path).unwrap();
    let check = |bytes: &[u8]| {
        let read = format::read(&path, &mut &bytes[..]).map(drop);
        // Before it is sent it is only checked.
        assert_eq!(
            format::check(&path, &mut &bytes[..]).is_err(),
            read.is_err(),
            "{read:?}"
        );
        read
    };
    check(&whole).unwrap();

    for len in 0..whole.len() {
        assert!(
            check(&whole[..len]).is_err(),
            "cut to {len} of {} bytes",
            whole.len()
        );
    }
    for byte in 0..whole.len() {
        for bit in 0..8 {
            let mut flipped = whole.clone();
            flipped[byte] ^= 1 << bit;
            assert!(check(&flipped).is_err(), "byte {byte} bit {bit}");
        }
    }
    let mut longer = whole.clone();
    longer.push(0);
    let refused = check(&longer).unwrap_err();
    assert!(
        refused.to_string().contains("something follows its end"),
        "{refused}"
    );
}

/// Frames that are each intact but out of order or missing: only the sum over the file shows it.
#[test]
fn a_missing_frame_is_refused() {
    let data = tempfile::tempdir().unwrap();
    let (store, _) = SnapshotStore::open(data.path(), None, Offload::Threads).unwrap();
    store.write(&state(100, 20_000), &meta(100)).unwrap();
    let path = files(data.path(), "snapshot").remove(0);
    let whole = fs::read(&path).unwrap();
    let body = u32::from_le_bytes(whole[10..14].try_into().unwrap()) as usize;
    let first = 18 + body;
    let packed = u32::from_le_bytes(whole[first + 4..first + 8].try_into().unwrap()) as usize;
    let without = [&whole[..first], &whole[first + 12 + packed..]].concat();
    assert!(matches!(
        format::read(&path, &mut &without[..]),
        Err(SnapshotError::Damaged { .. })
    ));
}

#[test]
fn an_older_snapshot_stands_in_only_when_the_log_reaches_it() {
    let data = tempfile::tempdir().unwrap();
    let (store, _) = SnapshotStore::open(data.path(), None, Offload::Threads).unwrap();
    store.write(&state(5, 10), &meta(5)).unwrap();
    store.write(&state(10, 10), &meta(10)).unwrap();
    let newest = files(data.path(), "snapshot").pop().unwrap();
    let mut bytes = fs::read(&newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&newest, bytes).unwrap();

    // The log begins at 8: from 5 it cannot be reached.
    let refused = SnapshotStore::open(data.path(), Some(id(7)), Offload::Threads).unwrap_err();
    let text = refused.to_string();
    assert!(
        text.contains("the log begins after index 7") && text.contains("is damaged"),
        "{text}"
    );
    assert!(text.contains("rejoin as a learner under a new node id"), "{text}");
    assert_eq!(
        files(data.path(), "snapshot").len(),
        2,
        "a refused start changes nothing"
    );

    // The log begins at 6: the older snapshot and the log have everything.
    let (store, restored) = SnapshotStore::open(data.path(), Some(id(5)), Offload::Threads).unwrap();
    assert_eq!(restored.unwrap().meta, meta(5));
    assert_eq!(files(data.path(), "damaged").len(), 1);
    store.write(&state(9, 10), &meta(9)).unwrap();
    assert_eq!(store.newest().unwrap().0, meta(9));
}

#[tokio::test]
async fn a_received_snapshot_is_checked_before_it_counts() {
    let from = tempfile::tempdir().unwrap();
    let (sender, _) = SnapshotStore::open(from.path(), None, Offload::Threads).unwrap();
    let file = sender.write(&state(50, 3_000), &meta(50)).unwrap();
    let (mut open, size) = file.open().await.unwrap();
    let bytes = open.read(usize::try_from(size).unwrap()).await.unwrap();
    assert!(
        open.read(1).await.is_err(),
        "there is nothing behind what was announced"
    );

    let to = tempfile::tempdir().unwrap();
    let (receiver, _) = SnapshotStore::open(to.path(), None, Offload::Threads).unwrap();
    let torn = receive(to.path(), &bytes[..bytes.len() - 3], &receiver, &meta(50)).await;
    assert!(torn.unwrap_err().to_string().contains("it ends too early"));
    receive(to.path(), &bytes, &receiver, &meta(49))
        .await
        .unwrap_err();
    assert!(receiver.newest().is_none());
    assert!(
        files(to.path(), "part").is_empty(),
        "refused ones leave nothing behind"
    );

    let restored = receive(to.path(), &bytes, &receiver, &meta(50)).await.unwrap();
    assert_eq!(restored.state.content_digest(), state(50, 3_000).content_digest());
    assert_eq!(receiver.newest().unwrap().0, meta(50));
    assert!(files(to.path(), "part").is_empty());
    let (_, again) = SnapshotStore::open(to.path(), Some(id(50)), Offload::Threads).unwrap();
    assert_eq!(again.unwrap().meta, meta(50));
}

async fn receive(
    data: &Path,
    bytes: &[u8],
    store: &SnapshotStore,
    meta: &SnapshotMeta,
) -> io::Result<Restored> {
    let mut incoming = Incoming::create(data, Offload::Threads).await.unwrap();
    for chunk in bytes.chunks(1_000) {
        incoming.write(Bytes::copy_from_slice(chunk)).await.unwrap();
    }
    Ok(store.install(meta, &incoming.finish().await?)?)
}

/// A file that rots after it was written must not reach another node, which could not install it.
#[tokio::test]
async fn a_snapshot_that_rotted_is_not_sent_and_is_replaced() {
    let data = tempfile::tempdir().unwrap();
    let (store, _) = SnapshotStore::open(data.path(), None, Offload::Threads).unwrap();
    let file = store.write(&state(50, 3_000), &meta(50)).unwrap();
    file.open().await.unwrap();
    assert!(!store.drop_spoiled().unwrap());

    let path = files(data.path(), "snapshot").remove(0);
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(&path, bytes).unwrap();
    let refused = file.open().await.unwrap_err().to_string();
    assert!(refused.contains(path.to_str().unwrap()), "{refused}");
    assert!(store.drop_spoiled().unwrap());
    assert!(store.newest().is_none());
    assert_eq!(files(data.path(), "damaged").len(), 1);

    let file = store.write(&state(50, 3_000), &meta(50)).unwrap();
    file.open().await.unwrap();
    assert!(!store.drop_spoiled().unwrap());
}
