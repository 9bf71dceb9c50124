//! The digest: one number by which nodes see that they have come to the same state.
//!
//! Each apply hashes the previous digest, the revision, the outcome and every record that changed,
//! all encoded. So two nodes that differ once differ for ever, and the revision at which they
//! began to differ can be found. It costs the encoding of what changed, into a buffer that is kept.

use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64;

use regent_types::Revision;

use crate::codec;
use crate::outcome::Applied;

/// The bytes that one apply contributes. Kept between applies for its allocation.
#[derive(Debug, Default)]
pub(crate) struct Contribution(Vec<u8>);

/// The buffer above this is given back after use: one large operation must not pin its memory.
const KEEP_BYTES: usize = 256 << 10;

impl Contribution {
    pub(crate) fn begin(&mut self, digest: u64, revision: Revision) {
        self.0.clear();
        self.0.extend_from_slice(&digest.to_le_bytes());
        self.0.extend_from_slice(&revision.0.to_le_bytes());
    }

    /// A record after its change. `table` keeps equal bytes of different tables apart.
    pub(crate) fn changed<T: Serialize + ?Sized>(&mut self, table: u8, record: &T) {
        self.0.push(table);
        codec::append(&mut self.0, record);
    }

    pub(crate) fn finish(&mut self, applied: &Applied) -> u64 {
        codec::append(&mut self.0, applied);
        let digest = xxh3_64(&self.0);
        if self.0.capacity() > KEEP_BYTES {
            self.0 = Vec::new();
        }
        digest
    }
}

impl Clone for Contribution {
    /// A buffer is nobody's content: clones of a state begin with an empty one.
    fn clone(&self) -> Self {
        Self::default()
    }
}
