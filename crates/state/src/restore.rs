//! A new cluster out of another one's state: from a backup, or from what survived the loss of a quorum.
//!
//! What the old cluster did after that state is not known here, and who obeyed it may still act. So nothing that the
//! old cluster said may be said again, and nothing that it allowed may go on unseen:
//!
//! - the revision base is raised, so that every token, epoch and event id is larger than all that ever were;
//! - leases end, and none is granted until the longest one that the old cluster may have granted is over, unless the
//!   operator states that nobody acts under one ([`HOLD_MS`]);
//! - connections are void, and agents may not connect before that time either, for a connection can lead;
//! - open commands fail: the world has moved on since they were wanted;
//! - API tokens are revoked unless the operator keeps them: what was revoked since would be valid again.
//!
//! The changes go through `txn` like those of an operation, so indexes, usage, events and digest follow. It is none,
//! though: the new cluster begins with a snapshot of the result.

use std::sync::Arc;

use regent_types::lease::MAX_TTL_MS;
use regent_types::{ClusterId, LeaseName, NodeId, Revision, TokenId, UserName};

use crate::actor::Actor;
use crate::event::EventKind;
use crate::leases::queue;
use crate::members::MEMBERS_LEVEL;
use crate::operation::{Leadership, Meta};
use crate::record::{ApiToken, Member, Restored, Role, Subject, User};
use crate::state::{Identity, State};
use crate::txn::Txn;
use crate::{agents, commands, sessions, tokens};

/// Revision bases are multiples of this. No log grows as long: 2^40 entries are 35 years of a thousand a second.
pub const BASE_STEP: u64 = 1 << 40;
/// Where revisions end: JSON's numbers are exact below it.
const REVISIONS_END: u64 = 1 << 53;
/// How long no lease is granted, in milliseconds by the cluster's clock: the longest TTL and twice the error of
/// clock rates (1 %), since the cluster's clock may be slewed on top of running fast.
pub const HOLD_MS: u64 = MAX_TTL_MS + MAX_TTL_MS / 50;
/// How many former clusters are remembered.
pub const MAX_LINEAGE: usize = 16;
/// What failed commands, leases and connections say.
const WHY: &str = "restored";

/// What is decided outside of the state.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The new cluster's id.
    pub cluster: ClusterId,
    /// Its only member.
    pub node: NodeId,
    /// The random name of that member's data folder.
    pub incarnation: [u8; 16],
    /// `host:port` of its peer transport.
    pub peer: String,
    /// Base address of its REST API.
    pub http: String,
    /// The place in the log that the restore takes: the one after the last applied entry.
    pub index: u64,
    /// The term under which it does.
    pub term: u64,
    /// Wall clock, in milliseconds.
    pub at: u64,
    /// No revision up to this one is used again, whatever the state says: for the case that a cluster that was
    /// restored from the same backup has run already.
    pub above: Revision,
    /// API tokens stay valid.
    pub keep_tokens: bool,
    /// Leases are granted at once.
    pub old_cluster_is_dead: bool,
    /// A new token for an administrator: its id and the SHA-256 of its secret.
    pub admin_token: Option<(TokenId, [u8; 32])>,
}

/// Why a state cannot be made a new cluster's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// It is of a cluster that has no identity yet.
    #[error("the state is empty: its cluster was never initialised, so there is nothing to restore")]
    Empty,
    /// The revision base cannot be raised any more.
    #[error(
        "the revision base cannot be raised beyond revision {above}: revisions end below {REVISIONS_END}"
    )]
    Exhausted {
        /// Above which revision it should be.
        above: Revision,
    },
    /// Nobody could do anything in it.
    #[error(
        "nobody could get in: all API tokens are revoked and no administrator has a password; \
         give a new token with --bootstrap-token-file, or keep the old ones with --keep-tokens"
    )]
    LockedOut,
    /// There is nobody whose token it could be.
    #[error(
        "the state has no administrator for whom a token could be made; leave out --bootstrap-token-file"
    )]
    NoAdmin,
}

impl State {
    /// This state as a new cluster begins with it.
    pub fn restored_as(&self, plan: &Plan) -> Result<Self, RestoreError> {
        let Some(identity) = self.identity.clone() else {
            return Err(RestoreError::Empty);
        };
        let above = self.revision.max(plan.above);
        let exhausted = RestoreError::Exhausted { above };
        let base = (above.0 / BASE_STEP + 1).checked_mul(BASE_STEP);
        let base = base.filter(|base| base + BASE_STEP <= REVISIONS_END);
        let base = base.ok_or(exhausted)?;
        let admin = match plan.admin_token {
            None => None,
            Some(_) => Some(administrator(self).ok_or(RestoreError::NoAdmin)?),
        };

        if !plan.keep_tokens
            && admin.is_none()
            && !administrators(self).any(|user| user.password_hash.is_some())
        {
            return Err(RestoreError::LockedOut);
        }

        let mut state = self.clone();
        state.revision_base = base;
        state.revision = Revision(base + plan.index);
        state.now = state.now.max(plan.at);
        let meta = Meta {
            revision: state.revision,
            leadership: Leadership {
                term: plan.term,
                node: plan.node,
            },
            at: state.now,
        };
        state.contribution.begin(state.digest, meta.revision);
        let mut txn = Txn::new(&mut state, &meta, Actor::Node(plan.node));
        name(&mut txn, &identity, plan, self.revision);
        end_leases(&mut txn);
        end_connections(&mut txn);
        fail_commands(&mut txn);
        renew_tokens(&mut txn, plan, admin);
        state.digest = state.contribution.finish(&Ok(crate::Outcome::Done));
        Ok(state)
    }
}

/// The new identity, and what is remembered of the old one.
fn name(txn: &mut Txn<'_>, old: &Identity, plan: &Plan, state_revision: Revision) {
    let mut from = vec![old.cluster.clone()];
    from.extend_from_slice(txn.state().former_clusters());
    if from.len() > MAX_LINEAGE {
        // The first one stays: what agents run is named after it.
        from.remove(MAX_LINEAGE - 1);
    }
    let now = txn.now();
    let no_lease_before = if plan.old_cluster_is_dead {
        0
    } else {
        now.saturating_add(HOLD_MS)
    };
    txn.set_identity(Identity {
        cluster: plan.cluster.clone(),
        feature_level: old.feature_level,
    });
    txn.put_restored(Restored {
        cluster: plan.cluster.clone(),
        from,
        at: now,
        revision: txn.revision(),
        state_revision,
        no_lease_before,
    });
    txn.clear_members();
    if old.feature_level >= MEMBERS_LEVEL {
        let member = Member {
            id: plan.node,
            incarnation: plan.incarnation,
            peer: plan.peer.clone(),
            http: plan.http.clone(),
            admitted_by: None,
            since: now,
            removed_at: None,
            changed: txn.revision(),
        };
        txn.put_member(EventKind::MemberAdded, member, WHY);
    }
}

/// Nobody waits for a lease any more, and nobody holds one. Queues first, or their first would be promoted.
fn end_leases(txn: &mut Txn<'_>) {
    let queues: Vec<LeaseName> = txn.state().candidates.keys().cloned().collect();
    for name in queues {
        queue::dissolve(txn, &name, WHY);
    }
    let names: Vec<LeaseName> = txn.state().leases().keys().cloned().collect();
    for name in names {
        txn.remove_lease(EventKind::LeaseForceReleased, &name, WHY);
    }
}

fn end_connections(txn: &mut Txn<'_>) {
    let all = txn.state().agents().values();
    let connections: Vec<_> = all
        .flat_map(|agent| {
            let connections = agent.connections.iter();
            connections.map(|(replica, connection)| (agent.id.clone(), replica.clone(), connection.epoch))
        })
        .collect();
    for (agent, replica, epoch) in connections {
        agents::drop_connection(
            txn,
            &agent,
            &replica,
            epoch,
            EventKind::LeaseForceReleased,
            "the cluster was restored, and it has not connected since",
        );
    }
}

/// What was to be done is not done any more; a session that waited for it says so, or goes on as it was.
fn fail_commands(txn: &mut Txn<'_>) {
    let open: Vec<_> = txn
        .state()
        .commands()
        .values()
        .filter(|command| !command.state.is_final())
        .cloned()
        .collect();
    for command in open {
        let failure = commands::failure(txn, WHY);
        let command = commands::finish(txn, &command, failure);
        sessions::effects::failed(txn, &command, WHY);
    }
}

/// Join tokens are always revoked: one that was used since would admit somebody a second time.
fn renew_tokens(txn: &mut Txn<'_>, plan: &Plan, admin: Option<UserName>) {
    let revoked: Vec<TokenId> = txn
        .state()
        .tokens()
        .values()
        .filter(|token| !plan.keep_tokens || matches!(token.subject, Subject::Join(_)))
        .map(|token| token.id.clone())
        .collect();
    for id in revoked {
        tokens::revoke(txn, &id, WHY);
    }
    if let (Some((id, hash)), Some(admin)) = (&plan.admin_token, admin) {
        let created_at = txn.now();
        txn.put_token(ApiToken {
            id: id.clone(),
            hash: *hash,
            subject: Subject::User(admin),
            description: "the first admin token after the restore".to_owned(),
            login: false,
            created_at,
            expires_at: None,
        });
    }
}

/// Whose a new administrator's token is: the first user's, if that is one still.
fn administrator(state: &State) -> Option<UserName> {
    let first = administrators(state).find(|user| user.name.as_str() == "admin");
    first
        .or_else(|| administrators(state).next())
        .map(|user| user.name.clone())
}

fn administrators(state: &State) -> impl Iterator<Item = &Arc<User>> {
    state.users().values().filter(|user| user.role == Role::Admin)
}
