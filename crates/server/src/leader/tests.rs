//! The desk of a leadership, without a node: states are made by applying operations, time is what the test says.

use super::*;
use regent_state::Meta;
use regent_state::operation::InitCluster;
use regent_types::{ClusterId, NodeId, Revision, TokenId, UserName};

const LEADERSHIP: Leadership = Leadership {
    term: 3,
    node: NodeId(1),
};
const TTL: u64 = 1_000;

fn apply(state: &mut State, caller: Caller, operation: Operation) {
    let meta = Meta {
        revision: Revision(state.revision().0 + 1),
        leadership: LEADERSHIP,
        at: 1,
    };
    let request = Request {
        caller,
        idempotency: None,
        operation,
    };
    state.apply(&meta, &request).unwrap();
}

/// A state in which the lease `a` is held.
fn held() -> (State, LeaseName, Token) {
    let mut state = State::new();
    let token = TokenId::new("t").unwrap();
    let init = InitCluster {
        cluster_id: ClusterId::new("c").unwrap(),
        feature_level: 1,
        admin: UserName::new("admin").unwrap(),
        password_hash: None,
        token: Some((token.clone(), [1; 32])),
    };
    apply(&mut state, Caller::Node(NodeId(1)), Operation::InitCluster(init));
    let name = LeaseName::new("a").unwrap();
    let acquire = Operation::AcquireLease {
        name: name.clone(),
        holder: "h".to_owned(),
        ttl_ms: TTL,
    };
    apply(&mut state, Caller::Token(token), acquire);
    let token = state.lease(&name).unwrap().token;
    (state, name, token)
}

#[test]
fn a_grant_is_renewed_in_the_very_view_that_brings_it() {
    let (state, name, token) = held();
    let mut desk = Desk::new(LEADERSHIP, &State::new(), 0);
    desk.follow(&state, 10);
    assert_eq!(desk.renew(&state, &[(name, token)], 20), [Some(TTL)]);
}

/// A keepalive that was confirmed just before the expiry was applied and is answered just after: a
/// holder that is told "renewed" then would hold on beside the next one.
#[test]
fn a_lease_whose_expiry_was_seen_is_not_renewed_from_an_older_view() {
    let (old, name, token) = held();
    let mut desk = Desk::new(LEADERSHIP, &old, 0);
    let due = desk.clock.due(TTL * 2, 1);
    let mut new = old.clone();
    apply(
        &mut new,
        Caller::Node(NodeId(1)),
        Operation::ExpireLeases {
            leadership: LEADERSHIP,
            leases: due,
        },
    );
    desk.follow(&new, TTL * 2);
    assert_eq!(desk.renew(&old, &[(name, token)], TTL * 2), [None]);
    assert_eq!(desk.clock.next_due(), None);
}

fn campaign(state: &mut State, candidate: &str, at: WaitsAt) {
    let campaign = Operation::Campaign(regent_state::operation::Campaign {
        name: LeaseName::new("a").unwrap(),
        candidate: regent_types::CandidateId::new(candidate).unwrap(),
        holder: candidate.to_owned(),
        ttl_ms: 60_000,
        at,
        connection: None,
        resume: None,
    });
    apply(state, Caller::Token(TokenId::new("t").unwrap()), campaign);
}

fn end(state: &mut State, due: Due) {
    let operation = Operation::EndLeases {
        leadership: LEADERSHIP,
        leases: due.leases,
        lapsed: due.lapsed,
    };
    apply(state, Caller::Node(NodeId(1)), operation);
}

const HERE: WaitsAt = WaitsAt {
    node: NodeId(1),
    start: 7,
};
const THERE: WaitsAt = WaitsAt {
    node: NodeId(2),
    start: 7,
};

/// A promotion in the very entry that ended the lease before it: it is taken back soon unless it is
/// renewed, though its TTL is a minute; a grant that nobody waited for has its whole TTL.
#[test]
fn a_promotion_is_told_from_a_grant_and_is_taken_back_soon() {
    let (mut state, name, _) = held();
    let mut desk = Desk::new(LEADERSHIP, &state, 0);
    campaign(&mut state, "b", HERE);
    campaign(&mut state, "c", HERE);
    desk.follow(&state, 0);
    desk.presence.heard(HERE, 60_000);
    let due = desk.due(&state, TTL * 2);
    end(&mut state, due);
    desk.follow(&state, 2_000);
    let b = state.lease(&name).unwrap().token;
    assert_eq!(desk.due(&state, 3_999).leases, []);
    let due = desk.due(&state, 4_000);
    assert_eq!(due.leases, [(name.clone(), b)]);
    end(&mut state, due);
    desk.follow(&state, 4_000);
    let c = state.lease(&name).unwrap().token;
    assert_eq!(desk.renew(&state, &[(name.clone(), c)], 4_100), [Some(60_000)]);
    assert_eq!(desk.due(&state, 60_000).leases, [], "it was renewed");
    // Without anybody in the queue it is a grant like any other.
    let due = desk.due(&state, 70_000);
    end(&mut state, due);
    campaign(&mut state, "d", HERE);
    desk.follow(&state, 70_000);
    assert_eq!(desk.due(&state, 130_000).leases, []);
}

/// The entry that ends a lease names the candidates of a node that is gone, so that none of them costs
/// anything; one that has only joined is not dropped before it had its time.
#[test]
fn candidates_of_a_node_that_is_gone_are_skipped() {
    use crate::presence::LAPSE_MS;

    let (mut state, name, token) = held();
    let mut desk = Desk::new(LEADERSHIP, &state, 0);
    campaign(&mut state, "b", THERE);
    campaign(&mut state, "c", THERE);
    campaign(&mut state, "d", HERE);
    desk.follow(&state, 0);
    desk.renew(&state, &[(name.clone(), token)], LAPSE_MS - TTL);
    desk.presence.heard(HERE, LAPSE_MS);
    let due = desk.due(&state, LAPSE_MS + TTL);
    assert_eq!((due.leases.len(), due.lapsed.len()), (1, 2));
    end(&mut state, due);
    let lease = state.lease(&name).unwrap();
    assert_eq!(lease.holder, "d");
    assert_eq!(state.queue_len(&name), 0);
    desk.follow(&state, LAPSE_MS + TTL);
    // A new leadership does not know when it was heard last: everybody has the whole time again.
    campaign(&mut state, "e", THERE);
    let mut next = Desk::new(LEADERSHIP, &state, 50_000);
    assert_eq!(next.due(&state, 50_000 + LAPSE_MS - 1).lapsed, []);
    assert_eq!(next.due(&state, 50_000 + LAPSE_MS).lapsed.len(), 1);
}
