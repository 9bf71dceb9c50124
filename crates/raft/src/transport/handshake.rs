//! The first frames of a connection: who is there, and do both know the secret?
//!
//! Challenge and response: each side sends a fresh nonce and proves the secret with an HMAC over
//! everything said so far, so the secret never travels and a recorded proof is worth nothing. The server
//! proves itself first; a client never tells its member list to a stranger. Whether the two may talk is
//! then decided by `identity`, which sees only proven peers. Over TLS both have shown certificates before, and
//! each must be the node that its certificate says.

use std::time::Duration;

use futures::SinkExt;
use hmac::{Hmac, KeyInit, Mac};
use regent_types::NodeId;
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use tokio::time::timeout;

use super::connection::{Connection, LinkError};
use super::wire::{PROTOCOL, Purpose, decode, encode};
use crate::identity::{ClusterName, Identity, Incarnation, Refusal};
use crate::options::ClusterSecret;
use crate::sockets::Stream;

/// How long the whole handshake may take. Three messages; a peer that needs longer is stuck.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);

/// Largest frame of the handshake: a stranger can make us buffer no more than this.
const HANDSHAKE_MAX_FRAME: usize = 16 * 1024;

const SERVER_LABEL: &[u8] = b"regent peer server 1";
const CLIENT_LABEL: &[u8] = b"regent peer client 1";

type Nonce = [u8; 32];
type Proof = [u8; 32];

/// The client's first frame.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) protocol: u8,
    pub(crate) purpose: Purpose,
    pub(crate) cluster: ClusterName,
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) incarnation: Incarnation,
    nonce: Nonce,
}

impl Hello {
    /// With a fresh nonce.
    pub(crate) fn new(
        purpose: Purpose,
        cluster: ClusterName,
        from: u64,
        to: u64,
        incarnation: Incarnation,
    ) -> Self {
        Self {
            protocol: PROTOCOL,
            purpose,
            cluster,
            from,
            to,
            incarnation,
            nonce: rand::random(),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Challenge {
    node: u64,
    incarnation: Incarnation,
    nonce: Nonce,
    proof: Proof,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ServerReply {
    Challenge(Challenge),
    /// The only thing said to a peer that has not proven itself.
    Protocol(u8),
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Answer {
    proof: Proof,
    members: String,
}

fn mac(secret: &ClusterSecret, label: &[u8], hello: &[u8], challenge: &Challenge) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.bytes()).expect("HMAC takes keys of every length");
    mac.update(label);
    mac.update(&(hello.len() as u64).to_le_bytes());
    mac.update(hello);
    mac.update(&challenge.node.to_le_bytes());
    mac.update(&challenge.incarnation.0);
    mac.update(&challenge.nonce);
    mac
}

/// Connects to `to` at `addr` for `purpose`, proves both sides and agrees on identity.
pub(crate) async fn dial(
    identity: &Identity,
    to: NodeId,
    addr: &str,
    purpose: Purpose,
) -> Result<Connection, LinkError> {
    let attempt = async {
        let stream = identity.sockets().connect(addr).await?;
        let mut link = Connection::new(stream, to, HANDSHAKE_MAX_FRAME);
        link.check_proven()?;
        let (cluster, incarnation) = (identity.cluster_name(), identity.incarnation());
        let hello = encode(&Hello::new(
            purpose,
            cluster,
            identity.node().0,
            to.0,
            incarnation,
        ));
        link.writer.send(hello.clone()).await?;

        let challenge = match decode::<ServerReply>(&link.first().await?)? {
            ServerReply::Challenge(challenge) => challenge,
            ServerReply::Protocol(theirs) => {
                return Err(Refusal::Protocol {
                    theirs,
                    ours: PROTOCOL,
                }
                .into());
            }
        };
        mac(identity.secret(), SERVER_LABEL, &hello, &challenge)
            .verify_slice(&challenge.proof)
            .map_err(|_| Refusal::Secret)?;
        if challenge.node != to.0 {
            return Err(Refusal::WrongNode {
                wanted: to,
                found: NodeId(challenge.node),
            }
            .into());
        }
        identity.check_server(to, challenge.incarnation)?;

        let proof = mac(identity.secret(), CLIENT_LABEL, &hello, &challenge)
            .finalize()
            .into_bytes()
            .into();
        link.send(&Answer {
            proof,
            members: identity.members_text(),
        })
        .await?;
        link.receive::<Result<(), Refusal>>().await??;
        link.set_max_frame(purpose.max_frame());
        Ok(link)
    };
    timeout(HANDSHAKE_TIMEOUT, attempt)
        .await
        .map_err(|_| LinkError::Silent)?
}

/// The server's side: proves itself, checks the proof, asks `identity` whether the two may talk.
pub(crate) async fn accept(identity: &Identity, stream: Stream) -> Result<(Connection, Purpose), LinkError> {
    let attempt = async {
        let stream = identity.sockets().receive(stream).await?;
        let mut link = Connection::new(stream, NodeId(0), HANDSHAKE_MAX_FRAME);
        let first = link.first().await?;
        // Another version's hello may not even decode: look at the version byte alone.
        if first.first() != Some(&PROTOCOL) {
            link.send(&ServerReply::Protocol(PROTOCOL)).await?;
            return Err(Refusal::Protocol {
                theirs: first.first().copied().unwrap_or(0),
                ours: PROTOCOL,
            }
            .into());
        }
        let hello: Hello = decode(&first)?;
        link.peer = NodeId(hello.from);

        let mut challenge = Challenge {
            node: identity.node().0,
            incarnation: identity.incarnation(),
            nonce: rand::random(),
            proof: [0; 32],
        };
        challenge.proof = mac(identity.secret(), SERVER_LABEL, &first, &challenge)
            .finalize()
            .into_bytes()
            .into();
        let expected = mac(identity.secret(), CLIENT_LABEL, &first, &challenge);
        link.send(&ServerReply::Challenge(challenge)).await?;

        let answer: Answer = link.receive().await?;
        let verdict = if expected.verify_slice(&answer.proof).is_err() {
            Err(Refusal::Secret)
        } else {
            link.check_proven()
                .and_then(|()| identity.check_client(&hello, &answer.members))
        };
        link.send(&verdict).await?;
        verdict?;
        link.set_max_frame(hello.purpose.max_frame());
        Ok((link, hello.purpose))
    };
    timeout(HANDSHAKE_TIMEOUT, attempt)
        .await
        .map_err(|_| LinkError::Silent)?
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::identity::Record;
    use crate::roster::Roster;
    use crate::sockets::Tcp;

    fn identity(node: u64) -> Identity {
        let members: BTreeMap<NodeId, String> =
            [(NodeId(1), "a".to_owned()), (NodeId(2), "b".to_owned())].into();
        let roster = Roster::of_nobody(0);
        Identity::new(
            Record::new(NodeId(node)),
            members,
            roster,
            ClusterSecret::new("the secret of this cluster").unwrap(),
            Arc::new(Tcp),
        )
    }

    async fn server() -> (TcpListener, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        (listener, addr)
    }

    #[tokio::test]
    async fn two_members_meet() {
        let (listener, addr) = server().await;
        let (client, server) = (identity(2), identity(1));
        let accepted = async {
            let (stream, _) = listener.accept().await.unwrap();
            accept(&server, Stream::from_tcp(stream).unwrap()).await
        };
        let (dialled, accepted) = tokio::join!(dial(&client, NodeId(1), &addr, Purpose::Identity), accepted);
        assert_eq!(dialled.unwrap().peer, NodeId(1));
        let (link, purpose) = accepted.unwrap();
        assert_eq!((link.peer, purpose), (NodeId(2), Purpose::Identity));
    }

    /// A client that does not care whether the server knows the secret gets no further without it, and a
    /// proof that was good once is worth nothing under another nonce.
    #[tokio::test]
    async fn without_the_secret_or_with_an_old_proof_nobody_gets_in() {
        let (listener, addr) = server().await;
        let server = identity(1);
        let secret = ClusterSecret::new("the secret of this cluster").unwrap();
        let mut old_proof = None;
        for attempt in ["no proof", "a good proof, kept", "the kept proof again"] {
            let client = async {
                let stream = Stream::from_tcp(TcpStream::connect(&addr).await.unwrap()).unwrap();
                let mut link = Connection::new(stream, NodeId(1), HANDSHAKE_MAX_FRAME);
                let name = identity(2).cluster_name();
                let hello = encode(&Hello::new(Purpose::Identity, name, 2, 1, Incarnation([2; 16])));
                link.writer.send(hello.clone()).await.unwrap();
                let ServerReply::Challenge(challenge) = link.receive().await.unwrap() else {
                    panic!("the same version");
                };
                let good = || {
                    mac(&secret, CLIENT_LABEL, &hello, &challenge)
                        .finalize()
                        .into_bytes()
                        .into()
                };
                let proof = match attempt {
                    "no proof" => [0; 32],
                    "a good proof, kept" => *old_proof.insert(good()),
                    _ => old_proof.unwrap(),
                };
                link.send(&Answer {
                    proof,
                    members: String::new(),
                })
                .await
                .unwrap();
                link.receive::<Result<(), Refusal>>().await.unwrap()
            };
            let accepted = async {
                let (stream, _) = listener.accept().await.unwrap();
                accept(&server, Stream::from_tcp(stream).unwrap()).await
            };
            let (told, accepted) = tokio::join!(client, accepted);
            if attempt == "a good proof, kept" {
                assert_eq!(told, Ok(()));
                assert!(accepted.is_ok());
            } else {
                assert_eq!(told, Err(Refusal::Secret), "{attempt}");
                assert!(
                    matches!(accepted, Err(LinkError::Refused(Refusal::Secret))),
                    "{attempt}"
                );
            }
        }
    }

    #[tokio::test]
    async fn another_protocol_version_is_told_ours() {
        let (listener, addr) = server().await;
        let server = identity(1);
        let client = async {
            let stream = Stream::from_tcp(TcpStream::connect(&addr).await.unwrap()).unwrap();
            let mut link = Connection::new(stream, NodeId(1), HANDSHAKE_MAX_FRAME);
            let foreign = bytes::Bytes::from_static(&[PROTOCOL + 1, 0, 0]);
            link.writer.send(foreign).await.unwrap();
            link.receive::<ServerReply>().await.unwrap()
        };
        let accepted = async {
            let (stream, _) = listener.accept().await.unwrap();
            accept(&server, Stream::from_tcp(stream).unwrap()).await
        };
        let (told, accepted) = tokio::join!(client, accepted);
        assert!(matches!(told, ServerReply::Protocol(PROTOCOL)));
        assert!(accepted.is_err());
    }
}
