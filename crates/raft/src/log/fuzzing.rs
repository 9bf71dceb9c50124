//! What the log reads back from disk, as [`crate::fuzzing`] offers it.

use bytes::Bytes;
use openraft::Membership;

use super::mark::SLOT;
use super::record::{BODY, CHECKSUM};
use super::{Promise, mark, record, segments};
use crate::config::{Entry, LeaderId, LogId, Payload, Proposal, Vote};
use crate::fuzzing::in_folder;

/// The record of an entry.
pub fn log_record(bytes: &[u8]) {
    for bytes in [bytes.to_vec(), with_checksum(bytes)] {
        // Where it was stored is not in the input: it is where the record says.
        let index = bytes.get(21..).and_then(<[u8]>::first_chunk);
        let index = index.map_or(0, |index| u64::from_le_bytes(*index));
        let Ok(entry) = record::decode_entry(index, &bytes) else {
            continue;
        };
        assert_eq!(
            record::decode_log_id(index, &bytes),
            Ok(entry.log_id),
            "both ways to read a record agree"
        );
        let again = record::encode_entry(&entry);
        assert_eq!(record::decode_entry(index, &again), Ok(entry), "an entry changed");
    }
}

/// A small value: the vote and the ids that are kept beside the entries.
pub fn log_value(bytes: &[u8]) {
    for bytes in [bytes.to_vec(), with_checksum(bytes)] {
        if let Ok(vote) = record::decode_value::<Vote>(&bytes) {
            assert_eq!(record::decode_value(&record::encode_value(&vote)), Ok(vote));
        }
        if let Ok(id) = record::decode_value::<Option<LogId>>(&bytes) {
            assert_eq!(record::decode_value(&record::encode_value(&id)), Ok(id));
        }
        if let Ok(promise) = record::decode_value::<(u64, Promise)>(&bytes) {
            assert_eq!(record::decode_value(&record::encode_value(&promise)), Ok(promise));
        }
    }
}

/// The watermark's file.
pub fn log_mark(bytes: &[u8]) {
    for bytes in [bytes.to_vec(), with_slots(bytes)] {
        in_folder("mark", &bytes, |folder| {
            let path = folder.join("mark");
            if let Ok((mark, found)) = mark::Mark::<Promise>::open(&path) {
                let promise = Promise {
                    last: Some(id(7)),
                    ..found.unwrap_or_default()
                };
                mark.write(&promise).expect("the file is open");
                let (_, again) = mark::Mark::<Promise>::open(&path).expect("it was just written");
                assert_eq!(again, Some(promise), "what was noted last counts");
            }
        });
    }
}

/// A segment file, as the only one.
pub fn log_segment(bytes: &[u8]) {
    segments::fuzzing::open(bytes);
}

/// Segment files to begin with.
#[must_use]
pub fn log_segments() -> Vec<Vec<u8>> {
    let records: Vec<Vec<u8>> = entries().iter().map(record::encode_entry).collect();
    segments::fuzzing::samples(&records)
}

/// One entry of each kind.
pub(crate) fn entries() -> Vec<Entry> {
    let membership = Membership::new_with_defaults(vec![[1, 2].into(), [1].into()], [1, 2]);
    let proposal = Proposal {
        at: 77,
        body: Bytes::from_static(b"body"),
    };
    let payloads = [
        Payload::Blank,
        Payload::Normal(proposal),
        Payload::Membership(membership),
    ];
    (5..)
        .zip(payloads)
        .map(|(index, payload)| Entry {
            log_id: id(index),
            payload,
        })
        .collect()
}

/// The same record with the version and the checksum put right.
fn with_checksum(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if bytes.len() >= BODY {
        bytes[0] = 1;
        let checksum = crc32fast::hash(&bytes[BODY..]);
        bytes[CHECKSUM].copy_from_slice(&checksum.to_le_bytes());
    }
    bytes
}

/// The same watermark with both of its slots put right.
fn with_slots(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for slot in bytes.chunks_mut(SLOT) {
        let Some((len, rest)) = slot.split_first_chunk_mut() else {
            continue;
        };
        let len = usize::from(u16::from_le_bytes(*len));
        if let Some(value) = rest.get_mut(..len) {
            let right = with_checksum(value);
            value.copy_from_slice(&right);
        }
    }
    bytes
}

/// Records and values to begin with.
#[must_use]
pub fn log_records() -> Vec<Vec<u8>> {
    let values = [
        record::encode_value(&Vote::new(3, 1)),
        record::encode_value(&Some(id(4))),
        record::encode_value(&(
            4_u64,
            Promise {
                last: Some(id(4)),
                vote: None,
            },
        )),
    ];
    let entries = entries();
    entries.iter().map(record::encode_entry).chain(values).collect()
}

fn id(index: u64) -> LogId {
    LogId {
        leader_id: LeaderId { term: 3, node_id: 1 },
        index,
    }
}
