//! Who waits for a lease: first come, first served.
//!
//! A lease that is free has an empty queue: whatever ends a lease promotes the first of its queue in the same
//! entry. A candidate is kept alive by the process of the node at which it waits; the leader names those
//! whose process is gone. What a promotion grants binds nobody until its first keepalive is acknowledged, so a
//! candidate that nobody can tell of it costs the next ones little (the leader's clock takes it back early).

use std::sync::Arc;

use regent_types::lease::MAX_CANDIDATES;
use regent_types::{LeaseName, Principal, ReplicaName, Revision};

use super::{check, grant, not_held_back, owner};
use crate::agents;
use crate::event::EventKind;
use crate::operation::Campaign;
use crate::outcome::{Applied, Outcome, Rejection};
use crate::record::{Candidate, Keeping, WaitsAt};
use crate::txn::Txn;

/// Takes a lease, takes up a grant again, or stands in the queue.
pub(crate) fn campaign(txn: &mut Txn<'_>, op: &Campaign) -> Applied {
    check(&op.holder, op.ttl_ms)?;
    let (owner, kept) = match (&op.connection, op.name.agent()) {
        (Some(connection), Some(_)) => of_replica(txn, op, connection)?,
        _ => (
            owner(txn, &op.name)?,
            Keeping::Candidacy(op.candidate.clone(), op.at),
        ),
    };
    let Some(lease) = txn.state().lease(&op.name).cloned() else {
        not_held_back(txn)?;
        let lease = grant(txn, &op.name, &op.holder, owner, op.ttl_ms, kept);
        return Ok(Outcome::Lease(lease));
    };
    if lease.owner == owner {
        let resumes = op.resume == Some(lease.token) && (op.connection.is_none() || lease.kept == kept);
        // A replica that was started anew does not know its token: its former self may still act under it.
        let asks_again = matches!(&lease.kept, Keeping::Candidacy(id, _) if *id == op.candidate)
            && op.connection.is_none();
        if asks_again && (&lease.holder, lease.ttl_ms) != (&op.holder, op.ttl_ms) {
            return Err(Rejection::IdempotencyKeyReused);
        }
        if resumes || asks_again {
            return Ok(Outcome::Lease(lease));
        }
    }
    join(txn, op, owner)
}

fn of_replica(
    txn: &Txn<'_>,
    op: &Campaign,
    (replica, epoch): &(ReplicaName, regent_types::Epoch),
) -> Result<(Principal, Keeping), Rejection> {
    txn.actor.require_node()?;
    let agent = op
        .name
        .agent()
        .and_then(|id| txn.state().agent(&id))
        .filter(|agent| {
            agent
                .connections
                .get(replica)
                .is_some_and(|connection| connection.epoch == *epoch)
        });
    let Some(agent) = agent else {
        return Err(Rejection::Superseded);
    };
    if replica.as_str().is_empty() {
        return Err(Rejection::Forbidden(format!(
            "the node holds {} for a connection without a replica name",
            op.name
        )));
    }
    Ok((
        Principal::Agent(agent.id.clone()),
        Keeping::Replica(replica.clone()),
    ))
}

fn join(txn: &mut Txn<'_>, op: &Campaign, owner: Principal) -> Applied {
    let known = txn.state().candidate(&op.name, &op.candidate).cloned();
    let (place, since) = match &known {
        Some(known) if known.owner != owner => {
            return Err(Rejection::Forbidden(format!(
                "that candidacy is of {}",
                known.owner
            )));
        }
        Some(known)
            if (&known.holder, known.ttl_ms) != (&op.holder, op.ttl_ms) && op.connection.is_none() =>
        {
            return Err(Rejection::IdempotencyKeyReused);
        }
        Some(known) => (known.place, known.since),
        None if txn.state().queue_len(&op.name) >= MAX_CANDIDATES => {
            return Err(Rejection::Busy(format!(
                "{MAX_CANDIDATES} wait for {} already; ask again later",
                op.name
            )));
        }
        None => (txn.revision(), txn.now()),
    };
    let candidate = Candidate {
        lease: op.name.clone(),
        place,
        id: op.candidate.clone(),
        holder: op.holder.clone(),
        owner,
        ttl_ms: op.ttl_ms,
        since,
        at: op.at,
        connection: op.connection.clone(),
    };
    Ok(Outcome::Queued(match known {
        // Nobody needs to be told what is so already.
        Some(known) if *known == candidate => known,
        Some(_) | None => txn.put_candidate(candidate),
    }))
}

/// Leaves the queue, unless the candidate waits elsewhere by now.
pub(crate) fn withdraw(
    txn: &mut Txn<'_>,
    name: &LeaseName,
    id: &regent_types::CandidateId,
    at: WaitsAt,
) -> Applied {
    let Some(candidate) = txn
        .state()
        .candidate(name, id)
        .filter(|candidate| candidate.at == at)
        .cloned()
    else {
        return Ok(Outcome::Stale);
    };
    if let Some(principal) = txn.actor.principal()
        && principal != candidate.owner
    {
        return Err(Rejection::Forbidden(format!(
            "that candidacy is of {}",
            candidate.owner
        )));
    }
    txn.remove_candidate(&candidate, "it does not wait any more");
    Ok(Outcome::Done)
}

/// A candidate's node is gone: it leaves the queue, and the connection that its node held is over. Gives whether
/// it was there, and still waited at that node.
pub(crate) fn lapse(txn: &mut Txn<'_>, name: &LeaseName, place: Revision, at: WaitsAt) -> bool {
    let candidate = txn.state().candidate_at(name, place).cloned();
    let Some(candidate) = candidate.filter(|candidate| candidate.at == at) else {
        return false;
    };
    let reason = format!("node {} is gone", candidate.at.node);
    txn.remove_candidate(&candidate, &reason);
    if let (Some((replica, epoch)), Some(agent)) = (&candidate.connection, name.agent()) {
        agents::drop_connection(txn, &agent, replica, *epoch, EventKind::LeaseExpired, &reason);
    }
    true
}

/// Grants a lease that has just become free to the first who waits for it.
pub(super) fn promote(txn: &mut Txn<'_>, name: &LeaseName) {
    loop {
        let first = txn.state().queue_of(name).next().cloned();
        let Some(first) = first else { return };
        if !exists(txn, &first.owner) {
            txn.remove_candidate(&first, "its principal was removed");
            continue;
        }
        txn.promote_candidate(&first);
        let kept = match &first.connection {
            Some((replica, _)) => Keeping::Replica(replica.clone()),
            None => Keeping::Candidacy(first.id.clone(), first.at),
        };
        grant(txn, name, &first.holder, first.owner.clone(), first.ttl_ms, kept);
        return;
    }
}

/// A connection is over or was replaced: its candidacy ends, or moves to the connection that replaced it.
pub(crate) fn connection_gone(
    txn: &mut Txn<'_>,
    name: &LeaseName,
    replica: &ReplicaName,
    epoch: regent_types::Epoch,
) {
    let gone = (replica.clone(), epoch);
    let candidate = txn
        .state()
        .queue_of(name)
        .find(|candidate| candidate.connection.as_ref() == Some(&gone))
        .cloned();
    if let Some(candidate) = candidate {
        txn.remove_candidate(&candidate, "its connection is over");
    }
}

/// A newer connection of a replica took over: its place in the queue goes along.
pub(crate) fn connection_replaced(
    txn: &mut Txn<'_>,
    name: &LeaseName,
    replica: &ReplicaName,
    epoch: regent_types::Epoch,
    at: WaitsAt,
) {
    let candidate = txn
        .state()
        .queue_of(name)
        .find(|candidate| matches!(&candidate.connection, Some((waits, _)) if waits == replica))
        .cloned();
    if let Some(candidate) = candidate {
        txn.put_candidate(Candidate {
            connection: Some((replica.clone(), epoch)),
            at,
            ..Candidate::clone(&candidate)
        });
    }
}

/// Nobody waits any more.
pub(crate) fn dissolve(txn: &mut Txn<'_>, name: &LeaseName, reason: &str) {
    let all: Vec<Arc<Candidate>> = txn.state().queue_of(name).cloned().collect();
    for candidate in all {
        txn.remove_candidate(&candidate, reason);
    }
}

fn exists(txn: &Txn<'_>, owner: &Principal) -> bool {
    match owner {
        Principal::User(name) => txn.state().user(name).is_some(),
        Principal::Agent(id) => txn.state().agent(id).is_some(),
    }
}
