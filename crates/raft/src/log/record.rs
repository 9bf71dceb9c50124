//! How one entry, and one small value, look on disk.
//!
//! `version, crc32, term, node, index, kind, payload`, integers little-endian. The checksum covers all that
//! follows it. Term and index are inside, so a record that turns up under another key is found. An entry's
//! layout is written by hand because it is the hot path: no copy but the one into the record.

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

use crate::codec;
use crate::config::{Entry, LeaderId, LogId, Payload, Proposal};

/// Version of the entry layout. A new layout takes the next number; the old one stays readable.
const ENTRY_VERSION: u8 = 1;
/// Version of the small values.
const VALUE_VERSION: u8 = 1;

pub(super) const CHECKSUM: std::ops::Range<usize> = 1..5;
pub(super) const BODY: usize = 5;
const KIND: usize = 29;
const PAYLOAD: usize = 30;

const BLANK: u8 = 0;
const PROPOSAL: u8 = 1;
const MEMBERSHIP: u8 = 2;

/// What is wrong with a record.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RecordError {
    #[error("{0} bytes are too few")]
    Short(usize),
    #[error("format version {0} is unknown to this build")]
    Version(u8),
    #[error("checksum mismatch")]
    Checksum,
    #[error("unknown kind {0}")]
    Kind(u8),
    #[error("malformed payload")]
    Payload,
    #[error("it says that its index is {0}")]
    Index(u64),
}

/// Encodes an entry.
pub(super) fn encode_entry(entry: &Entry) -> Vec<u8> {
    let body_len = match &entry.payload {
        Payload::Normal(proposal) => 8 + proposal.body.len(),
        Payload::Blank | Payload::Membership(_) => 0,
    };
    let mut bytes = Vec::with_capacity(PAYLOAD + body_len);
    bytes.push(ENTRY_VERSION);
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&entry.log_id.leader_id.term.to_le_bytes());
    bytes.extend_from_slice(&entry.log_id.leader_id.node_id.to_le_bytes());
    bytes.extend_from_slice(&entry.log_id.index.to_le_bytes());
    match &entry.payload {
        Payload::Blank => bytes.push(BLANK),
        Payload::Normal(proposal) => {
            bytes.push(PROPOSAL);
            bytes.extend_from_slice(&proposal.at.to_le_bytes());
            bytes.extend_from_slice(&proposal.body);
        }
        Payload::Membership(membership) => {
            bytes.push(MEMBERSHIP);
            codec::encode_into(&mut bytes, membership);
        }
    }
    let checksum = crc32fast::hash(&bytes[BODY..]);
    bytes[CHECKSUM].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// Decodes the record that is stored under `index`.
pub(super) fn decode_entry(index: u64, bytes: &[u8]) -> Result<Entry, RecordError> {
    let log_id = decode_log_id(index, bytes)?;
    let payload = &bytes[PAYLOAD..];
    let payload = match bytes[KIND] {
        BLANK if payload.is_empty() => Payload::Blank,
        BLANK => return Err(RecordError::Payload),
        PROPOSAL => {
            let (at, body) = payload.split_first_chunk().ok_or(RecordError::Payload)?;
            Payload::Normal(Proposal {
                at: u64::from_le_bytes(*at),
                body: Bytes::copy_from_slice(body),
            })
        }
        MEMBERSHIP => Payload::Membership(codec::decode_body(payload).map_err(|_| RecordError::Payload)?),
        kind => return Err(RecordError::Kind(kind)),
    };
    Ok(Entry { log_id, payload })
}

/// Checks the record that is stored under `index` and returns its log id without decoding the payload.
pub(super) fn decode_log_id(index: u64, bytes: &[u8]) -> Result<LogId, RecordError> {
    let version = *bytes.first().ok_or(RecordError::Short(0))?;
    if version != ENTRY_VERSION {
        return Err(RecordError::Version(version));
    }
    if bytes.len() < PAYLOAD {
        return Err(RecordError::Short(bytes.len()));
    }
    if bytes[CHECKSUM] != crc32fast::hash(&bytes[BODY..]).to_le_bytes() {
        return Err(RecordError::Checksum);
    }
    let word = |at: usize| {
        u64::from_le_bytes(
            bytes[at..at + 8]
                .try_into()
                .expect("the length was checked against PAYLOAD"),
        )
    };
    let found = word(21);
    if found != index {
        return Err(RecordError::Index(found));
    }
    Ok(LogId {
        leader_id: LeaderId {
            term: word(5),
            node_id: word(13),
        },
        index,
    })
}

/// Encodes a small value: version, checksum, bincode.
pub(super) fn encode_value<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = vec![VALUE_VERSION, 0, 0, 0, 0];
    codec::encode_into(&mut bytes, value);
    let checksum = crc32fast::hash(&bytes[BODY..]);
    bytes[CHECKSUM].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// Decodes what [`encode_value`] wrote.
pub(super) fn decode_value<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, RecordError> {
    let version = *bytes.first().ok_or(RecordError::Short(0))?;
    if version != VALUE_VERSION {
        return Err(RecordError::Version(version));
    }
    if bytes.len() < BODY {
        return Err(RecordError::Short(bytes.len()));
    }
    if bytes[CHECKSUM] != crc32fast::hash(&bytes[BODY..]).to_le_bytes() {
        return Err(RecordError::Checksum);
    }
    codec::decode_body(&bytes[BODY..]).map_err(|_| RecordError::Payload)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Member;

    fn entry(payload: Payload) -> Entry {
        Entry {
            log_id: LogId {
                leader_id: LeaderId { term: 3, node_id: 2 },
                index: 9,
            },
            payload,
        }
    }

    fn samples() -> Vec<Entry> {
        let member = Member {
            peer: "a:1".into(),
            http: "http://a".into(),
        };
        vec![
            entry(Payload::Blank),
            entry(Payload::Normal(Proposal {
                at: 77,
                body: Bytes::from_static(b"body"),
            })),
            entry(Payload::Normal(Proposal {
                at: 0,
                body: Bytes::new(),
            })),
            entry(Payload::Membership(openraft::Membership::new_with_defaults(
                vec![std::collections::BTreeSet::from([1])],
                [(1, member.clone()), (2, member)].into_iter().map(|(id, _)| id),
            ))),
        ]
    }

    #[test]
    fn entries_round_trip() {
        for entry in samples() {
            let bytes = encode_entry(&entry);
            assert_eq!(decode_entry(9, &bytes).unwrap(), entry);
            assert_eq!(decode_log_id(9, &bytes).unwrap(), entry.log_id);
        }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        for entry in samples() {
            let bytes = encode_entry(&entry);
            for bit in 0..bytes.len() * 8 {
                let mut flipped = bytes.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                assert!(decode_entry(9, &flipped).is_err(), "bit {bit} of {entry:?}");
            }
            for len in 0..bytes.len() {
                assert!(
                    decode_entry(9, &bytes[..len]).is_err(),
                    "cut to {len} of {entry:?}"
                );
            }
        }
    }

    #[test]
    fn a_record_under_another_index_is_found() {
        let bytes = encode_entry(&entry(Payload::Blank));
        assert_eq!(decode_entry(8, &bytes), Err(RecordError::Index(9)));
    }

    #[test]
    fn values_round_trip_and_damage_is_found() {
        let bytes = encode_value(&(1_u64, "x".to_owned()));
        assert_eq!(decode_value::<(u64, String)>(&bytes), Ok((1, "x".to_owned())));
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_value::<(u64, String)>(&flipped).is_err(), "bit {bit}");
        }
    }
}
