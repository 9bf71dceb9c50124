//! What holds of every state that was made another cluster's.

use std::collections::BTreeSet;

use regent_state::record::{CommandState, Subject};
use regent_state::{BASE_STEP, EventKind, Plan, State};
use regent_types::{ClusterId, NodeId, Revision, TokenId};

use super::harness::world::{bytes, decode};

/// A plan that states nothing and keeps nothing.
pub(crate) fn plan(state: &State, at: u64) -> Plan {
    Plan {
        cluster: ClusterId::new("new").unwrap(),
        node: NodeId(7),
        incarnation: [7; 16],
        peer: "10.0.0.7:7000".to_owned(),
        http: "http://10.0.0.7:8000".to_owned(),
        index: state.revision().0 - state.revision_base() + 1,
        term: 9,
        at,
        above: Revision(0),
        keep_tokens: false,
        old_cluster_is_dead: false,
        admin_token: Some((TokenId::new("fresh").unwrap(), [9; 32])),
    }
}

/// Restores, twice and once more from that, and looks at everything.
pub(crate) fn check(old: &State, at: u64, keep_tokens: bool) {
    let plan = Plan {
        keep_tokens,
        ..plan(old, at)
    };
    let new = old.restored_as(&plan).unwrap();
    let again = old.restored_as(&plan).unwrap();
    assert_eq!(bytes(&new), bytes(&again), "a restore is not the same each time");
    new.check().unwrap();
    let copy = decode(&new.encode_chunks().collect::<Vec<_>>());
    assert_eq!(bytes(&copy), bytes(&new));

    assert_eq!(new.cluster_id(), Some(&plan.cluster));
    assert_eq!(new.revision_base() % BASE_STEP, 0);
    assert_eq!(new.revision().0, new.revision_base() + plan.index);
    assert!(new.now() >= old.now().max(at));
    assert!(
        new.revision_base() > old.revision().0,
        "a token of the new cluster may be one of the old"
    );
    let restored = new.restored().unwrap();
    assert_eq!(restored.from.first(), old.cluster_id());
    assert_eq!(new.leases().len() + new.candidates().count(), 0);
    for agent in new.agents().values() {
        assert!(!agent.is_online() && agent.leader.is_none(), "{agent:?}");
    }
    for command in new.commands().values() {
        match (&command.state, old.command(&command.id)) {
            // What a start that failed may have left behind is removed.
            (CommandState::Pending { .. }, None) => assert_eq!(command.seq.0, new.revision()),
            (CommandState::Failed { error, .. }, Some(was)) if !was.state.is_final() => {
                assert_eq!(error, "restored");
            }
            (state, Some(was)) => assert!(state.is_final() && was.state == *state, "{command:?}"),
            (_, None) => panic!("{command:?} is new"),
        }
    }
    assert_eq!(new.sessions().len(), old.sessions().len());
    assert_eq!(new.users().len(), old.users().len());
    let tokens: BTreeSet<_> = new.tokens().keys().map(TokenId::as_str).collect();
    let kept = old
        .tokens()
        .values()
        .filter(|token| keep_tokens && !matches!(token.subject, Subject::Join(_)))
        .map(|token| token.id.as_str());
    assert_eq!(tokens, kept.chain(["fresh"]).collect());
    let told = new
        .events()
        .iter()
        .filter(|(_, event)| event.kind == EventKind::ClusterRestored);
    let (id, _) = told.last().unwrap();
    assert_eq!(id.0, new.revision());

    // The next disaster.
    let third = new.restored_as(&Plan {
        cluster: ClusterId::new("third").unwrap(),
        index: plan.index + 1,
        ..plan
    });
    let third = third.unwrap();
    assert_eq!(third.revision_base(), new.revision_base() + BASE_STEP);
    let from = &third.restored().unwrap().from;
    assert_eq!(
        from[..2],
        [ClusterId::new("new").unwrap(), old.cluster_id().unwrap().clone()]
    );
}
