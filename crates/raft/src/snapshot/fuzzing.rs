//! Snapshot files, as [`crate::fuzzing`] offers them.

use std::path::Path;

use openraft::Membership;
use regent_state::State;

use super::format::{self, MAGIC, header_checksum};
use crate::config::{LeaderId, LogId, SnapshotMeta, StoredMembership};

/// A whole snapshot file.
pub fn snapshot(bytes: &[u8]) {
    let place = Path::new("in memory");
    for bytes in [bytes.to_vec(), with_checksums(bytes)] {
        let checked = format::check(place, &mut bytes.as_slice());
        let read = format::read(place, &mut bytes.as_slice());
        if let Ok((header, state)) = read {
            assert!(checked.is_ok(), "what can be read is also sound: {checked:?}");
            let mut again = Vec::new();
            format::write(&mut again, &state, &header.meta()).expect("what was read can be written");
            let (header_again, state_again) =
                format::read(place, &mut again.as_slice()).expect("what was written can be read");
            assert_eq!(
                header, header_again,
                "the header of a snapshot changed on its way"
            );
            assert_eq!(state.content_digest(), state_again.content_digest());
        }
    }
}

/// Snapshot files to begin with.
pub fn snapshots(states: &[State]) -> Vec<Vec<u8>> {
    let membership = Membership::new_with_defaults(vec![[1].into()], [1]);
    let meta = SnapshotMeta {
        last_log_id: Some(id(9)),
        last_membership: StoredMembership::new(Some(id(1)), membership),
    };
    let write = |state: &State| {
        let mut bytes = Vec::new();
        format::write(&mut bytes, state, &meta).map(|()| bytes)
    };
    states.iter().filter_map(|state| write(state).ok()).collect()
}

/// The same file with every checksum put right, as far as its lengths lead.
fn with_checksums(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    // The file is whatever it is where the lengths lead out of it.
    let _ = fix(&mut bytes);
    bytes
}

fn fix(bytes: &mut [u8]) -> Option<()> {
    bytes.get_mut(..MAGIC.len())?.copy_from_slice(MAGIC);
    let version = u16::from_le_bytes(*bytes.get(8..)?.first_chunk()?);
    let mut at = 18 + u32_at(bytes, 10)?;
    let checksum = header_checksum(version, bytes.get(18..at)?);
    bytes[14..18].copy_from_slice(&checksum.to_le_bytes());
    let mut frames: u64 = 0;
    loop {
        let (raw, packed) = (u32_at(bytes, at)?, u32_at(bytes, at + 4)?);
        if (raw, packed) == (0, 0) {
            let checksum = crc32fast::hash(&bytes[..at + 8]);
            bytes
                .get_mut(at + 8..at + 12)?
                .copy_from_slice(&checksum.to_le_bytes());
            bytes
                .get_mut(at + 12..at + 20)?
                .copy_from_slice(&frames.to_le_bytes());
            return Some(());
        }
        let checksum = crc32fast::hash(bytes.get(at + 12..at + 12 + packed)?);
        bytes[at + 8..at + 12].copy_from_slice(&checksum.to_le_bytes());
        at += 12 + packed;
        frames += 1;
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?)).ok()
}

fn id(index: u64) -> LogId {
    LogId {
        leader_id: LeaderId { term: 3, node_id: 1 },
        index,
    }
}
