//! Who this node is, which cluster it belongs to, and whom it talks to.
//!
//! A node that comes back empty under its old id has forgotten its votes; if it voted again, two leaders
//! could be elected in one term and acknowledged writes be lost. So every data folder has a random
//! incarnation, made once and synced. At the cluster's first start all members learn each other's, and
//! from then on refuse any other under that id, for every purpose. The invariant: a node votes only for
//! peers that remember the folder it votes from.
//!
//! The first start: every node is empty and asks the others who they are. The member with the lowest id,
//! once all listed members answered that they are empty and have the same list, makes the cluster id and
//! sends the [`Settlement`] (cluster id, members, incarnations); each stores it, synced, before it
//! answers. Only when all have done so does openraft start there and initialise. A crash in between is
//! harmless: the settlement is sent again, and is the same.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use regent_types::{ClusterId, NodeId, Revision};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::codec;
use crate::config::Member;
use crate::options::ClusterSecret;
use crate::roster::{Roster, Standing};
use crate::sockets::Sockets;
use crate::transport::handshake::Hello;
use crate::transport::wire::Purpose;

/// Version of the stored [`Record`] of a node that founded its cluster.
const FOUNDED: u8 = 1;
/// The same of one that joined later.
const JOINED: u8 = 2;

/// The random name of a data folder, made at its first use.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Incarnation(pub(crate) [u8; 16]);

impl Incarnation {
    pub(crate) fn random() -> Self {
        Self(rand::random())
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The first four bytes tell two folders apart for a person.
        for byte in &self.0[..4] {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The cluster, as named in a handshake.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ClusterName {
    /// Not settled yet; the hash of the member list stands in for the id.
    Forming([u8; 32]),
    /// The cluster id.
    Formed(String),
}

/// A member as the settlement knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settled {
    pub(crate) incarnation: Incarnation,
    pub(crate) member: Member,
}

/// What all members store before the cluster begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settlement {
    pub(crate) cluster: String,
    pub(crate) members: BTreeMap<u64, Settled>,
}

/// What a node says when asked who it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IdentityReply {
    pub(crate) incarnation: Incarnation,
    pub(crate) member: Member,
    /// `None`: it is empty.
    pub(crate) settlement: Option<Settlement>,
}

/// What is stored, synced, in the data folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) node: u64,
    pub(crate) incarnation: Incarnation,
    pub(crate) settlement: Option<Settlement>,
    /// The revision at which it was admitted to a cluster that was there already.
    pub(crate) joined: Option<u64>,
}

impl Record {
    /// Of a folder that is used for the first time.
    pub(crate) fn new(node: NodeId) -> Self {
        Self {
            node: node.0,
            incarnation: Incarnation::random(),
            settlement: None,
            joined: None,
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let common = (self.node, self.incarnation, &self.settlement);
        match self.joined {
            None => codec::encode(FOUNDED, &common),
            Some(at) => codec::encode(JOINED, &(common, at)),
        }
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, codec::CodecError> {
        let ((node, incarnation, settlement), joined) = match bytes.first() {
            Some(&JOINED) => {
                let (common, at) = codec::decode(JOINED, bytes)?;
                (common, Some(at))
            }
            _ => (codec::decode(FOUNDED, bytes)?, None),
        };
        Ok(Self {
            node,
            incarnation,
            settlement,
            joined,
        })
    }
}

/// Why one node will not talk to another, in words for the person who reads the refused node's log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub(crate) enum Refusal {
    #[error("peer protocol {theirs} there, {ours} here")]
    Protocol { theirs: u8, ours: u8 },
    #[error("the cluster secrets differ")]
    Secret,
    #[error("asked for node {wanted}, but node {found} answers at this address")]
    WrongNode { wanted: NodeId, found: NodeId },
    #[error(
        "node {here} was started with the members {ours}, node {there} with {theirs}: start both with the same list"
    )]
    Members {
        here: NodeId,
        ours: String,
        there: NodeId,
        theirs: String,
    },
    #[error("cluster {theirs} there, {ours} here")]
    Cluster { theirs: String, ours: String },
    #[error(
        "the data of node {node} is gone: cluster {cluster} knows it with another data folder ({known}, not \
         {given}). A node that forgot its votes may not come back under its id. Restore the folder, or start \
         this machine under a node id that was never used, with an empty folder, and add it to the cluster"
    )]
    Forgotten {
        node: NodeId,
        cluster: String,
        known: Incarnation,
        given: Incarnation,
    },
    // What programs of the first feature level say; it stays for its place in the encoding.
    #[error("node {node} is not a member of cluster {cluster}")]
    NotAMember { node: NodeId, cluster: String },
    #[error("the identity is not settled yet")]
    NotSettled,
    #[error("node {node} is not a member of cluster {cluster} at revision {at}")]
    NotAMemberAt {
        node: NodeId,
        cluster: String,
        at: Revision,
    },
    #[error(
        "a certificate of node {proven} was shown by a peer that is to be node {claimed}: start each node with the \
         certificate and key that were made for it"
    )]
    Certificate { claimed: NodeId, proven: NodeId },
}

impl Refusal {
    /// Whether it passes by itself, as the cluster starts.
    pub(crate) fn passes(&self) -> bool {
        matches!(self, Self::NotSettled)
    }

    /// Whether it says that node `me`, which joined at that revision, can never be a member as it is, and should
    /// end. Who has not applied the admission yet cannot say so.
    fn is_final_for(&self, me: NodeId, joined: Revision) -> bool {
        match self {
            Self::Forgotten { node, .. } | Self::NotAMember { node, .. } => *node == me,
            Self::NotAMemberAt { node, at, .. } => *node == me && *at >= joined,
            Self::Protocol { .. }
            | Self::Secret
            | Self::WrongNode { .. }
            | Self::Members { .. }
            | Self::Cluster { .. }
            | Self::NotSettled
            | Self::Certificate { .. } => false,
        }
    }
}

/// A settlement that may not be stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SettleError {
    #[error("this node belongs to cluster {0} already")]
    Other(String),
    #[error("the settlement does not name this node's data folder")]
    NotMine,
}

/// This node's identity and its memory of the others'. Cheap to read, on every handshake.
pub(crate) struct Identity {
    record: ArcSwap<Record>,
    /// The member list as given at this start.
    members: BTreeMap<NodeId, String>,
    roster: Roster,
    secret: ClusterSecret,
    /// Over what it talks to them.
    sockets: Arc<dyn Sockets>,
}

impl Identity {
    pub(crate) fn new(
        record: Record,
        members: BTreeMap<NodeId, String>,
        roster: Roster,
        secret: ClusterSecret,
        sockets: Arc<dyn Sockets>,
    ) -> Self {
        Self {
            record: ArcSwap::from_pointee(record),
            members,
            roster,
            secret,
            sockets,
        }
    }

    pub(crate) fn sockets(&self) -> &dyn Sockets {
        &*self.sockets
    }

    pub(crate) fn node(&self) -> NodeId {
        NodeId(self.record.load().node)
    }

    pub(crate) fn incarnation(&self) -> Incarnation {
        self.record.load().incarnation
    }

    pub(crate) fn secret(&self) -> &ClusterSecret {
        &self.secret
    }

    pub(crate) fn settlement(&self) -> Option<Settlement> {
        self.record.load().settlement.clone()
    }

    pub(crate) fn cluster_id(&self) -> Option<ClusterId> {
        let record = self.record.load();
        record
            .settlement
            .as_ref()
            .and_then(|s| ClusterId::new(&s.cluster).ok())
    }

    /// The member list as one line, the same for the same list.
    pub(crate) fn members_text(&self) -> String {
        members_text(&self.members)
    }

    pub(crate) fn cluster_name(&self) -> ClusterName {
        match &self.record.load().settlement {
            Some(settlement) => ClusterName::Formed(settlement.cluster.clone()),
            None => ClusterName::Forming(hash(&self.members_text())),
        }
    }

    /// Whether this node is the one that initialises: the lowest of the list, in a cluster that begins with it.
    pub(crate) fn is_founder(&self) -> bool {
        self.record.load().joined.is_none() && self.members.keys().next() == Some(&self.node())
    }

    /// Whether a refusal says that this node can never be a member as it is, and should end.
    pub(crate) fn is_final(&self, refusal: &Refusal) -> bool {
        let record = self.record.load();
        refusal.is_final_for(NodeId(record.node), Revision(record.joined.unwrap_or(0)))
    }

    /// The members by the settlement.
    pub(crate) fn settled_members(&self) -> Vec<NodeId> {
        let record = self.record.load();
        let settled = record
            .settlement
            .iter()
            .flat_map(|settlement| settlement.members.keys());
        settled.map(|id| NodeId(*id)).collect()
    }

    /// Whether a node was a member, and is none any more.
    pub(crate) fn was_removed(&self, node: NodeId) -> bool {
        self.roster.standing(node).0 == Standing::Removed
    }

    /// Where the settlement says that a node is.
    pub(crate) fn settled_address(&self, node: NodeId) -> Option<String> {
        let record = self.record.load();
        let settled = record.settlement.as_ref()?.members.get(&node.0)?;
        Some(settled.member.peer.clone())
    }

    /// The record with `settlement` in it, to be stored before [`Identity::adopt`].
    pub(crate) fn settle(&self, settlement: Settlement) -> Result<Record, SettleError> {
        let record = self.record.load();
        if let Some(ours) = &record.settlement {
            // The same again: the founder crashed between sending and starting.
            return if ours.cluster == settlement.cluster {
                Ok(Record::clone(&record))
            } else {
                Err(SettleError::Other(ours.cluster.clone()))
            };
        }
        let mine = settlement.members.get(&record.node).map(|m| m.incarnation);
        if mine != Some(record.incarnation) {
            return Err(SettleError::NotMine);
        }
        Ok(Record {
            settlement: Some(settlement),
            ..Record::clone(&record)
        })
    }

    /// Takes a record that is stored and synced.
    pub(crate) fn adopt(&self, record: Record) {
        self.record.store(Arc::new(record));
    }

    /// The client's check of the server it reached.
    pub(crate) fn check_server(&self, node: NodeId, given: Incarnation) -> Result<(), Refusal> {
        let record = self.record.load();
        match &record.settlement {
            None => Ok(()),
            // Consensus or another member named it: it may have been admitted while this node was away.
            Some(settlement) => self.known(settlement, node, given, true),
        }
    }

    /// The server's check of a client that proved the secret.
    pub(crate) fn check_client(&self, hello: &Hello, their_members: &str) -> Result<(), Refusal> {
        let record = self.record.load();
        let (here, there) = (NodeId(record.node), NodeId(hello.from));
        if hello.to != record.node {
            return Err(Refusal::WrongNode {
                wanted: NodeId(hello.to),
                found: here,
            });
        }
        let settling = hello.purpose == Purpose::Identity;
        match (&record.settlement, &hello.cluster) {
            (Some(ours), ClusterName::Formed(theirs)) => {
                if *theirs != ours.cluster {
                    return Err(Refusal::Cluster {
                        theirs: ours.cluster.clone(),
                        ours: theirs.clone(),
                    });
                }
                self.known(ours, there, hello.incarnation, true)
            }
            // One of us that missed the settlement may still fetch it; whoever lost its data may not.
            (Some(ours), ClusterName::Forming(_)) => {
                self.known(ours, there, hello.incarnation, false)?;
                if settling {
                    Ok(())
                } else {
                    Err(Refusal::NotSettled)
                }
            }
            // The founder sends the settlement again.
            (None, ClusterName::Formed(_)) => {
                if settling {
                    Ok(())
                } else {
                    Err(Refusal::NotSettled)
                }
            }
            (None, ClusterName::Forming(theirs)) => {
                let ours = self.members_text();
                if *theirs != hash(&ours) {
                    let theirs = their_members.to_owned();
                    return Err(Refusal::Members {
                        here,
                        ours,
                        there,
                        theirs,
                    });
                }
                if settling {
                    Ok(())
                } else {
                    Err(Refusal::NotSettled)
                }
            }
        }
    }

    /// Whether a member speaks from the data folder that it is known by.
    ///
    /// `formed`: it belongs to this cluster, as only a folder can say that founded it or was admitted. Such a one may
    /// be unknown here: it was admitted while this node was away, and it may be the very one that leads and brings
    /// the entry that says so. A folder that has forgotten its votes has forgotten its cluster too.
    fn known(
        &self,
        settlement: &Settlement,
        node: NodeId,
        given: Incarnation,
        formed: bool,
    ) -> Result<(), Refusal> {
        let cluster = settlement.cluster.clone();
        let settled = || settlement.members.get(&node.0).map(|member| member.incarnation);
        let (standing, at) = self.roster.standing(node);
        let known = match standing {
            Standing::Member(incarnation) => Some(incarnation),
            Standing::Unknown => settled(),
            Standing::Removed => None,
        };
        match known {
            None if formed && standing == Standing::Unknown => Ok(()),
            None => Err(Refusal::NotAMemberAt { node, cluster, at }),
            Some(known) if known == given => Ok(()),
            Some(known) => Err(Refusal::Forgotten {
                node,
                cluster,
                known,
                given,
            }),
        }
    }
}

/// A member list as one line: `1=host:port,2=host:port`, by id.
pub(crate) fn members_text(members: &BTreeMap<NodeId, String>) -> String {
    let members: Vec<String> = members.iter().map(|(id, addr)| format!("{id}={addr}")).collect();
    members.join(",")
}

fn hash(text: &str) -> [u8; 32] {
    Sha256::digest(text.as_bytes()).into()
}

/// A new cluster id: 16 random hexadecimal digits.
pub(crate) fn new_cluster_id() -> String {
    format!("{:016x}", rand::random::<u64>())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINE: Incarnation = Incarnation([1; 16]);
    const PEER: Incarnation = Incarnation([2; 16]);
    const NEW: Incarnation = Incarnation([9; 16]);

    fn list() -> BTreeMap<NodeId, String> {
        [(NodeId(1), "a:1".to_owned()), (NodeId(2), "b:1".to_owned())].into()
    }

    fn settlement(cluster: &str) -> Settlement {
        let settled = |incarnation| Settled {
            incarnation,
            member: Member::default(),
        };
        Settlement {
            cluster: cluster.to_owned(),
            members: [(1, settled(MINE)), (2, settled(PEER))].into(),
        }
    }

    /// Nothing is applied.
    fn roster() -> Roster {
        Roster::of_nobody(7)
    }

    fn node(settlement: Option<Settlement>) -> Identity {
        let secret = ClusterSecret::new("sixteen bytes or more").unwrap();
        Identity::new(
            Record {
                node: 1,
                incarnation: MINE,
                settlement,
                joined: None,
            },
            list(),
            roster(),
            secret,
            Arc::new(crate::sockets::Tcp),
        )
    }

    fn hello(from: u64, incarnation: Incarnation, cluster: ClusterName, purpose: Purpose) -> Hello {
        Hello::new(purpose, cluster, from, 1, incarnation)
    }

    fn formed(cluster: &str) -> ClusterName {
        ClusterName::Formed(cluster.to_owned())
    }

    fn forming() -> ClusterName {
        ClusterName::Forming(hash(&members_text(&list())))
    }

    #[test]
    fn members_of_one_cluster_talk() {
        let hello = hello(2, PEER, formed("c"), Purpose::Control);
        assert_eq!(node(Some(settlement("c"))).check_client(&hello, ""), Ok(()));
    }

    /// For every purpose: one vote of a node that forgot its last one is enough for two leaders.
    #[test]
    fn another_folder_under_a_known_id_is_refused() {
        let node = node(Some(settlement("c")));
        for purpose in [
            Purpose::Identity,
            Purpose::Control,
            Purpose::Log,
            Purpose::Snapshot,
            Purpose::Work,
        ] {
            for cluster in [formed("c"), forming()] {
                let refused = node
                    .check_client(&hello(2, NEW, cluster, purpose), "")
                    .unwrap_err();
                assert!(
                    matches!(refused, Refusal::Forgotten { node: NodeId(2), .. }),
                    "{purpose:?}: {refused}"
                );
                assert!(
                    refused.is_final_for(NodeId(2), Revision(0))
                        && !refused.is_final_for(NodeId(1), Revision(0))
                );
            }
        }
        assert!(
            node.check_server(NodeId(2), NEW).is_err(),
            "nor does a client ask it for its vote"
        );
        assert!(node.check_server(NodeId(2), PEER).is_ok());
    }

    #[test]
    fn strangers_and_other_clusters_are_refused() {
        let node = node(Some(settlement("c")));
        let other = node.check_client(&hello(2, PEER, formed("d"), Purpose::Control), "");
        assert!(matches!(other, Err(Refusal::Cluster { .. })));
        let stranger = node.check_client(&hello(3, NEW, forming(), Purpose::Control), "");
        assert!(matches!(
            stranger,
            Err(Refusal::NotAMemberAt {
                node: NodeId(3),
                at: Revision(7),
                ..
            })
        ));
        let mut lost = hello(2, PEER, formed("c"), Purpose::Control);
        lost.to = 7;
        assert!(matches!(
            node.check_client(&lost, ""),
            Err(Refusal::WrongNode { .. })
        ));
    }

    /// The one that leads may have been admitted while this node was away, and only it can bring the entry that says so.
    #[test]
    fn a_member_that_is_not_known_here_yet_is_heard() {
        let node = node(Some(settlement("c")));
        for purpose in [Purpose::Control, Purpose::Log, Purpose::Snapshot, Purpose::Work] {
            let admitted = hello(3, NEW, formed("c"), purpose);
            assert_eq!(node.check_client(&admitted, ""), Ok(()), "{purpose:?}");
        }
        assert_eq!(node.check_server(NodeId(3), NEW), Ok(()));
    }

    /// A node that has just joined meets one that has not applied its admission yet.
    #[test]
    fn who_has_not_heard_of_an_admission_cannot_say_that_it_is_over() {
        let refusal = Refusal::NotAMemberAt {
            node: NodeId(4),
            cluster: "c".to_owned(),
            at: Revision(7),
        };
        assert!(!refusal.is_final_for(NodeId(4), Revision(8)));
        assert!(refusal.is_final_for(NodeId(4), Revision(7)));
        assert!(!refusal.is_final_for(NodeId(5), Revision(7)));
    }

    /// The two forms are read by the version that they begin with.
    #[test]
    fn a_record_of_one_that_joined_is_read_back() {
        for joined in [None, Some(9)] {
            let record = Record {
                node: 4,
                incarnation: MINE,
                settlement: Some(settlement("c")),
                joined,
            };
            assert_eq!(Record::decode(&record.encode()).unwrap(), record);
        }
    }

    #[test]
    fn before_it_is_settled_only_the_identity_is_spoken_of() {
        let node = node(None);
        assert_eq!(
            node.check_client(&hello(2, PEER, forming(), Purpose::Identity), ""),
            Ok(())
        );
        for purpose in [Purpose::Control, Purpose::Log, Purpose::Snapshot, Purpose::Work] {
            for cluster in [forming(), formed("c")] {
                let refused = node.check_client(&hello(2, PEER, cluster, purpose), "");
                assert_eq!(refused, Err(Refusal::NotSettled), "{purpose:?}");
            }
        }
    }

    #[test]
    fn a_settlement_is_taken_once_and_only_for_this_folder() {
        let node = node(None);
        let record = node.settle(settlement("c")).unwrap();
        assert_eq!(Record::decode(&record.encode()).unwrap(), record);
        node.adopt(record.clone());
        assert_eq!(
            node.settle(settlement("c")).unwrap(),
            record,
            "the same again changes nothing"
        );
        assert_eq!(
            node.settle(settlement("d")),
            Err(SettleError::Other("c".to_owned()))
        );

        let mut foreign = settlement("c");
        foreign.members.get_mut(&1).unwrap().incarnation = NEW;
        assert_eq!(self::node(None).settle(foreign), Err(SettleError::NotMine));
    }
}
