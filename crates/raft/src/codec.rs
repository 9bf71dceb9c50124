//! bincode behind one door: what is stored and what peers send.
//!
//! Every encoding begins with a version byte, then bincode in its varint form, which rejects trailing
//! bytes. bincode is positional: fields are never reordered, enum variants only appended. A caller frames
//! first and caps the frame, then decodes from the slice, so a length inside can never exceed it.

use bincode::Options;
use serde::{Serialize, de::DeserializeOwned};

/// Why bytes could not be decoded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CodecError {
    /// There is not even a version byte.
    #[error("empty record")]
    Empty,
    /// Written by another version of this format.
    #[error("format version {found}, this build reads {expected}")]
    Version {
        /// The version byte found.
        found: u8,
        /// The version byte that this build writes.
        expected: u8,
    },
    /// The bytes are not what the version promises.
    #[error("malformed record")]
    Malformed(#[source] bincode::Error),
}

/// Encodes `value` after the byte `version`.
pub(crate) fn encode<T: Serialize + ?Sized>(version: u8, value: &T) -> Vec<u8> {
    let mut bytes = vec![version];
    encode_into(&mut bytes, value);
    bytes
}

/// Appends the encoding of `value`, without a version byte, to `bytes`.
pub(crate) fn encode_into<T: Serialize + ?Sized>(bytes: &mut Vec<u8>, value: &T) {
    bincode::DefaultOptions::new()
        .serialize_into(bytes, value)
        .expect("our own types have known lengths, and a Vec takes every byte");
}

/// Decodes what [`encode`] wrote with the same `version`; the whole slice must be used.
pub(crate) fn decode<T: DeserializeOwned>(version: u8, bytes: &[u8]) -> Result<T, CodecError> {
    let (&found, body) = bytes.split_first().ok_or(CodecError::Empty)?;
    if found != version {
        return Err(CodecError::Version {
            found,
            expected: version,
        });
    }
    decode_body(body)
}

/// Decodes what [`encode_into`] wrote; the whole slice must be used.
pub(crate) fn decode_body<T: DeserializeOwned>(body: &[u8]) -> Result<T, CodecError> {
    bincode::DefaultOptions::new()
        .with_limit(body.len() as u64)
        .deserialize(body)
        .map_err(CodecError::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let bytes = encode(3, &("a", 7_u64));
        assert_eq!(decode::<(String, u64)>(3, &bytes).unwrap(), ("a".to_owned(), 7));
    }

    #[test]
    fn other_versions_trailing_bytes_and_huge_lengths_are_refused() {
        let mut bytes = encode(3, &7_u64);
        assert!(matches!(
            decode::<u64>(2, &bytes),
            Err(CodecError::Version {
                found: 3,
                expected: 2
            })
        ));
        bytes.push(0);
        assert!(matches!(decode::<u64>(3, &bytes), Err(CodecError::Malformed(_))));
        // A length of 2^63 in front of nothing must not allocate.
        let huge = [vec![3, 253], u64::MAX.to_le_bytes().to_vec()].concat();
        assert!(decode::<Vec<u8>>(3, &huge).is_err());
        assert!(matches!(decode::<u64>(3, &[]), Err(CodecError::Empty)));
    }
}
