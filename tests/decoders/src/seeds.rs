//! Inputs to begin with that need a state.

use regent_state::State;

use crate::operations;

pub(crate) fn snapshots() -> Vec<Vec<u8>> {
    regent_raft::fuzzing::snapshots(&operations::states())
}

/// The records of states, without the byte for the version that stands before the first.
pub(crate) fn records() -> Vec<Vec<u8>> {
    operations::states().iter().map(encoded).collect()
}

/// Two slots, of which one is written.
pub(crate) fn marks() -> Vec<Vec<u8>> {
    let values = regent_raft::fuzzing::log_records();
    let value = values.last().expect("the last one is that of a watermark");
    let length = u16::try_from(value.len()).expect("it is short");
    let mut mark = [&length.to_le_bytes()[..], value].concat();
    mark.resize(512, 0);
    vec![[mark.clone(), mark.clone()].concat(), mark]
}

fn encoded(state: &State) -> Vec<u8> {
    state.encode_chunks().flatten().skip(1).collect()
}
