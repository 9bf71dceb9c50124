//! How many may wait for one lease, and that a long queue stays in order. Not by a story: the harness
//! checks the whole state after every step.

// Clippy knows only functions marked as tests.
#![allow(clippy::unwrap_used)]

use regent_state::operation::{Campaign, InitCluster};
use regent_state::record::WaitsAt;
use regent_state::{Applied, Caller, Leadership, Meta, Operation, Outcome, Rejection, Request, State};
use regent_types::lease::MAX_CANDIDATES;
use regent_types::{CandidateId, ClusterId, LeaseName, NodeId, Revision, TokenId, UserName};

fn apply(state: &mut State, caller: Caller, operation: Operation) -> Applied {
    let meta = Meta {
        revision: Revision(state.revision().0 + 1),
        leadership: Leadership::default(),
        at: 1,
    };
    let request = Request {
        caller,
        idempotency: None,
        operation,
    };
    state.apply(&meta, &request)
}

fn campaign(state: &mut State, candidate: &str) -> Applied {
    let campaign = Campaign {
        name: LeaseName::new("jobs").unwrap(),
        candidate: CandidateId::new(candidate).unwrap(),
        holder: candidate.to_owned(),
        ttl_ms: 5_000,
        at: WaitsAt {
            node: NodeId(1),
            start: 1,
        },
        connection: None,
        resume: None,
    };
    let admin = Caller::Token(TokenId::new("admin").unwrap());
    apply(state, admin, Operation::Campaign(campaign))
}

#[test]
fn a_queue_has_a_bound_and_who_stands_in_it_may_ask_again() {
    let mut state = State::new();
    let init = InitCluster {
        cluster_id: ClusterId::new("c").unwrap(),
        feature_level: 1,
        admin: UserName::new("admin").unwrap(),
        password_hash: None,
        token: Some((TokenId::new("admin").unwrap(), [1; 32])),
    };
    apply(&mut state, Caller::Node(NodeId(1)), Operation::InitCluster(init)).unwrap();
    campaign(&mut state, "holder").unwrap();
    for n in 0..MAX_CANDIDATES {
        campaign(&mut state, &format!("c{n}")).unwrap();
    }
    let name = LeaseName::new("jobs").unwrap();
    assert_eq!(state.queue_len(&name), MAX_CANDIDATES);
    assert!(matches!(campaign(&mut state, "late"), Err(Rejection::Busy(_))));
    assert!(matches!(campaign(&mut state, "c17"), Ok(Outcome::Queued(_))));
    let order = state.queue_of(&name).map(|candidate| candidate.holder.clone());
    assert!(order.eq((0..MAX_CANDIDATES).map(|n| format!("c{n}"))));
    state.check().unwrap();
    let token = state.lease(&name).unwrap().token;
    let release = Operation::ReleaseLease {
        name: name.clone(),
        token,
    };
    apply(&mut state, Caller::Node(NodeId(1)), release).unwrap();
    assert_eq!(state.lease(&name).unwrap().holder, "c0");
    assert!(matches!(campaign(&mut state, "late"), Ok(Outcome::Queued(_))));
}
