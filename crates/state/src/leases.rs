//! Leases: named, fenced, time-bound rights, and here only whose they are and who is next.
//!
//! How much time is left is not in the state: the leader's clock knows it and proposes the end.
//! A token is the revision of its grant, so it is larger than that of every earlier one. However a lease
//! ends, the first in its queue is promoted in the same entry ([`queue`]). The lease `agent/{id}` says who
//! leads an agent: of an agent without replicas a gateway holds it for the connection, and it stands and
//! falls with that; replicas campaign for it.

use std::sync::Arc;

use regent_types::lease::{MAX_TTL_MS, MIN_TTL_DEV_MS};
use regent_types::{AgentId, Epoch, LeaseName, Principal, ReplicaName, Revision, Token};

use crate::agents;
use crate::event::EventKind;
use crate::faults::{self, Fault};
use crate::operation::Leadership;
use crate::outcome::{Applied, Noun, Outcome, Rejection};
use crate::record::{Agent, Keeping, Lease, Role, WaitsAt};
use crate::txn::Txn;

pub(crate) mod queue;

/// Characters of a holder's name.
const MAX_HOLDER: usize = 200;

/// Takes a lease that is free.
pub(crate) fn acquire(txn: &mut Txn<'_>, name: &LeaseName, holder: &str, ttl_ms: u64) -> Applied {
    let owner = owner(txn, name)?;
    check(holder, ttl_ms)?;
    if let Some(lease) = txn.state().lease(name) {
        return Err(held(lease));
    }
    not_held_back(txn)?;
    let lease = grant(txn, name, holder, owner, ttl_ms, Keeping::Holder);
    Ok(Outcome::Lease(lease))
}

/// Who asks for a lease that anybody may ask for.
fn owner(txn: &Txn<'_>, name: &LeaseName) -> Result<Principal, Rejection> {
    let Some(owner) = txn.actor.principal() else {
        return Err(Rejection::Forbidden(
            "the cluster itself holds no leases".to_owned(),
        ));
    };
    if name.as_str().starts_with("agent/") {
        // Taken by anybody else it would keep the agent's own connections from leading.
        return Err(Rejection::Forbidden(format!(
            "{name} is for the connections of that agent"
        )));
    }
    Ok(owner)
}

fn check(holder: &str, ttl_ms: u64) -> Result<(), Rejection> {
    if holder.chars().count() > MAX_HOLDER {
        return Err(invalid(
            "holder",
            format!("must have at most {MAX_HOLDER} characters"),
        ));
    }
    // The node that took the request refuses less than a second where that is too short.
    if !(MIN_TTL_DEV_MS..=MAX_TTL_MS).contains(&ttl_ms) {
        return Err(invalid(
            "ttlMs",
            format!("must be from {MIN_TTL_DEV_MS} to {MAX_TTL_MS}"),
        ));
    }
    Ok(())
}

/// Refuses to grant while somebody may act under a lease that a restored cluster does not know of.
pub(crate) fn not_held_back(txn: &Txn<'_>) -> Result<(), Rejection> {
    match txn.state().leases_held_back(txn.now()) {
        None => Ok(()),
        Some(until) => Err(Rejection::LeasesHeldBack {
            until,
            for_ms: until - txn.now(),
        }),
    }
}

fn held(lease: &Lease) -> Rejection {
    Rejection::LeaseHeld {
        holder: lease.holder.clone(),
        token: lease.token,
    }
}

/// Grants a lease that is free, under the revision of this operation.
fn grant(
    txn: &mut Txn<'_>,
    name: &LeaseName,
    holder: &str,
    owner: Principal,
    ttl_ms: u64,
    kept: Keeping,
) -> Arc<Lease> {
    let lease = Lease {
        name: name.clone(),
        holder: holder.to_owned(),
        owner,
        token: Token(txn.revision().0),
        ttl_ms,
        granted_at: txn.now(),
        kept,
    };
    txn.put_lease(lease)
}

/// Gives a lease back.
pub(crate) fn release(txn: &mut Txn<'_>, name: &LeaseName, token: Token) -> Applied {
    let Some(lease) = txn.state().lease(name).cloned() else {
        return Err(Rejection::LeaseLost);
    };
    if let Some(principal) = txn.actor.principal()
        && principal != lease.owner
    {
        return Err(Rejection::Forbidden(format!(
            "the lease belongs to {}",
            lease.owner
        )));
    }
    if lease.token != token {
        return Err(Rejection::LeaseLost);
    }
    end(txn, &lease, EventKind::LeaseReleased, "");
    Ok(Outcome::Lease(lease))
}

/// Takes a lease from its holder.
pub(crate) fn force_release(txn: &mut Txn<'_>, name: &LeaseName, reason: &str) -> Applied {
    txn.actor
        .require(Role::Operator, "take a lease from its holder")?;
    let Some(lease) = txn.state().lease(name).cloned() else {
        return Err(Rejection::NotFound {
            noun: Noun::Lease,
            name: name.to_string(),
        });
    };
    end(txn, &lease, EventKind::LeaseForceReleased, reason);
    Ok(Outcome::Lease(lease))
}

/// Ends the leases whose time is up, as long as the leadership that decided it wrote the entry. Candidates that
/// have lapsed leave the queues first.
pub(crate) fn expire(
    txn: &mut Txn<'_>,
    decided: Leadership,
    leases: &[(LeaseName, Token)],
    lapsed: &[(LeaseName, Revision, WaitsAt)],
) -> Applied {
    txn.actor.require_node()?;
    if decided != txn.meta.leadership && !faults::seeded(Fault::ForeignExpiry) {
        return Err(Rejection::WrongLeadership);
    }
    let mut ended = 0;
    for (name, place, at) in lapsed {
        ended += u64::from(queue::lapse(txn, name, *place, *at));
    }
    for (name, token) in leases {
        let Some(lease) = txn
            .state()
            .lease(name)
            .filter(|lease| lease.token == *token)
            .cloned()
        else {
            continue;
        };
        let reason = match lease.kept {
            Keeping::Gateway(..) => format!("not heard from for {} ms", lease.ttl_ms),
            // Of one that was promoted and never renewed, long before its TTL.
            Keeping::Holder | Keeping::Candidacy(..) | Keeping::Replica(_) => {
                "not renewed in time".to_owned()
            }
        };
        end(txn, &lease, EventKind::LeaseExpired, &reason);
        ended += 1;
    }
    Ok(Outcome::Count(ended))
}

/// Ends a lease early whose holder asked for that should its connection be lost.
pub(crate) fn release_abandoned(
    txn: &mut Txn<'_>,
    name: &LeaseName,
    token: Token,
    agent: &AgentId,
    (replica, epoch): (&ReplicaName, Epoch),
) -> Applied {
    txn.actor.require_node()?;
    let is_back = txn
        .state()
        .agent(agent)
        .and_then(|agent| agent.connections.get(replica))
        .is_some_and(|connection| connection.epoch > epoch);
    let owner = Principal::Agent(agent.clone());
    let lease = txn.state().lease(name).cloned();
    match lease.filter(|lease| !is_back && lease.token == token && lease.owner == owner) {
        Some(lease) => {
            end(
                txn,
                &lease,
                EventKind::LeaseReleased,
                "its connection was lost and did not come back in time",
            );
            Ok(Outcome::Lease(lease))
        }
        None => Ok(Outcome::Stale),
    }
}

/// Grants `agent/{id}` to a gateway for a connection of that agent.
pub(crate) fn grant_to_connection(
    txn: &mut Txn<'_>,
    agent: &Agent,
    replica: &ReplicaName,
) -> Option<Arc<Lease>> {
    let connection = agent.connections.get(replica)?;
    let (epoch, ttl_ms) = (connection.epoch, connection.stale_ms);
    let owner = Principal::Agent(agent.id.clone());
    let kept = Keeping::Gateway(replica.clone(), epoch);
    let name = LeaseName::of_agent(&agent.id);
    Some(grant(txn, &name, agent.id.as_str(), owner, ttl_ms, kept))
}

/// Ends a lease and promotes the next in its queue. What stands and falls with the lease goes with it: the
/// connection of an agent whose lease was not given back in good order.
fn end(txn: &mut Txn<'_>, lease: &Lease, kind: EventKind, why: &str) {
    let Some(agent) = lease.name.agent() else {
        txn.remove_lease(kind, &lease.name, why);
        queue::promote(txn, &lease.name);
        return;
    };
    let reason = &match (kind, why) {
        (EventKind::LeaseForceReleased, "") => "its lease was taken by an operator".to_owned(),
        (EventKind::LeaseForceReleased, why) => format!("its lease was taken by an operator: {why}"),
        (_, "") => "its lease was released".to_owned(),
        (_, why) => why.to_owned(),
    };
    match &lease.kept {
        Keeping::Gateway(replica, epoch) => {
            agents::drop_connection(txn, &agent, replica, *epoch, kind, reason);
        }
        Keeping::Replica(replica) => {
            let over = connection_of_holder(txn, &agent, replica, lease.token);
            txn.remove_lease(kind, &lease.name, why);
            match over {
                // It was not heard or was sent away: as far as this agent goes its connection is over too, and
                // a process that wakes finds it closed.
                Some(epoch) if kind != EventKind::LeaseReleased => {
                    agents::drop_connection(txn, &agent, replica, epoch, kind, reason);
                }
                Some(_) | None => agents::leader_gone(txn, &agent, reason),
            }
            queue::promote(txn, &lease.name);
        }
        Keeping::Holder | Keeping::Candidacy(..) => {
            txn.remove_lease(kind, &lease.name, why);
            queue::promote(txn, &lease.name);
        }
    }
}

/// The connection over which the replica holds the lease: the one that leads by it, or that was there when it was
/// granted. One that is newer is of a process that was started anew, and has no part in it.
fn connection_of_holder(
    txn: &Txn<'_>,
    agent: &AgentId,
    replica: &ReplicaName,
    token: Token,
) -> Option<Epoch> {
    let agent = txn.state().agent(agent)?;
    let epoch = agent.connections.get(replica)?.epoch;
    let leads = agent.leader.as_ref() == Some(&(replica.clone(), token));
    (leads || epoch.0 < token.0).then_some(epoch)
}

/// Ends `agent/{id}` with the agent itself: nobody is promoted, nobody waits any more.
pub(crate) fn end_with_agent(txn: &mut Txn<'_>, agent: &AgentId) {
    let name = LeaseName::of_agent(agent);
    queue::dissolve(txn, &name, "there is nothing to wait for any more");
    txn.remove_lease(EventKind::LeaseReleased, &name, "the agent was removed");
}

fn invalid(field: &str, message: String) -> Rejection {
    Rejection::Invalid {
        field: field.to_owned(),
        message,
    }
}
