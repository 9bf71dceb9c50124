//! Connections of an agent's replicas, and leases that are campaigned for over a connection.

use regent_types::frame::{LeaseConfirmedFrame, LeaseObservedFrame};

use super::*;

const CAMPAIGN: &str = r#"{"type":"lease_campaign","payload":{"name":"agent/a","ttlMs":4000}}"#;

impl World {
    fn replica(&mut self, name: &str) -> Connection {
        let mut connection = self.connection_of(name);
        self.text(&mut connection, HELLO);
        assert_eq!(self.welcome(), None, "nobody leads by connecting");
        connection
    }

    /// The token of the welcome that comes next.
    fn welcome(&mut self) -> Option<Token> {
        match self.frame() {
            ServerFrame::Welcome(welcome) => welcome.token,
            other => panic!("{other:?}"),
        }
    }

    fn granted(&mut self) -> LeaseConfirmedFrame {
        match self.frame() {
            ServerFrame::LeaseGranted(granted) => granted,
            other => panic!("{other:?}"),
        }
    }

    fn observed(&mut self) -> LeaseObservedFrame {
        match self.frame() {
            ServerFrame::LeaseObserved(observed) => observed,
            other => panic!("{other:?}"),
        }
    }

    fn lost(&mut self) -> LeaseName {
        match self.frame() {
            ServerFrame::LeaseLost(lost) => lost.name,
            other => panic!("{other:?}"),
        }
    }

    /// Takes over: says hello again with the token that it was granted.
    fn take_over(&mut self, connection: &mut Connection, token: Token) -> Option<Token> {
        let hello = format!(
            r#"{{"type":"hello","payload":{{"protocol":3,"runtimeId":"r","sessions":[],"leases":[{{"name":"agent/a","token":{token}}}]}}}}"#
        );
        self.text(connection, &hello);
        self.welcome()
    }

    fn end(&mut self, name: &str) {
        let name = LeaseName::new(name).unwrap();
        let token = self.state.lease(&name).unwrap().token;
        self.own(Operation::EndLeases {
            leadership: LEADERSHIP,
            leases: vec![(name, token)],
            lapsed: vec![],
        })
        .unwrap();
    }
}

#[test]
fn of_two_replicas_one_is_granted_and_carries_commands_once_it_has_taken_over() {
    let mut world = World::new();
    let (mut one, mut two) = (world.replica("one"), world.replica("two"));
    world.text(&mut one, CAMPAIGN);
    let granted = world.granted();
    world.text(&mut two, CAMPAIGN);
    let observed = world.observed();
    assert_eq!((observed.token, &*observed.holder), (granted.token, "h"));
    world.queue("c1");
    for connection in [&mut one, &mut two] {
        world.settle(connection);
    }
    assert!(world.sent.is_empty(), "a grant alone carries no commands");
    assert_eq!(world.take_over(&mut one, granted.token), Some(granted.token));
    let command = world.command();
    assert_eq!(command.token, granted.token);
    world.settle(&mut two);
    assert!(world.sent.is_empty() && world.closed.is_none());
}

#[test]
fn a_heartbeat_does_not_renew_a_replicas_lease_and_its_keepalive_does() {
    let mut world = World::new();
    let mut one = world.replica("one");
    world.text(&mut one, CAMPAIGN);
    let token = world.granted().token;
    world.take_over(&mut one, token);
    world.now += HEARTBEAT;
    world.text(&mut one, r#"{"type":"heartbeat","payload":{}}"#);
    assert_eq!(world.renewals, []);
    let keepalive =
        format!(r#"{{"type":"lease_keepalive","payload":{{"name":"agent/a","token":{token},"seq":4}}}}"#);
    world.text(&mut one, &keepalive);
    assert_eq!(
        world.renewals,
        [(LeaseName::new("agent/a").unwrap(), token, Some(4))]
    );
    let old = keepalive.replace(&token.to_string(), "1");
    world.text(&mut one, &old);
    assert_eq!(world.lost().as_str(), "agent/a");
    assert_eq!(world.renewals.len(), 1, "nothing is renewed under an older token");
}

#[test]
fn the_end_of_the_leaders_lease_promotes_the_standby_and_closes_the_leader() {
    let mut world = World::new();
    let (mut one, mut two) = (world.replica("one"), world.replica("two"));
    world.text(&mut one, CAMPAIGN);
    let first = world.granted().token;
    world.take_over(&mut one, first);
    world.text(&mut two, CAMPAIGN);
    world.observed();
    world.end("agent/a");
    world.settle(&mut two);
    let second = world.granted().token;
    assert!(second > first);
    world.settle(&mut one);
    let (code, reason) = world.closed.take().unwrap();
    assert_eq!(code, CLOSE_TRY_LATER);
    assert!(reason.contains("given up"), "{reason}");
    assert_eq!(one.epoch_to_leave(), None);
    // What the old one claims does not make it lead again.
    let mut again = world.connection_of("one");
    assert_eq!(world.take_over(&mut again, first), None);
    assert_eq!(world.take_over(&mut two, second), Some(second));
}

#[test]
fn a_leader_that_loses_its_lease_before_it_took_over_is_told_and_may_campaign_again() {
    let mut world = World::new();
    let mut one = world.replica("one");
    world.text(&mut one, CAMPAIGN);
    let token = world.granted().token;
    let name = LeaseName::new("agent/a").unwrap();
    world
        .own(Operation::ReleaseLease {
            name: name.clone(),
            token,
        })
        .unwrap();
    world.settle(&mut one);
    assert_eq!(world.lost(), name);
    assert_eq!(world.take_over(&mut one, token), None);
    world.text(&mut one, CAMPAIGN);
    assert!(world.granted().token > token);
}

#[test]
fn a_replica_that_comes_back_leads_under_the_same_token_and_keeps_its_place_as_a_standby() {
    let mut world = World::new();
    let (mut one, mut two) = (world.replica("one"), world.replica("two"));
    world.text(&mut one, CAMPAIGN);
    let token = world.granted().token;
    world.take_over(&mut one, token);
    world.text(&mut two, CAMPAIGN);
    world.observed();
    let mut one_again = world.connection_of("one");
    assert_eq!(world.take_over(&mut one_again, token), Some(token));
    let mut two_again = world.replica("two");
    world.text(&mut two_again, CAMPAIGN);
    assert_eq!(world.observed().token, token);
    let queue: Vec<_> = world
        .state
        .queue_of(&LeaseName::new("agent/a").unwrap())
        .collect();
    assert_eq!(queue.len(), 1);
    world.end("agent/a");
    world.settle(&mut two_again);
    world.granted();
}

#[test]
fn what_may_not_be_campaigned_for_is_refused_with_the_reason() {
    let mut world = World::new();
    let mut connection = world.joined();
    for (name, words) in [("agent/a", "no replica name"), ("agent/b", "another agent's")] {
        let frame = CAMPAIGN.replace("agent/a", name);
        world.text(&mut connection, &frame);
        match world.frame() {
            ServerFrame::LeaseRefused(refused) => assert!(refused.detail.contains(words), "{refused:?}"),
            other => panic!("{other:?}"),
        }
    }
    let too_short = CAMPAIGN.replace("agent/a", "x").replace("4000", "1");
    world.text(&mut connection, &too_short);
    assert!(matches!(world.frame(), ServerFrame::LeaseRefused(_)));
    assert_eq!(
        connection.next_campaign(),
        None,
        "what was refused is not tried again"
    );
}

#[test]
fn a_candidate_that_was_dropped_stands_in_the_queue_again() {
    let mut world = World::new();
    let name = LeaseName::new("jobs").unwrap();
    let taken = world.admin(Operation::AcquireLease {
        name: name.clone(),
        holder: "other".into(),
        ttl_ms: 5_000,
    });
    taken.unwrap();
    let mut connection = world.joined();
    let campaign = CAMPAIGN.replace("agent/a", "jobs");
    world.text(&mut connection, &campaign);
    assert_eq!(world.observed().holder, "other");
    let place = world.state.queue_of(&name).next().unwrap().place;
    world
        .own(Operation::EndLeases {
            leadership: LEADERSHIP,
            leases: vec![],
            lapsed: vec![(name.clone(), place, WaitsAt { node: NODE, start: 1 })],
        })
        .unwrap();
    world.settle(&mut connection);
    assert!(world.state.queue_of(&name).next().unwrap().place > place);
    world.end("jobs");
    world.settle(&mut connection);
    world.granted();
    assert_eq!(world.taken, [name]);
}

#[test]
fn only_leases_that_were_granted_and_asked_for_it_are_given_up_early() {
    let mut world = World::new();
    let mut connection = world.joined();
    for name in ["x", "y"] {
        let campaign = CAMPAIGN.replace("agent/a", name);
        world.text(&mut connection, &campaign);
        world.granted();
    }
    let early = CAMPAIGN
        .replace("agent/a", "z")
        .replace("4000", "4000,\"releaseOnDisconnect\":{\"graceMs\":250}");
    world.text(&mut connection, &early);
    let token = world.granted().token;
    let given_up = connection.early_releases();
    assert_eq!(given_up, [(LeaseName::new("z").unwrap(), token, 250)]);
    let release = format!(r#"{{"type":"lease_release","payload":{{"name":"z","token":{token}}}}}"#);
    world.text(&mut connection, &release);
    assert_eq!(connection.early_releases(), []);
    assert!(world.state.lease(&LeaseName::new("z").unwrap()).is_none());
}

/// Its former self may still act under that token, on a machine that nobody hears of.
#[test]
fn a_replica_that_was_started_anew_is_not_told_its_former_selfs_token_however_its_campaign_ends() {
    let name = LeaseName::new("agent/a").unwrap();
    for how in ["undecided", "superseded"] {
        let mut world = World::new();
        let mut former = world.replica("one");
        world.text(&mut former, CAMPAIGN);
        let token = world.granted().token;
        world.take_over(&mut former, token);
        let mut anew = world.replica("one");
        anew.on_text(CAMPAIGN, world.now, Time(world.now), &world.state);
        anew.take_effects();
        let decided = match how {
            "undecided" => Err("no leader".to_owned()),
            _ => Ok((world.state.revision(), Err(Rejection::Superseded))),
        };
        anew.campaigned(name.clone(), decided, world.now, Time(world.now));
        world.settle(&mut anew);
        for text in world.sent.drain(..) {
            let frame = ServerFrame::parse(&text).unwrap().unwrap();
            assert!(!matches!(frame, ServerFrame::LeaseGranted(_)), "{how}: {frame:?}");
        }
        world.pass(&mut anew, 600);
        world.end("agent/a");
        world.settle(&mut anew);
        let granted = loop {
            if let ServerFrame::LeaseGranted(granted) = world.frame() {
                break granted;
            }
        };
        assert!(granted.token > token, "{how}");
    }
}

/// The grant comes with the answer of the leader; this node applies it a moment later.
#[test]
fn a_lease_that_was_just_granted_is_kept_alive_before_this_node_has_applied_it() {
    let mut world = World::new();
    let mut connection = world.joined();
    let behind = world.state.clone();
    let campaign = CAMPAIGN.replace("agent/a", "jobs");
    world.text(&mut connection, &campaign);
    let token = world.granted().token;
    let keepalive =
        format!(r#"{{"type":"lease_keepalive","payload":{{"name":"jobs","token":{token},"seq":1}}}}"#);
    connection.on_text(&keepalive, world.now, Time(world.now), &behind);
    assert!(matches!(connection.take_effects()[..], [Effect::Renew { .. }]));
}

#[test]
fn the_places_of_a_replica_in_other_queues_outlast_its_takeover() {
    let mut world = World::new();
    let name = LeaseName::new("jobs").unwrap();
    let taken = world.admin(Operation::AcquireLease {
        name: name.clone(),
        holder: "other".into(),
        ttl_ms: 5_000,
    });
    taken.unwrap();
    let mut one = world.replica("one");
    let jobs = CAMPAIGN.replace("agent/a", "jobs");
    world.text(&mut one, &jobs);
    world.observed();
    world.text(&mut one, CAMPAIGN);
    let token = world.granted().token;
    world.take_over(&mut one, token);
    world.settle(&mut one);
    assert_eq!(world.state.queue_len(&name), 1);
    world.end("jobs");
    world.settle(&mut one);
    assert_eq!(world.granted().name, name);
}

#[test]
fn a_loss_names_the_token_that_is_lost() {
    let mut world = World::new();
    let mut one = world.replica("one");
    world.text(&mut one, CAMPAIGN);
    let first = world.granted().token;
    let name = LeaseName::new("agent/a").unwrap();
    one.renewed(
        &name,
        Token(1),
        Some(1),
        Err(KeepaliveError::Lost),
        Time(world.now),
    );
    world.settle(&mut one);
    match world.frame() {
        ServerFrame::LeaseLost(lost) => assert_eq!(lost.token, Some(Token(1))),
        other => panic!("{other:?}"),
    }
    assert_eq!(world.take_over(&mut one, first), Some(first), "the grant stands");
}
