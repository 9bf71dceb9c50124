//! Leases and who waits for them.

use serde::{Deserialize, Serialize};

use regent_types::{CandidateId, Epoch, LeaseName, NodeId, Principal, ReplicaName, Revision, Token};

/// A lease that is held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Its name.
    pub name: LeaseName,
    /// Who holds it, for people.
    pub holder: String,
    /// The principal that acquired it.
    pub owner: Principal,
    /// The revision of the grant.
    pub token: Token,
    /// How long it lasts without a renewal, in milliseconds.
    pub ttl_ms: u64,
    /// When it was granted.
    pub granted_at: u64,
    /// Who keeps it alive.
    pub kept: Keeping,
}

/// Who keeps a lease alive, and with that, who may ask for its grant again. The first two are encoded as
/// the `Option` of a connection was that stood here before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Keeping {
    /// Whoever acquired it.
    Holder,
    /// A gateway, for `agent/{id}` of an agent without replicas: the connection that it stands and falls with.
    Gateway(ReplicaName, Epoch),
    /// Whoever acquired it and may have waited for it, there. Asking again under this id gives the same grant.
    Candidacy(CandidateId, WaitsAt),
    /// A replica of the agent, for `agent/{id}`, over whatever connection it has.
    Replica(ReplicaName),
}

/// Somebody who waits for a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// The lease.
    pub lease: LeaseName,
    /// Its place in the queue: the revision at which it joined. Asking again keeps it.
    pub place: Revision,
    /// Names the candidacy. Of a replica: the replica's name.
    pub id: CandidateId,
    /// Who would hold it, for people.
    pub holder: String,
    /// The principal.
    pub owner: Principal,
    /// The TTL that it wants.
    pub ttl_ms: u64,
    /// Since when it waits.
    pub since: u64,
    /// Where: that process keeps it alive.
    pub at: WaitsAt,
    /// For `agent/{id}`: the connection that it stands and falls with.
    pub connection: Option<(ReplicaName, Epoch)>,
}

/// The process of a node at which candidates wait. They all live and die with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct WaitsAt {
    /// The node.
    pub node: NodeId,
    /// A random number of that start of its process.
    pub start: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec;

    /// Leases that were written when a connection was all that could keep one are still read.
    #[test]
    fn who_keeps_a_lease_is_encoded_as_the_connection_once_was() {
        let replica = || ReplicaName::new("one").unwrap();
        let encoded = |value: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = Vec::new();
            value(&mut bytes);
            bytes
        };
        for (was, is) in [
            (None, Keeping::Holder),
            (
                Some((replica(), Epoch(70_000))),
                Keeping::Gateway(replica(), Epoch(70_000)),
            ),
        ] {
            let was = encoded(&|bytes| codec::append(bytes, &was));
            assert_eq!(was, encoded(&|bytes| codec::append(bytes, &is)));
            assert_eq!(codec::read::<Keeping>(&was).unwrap(), is);
        }
    }
}
