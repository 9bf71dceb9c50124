//! Agents: registered, connected, led by one connection, gone.
//!
//! A connection is (agent, replica); its epoch, the revision at which it was taken up, says which
//! socket. The newer connection of a pair supersedes the older, whose late words change nothing.
//! The token of `agent/{id}` says which connection leads: that one carries commands, and only its
//! reports count. Registration touches neither connections nor scheduling.

use std::sync::Arc;

use std::collections::BTreeMap;

use regent_types::{AgentId, Epoch, LeaseName, Principal, ReplicaName, Revision, Token};

use crate::event::EventKind;
use crate::leases::queue;
use crate::operation::{AgentConnected, RegisterAgent};
use crate::outcome::{Applied, Noun, Outcome, Rejection};
use crate::record::{
    Agent, Capacity, Connection, Keeping, Role, Scheduling, SessionState, Subject, Usage, WaitsAt,
};
use crate::txn::Txn;
use crate::{leases, reconcile, tokens};

/// Replicas of one agent. Each event about it shows them all.
const MAX_REPLICAS: usize = 64;

/// Makes an agent known, or changes what is known of it.
pub(crate) fn register(txn: &mut Txn<'_>, op: &RegisterAgent) -> Applied {
    txn.actor.require_agent(&op.id, "register another agent")?;
    let known = txn.state().agent(&op.id).cloned();
    let now = txn.now();
    let (kind, agent) = match &known {
        None => {
            let agent = Agent {
                id: op.id.clone(),
                platform: op.platform.clone(),
                region: op.region.clone(),
                capacity: op.capacity,
                allocated: Usage::default(),
                labels: op.labels.clone(),
                metadata: op.metadata.clone(),
                scheduling: Scheduling::Eligible,
                connections: BTreeMap::new(),
                leader: None,
                // What was said before it was registered is of an agent that is forgotten.
                newest_ended: Epoch(txn.revision().0),
                runtime_id: String::new(),
                offline_reason: "has not connected yet".to_owned(),
                created_at: now,
                updated_at: now,
                changed: txn.revision(),
            };
            (EventKind::AgentRegistered, agent)
        }
        Some(old) => {
            let agent = Agent {
                platform: op.platform.clone(),
                region: op.region.clone(),
                capacity: op.capacity,
                labels: op.labels.clone(),
                metadata: op.metadata.clone(),
                ..Agent::clone(old)
            };
            if agent == **old {
                return Ok(Outcome::Agent {
                    agent: old.clone(),
                    created: false,
                });
            }
            (EventKind::AgentUpdated, agent)
        }
    };
    Ok(Outcome::Agent {
        agent: txn.put_agent(kind, agent),
        created: known.is_none(),
    })
}

/// Forgets an agent, its connections and its tokens. By force its live sessions are lost.
pub(crate) fn delete(txn: &mut Txn<'_>, id: &AgentId, force: bool) -> Applied {
    txn.actor.require(Role::Operator, "remove agents")?;
    let agent = find(txn, id)?;
    let live = agent.allocated.sessions;
    if live > 0 && !force {
        return Err(Rejection::WrongState(format!(
            "agent {id} has {live} live sessions; drain it first, or use force to give them up"
        )));
    }
    reconcile::agent_removed(txn, id);
    leases::end_with_agent(txn, id);
    let agent = find(txn, id)?;
    txn.remove_agent(id);
    tokens::revoke_all(txn, &Subject::Agent(id.clone()), |_| true);
    Ok(Outcome::Agent {
        agent: Arc::new(agent),
        created: false,
    })
}

/// Cordons, uncordons or drains. No heartbeat, registration or reconnect changes it.
pub(crate) fn set_scheduling(
    txn: &mut Txn<'_>,
    id: &AgentId,
    scheduling: Scheduling,
    deadline_ms: Option<u64>,
) -> Applied {
    txn.actor.require(Role::Operator, "cordon or drain agents")?;
    let mut agent = find(txn, id)?;
    agent.scheduling = match scheduling {
        Scheduling::Draining { .. } => Scheduling::Draining {
            deadline: deadline_ms.map(|ms| txn.now().saturating_add(ms)),
        },
        Scheduling::Eligible | Scheduling::Cordoned => scheduling,
    };
    Ok(Outcome::Agent {
        agent: txn.put_agent(EventKind::AgentScheduling, agent),
        created: false,
    })
}

/// Takes up a connection. One without a replica name leads from then on; one of a replica leads if it holds
/// `agent/{id}`, under the token that it says. What the one that leads runs is reconciled.
pub(crate) fn connected(
    txn: &mut Txn<'_>,
    op: &AgentConnected,
    replica: Option<(Option<Token>, WaitsAt)>,
) -> Applied {
    let (holds, at) = replica.unzip();
    txn.actor.require_node()?;
    let mut agent = find(txn, &op.agent)?;
    may_connect(txn, op)?;
    // It could not lead, and a standby would only learn that one by one.
    leases::not_held_back(txn)?;
    one_kind(txn, &agent, op)?;
    if agent.connections.len() >= MAX_REPLICAS && !agent.connections.contains_key(&op.replica) {
        return Err(Rejection::WrongState(format!(
            "agent {} has {MAX_REPLICAS} replicas, which is as many as one may have",
            op.agent
        )));
    }
    let runtime_changed =
        !op.runtime_id.is_empty() && !agent.runtime_id.is_empty() && op.runtime_id != agent.runtime_id;
    if runtime_changed && let Some(why) = tied_to_runtime(txn, &agent, op) {
        // What to do comes first: the reason of a closed connection has little room.
        return Err(Rejection::WrongState(format!(
            "another runtime than the agent's: stop its sessions and replicas first, or remove it by force; \
             {why} on {:?}, this is {:?}",
            agent.runtime_id, op.runtime_id
        )));
    }
    if !op.runtime_id.is_empty() {
        agent.runtime_id.clone_from(&op.runtime_id);
    }

    let epoch = Epoch(txn.revision().0);
    let connection = Connection {
        node: op.node,
        epoch,
        protocol: op.protocol,
        connected_at: txn.now(),
        stale_ms: op.stale_ms,
        token: op.token.clone(),
    };
    let was_online = agent.is_online();
    let superseded = agent.connections.insert(op.replica.clone(), connection).is_some();
    let lease_name = LeaseName::of_agent(&op.agent);
    let by_gateway = op.replica.as_str().is_empty() && lease_is_ours(txn, &lease_name, &op.replica);
    let token = if by_gateway {
        Some(Token(txn.revision().0))
    } else {
        held_by_replica(txn, &lease_name, &op.replica).filter(|token| holds.flatten() == Some(*token))
    };
    if let Some(token) = token {
        agent.leader = Some((op.replica.clone(), token));
        agent.offline_reason.clear();
    }
    let led = agent
        .leader
        .as_ref()
        .is_some_and(|(replica, _)| *replica == op.replica);
    let leads_no_more = token.is_none() && superseded && led;
    if leads_no_more {
        agent.leader = None;
    }
    let kind = if was_online {
        EventKind::AgentConnected
    } else {
        EventKind::AgentOnline
    };
    let agent = txn.put_agent(kind, agent);
    if by_gateway {
        if txn.state().lease(&lease_name).is_some() {
            txn.remove_lease(
                EventKind::LeaseReleased,
                &lease_name,
                "a newer connection took over",
            );
        }
        leases::grant_to_connection(txn, &agent, &op.replica);
    } else if let Some(at) = at {
        queue::connection_replaced(txn, &lease_name, &op.replica, epoch, at);
    }
    if token.is_some() {
        reconcile::agent_connected(txn, op);
    } else if leads_no_more {
        reconcile::agent_offline(txn, &op.agent, "its replica was started anew");
    }
    Ok(Outcome::Connected { epoch, token })
}

/// Refuses a connection if a newer one of that replica was taken up since its socket was opened, even if that one is over
/// by now. A proposal can hang in the network, or in a node that stands still, while the agent connects elsewhere: the
/// older connection would supersede the newer, and what was begun since would be missing from what it says.
///
/// What is over is not kept by replica. So another replica that came and went meanwhile refuses this one too, and a join
/// that is proposed twice refuses itself when the first was applied; then the agent connects once more.
pub(crate) fn is_newest(txn: &Txn<'_>, op: &AgentConnected, since: Revision) -> Result<(), Rejection> {
    txn.actor.require_node()?;
    let agent = find(txn, &op.agent)?;
    let current = agent.connections.get(&op.replica).map(|current| current.epoch);
    if current.unwrap_or(agent.newest_ended).0 > since.0 {
        return Err(Rejection::Superseded);
    }
    Ok(())
}

/// An agent either has replicas, which elect their leader, or none, and its newest connection leads: both at
/// once would be two leaders.
fn one_kind(txn: &Txn<'_>, agent: &Agent, op: &AgentConnected) -> Result<(), Rejection> {
    let named = !op.replica.as_str().is_empty();
    let other = agent
        .connections
        .keys()
        .find(|replica| replica.as_str().is_empty() == named);
    match other {
        Some(replica) if named => Err(Rejection::WrongState(format!(
            "agent {} is connected without a replica name, on node {}; end that process before replicas are started",
            agent.id, agent.connections[replica].node
        ))),
        Some(replica) => Err(Rejection::WrongState(format!(
            "agent {} is connected as replica {replica:?}; give this process a replica name too",
            agent.id
        ))),
        None => match txn.state().lease(&LeaseName::of_agent(&agent.id)) {
            Some(lease) if !named && let Keeping::Replica(replica) = &lease.kept => {
                Err(Rejection::WrongState(format!(
                    "replica {replica:?} led agent {} and may still act; its lease runs out within {} ms",
                    agent.id, lease.ttl_ms
                )))
            }
            Some(_) | None => Ok(()),
        },
    }
}

/// The token under which that replica holds the lease.
fn held_by_replica(txn: &Txn<'_>, name: &LeaseName, replica: &ReplicaName) -> Option<Token> {
    let lease = txn.state().lease(name)?;
    matches!(&lease.kept, Keeping::Replica(holder) if holder == replica).then_some(lease.token)
}

fn may_connect(txn: &Txn<'_>, op: &AgentConnected) -> Result<(), Rejection> {
    match txn.state().principal_of(&op.token, txn.now()) {
        None => Err(Rejection::Unauthenticated),
        Some((Principal::Agent(id), _)) if id == op.agent => Ok(()),
        Some((Principal::User(_), Role::Admin)) => Ok(()),
        Some((principal, _)) => Err(Rejection::Forbidden(format!(
            "the token of {principal} may not connect agent {}",
            op.agent
        ))),
    }
}

/// Whether `agent/{id}` is free, or held for an earlier connection of that replica.
fn lease_is_ours(txn: &Txn<'_>, name: &LeaseName, replica: &ReplicaName) -> bool {
    match txn.state().lease(name) {
        None => true,
        Some(lease) => matches!(&lease.kept, Keeping::Gateway(held, _) if held == replica),
    }
}

/// What keeps an agent on its runtime: a session that may run there now (one that was at least sent there), or
/// another replica that would start every session a second time.
fn tied_to_runtime(txn: &Txn<'_>, agent: &Agent, op: &AgentConnected) -> Option<String> {
    if let Some(session) = on_runtime(txn, &op.agent) {
        return Some(format!("session {session} runs"));
    }
    let other = agent.connections.keys().find(|replica| **replica != op.replica)?;
    Some(format!("replica {other} is"))
}

/// A session that may run on the agent's runtime now: one that was at least sent there.
fn on_runtime(txn: &Txn<'_>, agent: &AgentId) -> Option<regent_types::SessionName> {
    let state = txn.state();
    let mut sessions = state.sessions_of_agent(agent);
    sessions
        .find(|s| !s.state.is_final() && s.state != SessionState::Pending)
        .map(|s| s.name.clone())
}

/// A connection has ended. Stale when it is not the current one.
pub(crate) fn disconnected(
    txn: &mut Txn<'_>,
    agent: &AgentId,
    replica: &ReplicaName,
    epoch: Epoch,
    reason: &str,
) -> Applied {
    txn.actor.require_node()?;
    if drop_connection(txn, agent, replica, epoch, EventKind::LeaseReleased, reason) {
        Ok(Outcome::Done)
    } else {
        Ok(Outcome::Stale)
    }
}

/// Ends a connection, if it is the current one of its replica, with the lease that a gateway holds for it (that
/// of a replica outlasts its connection, for it may come back) and with its place in the queue.
/// `lease_ends` says how the lease ends. Gives whether there was such a connection.
pub(crate) fn drop_connection(
    txn: &mut Txn<'_>,
    id: &AgentId,
    replica: &ReplicaName,
    epoch: Epoch,
    lease_ends: EventKind,
    reason: &str,
) -> bool {
    let lease_name = LeaseName::of_agent(id);
    let holds = txn
        .state()
        .lease(&lease_name)
        .is_some_and(|lease| lease.kept == Keeping::Gateway(replica.clone(), epoch));
    queue::connection_gone(txn, &lease_name, replica, epoch);
    let current = txn.state().agent(id).filter(|agent| {
        agent
            .connections
            .get(replica)
            .is_some_and(|connection| connection.epoch == epoch)
    });
    let Some(mut agent) = current.map(|agent| Agent::clone(agent)) else {
        if holds {
            txn.remove_lease(lease_ends, &lease_name, reason);
        }
        return false;
    };
    agent.connections.remove(replica);
    agent.newest_ended = agent.newest_ended.max(epoch);
    let led = agent
        .leader
        .as_ref()
        .is_some_and(|(leading, _)| leading == replica);
    if led {
        agent.leader = None;
    }
    let offline = !agent.is_online();
    if offline {
        reason.clone_into(&mut agent.offline_reason);
    }
    let kind = if offline {
        EventKind::AgentOffline
    } else {
        EventKind::AgentDisconnected
    };
    txn.put_agent(kind, agent);
    if holds {
        txn.remove_lease(lease_ends, &lease_name, reason);
    }
    if led || offline {
        reconcile::agent_offline(txn, id, reason);
    }
    true
}

/// The replica that led gave its lease back: nobody leads until the next one has taken over.
pub(crate) fn leader_gone(txn: &mut Txn<'_>, id: &AgentId, reason: &str) {
    let Some(mut agent) = txn.state().agent(id).map(|agent| Agent::clone(agent)) else {
        return;
    };
    if agent.leader.take().is_some() {
        txn.put_agent(EventKind::AgentUpdated, agent);
        reconcile::agent_offline(txn, id, reason);
    }
}

/// What an agent can carry has changed; only its leading connection may say so.
pub(crate) fn capacity(txn: &mut Txn<'_>, id: &AgentId, epoch: Epoch, capacity: Capacity) -> Applied {
    txn.actor.require_node()?;
    let mut agent = find(txn, id)?;
    if agent.leading().is_none_or(|connection| connection.epoch != epoch) {
        return Err(Rejection::Superseded);
    }
    if agent.capacity != capacity {
        agent.capacity = capacity;
        txn.put_agent(EventKind::AgentUpdated, agent);
    }
    Ok(Outcome::Done)
}

fn find(txn: &Txn<'_>, id: &AgentId) -> Result<Agent, Rejection> {
    match txn.state().agent(id) {
        Some(agent) => Ok(Agent::clone(agent)),
        None => Err(Rejection::NotFound {
            noun: Noun::Agent,
            name: id.to_string(),
        }),
    }
}
