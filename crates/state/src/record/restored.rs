//! How a cluster came out of another one's state.

use serde::{Deserialize, Serialize};

use regent_types::{ClusterId, Revision};

/// Where a restored or recovered cluster comes from. One record, of the last time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restored {
    /// The cluster that was made.
    pub cluster: ClusterId,
    /// The clusters that it came from, the latest first and the very first last: an agent of one of them may follow
    /// to this one.
    pub from: Vec<ClusterId>,
    /// When.
    pub at: u64,
    /// The revision of it; all that was before has a smaller one.
    pub revision: Revision,
    /// The last revision of the state that it was made from.
    pub state_revision: Revision,
    /// No lease is granted before this time; 0 when the operator stated that nobody acts under an old one.
    pub no_lease_before: u64,
}
