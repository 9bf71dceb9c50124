//! The first start: from strangers to a settled cluster. See `identity` for the rules.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use regent_types::NodeId;
use tokio::time::{sleep, timeout};

use crate::config::Member;
use crate::identity::{Identity, IdentityReply, Refusal, Settled, Settlement, new_cluster_id};
use crate::node::Shared;
use crate::transport::channel::Link;
use crate::transport::connection::LinkError;
use crate::transport::handshake::dial;
use crate::transport::wire::{Purpose, Request, Response};

/// Pause between two rounds of asking. The whole cluster waits for the last node, so it is short; asking
/// costs one small connection per member.
const ASK_EVERY: Duration = Duration::from_millis(100);

/// How long one member may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);

/// How long the first election waits for connections.
const LINKS_WITHIN: Duration = Duration::from_secs(1);

/// Returns once this node's identity is settled and stored, or with the reason why it never will be.
pub(crate) async fn settle(shared: &Arc<Shared>) -> Result<(), String> {
    let identity = &shared.identity;
    let mut told = String::new();
    while identity.settlement().is_none() {
        let others: Vec<(NodeId, String)> = shared
            .members
            .iter()
            .filter(|(id, _)| **id != shared.node)
            .map(|(id, a)| (*id, a.clone()))
            .collect();
        let answers = join_all(others.iter().map(|(id, addr)| ask(identity, *id, addr))).await;

        let mut empty = BTreeMap::new();
        let mut waiting = Vec::new();
        for ((id, addr), answer) in others.iter().zip(answers) {
            match answer {
                Ok(IdentityReply {
                    settlement: Some(settlement),
                    ..
                }) => {
                    // The founder's message was lost on the way here.
                    shared.store_settlement(settlement).await?;
                }
                Ok(reply) => {
                    let member = Member {
                        peer: addr.clone(),
                        ..reply.member
                    };
                    empty.insert(
                        id.0,
                        Settled {
                            incarnation: reply.incarnation,
                            member,
                        },
                    );
                }
                Err(LinkError::Refused(refusal)) if identity.is_final(&refusal) => {
                    return Err(refusal.to_string());
                }
                Err(error) => waiting.push(format!("node {id} at {addr}: {error}")),
            }
        }
        if identity.settlement().is_some() {
            break;
        }
        if waiting.is_empty() && identity.is_founder() {
            let me = Settled {
                incarnation: identity.incarnation(),
                member: shared.member(),
            };
            empty.insert(shared.node.0, me);
            let settlement = Settlement {
                cluster: new_cluster_id(),
                members: empty,
            };
            shared.store_settlement(settlement).await?;
            break;
        }
        let waits_for = if waiting.is_empty() {
            "the member with the lowest id to begin".to_owned()
        } else {
            waiting.join("; ")
        };
        if waits_for != told {
            tracing::info!(%waits_for, "the cluster is not formed yet");
            shared.set_waiting(&waits_for);
            told = waits_for;
        }
        tokio::select! {
            () = sleep(ASK_EVERY) => {}
            () = shared.settled.notified() => {}
            () = shared.stop.cancelled() => return Err("stopped before the cluster was formed".to_owned()),
        }
    }
    Ok(())
}

/// The founder's second half: everybody has stored the settlement when this returns.
pub(crate) async fn announce(shared: &Arc<Shared>, settlement: &Settlement) {
    let announced = settlement
        .members
        .iter()
        .filter(|(id, _)| **id != shared.node.0)
        .map(|(&id, settled)| {
            let addr = shared
                .members
                .get(&NodeId(id))
                .unwrap_or(&settled.member.peer)
                .clone();
            async move {
                loop {
                    let request = Request::Settle(settlement.clone());
                    match exchange(&shared.identity, NodeId(id), &addr, request).await {
                        Ok(Response::Done) => return,
                        Ok(other) => tracing::warn!(peer = id, ?other, "the settlement was not taken"),
                        Err(error) => tracing::debug!(peer = id, %error, "the settlement was not delivered"),
                    }
                    sleep(ASK_EVERY).await;
                }
            }
        });
    tokio::select! {
        _ = join_all(announced) => {}
        () = shared.stop.cancelled() => {}
    }
}

/// Waits a moment until the others can be asked for their votes: the first election then needs no second
/// attempt. Only a courtesy, so it ends by itself.
pub(crate) async fn wait_for_links(shared: &Arc<Shared>) {
    let others = shared.members.keys().filter_map(|id| shared.peers.get(*id));
    let links = others.map(|peer| {
        let mut link = peer.control.link();
        async move {
            let _ = link.wait_for(|link| *link == Link::Up).await;
        }
    });
    let _ = timeout(LINKS_WITHIN, join_all(links)).await;
}

async fn ask(identity: &Identity, to: NodeId, addr: &str) -> Result<IdentityReply, LinkError> {
    match exchange(identity, to, addr, Request::Identify).await? {
        Response::Identity(reply) => Ok(reply),
        _ => Err(Refusal::NotSettled.into()),
    }
}

async fn exchange(
    identity: &Identity,
    to: NodeId,
    addr: &str,
    request: Request,
) -> Result<Response, LinkError> {
    let mut link = dial(identity, to, addr, Purpose::Identity).await?;
    let talk = async {
        link.send(&(1_u64, request)).await?;
        let (_, response): (u64, Response) = link.receive().await?;
        Ok(response)
    };
    timeout(ANSWER_WITHIN, talk)
        .await
        .map_err(|_| LinkError::Silent)?
}
