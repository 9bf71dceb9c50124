//! Every decoder of this crate behind a function that takes bytes, for the fuzz targets and the property tests
//! (`tests/decoders`). Not a part of what this crate offers.
//!
//! Most of what is decoded here stands behind a checksum, which random bytes never pass. So each function tries the
//! bytes as they are and then once more with the checksums put right, and panics when a decoder breaks its word:
//! what it accepted must survive being encoded and decoded again.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::{LeaderId, LogId, Member, SnapshotMeta, StoredMembership, Vote};
use crate::identity::{ClusterName, IdentityReply, Incarnation, Record, Refusal, Settled, Settlement};
pub use crate::log::fuzzing::{log_mark, log_record, log_records, log_segment, log_segments, log_value};
pub use crate::snapshot::fuzzing::{snapshot, snapshots};
use crate::transport::handshake::{self, Hello};
use crate::transport::wire::{
    LogAck, LogFrame, PROTOCOL, ProposeReply, Purpose, ReadIndexReply, Request, Response, SnapshotAck,
    SnapshotFrame, decode, encode,
};

/// A frame of a peer connection. The first byte says which kind is expected, the rest is the frame.
pub fn peer_frame(bytes: &[u8]) {
    let Some((kind, frame)) = bytes.split_first() else {
        return;
    };
    match kind % 11 {
        0 => survives::<(u64, Request)>(frame),
        1 => survives::<(u64, Response)>(frame),
        2 => survives::<LogFrame>(frame),
        3 => survives::<LogAck>(frame),
        4 => survives::<SnapshotFrame>(frame),
        5 => survives::<SnapshotAck>(frame),
        6 => survives::<Hello>(frame),
        7 => survives::<Result<(), Refusal>>(frame),
        8 => survives::<handshake::ServerReply>(frame),
        9 => survives::<handshake::Answer>(frame),
        _ => {
            // Stored in the data folder, not sent; the first byte is its version as in a frame.
            if let Ok(record) = Record::decode(frame) {
                assert_eq!(Record::decode(&record.encode()).ok(), Some(record));
            }
        }
    }
}

/// Frames to begin with.
#[must_use]
pub fn peer_frames() -> Vec<Vec<u8>> {
    let member = Member {
        peer: "a:1".to_owned(),
        http: "http://a".to_owned(),
    };
    let incarnation = Incarnation([7; 16]);
    let settlement = Settlement {
        cluster: "c".to_owned(),
        members: BTreeMap::from([(
            1,
            Settled {
                incarnation,
                member: member.clone(),
            },
        )]),
    };
    let reply = IdentityReply {
        incarnation,
        member,
        settlement: Some(settlement.clone()),
    };
    let record = Record {
        node: 1,
        incarnation,
        settlement: Some(settlement.clone()),
        joined: None,
    };
    let vote = Vote::new(3, 1);
    let append = || openraft::raft::AppendEntriesRequest {
        vote,
        prev_log_id: Some(log_id(4)),
        entries: crate::log::fuzzing::entries(),
        leader_commit: Some(log_id(3)),
    };
    let propose = Request::Propose {
        within_ms: 5,
        bodies: vec![vec![1, 2, 3].into(), bytes::Bytes::new()],
    };
    let meta = SnapshotMeta {
        last_log_id: Some(log_id(9)),
        last_membership: StoredMembership::default(),
    };
    let refusal = Refusal::Cluster {
        theirs: "a".to_owned(),
        ours: "b".to_owned(),
    };
    let hello = |cluster| Hello::new(Purpose::Log, cluster, 1, 2, incarnation);
    [
        (0, encode(&(1_u64, Request::Ping))),
        (0, encode(&(2_u64, Request::Settle(settlement)))),
        (0, encode(&(3_u64, Request::Append(append())))),
        (0, encode(&(4_u64, propose))),
        (0, encode(&(5_u64, Request::ReadIndex { within_ms: 9 }))),
        (0, encode(&(6_u64, Request::Call(vec![0; 9].into())))),
        (1, encode(&(1_u64, Response::Identity(reply)))),
        (
            1,
            encode(&(2_u64, Response::Propose(vec![ProposeReply::NotLeader]))),
        ),
        (
            1,
            encode(&(3_u64, Response::ReadIndex(ReadIndexReply::At(log_id(8))))),
        ),
        (1, encode(&(4_u64, Response::Call(Err("no".to_owned()))))),
        (
            2,
            encode(&LogFrame {
                session: 1,
                request: append(),
            }),
        ),
        (
            3,
            encode(&LogAck {
                session: 1,
                result: Ok(Some(log_id(2))),
            }),
        ),
        (4, encode(&SnapshotFrame::Begin { vote, meta, size: 9 })),
        (4, encode(&SnapshotFrame::Chunk(vec![1; 9].into()))),
        (5, encode(&SnapshotAck::Done(vote))),
        (6, encode(&hello(ClusterName::Formed("c".to_owned())))),
        (6, encode(&hello(ClusterName::Forming([1; 32])))),
        (7, encode(&Err::<(), _>(refusal))),
        (8, encode(&handshake::ServerReply::Protocol(2))),
        (10, record.encode().into()),
    ]
    .into_iter()
    .map(|(kind, frame)| [&[kind], &frame[..]].concat())
    .collect()
}

/// Types without equality are compared by their bytes. The first encoding may differ from what was read, since a
/// number can be written longer than it need be.
fn survives<T: Serialize + DeserializeOwned>(frame: &[u8]) {
    let mut whole = frame.to_vec();
    if let Some(version) = whole.first_mut() {
        *version = PROTOCOL;
    }
    for frame in [frame, &whole] {
        if let Ok(value) = decode::<T>(frame) {
            let first = encode(&value);
            assert!(
                first.len() <= frame.len(),
                "the shortest form is longer than another one"
            );
            let again: T = decode(&first).expect("what was encoded decodes");
            assert_eq!(first, encode(&again), "a frame changed on its way");
        }
    }
}

fn log_id(index: u64) -> LogId {
    LogId {
        leader_id: LeaderId { term: 3, node_id: 1 },
        index,
    }
}

/// Writes a file into a fresh folder of the temporary folder and removes it again.
pub(crate) fn in_folder<T>(name: &str, bytes: &[u8], work: impl FnOnce(&Path) -> T) -> T {
    let folder = std::env::temp_dir().join(format!("regent-fuzzing-{}", rand::random::<u64>()));
    let file = folder.join(name);
    let parent = file.parent().expect("it is below the folder");
    fs::create_dir_all(parent).expect("the temporary folder can be written");
    fs::write(&file, bytes).expect("the temporary folder can be written");
    let result = work(&folder);
    fs::remove_dir_all(&folder).expect("the folder is ours");
    result
}
