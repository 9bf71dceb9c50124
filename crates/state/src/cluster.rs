//! The identity of the cluster: the first operation, and only that, gives it.

use std::sync::Arc;

use crate::event::{EventKind, EventRecord};
use crate::members;
use crate::operation::{Asked, InitCluster};
use crate::outcome::{Applied, Outcome, Rejection};
use crate::record::{ApiToken, Quota, Role, Subject, Usage, User};
use crate::state::Identity;
use crate::templates;
use crate::txn::Txn;

/// Gives the cluster its identity, its first admin and the built-in templates.
pub(crate) fn init(txn: &mut Txn<'_>, op: &InitCluster) -> Applied {
    txn.actor.require_node()?;
    if let Some(id) = txn.state().cluster_id() {
        return Err(Rejection::Identity(format!(
            "the cluster has an identity already: {id}"
        )));
    }
    txn.set_identity(Identity {
        cluster: op.cluster_id.clone(),
        feature_level: op.feature_level,
    });
    let now = txn.now();
    let admin = User {
        name: op.admin.clone(),
        password_hash: op.password_hash.clone(),
        role: Role::Admin,
        quota: Quota::default(),
        used: Usage::default(),
        created_at: now,
        changed: txn.revision(),
    };
    txn.put_user(EventKind::UserCreated, admin);
    if let Some((id, hash)) = &op.token {
        txn.put_token(ApiToken {
            id: id.clone(),
            hash: *hash,
            subject: Subject::User(op.admin.clone()),
            description: "the first admin token".to_owned(),
            login: false,
            created_at: now,
            expires_at: None,
        });
    }
    templates::put_built_in(txn);
    Ok(Outcome::Done)
}

/// Writes down who asked for what, if they may.
pub(crate) fn asked(txn: &mut Txn<'_>, asked: &Asked) -> Applied {
    let cluster = txn.state().cluster_id().cloned().map(EventRecord::Cluster);
    let cluster = cluster.ok_or_else(|| Rejection::Identity("the cluster has no identity yet".to_owned()))?;
    match asked {
        Asked::Transfer(to) => {
            txn.actor.require(Role::Operator, "hand the leadership over")?;
            let to = to.map(|to| format!("to node {to}")).unwrap_or_default();
            txn.emit_because(EventKind::ClusterTransferRequested, cluster, &to);
        }
        Asked::Promote(id) => {
            txn.actor.require(Role::Admin, "promote members")?;
            let member = EventRecord::Member(Arc::new(members::find(txn, *id)?));
            txn.emit_because(EventKind::MemberPromotionRequested, member, "");
        }
        Asked::Backup => {
            txn.actor.require(Role::Admin, "take backups")?;
            txn.emit_because(EventKind::ClusterBackupRequested, cluster, "");
        }
    }
    Ok(Outcome::Done)
}
