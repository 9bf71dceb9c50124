//! Applying one operation: who asks, whether it was asked before, and which handler does it.
//!
//! Total and deterministic. The time of the state follows that of the entries and never goes back.
//! A rejection is a result like any other: the same on every node, and part of the digest.

use regent_types::LeaseName;

use crate::actor::Actor;
use crate::commands::Report;
use crate::faults::{self, Fault};
use crate::operation::{Idempotency, Meta, Operation, Request};
use crate::outcome::{Applied, Outcome, Rejection};
use crate::state::{Recorded, State};
use crate::txn::Txn;
use crate::{agents, cluster, commands, leases, members, prune, sessions, templates, tokens, users};

impl State {
    /// Applies one operation. `meta.revision` must be above the last one.
    pub fn apply(&mut self, meta: &Meta, request: &Request) -> Applied {
        self.revision = meta.revision;
        self.now = self.now.max(meta.at);
        self.contribution.begin(self.digest, meta.revision);
        let applied = self.answer(meta, request);
        self.digest = self.contribution.finish(&applied);
        applied
    }

    fn answer(&mut self, meta: &Meta, request: &Request) -> Applied {
        if self.identity.is_none() && !matches!(request.operation, Operation::InitCluster(_)) {
            return Err(Rejection::Identity("the cluster has no identity yet".to_owned()));
        }
        let actor = Actor::resolve(self, &request.caller)?;
        if let Some(applied) = self.replay(request) {
            return applied;
        }
        let mut txn = Txn::new(self, meta, actor);
        let applied = dispatch(&mut txn, &request.operation);
        if let Some(Idempotency { key, body }) = request.idempotency
            && is_final(&applied)
        {
            let recorded = Recorded {
                body,
                at: txn.now(),
                revision: txn.revision(),
                applied: applied.clone(),
            };
            txn.record(key, recorded);
        }
        applied
    }

    /// What was answered before under that key, if anything was.
    fn replay(&self, request: &Request) -> Option<Applied> {
        let given = request.idempotency.as_ref()?;
        let recorded = self.recorded.get(&given.key)?;
        if faults::seeded(Fault::RetryAppliedTwice) {
            return None;
        }
        if recorded.body != given.body {
            return Some(Err(Rejection::IdempotencyKeyReused));
        }
        Some(match &recorded.applied {
            // A grant that is over must not be taken for one that holds. What a release answers is over.
            Ok(Outcome::Lease(lease))
                if matches!(request.operation, Operation::AcquireLease { .. })
                    && !self.holds(&lease.name, lease.token) =>
            {
                Err(Rejection::LeaseLost)
            }
            Ok(outcome) => Ok(Outcome::Replayed(Box::new(outcome.clone()))),
            Err(rejection) => Err(rejection.clone()),
        })
    }

    fn holds(&self, name: &LeaseName, token: regent_types::Token) -> bool {
        self.leases.get(name).is_some_and(|lease| lease.token == token)
    }
}

/// Whether the same request will have the same answer: successes and final refusals. Not "no room
/// just now": that may be tried again under the same key.
fn is_final(applied: &Applied) -> bool {
    match applied {
        Ok(_) => true,
        Err(rejection) => match rejection {
            Rejection::Forbidden(_)
            | Rejection::NotFound { .. }
            | Rejection::AlreadyExists { .. }
            | Rejection::WrongState(_)
            | Rejection::Invalid { .. } => true,
            Rejection::Unauthenticated
            | Rejection::Changed { .. }
            | Rejection::QuotaExceeded(_)
            | Rejection::NoAgents(_)
            | Rejection::LeaseHeld { .. }
            | Rejection::LeaseLost
            | Rejection::IdempotencyKeyReused
            | Rejection::Superseded
            | Rejection::WrongLeadership
            | Rejection::Identity(_)
            | Rejection::NameTaken(_)
            | Rejection::Busy(_)
            | Rejection::LeasesHeldBack { .. } => false,
        },
    }
}

fn dispatch(txn: &mut Txn<'_>, operation: &Operation) -> Applied {
    match operation {
        Operation::InitCluster(op) => cluster::init(txn, op),
        Operation::CreateSession(op) => sessions::create(txn, op),
        Operation::PatchSession(op) => sessions::patch(txn, op),
        Operation::StopSession(op) => sessions::stop(txn, op),
        Operation::HibernateSession(op) => sessions::hibernate(txn, op),
        Operation::WakeSession(op) => sessions::wake(txn, op),
        Operation::PlaceQueued(waiting) => sessions::place_queued(txn, waiting),
        Operation::SessionOverdue {
            name,
            changed,
            command,
        } => sessions::overdue(txn, name, *changed, command),
        Operation::ReportSession(op) => sessions::report(txn, op),
        Operation::PutTemplate {
            name,
            manifest,
            cpu,
            memory,
            create_only,
            if_match,
        } => {
            let op = templates::Put {
                name: name.clone(),
                manifest: manifest.clone(),
                cpu: *cpu,
                memory: *memory,
                create_only: *create_only,
                if_match: *if_match,
            };
            templates::put(txn, op)
        }
        Operation::DeleteTemplate { name } => templates::delete(txn, name),
        Operation::CreateUser {
            name,
            password_hash,
            role,
            quota,
        } => users::create(txn, name, password_hash, *role, *quota),
        Operation::DeleteUser { name } => users::delete(txn, name),
        Operation::SetPassword { name, password_hash } => users::set_password(txn, name, password_hash),
        Operation::SetQuota { name, quota } => users::set_quota(txn, name, *quota),
        Operation::CreateToken(op) => tokens::create(txn, op),
        Operation::DeleteToken { id } => tokens::delete(txn, id),
        Operation::RegisterAgent(op) => agents::register(txn, op),
        Operation::DeleteAgent { id, force } => agents::delete(txn, id, *force),
        Operation::SetScheduling {
            id,
            scheduling,
            deadline_ms,
        } => agents::set_scheduling(txn, id, *scheduling, *deadline_ms),
        Operation::AgentConnected(op) => agents::connected(txn, op, None),
        Operation::AgentDisconnected {
            agent,
            replica,
            epoch,
            reason,
        } => agents::disconnected(txn, agent, replica, *epoch, reason),
        Operation::AgentCapacity {
            agent,
            epoch,
            capacity,
        } => agents::capacity(txn, agent, *epoch, *capacity),
        Operation::CreateCommand(op) => commands::create(txn, op),
        Operation::CommandSent {
            id,
            run,
            epoch,
            attempt,
        } => commands::sent(txn, id, *run, *epoch, *attempt),
        Operation::CommandAcked {
            id,
            run,
            agent,
            epoch,
        } => commands::acked(
            txn,
            &Report {
                id,
                run: *run,
                agent,
                epoch: *epoch,
            },
        ),
        Operation::CommandCompleted {
            id,
            run,
            agent,
            epoch,
            result,
            url,
            metadata,
        } => {
            let report = Report {
                id,
                run: *run,
                agent,
                epoch: *epoch,
            };
            commands::completed(txn, &report, result, url.as_deref(), metadata.as_deref())
        }
        Operation::CommandFailed {
            id,
            run,
            agent,
            epoch,
            error,
            retryable,
        } => commands::failed(
            txn,
            &Report {
                id,
                run: *run,
                agent,
                epoch: *epoch,
            },
            error,
            *retryable,
        ),
        Operation::CommandOverdue { id, changed } => commands::overdue(txn, id, *changed),
        Operation::CancelCommand { id } => commands::cancel(txn, id),
        Operation::RetryCommand { id } => commands::retry(txn, id),
        Operation::AcquireLease { name, holder, ttl_ms } => leases::acquire(txn, name, holder, *ttl_ms),
        Operation::ReleaseLease { name, token } => leases::release(txn, name, *token),
        Operation::ForceReleaseLease { name, reason } => leases::force_release(txn, name, reason),
        Operation::ExpireLeases { leadership, leases } => leases::expire(txn, *leadership, leases, &[]),
        Operation::Prune => prune::prune(txn),
        Operation::Campaign(op) => leases::queue::campaign(txn, op),
        Operation::Withdraw { name, candidate, at } => leases::queue::withdraw(txn, name, candidate, *at),
        Operation::EndLeases {
            leadership,
            leases,
            lapsed,
        } => leases::expire(txn, *leadership, leases, lapsed),
        Operation::ReplicaConnected { connected, holds, at } => {
            agents::connected(txn, connected, Some((*holds, *at)))
        }
        Operation::ConnectedSince {
            since,
            connected,
            replica,
        } => {
            agents::is_newest(txn, connected, *since)?;
            agents::connected(txn, connected, *replica)
        }
        Operation::ReleaseAbandoned {
            name,
            token,
            agent,
            replica,
            epoch,
        } => leases::release_abandoned(txn, name, *token, agent, (replica, *epoch)),
        Operation::AdmitMember(op) => members::admit(txn, op),
        Operation::MemberMoved { id, peer, http } => members::moved(txn, *id, peer, http),
        Operation::RemoveMember { id, reason } => members::remove(txn, *id, reason),
        Operation::EnrolAgent { join, token } => members::enrol(txn, join, token),
        Operation::RaiseFeatureLevel { level } => members::raise_level(txn, *level),
        Operation::Asked(asked) => cluster::asked(txn, asked),
    }
}

#[cfg(test)]
mod tests {
    use regent_types::{ClusterId, NodeId, Revision, TemplateName, UserName};

    use super::*;
    use crate::operation::{Caller, InitCluster, Leadership};

    fn init() -> Operation {
        Operation::InitCluster(InitCluster {
            cluster_id: ClusterId::new("c").unwrap(),
            feature_level: 1,
            admin: UserName::new("admin").unwrap(),
            password_hash: None,
            token: None,
        })
    }

    fn apply(state: &mut State, revision: u64, at: u64, operation: Operation) -> Applied {
        let leadership = Leadership {
            term: 1,
            node: NodeId(1),
        };
        let meta = Meta {
            revision: Revision(revision),
            leadership,
            at,
        };
        state.apply(
            &meta,
            &Request {
                caller: Caller::Node(NodeId(1)),
                idempotency: None,
                operation,
            },
        )
    }

    fn put(name: &str) -> Operation {
        Operation::PutTemplate {
            name: TemplateName::new(name).unwrap(),
            manifest: "{}".to_owned(),
            cpu: 1,
            memory: 1,
            create_only: false,
            if_match: None,
        }
    }

    /// The alarm of the digest: an apply that is not the same everywhere shows at that very
    /// revision, and the difference does not heal.
    #[test]
    fn a_nondeterministic_apply_makes_the_digests_differ() {
        let (mut one, mut other) = (State::new(), State::new());
        for (revision, operation) in [(1, init()), (2, put("a"))] {
            assert_eq!(
                apply(&mut one, revision, 5, operation.clone()),
                apply(&mut other, revision, 5, operation)
            );
        }
        assert_eq!(
            (one.digest(), one.content_digest()),
            (other.digest(), other.content_digest())
        );
        other.skew(1);
        for (revision, name) in [(3, "b"), (4, "c")] {
            apply(&mut one, revision, 5, put(name)).unwrap();
            apply(&mut other, revision, 5, put(name)).unwrap();
            assert_ne!(one.digest(), other.digest());
        }
        other.skew(0);
        apply(&mut one, 5, 5, put("d")).unwrap();
        apply(&mut other, 5, 5, put("d")).unwrap();
        assert_ne!(one.digest(), other.digest(), "a difference must not be forgotten");
        assert_ne!(one.content_digest(), other.content_digest());
    }

    /// The outcome says nothing of the templates that the first operation writes: the records do.
    #[test]
    fn the_digest_covers_changes_that_no_outcome_shows() {
        let (mut one, mut other) = (State::new(), State::new());
        other.skew(1);
        assert_eq!(apply(&mut one, 1, 5, init()), apply(&mut other, 1, 5, init()));
        assert_ne!(one.digest(), other.digest());
    }

    /// A retry under the same key must be able to succeed once there is room.
    #[test]
    fn a_refusal_that_passes_is_not_recorded() {
        let full = Rejection::Busy("10000 commands wait".to_owned());
        for (rejection, recorded) in [
            (full, false),
            (Rejection::NoAgents(Vec::new()), false),
            (Rejection::WrongState("it has ended".to_owned()), true),
        ] {
            assert_eq!(is_final(&Err(rejection.clone())), recorded, "{rejection}");
        }
    }

    #[test]
    fn time_never_goes_back() {
        let mut state = State::new();
        apply(&mut state, 1, 1_000, init()).unwrap();
        apply(&mut state, 2, 400, put("a")).unwrap();
        assert_eq!((state.now(), state.revision()), (1_000, Revision(2)));
    }
}
