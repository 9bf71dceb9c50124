//! What enters a node from outside, behind functions that take bytes, for the fuzz targets and the property tests
//! (`tests/decoders`). Not a part of what this crate offers.

pub use crate::gateway::fuzzing::{agent_frames, conversation};
pub use crate::http::fuzzing::{bodies, body, manifest, parameters, parameters_samples};
