//! Leases: named, fenced, time-bound rights, and here only whose they are.
//!
//! How much time is left is not in the state: the leader's clock knows it and proposes the expiry.
//! A token is the revision of its grant, so it is larger than that of every earlier one. The lease
//! `agent/{id}` that a gateway holds for a connection stands and falls with that connection.

use std::sync::Arc;

use regent_types::lease::{MAX_TTL_MS, MIN_TTL_DEV_MS};
use regent_types::{LeaseName, Principal, ReplicaName, Token};

use crate::agents;
use crate::event::EventKind;
use crate::operation::Leadership;
use crate::outcome::{Applied, Noun, Outcome, Rejection};
use crate::record::{Agent, Lease, Role};
use crate::txn::Txn;

/// Characters of a holder's name.
const MAX_HOLDER: usize = 200;

/// Takes a lease that is free.
pub(crate) fn acquire(txn: &mut Txn<'_>, name: &LeaseName, holder: &str, ttl_ms: u64) -> Applied {
    let Some(owner) = txn.actor.principal() else {
        return Err(Rejection::Forbidden(
            "the cluster itself holds no leases".to_owned(),
        ));
    };
    if name.as_str().starts_with("agent/") {
        // Taken by anybody else it would keep the agent's own connections from leading.
        return Err(Rejection::Forbidden(format!(
            "{name} is held by the node that the agent is connected to"
        )));
    }
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
    if let Some(lease) = txn.state().lease(name) {
        return Err(Rejection::LeaseHeld {
            holder: lease.holder.clone(),
            token: lease.token,
        });
    }
    let token = Token(txn.revision().0);
    let lease = Lease {
        name: name.clone(),
        holder: holder.to_owned(),
        owner,
        token,
        ttl_ms,
        granted_at: txn.now(),
        connection: None,
    };
    Ok(Outcome::Lease(txn.put_lease(lease)))
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
    end(txn, &lease, EventKind::LeaseReleased, "its lease was released");
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
    let reason = match reason {
        "" => "its lease was taken by an operator".to_owned(),
        reason => format!("its lease was taken by an operator: {reason}"),
    };
    end(txn, &lease, EventKind::LeaseForceReleased, &reason);
    Ok(Outcome::Lease(lease))
}

/// Ends the leases whose time is up, as long as the leadership that decided it wrote the entry.
pub(crate) fn expire(txn: &mut Txn<'_>, decided: Leadership, leases: &[(LeaseName, Token)]) -> Applied {
    txn.actor.require_node()?;
    if decided != txn.meta.leadership {
        return Err(Rejection::WrongLeadership);
    }
    let mut expired = 0;
    for (name, token) in leases {
        let Some(lease) = txn
            .state()
            .lease(name)
            .filter(|lease| lease.token == *token)
            .cloned()
        else {
            continue;
        };
        let reason = format!("not heard from for {} ms", lease.ttl_ms);
        end(txn, &lease, EventKind::LeaseExpired, &reason);
        expired += 1;
    }
    Ok(Outcome::Count(expired))
}

/// Grants `agent/{id}` to a gateway for a connection of that agent. What held it before is over:
/// the newest connection leads.
pub(crate) fn grant_to_connection(
    txn: &mut Txn<'_>,
    agent: &Agent,
    replica: &ReplicaName,
) -> Option<Arc<Lease>> {
    let connection = agent.connections.get(replica)?;
    let holder = match replica.as_str() {
        "" => agent.id.to_string(),
        replica => format!("{}/{replica}", agent.id),
    };
    Some(txn.put_lease(Lease {
        name: LeaseName::of_agent(&agent.id),
        holder,
        owner: Principal::Agent(agent.id.clone()),
        token: Token(txn.revision().0),
        ttl_ms: connection.stale_ms,
        granted_at: txn.now(),
        connection: Some((replica.clone(), connection.epoch)),
    }))
}

/// Ends a lease, and the connection that it stands and falls with.
fn end(txn: &mut Txn<'_>, lease: &Lease, kind: EventKind, reason: &str) {
    match (&lease.connection, lease.name.agent()) {
        (Some((replica, epoch)), Some(agent)) => {
            agents::drop_connection(txn, &agent, replica, *epoch, kind, reason);
        }
        _ => txn.remove_lease(kind, &lease.name),
    }
}

fn invalid(field: &str, message: String) -> Rejection {
    Rejection::Invalid {
        field: field.to_owned(),
        message,
    }
}
