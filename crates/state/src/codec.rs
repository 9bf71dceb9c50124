//! The one place that knows how operations, outcomes and records become bytes.
//!
//! bincode with varints, a limit and no trailing bytes, behind a version byte. The encoding is
//! positional, so enum variants are only appended and structs that were ever written never change;
//! a golden file in the tests holds one of every operation.

use bincode::Options;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::operation::Request;
use crate::outcome::Applied;

/// The version of everything that this crate encodes.
pub const FORMAT: u8 = 1;

/// The most bytes that one encoded request, outcome or record may have: bodies are at most 1 MiB,
/// and a hello lists at most some thousands of sessions. Guards the decoder, not the encoder.
pub const MAX_ENCODED: u64 = 16 << 20;

/// Why bytes are not what they should be.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// Written by another version of Regent.
    #[error("format version {found} is not known here; this version reads {FORMAT}")]
    Version {
        /// The version that was found.
        found: u8,
    },
    /// The bytes end too early, or there are none.
    #[error("the bytes end too early")]
    Truncated,
    /// A record is larger than any that was ever written.
    #[error("a record of {bytes} bytes is larger than the limit of {MAX_ENCODED}")]
    TooLarge {
        /// What its header says.
        bytes: u64,
    },
    /// The bytes do not decode.
    #[error("the bytes do not decode")]
    Decode(#[source] bincode::Error),
    /// A snapshot's parts do not make a whole.
    #[error("the snapshot is not whole: {0}")]
    Snapshot(String),
}

fn options() -> impl Options {
    bincode::DefaultOptions::new()
}

/// Appends the encoding of `value`, without a version byte.
pub(crate) fn append<T: Serialize + ?Sized>(buffer: &mut Vec<u8>, value: &T) {
    options()
        .serialize_into(buffer, value)
        .expect("a vector takes all bytes, and every type of ours has a known length");
}

/// Decodes the whole of `bytes`, without a version byte.
pub(crate) fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    options()
        .with_limit(MAX_ENCODED)
        .deserialize(bytes)
        .map_err(CodecError::Decode)
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let mut buffer = vec![FORMAT];
    append(&mut buffer, value);
    buffer
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    match bytes.split_first() {
        None => Err(CodecError::Truncated),
        Some((&FORMAT, rest)) => read(rest),
        Some((&found, _)) => Err(CodecError::Version { found }),
    }
}

impl Request {
    /// The content of a log entry.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// Reads the content of a log entry.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        decode(bytes)
    }
}

/// What applying gave, for the way back to the node that asked.
pub fn encode_applied(applied: &Applied) -> Vec<u8> {
    encode(applied)
}

/// Reads what [`encode_applied`] wrote.
pub fn decode_applied(bytes: &[u8]) -> Result<Applied, CodecError> {
    decode(bytes)
}
