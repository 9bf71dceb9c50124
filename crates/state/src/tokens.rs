//! API tokens: opaque secrets of which only the hash is kept, and for whom they speak.
//!
//! A token that goes takes the connections with it that came with it.

use regent_types::TokenId;

use crate::actor::Actor;
use crate::agents;
use crate::event::EventKind;
use crate::members::{check_agent_pattern, require_level};
use crate::operation::CreateToken;
use crate::outcome::{Applied, Noun, Outcome, Rejection};
use crate::record::{ApiToken, JoinScope, Role, Subject};
use crate::txn::Txn;
use crate::users::require_self_or_admin;

/// How many tokens one subject may have: a program that logs in for every call must not fill the state.
pub const MAX_TOKENS_PER_SUBJECT: usize = 1_000;
/// Longest life of a join token, in milliseconds.
const MAX_JOIN_MS: u64 = 24 * 60 * 60 * 1_000;
/// Bytes of a description.
const MAX_DESCRIPTION: usize = 1_000;

/// Makes a token. Beyond [`MAX_TOKENS_PER_SUBJECT`] a login replaces the oldest login; others are refused.
pub(crate) fn create(txn: &mut Txn<'_>, op: &CreateToken) -> Applied {
    may_create(txn, op)?;
    put(txn, op)
}

/// Makes a token that may be made.
pub(crate) fn put(txn: &mut Txn<'_>, op: &CreateToken) -> Applied {
    if op.description.len() > MAX_DESCRIPTION {
        return Err(Rejection::Invalid {
            field: "description".to_owned(),
            message: format!("must have at most {MAX_DESCRIPTION} bytes"),
        });
    }
    if txn.state().token(&op.id).is_some() || txn.state().token_by_hash(&op.hash).is_some() {
        return Err(Rejection::AlreadyExists {
            noun: Noun::Token,
            name: op.id.to_string(),
        });
    }
    let replaced = if txn.state().tokens_of(&op.subject).count() < MAX_TOKENS_PER_SUBJECT {
        None
    } else {
        let logins = txn
            .state()
            .tokens_of(&op.subject)
            .filter(|t| t.login && op.login.is_some());
        match logins.min_by_key(|t| (t.created_at, t.id.clone())) {
            Some(oldest) => Some(oldest.id.clone()),
            None => {
                return Err(Rejection::WrongState(format!(
                    "there are {MAX_TOKENS_PER_SUBJECT} tokens already; revoke some first"
                )));
            }
        }
    };
    if let Some(id) = replaced {
        revoke(txn, &id, "its token was replaced by a newer login");
    }
    let now = txn.now();
    Ok(Outcome::ApiToken(txn.put_token(ApiToken {
        id: op.id.clone(),
        hash: op.hash,
        subject: op.subject.clone(),
        description: op.description.clone(),
        login: op.login.is_some(),
        created_at: now,
        expires_at: op.ttl_ms.map(|ttl| now.saturating_add(ttl)),
    })))
}

fn may_create(txn: &Txn<'_>, op: &CreateToken) -> Result<(), Rejection> {
    if let Some(checked) = &op.login {
        txn.actor.require_node()?;
        let Subject::User(name) = &op.subject else {
            return Err(Rejection::Forbidden("only users log in".to_owned()));
        };
        // The password may have changed after the node has checked it.
        return match txn.state().user(name) {
            Some(user) if user.password_hash.as_ref() == Some(checked) => Ok(()),
            _ => Err(Rejection::Unauthenticated),
        };
    }
    if let Actor::Node(_) = txn.actor {
        return Err(Rejection::Forbidden(
            "the cluster itself makes tokens for logins only".to_owned(),
        ));
    }
    match &op.subject {
        Subject::User(name) => {
            require_self_or_admin(&txn.actor, name, "make tokens for others")?;
            if txn.state().user(name).is_none() {
                return Err(Rejection::NotFound {
                    noun: Noun::User,
                    name: name.to_string(),
                });
            }
        }
        Subject::Agent(_) => txn.actor.require(Role::Operator, "make tokens for agents")?,
        Subject::Join(scope) => may_admit(txn, scope, op.ttl_ms)?,
    }
    Ok(())
}

/// Whoever may make an agent's token may have it fetched; nodes are for admins. Both are for a while only.
fn may_admit(txn: &Txn<'_>, scope: &JoinScope, ttl_ms: Option<u64>) -> Result<(), Rejection> {
    match scope {
        JoinScope::Node => txn.actor.require(Role::Admin, "let nodes join")?,
        JoinScope::Agent(pattern) => {
            txn.actor.require(Role::Operator, "let agents join")?;
            check_agent_pattern(pattern).map_err(|message| Rejection::Invalid {
                field: "join".to_owned(),
                message,
            })?;
        }
    }
    require_level(txn)?;
    if ttl_ms.is_some_and(|ttl| ttl <= MAX_JOIN_MS) {
        return Ok(());
    }
    Err(Rejection::Invalid {
        field: "expiresIn".to_owned(),
        message: "a join token lasts at most 24h".to_owned(),
    })
}

/// Revokes a token: one's own, an agent's as an operator, anybody's as an admin.
pub(crate) fn delete(txn: &mut Txn<'_>, id: &TokenId) -> Applied {
    let found = txn.state().token(id).map(|token| token.subject.clone());
    let own = match (&txn.actor, &found) {
        (Actor::User { name, .. }, Some(Subject::User(owner))) => name == owner,
        (Actor::Agent { id, .. }, Some(Subject::Agent(owner))) => id == owner,
        (actor, Some(Subject::Agent(_))) => actor.is_at_least(Role::Operator),
        _ => false,
    };
    if !own {
        // Before whether it exists: ids of others' tokens are nobody's business.
        txn.actor.require(Role::Admin, "revoke tokens of others")?;
    }
    if found.is_none() {
        return Err(Rejection::NotFound {
            noun: Noun::Token,
            name: id.to_string(),
        });
    }
    revoke(txn, id, "its token was revoked");
    Ok(Outcome::Done)
}

/// Removes a token, and the connections that came with it.
pub(crate) fn revoke(txn: &mut Txn<'_>, id: &TokenId, reason: &str) {
    let connections: Vec<_> = txn
        .state()
        .agents()
        .values()
        .flat_map(|agent| {
            agent
                .connections
                .iter()
                .map(move |(replica, c)| (agent, replica, c))
        })
        .filter(|(_, _, connection)| connection.token == *id)
        .map(|(agent, replica, connection)| (agent.id.clone(), replica.clone(), connection.epoch))
        .collect();
    txn.remove_token(id);
    for (agent, replica, epoch) in connections {
        agents::drop_connection(txn, &agent, &replica, epoch, EventKind::LeaseReleased, reason);
    }
}

/// Removes those of a subject's tokens that `which` says.
pub(crate) fn revoke_all(txn: &mut Txn<'_>, subject: &Subject, which: impl Fn(&ApiToken) -> bool) {
    let ids: Vec<TokenId> = txn
        .state()
        .tokens_of(subject)
        .filter(|token| which(token))
        .map(|token| token.id.clone())
        .collect();
    for id in ids {
        revoke(txn, &id, "its token was revoked");
    }
}
