//! Users: who they are, what they may do, what their sessions may use.

use regent_types::UserName;

use crate::actor::Actor;
use crate::event::EventKind;
use crate::outcome::{Applied, Noun, Outcome, Rejection};
use crate::record::{Quota, Role, Subject, Usage, User};
use crate::tokens;
use crate::txn::Txn;

/// Makes a user.
pub(crate) fn create(txn: &mut Txn<'_>, name: &UserName, hash: &str, role: Role, quota: Quota) -> Applied {
    txn.actor.require(Role::Admin, "make users")?;
    if role == Role::Agent {
        return Err(Rejection::Invalid {
            field: "role".to_owned(),
            message: "a user is user, operator or admin; agents get tokens of their own".to_owned(),
        });
    }
    if txn.state().user(name).is_some() {
        return Err(Rejection::AlreadyExists {
            noun: Noun::User,
            name: name.to_string(),
        });
    }
    let user = User {
        name: name.clone(),
        password_hash: Some(hash.to_owned()),
        role,
        quota,
        used: Usage::default(),
        created_at: txn.now(),
        changed: txn.revision(),
    };
    Ok(Outcome::User(txn.put_user(EventKind::UserCreated, user)))
}

/// Removes a user and their tokens.
pub(crate) fn delete(txn: &mut Txn<'_>, name: &UserName) -> Applied {
    txn.actor.require(Role::Admin, "remove users")?;
    let user = find(txn, name)?;
    let live = user.used.sessions;
    if live > 0 {
        return Err(Rejection::WrongState(format!(
            "user {name} has {live} live sessions; stop them first"
        )));
    }
    if user.role == Role::Admin
        && !txn
            .state()
            .users()
            .values()
            .any(|u| u.role == Role::Admin && u.name != *name)
    {
        return Err(Rejection::WrongState(format!(
            "user {name} is the last admin; make another one first"
        )));
    }
    tokens::revoke_all(txn, &Subject::User(name.clone()), |_| true);
    txn.remove_user(name);
    Ok(Outcome::Done)
}

/// Changes a password, one's own or, as an admin, anybody's, and ends what was logged in by the old one.
pub(crate) fn set_password(txn: &mut Txn<'_>, name: &UserName, hash: &str) -> Applied {
    require_self_or_admin(&txn.actor, name, "change another user's password")?;
    let mut user = find(txn, name)?;
    user.password_hash = Some(hash.to_owned());
    tokens::revoke_all(txn, &Subject::User(name.clone()), |token| token.login);
    Ok(Outcome::User(txn.put_user(EventKind::UserUpdated, user)))
}

/// Changes what a user's sessions may use. What they use now stays, even when it is more.
pub(crate) fn set_quota(txn: &mut Txn<'_>, name: &UserName, quota: Quota) -> Applied {
    txn.actor.require(Role::Admin, "change quotas")?;
    let mut user = find(txn, name)?;
    user.quota = quota;
    Ok(Outcome::User(txn.put_user(EventKind::UserUpdated, user)))
}

/// Refuses all but that user and admins (and the cluster itself).
pub(crate) fn require_self_or_admin(actor: &Actor, owner: &UserName, what: &str) -> Result<(), Rejection> {
    match actor {
        Actor::User { name, .. } if name == owner => Ok(()),
        _ => actor.require(Role::Admin, what),
    }
}

fn find(txn: &Txn<'_>, name: &UserName) -> Result<User, Rejection> {
    match txn.state().user(name) {
        Some(user) => Ok(User::clone(user)),
        None => Err(Rejection::NotFound {
            noun: Noun::User,
            name: name.to_string(),
        }),
    }
}
