//! A state that becomes another cluster's: what may be done in it, and when. That it is whole is a property
//! (`properties.rs`).

// Clippy knows only functions marked as tests.
#![allow(clippy::unwrap_used)]

mod harness;
mod restored;

use harness::world::{World, bytes};
use regent_state::operation::AgentConnected;
use regent_state::record::SessionState;
use regent_state::{
    Applied, BASE_STEP, Caller, HOLD_MS, Leadership, Meta, Operation, Outcome, Plan, Rejection, Request,
    RestoreError, State,
};
use regent_types::lease::MAX_TTL_MS;
use regent_types::{AgentId, ClusterId, CommandId, LeaseName, NodeId, ReplicaName, Revision, Token, TokenId};
use restored::plan;

fn apply(state: &mut State, at: u64, caller: Caller, operation: Operation) -> Applied {
    let meta = Meta {
        revision: Revision(state.revision().0 + 1),
        leadership: Leadership {
            term: 10,
            node: NodeId(7),
        },
        at,
    };
    let request = Request {
        caller,
        idempotency: None,
        operation,
    };
    let applied = state.apply(&meta, &request);
    state.check().unwrap();
    applied
}

fn acquire(state: &mut State, at: u64) -> Applied {
    let operation = Operation::AcquireLease {
        name: LeaseName::new("jobs").unwrap(),
        holder: "me".to_owned(),
        ttl_ms: 5_000,
    };
    apply(
        state,
        at,
        Caller::Token(TokenId::new("fresh").unwrap()),
        operation,
    )
}

fn connect(state: &mut State, at: u64, replica: &str) -> Applied {
    let operation = Operation::AgentConnected(AgentConnected {
        agent: AgentId::new("dev").unwrap(),
        replica: ReplicaName::new(replica).unwrap(),
        node: NodeId(7),
        protocol: 3,
        stale_ms: 30_000,
        token: TokenId::new("fresh").unwrap(),
        runtime_id: String::new(),
        sessions: Some(Vec::new()),
        command_seed: CommandId::new("seed").unwrap(),
    });
    apply(state, at, Caller::Node(NodeId(7)), operation)
}

fn told(lines: &[&str]) -> World {
    let mut world = World::new();
    for line in ["init", "agent dev sessions=5", "connect dev sessions="]
        .iter()
        .chain(lines)
    {
        world.step(line);
    }
    world
}

#[test]
fn no_lease_is_granted_and_no_agent_connects_before_the_longest_is_over() {
    let world = told(&[
        "acquire jobs holder=old ttl=5s",
        "campaign jobs candidate=a holder=next ttl=5s node=1",
    ]);
    let old = &world.state;
    let jobs = LeaseName::new("jobs").unwrap();
    let before = old.lease(&jobs).unwrap().token;
    let at = world.now + 60_000;
    let mut new = old.restored_as(&plan(old, at)).unwrap();
    const { assert!(HOLD_MS > MAX_TTL_MS) };
    for (now, left) in [(at, HOLD_MS), (at + HOLD_MS - 1, 1)] {
        let refused = Err(Rejection::LeasesHeldBack {
            until: at + HOLD_MS,
            for_ms: left,
        });
        assert_eq!(acquire(&mut new, now), refused);
        assert_eq!(connect(&mut new, now, ""), refused, "it would lead at once");
        assert_eq!(connect(&mut new, now, "one"), refused);
        assert_eq!(new.leases_held_back(now), Some(at + HOLD_MS));
    }
    let granted = acquire(&mut new, at + HOLD_MS).unwrap();
    let Outcome::Lease(lease) = granted else {
        panic!("{granted:?}");
    };
    assert!(lease.token > before && lease.token.0 > BASE_STEP);
    let connected = connect(&mut new, at + HOLD_MS, "").unwrap();
    assert!(matches!(connected, Outcome::Connected { token: Some(token), .. } if token > lease.token));
}

#[test]
fn who_vouches_for_the_old_clusters_death_waits_for_nothing() {
    let world = told(&[]);
    let vouched = Plan {
        old_cluster_is_dead: true,
        ..plan(&world.state, world.now)
    };
    let mut new = world.state.restored_as(&vouched).unwrap();
    assert_eq!(new.leases_held_back(world.now), None);
    acquire(&mut new, world.now).unwrap();
    connect(&mut new, world.now, "").unwrap();
}

/// Two clusters may be made of one backup, one after the other. Each must know of the other's revisions, or both
/// would grant under the same tokens.
#[test]
fn no_token_is_issued_twice_even_by_two_restores_of_one_backup() {
    let world = told(&[]);
    let vouched = |above: u64| Plan {
        old_cluster_is_dead: true,
        above: Revision(above),
        ..plan(&world.state, world.now)
    };
    let mut first = world.state.restored_as(&vouched(0)).unwrap();
    let token = |applied: Applied| match applied.unwrap() {
        Outcome::Lease(lease) => lease.token,
        other => panic!("{other:?}"),
    };
    let of_first = token(acquire(&mut first, world.now));
    let mut second = world.state.restored_as(&vouched(first.revision().0)).unwrap();
    let of_second = token(acquire(&mut second, world.now));
    assert!(of_second > of_first);
    assert_eq!(second.revision_base(), first.revision_base() + BASE_STEP);
    // Without being told it could not know.
    let unaware = world.state.restored_as(&vouched(0)).unwrap();
    assert_eq!(unaware.revision_base(), first.revision_base());
}

#[test]
fn a_token_of_before_renews_and_releases_nothing() {
    let world = told(&["acquire jobs holder=old ttl=5s"]);
    let jobs = LeaseName::new("jobs").unwrap();
    let before: Token = world.state.lease(&jobs).unwrap().token;
    let vouched = Plan {
        old_cluster_is_dead: true,
        ..plan(&world.state, world.now)
    };
    let mut new = world.state.restored_as(&vouched).unwrap();
    acquire(&mut new, world.now).unwrap();
    let release = Operation::ReleaseLease {
        name: jobs,
        token: before,
    };
    let caller = Caller::Token(TokenId::new("fresh").unwrap());
    assert_eq!(
        apply(&mut new, world.now, caller, release),
        Err(Rejection::LeaseLost)
    );
}

/// A start, a sleep, an awakening and a stop were under way; the agent then says what it really runs.
#[test]
fn sessions_that_were_under_way_are_settled_and_then_reconciled() {
    let world = told(&[
        "create starting command=c1",
        "sent c1",
        "create sleeping command=c2",
        "sent c2",
        "complete c2",
        "hibernate sleeping command=c3",
        "sent c3",
        "create running command=c4",
        "sent c4",
        "complete c4",
    ]);
    restored::check(&world.state, world.now, true);
    let vouched = Plan {
        old_cluster_is_dead: true,
        keep_tokens: true,
        ..plan(&world.state, world.now)
    };
    let new = world.state.restored_as(&vouched).unwrap();
    let is = |name: &str| {
        let session = new.session(&name.parse().unwrap()).unwrap();
        (session.state, session.reason.clone())
    };
    assert_eq!(
        is("starting"),
        (SessionState::Failed, "start failed: restored".to_owned())
    );
    assert_eq!(
        is("sleeping"),
        (SessionState::Running, "hibernating failed: restored".to_owned())
    );
    assert_eq!(is("running").0, SessionState::Running);
    let agent = new.agent(&AgentId::new("dev").unwrap()).unwrap();
    assert!(
        agent.offline_reason.contains("restored"),
        "{}",
        agent.offline_reason
    );
}

#[test]
fn what_cannot_be_restored_is_refused() {
    let empty = State::new();
    let nothing = Plan {
        index: 1,
        ..plan(&told(&[]).state, 1)
    };
    assert_eq!(empty.restored_as(&nothing).unwrap_err(), RestoreError::Empty);
    let world = told(&[]);
    let nobody = Plan {
        admin_token: None,
        ..plan(&world.state, world.now)
    };
    assert_eq!(
        world.state.restored_as(&nobody).unwrap_err(),
        RestoreError::LockedOut
    );
    let above = Revision((1 << 53) - 5);
    let exhausted = Plan {
        above,
        ..plan(&world.state, world.now)
    };
    assert_eq!(
        world.state.restored_as(&exhausted).unwrap_err(),
        RestoreError::Exhausted { above }
    );
}

/// A snapshot without the record is what it was before there was one.
#[test]
fn only_a_restored_cluster_says_so_in_its_snapshots() {
    let world = told(&[]);
    let new = world.state.restored_as(&plan(&world.state, world.now)).unwrap();
    assert!(world.state.restored().is_none());
    assert!(bytes(&new).len() > 100);
    assert_ne!(new.content_digest(), world.state.content_digest());
    assert_eq!(new.cluster_id(), Some(&ClusterId::new("new").unwrap()));
}
