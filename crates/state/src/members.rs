//! Members of the cluster, as they are to be.
//!
//! This table is the one source of truth for who is a member. A join token admits a node once; removing it is an
//! operation of its own. The voters of consensus follow: a reconciler of the leader makes them so. Nodes look up here
//! which data folder may speak under an id, so a folder that has forgotten its votes stays out on every node that
//! has applied this. Needs feature level [`MEMBERS_LEVEL`], since older programs cannot read these operations.

use regent_types::{AgentId, NodeId};

use crate::event::EventKind;
use crate::operation::{AdmitMember, CreateToken};
use crate::outcome::{Applied, Noun, Outcome, Rejection};
use crate::record::{ApiToken, JoinScope, Member, Role, Subject};
use crate::tokens;
use crate::txn::Txn;

/// The feature level at which every cluster begins.
pub const FIRST_LEVEL: u32 = 1;
/// The feature level from which members are in the state.
pub const MEMBERS_LEVEL: u32 = 2;
/// How long after its admission a node may ask again with its spent token, whose answer was lost.
const ANSWERED_AGAIN_MS: u64 = 600_000;
/// Members at a time: consensus of more has no use, and each costs every other a connection.
pub const MAX_MEMBERS: usize = 9;

/// Makes a node a member: one that founded the cluster, as the leader knows it, or one that brings a join token.
pub(crate) fn admit(txn: &mut Txn<'_>, op: &AdmitMember) -> Applied {
    txn.actor.require_node()?;
    require_level(txn)?;
    if let Some(known) = txn.state().member(op.id) {
        // The answer to the first attempt was lost, and the token is spent.
        if known.is_live() && known.incarnation == op.incarnation && known.admitted_by == op.token {
            // A founder was admitted by no token, and nothing is given away by saying so again.
            if op.token.is_none() || txn.now() < known.since.saturating_add(ANSWERED_AGAIN_MS) {
                return Ok(Outcome::Member(known.clone()));
            }
            return Err(Rejection::WrongState(format!(
                "node {0} was admitted more than ten minutes ago and its join token is spent; remove it \
                 (`regent cluster remove {0}`) and let it join with an empty folder under a new id",
                op.id
            )));
        }
        let what = if known.is_live() { "is" } else { "was" };
        return Err(Rejection::WrongState(format!(
            "node {} {what} a member already, with another data folder; a node id is never used again: choose a new one",
            op.id
        )));
    }
    if txn
        .state()
        .members()
        .values()
        .filter(|member| member.is_live())
        .count()
        >= MAX_MEMBERS
    {
        return Err(Rejection::WrongState(format!(
            "the cluster has {MAX_MEMBERS} members, which is the most; remove one first"
        )));
    }
    if let Some(hash) = &op.token {
        let token = spend(txn, hash, |scope| *scope == JoinScope::Node, "a node")?;
        tokens::revoke(txn, &token.id, "it was used");
    }
    let member = Member {
        id: op.id,
        incarnation: op.incarnation,
        peer: op.peer.clone(),
        http: op.http.clone(),
        admitted_by: op.token,
        since: txn.now(),
        removed_at: None,
        changed: txn.revision(),
    };
    Ok(Outcome::Member(txn.put_member(
        EventKind::MemberAdded,
        member,
        "",
    )))
}

/// A member says where it is now.
pub(crate) fn moved(txn: &mut Txn<'_>, id: NodeId, peer: &str, http: &str) -> Applied {
    txn.actor.require_node()?;
    let member = find(txn, id)?;
    if member.peer == peer && member.http == http {
        return Ok(Outcome::Stale);
    }
    let member = Member {
        peer: peer.to_owned(),
        http: http.to_owned(),
        ..member
    };
    Ok(Outcome::Member(txn.put_member(
        EventKind::MemberUpdated,
        member,
        "",
    )))
}

/// Takes a member out, for good.
pub(crate) fn remove(txn: &mut Txn<'_>, id: NodeId, reason: &str) -> Applied {
    txn.actor.require(Role::Admin, "remove members")?;
    let member = find(txn, id)?;
    if txn
        .state()
        .members()
        .values()
        .filter(|member| member.is_live())
        .count()
        == 1
    {
        return Err(Rejection::WrongState(format!(
            "node {id} is the only member of the cluster"
        )));
    }
    let member = Member {
        removed_at: Some(txn.now()),
        ..member
    };
    Ok(Outcome::Member(txn.put_member(
        EventKind::MemberRemoved,
        member,
        reason,
    )))
}

/// Exchanges a join token for an agent's API token.
pub(crate) fn enrol(txn: &mut Txn<'_>, hash: &[u8; 32], op: &CreateToken) -> Applied {
    txn.actor.require_node()?;
    require_level(txn)?;
    let Subject::Agent(agent) = &op.subject else {
        return Err(Rejection::Forbidden(
            "a join token makes tokens for agents only".to_owned(),
        ));
    };
    let admits = |scope: &JoinScope| scope.admits_agent(agent.as_str());
    let join = spend(txn, hash, admits, &format!("the agent {agent}"))?;
    if let Subject::Join(scope) = &join.subject
        && scope.is_pattern()
        && (txn.state().agent(agent).is_some() || txn.state().tokens_of(&op.subject).next().is_some())
    {
        return Err(Rejection::Forbidden(format!(
            "the agent {agent} is known already, and this join token is for new agents; make one for it alone with \
             `regent token create --join agent:{agent}`"
        )));
    }
    let made = tokens::put(txn, op)?;
    tokens::revoke(txn, &join.id, &format!("it was used for the agent {agent}"));
    Ok(made)
}

/// The cluster's programs all support a newer level.
pub(crate) fn raise_level(txn: &mut Txn<'_>, level: u32) -> Applied {
    txn.actor.require_node()?;
    if level <= txn.state().feature_level() {
        return Ok(Outcome::Stale);
    }
    txn.raise_level(level);
    Ok(Outcome::Done)
}

/// The pattern of agent ids of a join token: an id, or the beginning of one and `*`.
pub fn check_agent_pattern(pattern: &str) -> Result<(), String> {
    let prefix = pattern.strip_suffix('*').unwrap_or(pattern);
    if pattern == "*" || AgentId::new(prefix).is_ok() {
        return Ok(());
    }
    Err(format!(
        "{pattern:?} is neither an agent's id nor the beginning of one and *, such as docker-*"
    ))
}

fn spend(
    txn: &Txn<'_>,
    hash: &[u8; 32],
    admits: impl Fn(&JoinScope) -> bool,
    whom: &str,
) -> Result<ApiToken, Rejection> {
    let now = txn.now();
    let token = txn
        .state()
        .token_by_hash(hash)
        .filter(|token| token.expires_at.is_none_or(|at| at > now));
    match token.map(|token| (token, &token.subject)) {
        Some((token, Subject::Join(scope))) if admits(scope) => Ok(ApiToken::clone(token)),
        Some((_, Subject::Join(scope))) => Err(Rejection::Forbidden(format!(
            "this join token is for {scope}, not for {whom}"
        ))),
        Some(_) => Err(Rejection::Forbidden(
            "this is not a join token; make one with `regent token create --join`".to_owned(),
        )),
        None => Err(Rejection::Unauthenticated),
    }
}

pub(crate) fn find(txn: &Txn<'_>, id: NodeId) -> Result<Member, Rejection> {
    let found = txn.state().member(id).filter(|member| member.is_live());
    found
        .map(|member| Member::clone(member))
        .ok_or_else(|| Rejection::NotFound {
            noun: Noun::Member,
            name: id.to_string(),
        })
}

/// Refuses what programs of a lower level could not read.
pub(crate) fn require_level(txn: &Txn<'_>) -> Result<(), Rejection> {
    if txn.state().feature_level() >= MEMBERS_LEVEL {
        return Ok(());
    }
    Err(Rejection::WrongState(
        "some nodes still run an older program: upgrade all of them first".to_owned(),
    ))
}
