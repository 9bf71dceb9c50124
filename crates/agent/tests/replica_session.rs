//! A replica's session with the control plane, told the time and frames: who leads, and what only a leader does.

#![allow(clippy::unwrap_used)] // helpers of tests are no tests to clippy

use std::collections::{BTreeMap, BTreeSet};

use regent_agent::journal::{Outcome, RunKey};
use regent_agent::runtime::{Exit, Observed, ObservedState};
use regent_agent::session::{Candidacy, ControlSession, Effect, Known, key_of};
use regent_client::guard::hold_ms;
use regent_types::frame::{
    AgentFrame, CommandFrame, LeaseConfirmedFrame, LeaseObservedFrame, LeaseReasonFrame, LeaseRefusedFrame,
    LeaseRenewedFrame, ReleaseOnDisconnect, ServerFrame, Welcome,
};
use regent_types::{
    AgentId, ClusterId, Code, CommandId, Epoch, LeaseName, NodeId, ReplicaName, SessionName, Token,
};
use serde_json::json;

const HEARTBEAT: u64 = 10_000;
const TTL: u64 = 1_000;
const INTERVAL: u64 = TTL / 5;

fn lease() -> LeaseName {
    LeaseName::of_agent(&AgentId::new("dev").unwrap())
}

fn name(text: &str) -> SessionName {
    SessionName::new(text).unwrap()
}

fn welcome(token: Option<u64>) -> ServerFrame {
    ServerFrame::Welcome(Welcome {
        cluster_id: ClusterId::new("c-1").unwrap(),
        base: 0,
        epoch: Epoch(5),
        token: token.map(Token),
        heartbeat_ms: HEARTBEAT,
        stale_ms: 3 * HEARTBEAT,
        protocol: 3,
        node: NodeId(1),
        features: Vec::new(),
        former_cluster_ids: Vec::new(),
    })
}

fn granted(token: u64) -> ServerFrame {
    ServerFrame::LeaseGranted(LeaseConfirmedFrame {
        name: lease(),
        token: Token(token),
        ttl_ms: TTL,
    })
}

fn renewed(token: u64, seq: u64) -> ServerFrame {
    ServerFrame::LeaseRenewed(LeaseRenewedFrame {
        name: lease(),
        token: Token(token),
        ttl_ms: TTL,
        seq,
    })
}

fn observed(token: u64) -> ServerFrame {
    ServerFrame::LeaseObserved(LeaseObservedFrame {
        name: lease(),
        holder: "r2".to_owned(),
        token: Token(token),
    })
}

fn lost() -> ServerFrame {
    ServerFrame::LeaseLost(LeaseReasonFrame {
        token: None,
        name: lease(),
        reason: "expired".to_owned(),
    })
}

fn refused(code: Code) -> ServerFrame {
    ServerFrame::LeaseRefused(LeaseRefusedFrame {
        name: lease(),
        code,
        detail: "another runtime".to_owned(),
    })
}

fn command(id: &str, action: &str, session: &str, token: u64) -> CommandFrame {
    CommandFrame {
        command_id: CommandId::new(id).unwrap(),
        run: 1,
        action: action.to_owned(),
        payload: json!({ "sessionId": session, "generation": 1 }),
        token: Token(token),
        attempt: 1,
        deadline: None,
    }
}

fn start(id: &str, session: &str, token: u64) -> CommandFrame {
    command(id, "start_session", session, token)
}

fn done() -> Outcome {
    Outcome::Completed { result: json!(null) }
}

fn failed() -> Outcome {
    Outcome::Failed {
        error: "fenced".to_owned(),
        retryable: false,
    }
}

fn here(session: &str, state: ObservedState) -> Observed {
    Observed {
        session: name(session),
        generation: 1,
        token: Token(5),
        state,
        pid: None,
        port: None,
        url: None,
        started_at_ms: None,
        metadata: BTreeMap::new(),
    }
}

fn tokens<'a>(tokens: impl Iterator<Item = &'a Token>) -> String {
    tokens.map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn word(effect: Effect) -> Option<String> {
    Some(match effect {
        Effect::Send(frame) => match *frame {
            AgentFrame::Heartbeat(_) => return None,
            AgentFrame::Hello(hello) => {
                assert_eq!(hello.replica.unwrap().as_str(), "r1");
                let offered = tokens(hello.leases.iter().map(|lease| &lease.token));
                format!("hello {} [{offered}]", hello.sessions.len())
            }
            AgentFrame::LeaseCampaign(c) => {
                assert_eq!((c.name, c.ttl_ms), (lease(), TTL));
                let token = c
                    .token
                    .map_or(String::new(), |token| format!(" resuming {token}"));
                format!("campaign{token}")
            }
            AgentFrame::LeaseKeepalive(k) => format!("keepalive {} #{}", k.token, k.seq),
            AgentFrame::LeaseRelease(r) => format!("release {}", r.token),
            AgentFrame::Ack(ack) => format!("ack {}", ack.command_id),
            AgentFrame::Complete(c) => format!("complete {}", c.command_id),
            AgentFrame::Failed(f) => format!("failed {} {} {}", f.command_id, f.retryable, f.error),
            AgentFrame::Status(s) => format!("status {} {}", s.session_id, s.state),
            other => format!("{other:?}"),
        },
        Effect::Ping | Effect::Remember(_) => return None,
        Effect::Begin(command) => format!("begin {} {}", command.command_id, command.token),
        Effect::TakeOver(token) => format!("take over {token}"),
        Effect::Forget(key) => format!("forget {}", key.command),
        Effect::Remove(session) => format!("remove {}", session.session),
        Effect::Reconnect(reason) => format!("reconnect: {reason}"),
        Effect::End(fatal) => format!("end: {fatal}"),
    })
}

/// A session under test, and what it says in short words; heartbeats are left out.
struct Replica(ControlSession);

impl Replica {
    fn knowing(highest: u64) -> Self {
        Self(ControlSession::new(Known {
            replica: Some(Candidacy {
                replica: ReplicaName::new("r1").unwrap(),
                lease: lease(),
                ttl_ms: TTL,
                release_on_disconnect: None,
            }),
            highest: Token(highest),
            ..Known::default()
        }))
    }

    /// Connected, welcomed without a token, in the queue.
    fn standing_by() -> Self {
        let mut replica = Self::knowing(0);
        assert_eq!(replica.connect(0, None), ["hello 0 []", "campaign"]);
        assert!(replica.told(0, observed(3)).is_empty());
        replica
    }

    /// Leads under this token since `now`, with a guard that counts from there.
    fn leading(now: u64, token: u64) -> Self {
        let mut replica = Self::standing_by();
        replica.promote(now, token);
        replica
    }

    fn promote(&mut self, now: u64, token: u64) {
        assert_eq!(self.told(now, granted(token)), [format!("keepalive {token} #1")]);
        assert_eq!(self.told(now, renewed(token, 1)), [format!("take over {token}")]);
        assert_eq!(self.took_over(now, token, &[]), [format!("hello 0 [{token}]")]);
        assert_eq!(
            self.told(now, welcome(Some(token))),
            [format!("keepalive {token} #2")]
        );
    }

    fn words(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.0.next_effect())
            .filter_map(word)
            .collect()
    }

    fn told(&mut self, now: u64, frame: ServerFrame) -> Vec<String> {
        self.0.frame(now, frame);
        self.words()
    }

    fn asked(&mut self, now: u64, command: &CommandFrame) -> Vec<String> {
        self.told(now, ServerFrame::Command(command.clone()))
    }

    fn connect(&mut self, now: u64, token: Option<u64>) -> Vec<String> {
        self.0.connected(now, &[]);
        self.0.frame(now, welcome(token));
        self.words()
    }

    fn took_over(&mut self, now: u64, token: u64, found: &[Observed]) -> Vec<String> {
        self.0.taken_over(now, Token(token), found, Vec::new());
        self.words()
    }

    fn finished(&mut self, now: u64, command: &CommandFrame, outcome: Outcome) -> Vec<String> {
        self.0.finished(now, command, outcome);
        self.words()
    }

    fn tick(&mut self, now: u64) -> Vec<String> {
        self.0.heard(now);
        self.0.tick(now);
        self.words()
    }
}

#[test]
fn a_standby_is_connected_and_does_nothing_else() {
    let mut replica = Replica::knowing(0);
    replica.0.connected(0, &[here("a", ObservedState::Running)]);
    replica.0.frame(0, welcome(None));
    assert_eq!(replica.words(), ["hello 1 []", "campaign"]);
    assert!(replica.told(0, observed(3)).is_empty());
    assert!(replica.asked(0, &start("one", "b", 5)).is_empty());
    replica.0.exited(0, &name("a"), 1, Exit::Code(0));
    assert!(replica.words().is_empty(), "the leader reports it");
    replica.0.heard(HEARTBEAT);
    replica.0.tick(HEARTBEAT);
    let Some(Effect::Send(frame)) = replica.0.next_effect() else {
        panic!("no heartbeat");
    };
    assert!(matches!(*frame, AgentFrame::Heartbeat(_)));
    assert!(!replica.0.leads() && replica.0.permit().is_none());
}

#[test]
fn the_campaign_says_what_was_asked_for() {
    let wish = Some(ReleaseOnDisconnect { grace_ms: 500 });
    let mut session = ControlSession::new(Known {
        replica: Some(Candidacy {
            replica: ReplicaName::new("r1").unwrap(),
            lease: lease(),
            ttl_ms: TTL,
            release_on_disconnect: wish,
        }),
        ..Known::default()
    });
    session.connected(0, &[]);
    session.frame(0, welcome(None));
    let campaign = std::iter::from_fn(|| session.next_effect()).find_map(|effect| match effect {
        Effect::Send(frame) => match *frame {
            AgentFrame::LeaseCampaign(campaign) => Some(campaign),
            _ => None,
        },
        _ => None,
    });
    assert_eq!(campaign.unwrap().release_on_disconnect, wish);
}

#[test]
fn a_grant_is_acted_on_after_keepalive_takeover_and_second_welcome_and_not_before() {
    let mut replica = Replica::standing_by();
    let one = start("one", "a", 9);
    assert_eq!(replica.told(10, granted(9)), ["keepalive 9 #1"]);
    assert!(replica.asked(10, &one).is_empty());
    assert_eq!(replica.told(20, renewed(9, 1)), ["take over 9"]);
    assert!(replica.asked(20, &one).is_empty());
    assert!(replica.0.permit().is_none(), "the fence is not raised yet");
    assert_eq!(
        replica.took_over(30, 9, &[here("a", ObservedState::Running)]),
        ["hello 1 [9]"]
    );
    assert!(replica.asked(30, &one).is_empty());
    assert_eq!(replica.told(40, welcome(Some(9))), ["keepalive 9 #2"]);
    assert_eq!(replica.asked(40, &one), ["ack one", "begin one 9"]);
    assert_eq!(replica.0.permit(), Some((Token(9), 10 + hold_ms(TTL))));
    assert!(
        replica.told(40, welcome(Some(9))).is_empty(),
        "a welcome that answers no hello counts for nothing"
    );
}

#[test]
fn what_the_former_leader_did_is_answered_from_the_record() {
    let mut replica = Replica::standing_by();
    let one = start("one", "a", 9);
    replica.told(0, granted(9));
    replica.told(0, renewed(9, 1));
    replica
        .0
        .taken_over(0, Token(9), &[], vec![(key_of(&one), done())]);
    replica.told(0, welcome(Some(9)));
    assert_eq!(replica.asked(0, &one), ["complete one"]);
}

#[test]
fn an_acknowledgement_that_comes_too_late_gives_no_right() {
    let mut replica = Replica::standing_by();
    replica.told(0, granted(9));
    assert_eq!(replica.tick(INTERVAL), ["keepalive 9 #2"]);
    assert_eq!(
        replica.told(hold_ms(TTL), renewed(9, 1)),
        ["keepalive 9 #3"],
        "it counts from its sending"
    );
    assert_eq!(replica.told(hold_ms(TTL), renewed(9, 2)), ["take over 9"]);
}

#[test]
fn keepalives_leave_every_fifth_of_the_ttl_whether_or_not_a_heartbeat_is_due() {
    let mut replica = Replica::leading(0, 9);
    for n in 1..20 {
        let at = n * INTERVAL;
        assert_eq!(replica.0.next_tick(), Some(at));
        assert_eq!(replica.tick(at), [format!("keepalive 9 #{}", n + 2)]);
        assert!(replica.told(at, renewed(9, n + 2)).is_empty());
    }
}

#[test]
fn late_doubled_and_strange_frames_about_the_lease_change_nothing() {
    let mut replica = Replica::leading(0, 9);
    let before = replica.0.permit();
    let other = ServerFrame::LeaseLost(LeaseReasonFrame {
        token: None,
        name: LeaseName::new("job").unwrap(),
        reason: String::new(),
    });
    for frame in [
        granted(9),
        granted(8),
        renewed(9, 1),
        renewed(9, 77),
        renewed(8, 2),
        observed(9),
        observed(8),
        refused(Code::Busy),
        refused(Code::LeaseLost),
        other,
        welcome(None),
    ] {
        assert!(replica.told(50, frame.clone()).is_empty(), "{frame:?}");
        assert!(replica.0.leads(), "{frame:?}");
    }
    assert_eq!(replica.0.permit(), before);
}

#[test]
fn a_grant_older_than_a_leadership_seen_here_is_given_back() {
    let mut replica = Replica::knowing(20);
    replica.connect(0, None);
    assert_eq!(
        replica.told(0, granted(9)),
        ["release 9"],
        "the node that granted it lags"
    );
    let again = replica.0.next_tick().unwrap();
    assert_eq!(replica.tick(again), ["campaign"]);
    assert_eq!(replica.told(again, granted(21)), ["keepalive 21 #1"]);
}

/// A replica that is started anew while its former self is frozen: both would act under one token, and no fence
/// would tell them apart.
#[test]
fn the_token_of_an_earlier_process_is_neither_taken_nor_given_back() {
    let mut replica = Replica::knowing(20);
    replica.connect(0, None);
    assert!(replica.told(0, granted(20)).is_empty());
    let again = replica.0.next_tick().unwrap();
    assert_eq!(replica.tick(again), ["campaign"]);
    replica.promote(again, 21);
}

#[test]
fn a_promotion_that_is_lost_before_the_second_welcome_leads_to_nothing() {
    // While the shell takes over.
    let mut replica = Replica::standing_by();
    replica.told(0, granted(9));
    replica.told(0, renewed(9, 1));
    assert_eq!(replica.told(0, lost()), ["campaign"]);
    assert!(replica.took_over(0, 9, &[]).is_empty(), "and no hello offers it");

    // Once `hello` is said. Its answer comes first: the campaign belongs to the connection that it makes.
    for answer in [Some(9), None, Some(12)] {
        let mut replica = Replica::standing_by();
        replica.told(0, granted(9));
        replica.told(0, renewed(9, 1));
        replica.took_over(0, 9, &[]);
        assert!(replica.told(0, lost()).is_empty());
        assert_eq!(replica.told(0, welcome(answer)), ["campaign"]);
        assert!(!replica.0.leads());
    }

    // Said by the welcome itself.
    for answer in [None, Some(12)] {
        let mut replica = Replica::standing_by();
        replica.told(0, granted(9));
        replica.told(0, renewed(9, 1));
        replica.took_over(0, 9, &[]);
        assert_eq!(replica.told(0, welcome(answer)), ["campaign"]);
        assert!(replica.asked(0, &start("one", "a", 9)).is_empty());
    }
}

#[test]
fn who_is_promoted_again_while_hello_waits_takes_over_after_its_answer() {
    let mut replica = Replica::standing_by();
    replica.told(0, granted(9));
    replica.told(0, renewed(9, 1));
    replica.took_over(0, 9, &[]);
    assert_eq!(replica.told(0, granted(12)), ["keepalive 12 #1"]);
    assert!(replica.told(0, renewed(12, 1)).is_empty());
    assert_eq!(
        replica.told(0, welcome(Some(9))),
        ["take over 12"],
        "the welcome was for the token before"
    );
    assert_eq!(replica.took_over(0, 12, &[]), ["hello 0 [12]"]);
    replica.told(0, welcome(Some(12)));
    assert!(replica.0.leads());
}

#[test]
fn a_hello_of_the_takeover_that_is_not_answered_costs_the_connection_and_not_the_token() {
    let mut replica = Replica::standing_by();
    replica.told(0, granted(9));
    replica.told(0, renewed(9, 1));
    replica.took_over(0, 9, &[]);
    let mut now = 0;
    let words = loop {
        now += INTERVAL;
        let words = replica.tick(now);
        if !words.iter().all(|word| word.starts_with("keepalive")) {
            break words;
        }
        assert!(now < 60_000);
    };
    assert_eq!(words, ["reconnect: no welcome in time after the takeover"]);
    assert_eq!(replica.connect(now, Some(9))[0], "hello 0 [9]");
    assert!(replica.0.leads());
}

#[test]
fn a_leader_that_reconnects_says_what_it_holds_and_leads_on() {
    let mut replica = Replica::leading(0, 9);
    let (one, two) = (start("one", "a", 9), command("two", "stop_session", "a", 9));
    replica.asked(0, &one);
    replica.asked(0, &two);
    replica.0.disconnected();
    assert!(
        replica.finished(50, &one, done()).is_empty(),
        "nothing is begun without a connection"
    );
    assert_eq!(replica.0.permit(), Some((Token(9), hold_ms(TTL))));
    assert_eq!(
        replica.connect(300, Some(9)),
        ["hello 0 [9]", "keepalive 9 #3"],
        "keepalives go on at once, and only after the welcome"
    );
    assert_eq!(replica.asked(300, &one), ["complete one"]);
    assert_eq!(replica.asked(300, &two), ["ack two", "begin two 9"]);
}

#[test]
fn a_leader_that_reconnects_too_late_stands_by() {
    for answer in [None, Some(12)] {
        let mut replica = Replica::leading(0, 9);
        let one = start("one", "a", 9);
        replica.asked(0, &one);
        replica.0.disconnected();
        assert_eq!(replica.connect(5_000, answer), ["hello 0 [9]", "campaign"]);
        assert!(replica.0.permit().is_none());
        assert!(replica.finished(5_000, &one, done()).is_empty());
        replica.0.disconnected();
        assert_eq!(replica.connect(5_000, None), ["hello 0 []", "campaign"]);
    }
}

/// A keepalive of an earlier grant may be answered after the next one came.
#[test]
fn the_loss_of_an_earlier_token_does_not_end_a_newer_grant() {
    let mut replica = Replica::leading(0, 9);
    for (token, ends) in [(8, false), (9, true)] {
        let loss = ServerFrame::LeaseLost(LeaseReasonFrame {
            token: Some(Token(token)),
            name: lease(),
            reason: "expired".to_owned(),
        });
        replica.told(0, loss);
        assert_eq!(replica.0.permit().is_none(), ends, "token {token}");
    }
}

#[test]
fn a_loss_counts_also_before_the_welcome() {
    let mut replica = Replica::leading(0, 9);
    replica.0.disconnected();
    replica.0.connected(10, &[]);
    assert_eq!(replica.words(), ["hello 0 [9]"]);
    assert!(replica.told(10, lost()).is_empty());
    assert!(replica.0.permit().is_none());
    assert_eq!(replica.told(20, welcome(Some(9))), ["campaign"]);
}

#[test]
fn a_grant_that_was_not_taken_over_when_the_connection_broke_is_resumed_and_taken_over_anew() {
    let mut replica = Replica::standing_by();
    replica.told(0, granted(9));
    replica.told(0, renewed(9, 1));
    replica.0.disconnected();
    assert!(
        replica.took_over(10, 9, &[]).is_empty(),
        "the next hello may be made of an older list"
    );
    assert_eq!(replica.connect(20, None), ["hello 0 []", "campaign resuming 9"]);
    assert!(replica.tick(2 * INTERVAL).is_empty(), "not confirmed yet");
    assert_eq!(replica.told(500, granted(9)), ["keepalive 9 #2"]);
    assert_eq!(replica.told(510, renewed(9, 2)), ["take over 9"]);

    // Refused for good, it is forgotten; refused for now, it is asked for again.
    for (code, expected) in [
        (Code::LeaseLost, "campaign"),
        (Code::NoQuorum, "campaign resuming 9"),
    ] {
        let mut replica = Replica::standing_by();
        replica.told(0, granted(9));
        replica.0.disconnected();
        replica.connect(0, None);
        assert!(replica.told(0, refused(code)).is_empty());
        let again = replica.0.next_tick().unwrap();
        assert_eq!(replica.tick(again), [expected]);
    }
}

#[test]
fn a_command_under_way_when_the_lease_is_lost_is_finished_and_not_reported() {
    let mut replica = Replica::leading(0, 9);
    let (one, two) = (start("one", "a", 9), command("two", "stop_session", "a", 9));
    replica.asked(0, &one);
    replica.asked(0, &two);
    assert_eq!(replica.told(0, lost()), ["campaign"]);
    assert!(replica.0.permit().is_none());
    assert!(
        replica.finished(0, &one, done()).is_empty(),
        "neither told, nor is what waited begun"
    );
    replica.promote(100, 12);
    let (one, two) = (start("one", "a", 12), command("two", "stop_session", "a", 12));
    assert_eq!(replica.asked(100, &one), ["complete one"], "the record answers");
    assert_eq!(replica.asked(100, &two), ["ack two", "begin two 12"]);
}

#[test]
fn what_an_earlier_leadership_still_does_is_told_to_the_next_one_that_asks() {
    for (outcome, expected) in [
        (done(), vec!["complete one", "begin two 12"]),
        // It failed because of the newer leadership, perhaps.
        (failed(), vec!["begin one 12"]),
    ] {
        let mut replica = Replica::leading(0, 9);
        let one = start("one", "a", 9);
        replica.asked(0, &one);
        replica.told(0, lost());
        replica.promote(100, 12);
        assert_eq!(replica.asked(100, &start("one", "a", 12)), ["ack one"]);
        assert_eq!(
            replica.asked(100, &command("two", "stop_session", "a", 12)),
            ["ack two"]
        );
        assert_eq!(replica.finished(100, &one, outcome), expected);
    }
}

#[test]
fn a_failure_under_a_leadership_that_is_over_is_not_remembered() {
    let mut replica = Replica::leading(0, 9);
    let one = start("one", "a", 9);
    replica.asked(0, &one);
    replica.told(0, lost());
    assert!(replica.finished(0, &one, failed()).is_empty());
    replica.promote(100, 12);
    assert_eq!(
        replica.asked(100, &start("one", "a", 12)),
        ["ack one", "begin one 12"]
    );
}

#[test]
fn a_replica_that_was_frozen_begins_and_tells_nothing_until_its_token_is_confirmed() {
    let mut replica = Replica::leading(0, 9);
    let (one, two) = (start("one", "a", 9), command("two", "stop_session", "a", 9));
    replica.asked(0, &one);
    replica.asked(0, &two);
    let woken = 60_000;
    assert!(replica.finished(woken, &one, done()).is_empty());
    replica.0.exited(woken, &name("b"), 1, Exit::Code(0));
    assert!(replica.words().is_empty());
    assert_eq!(replica.asked(woken, &start("three", "c", 9)), ["ack three"]);
    assert_eq!(replica.tick(woken), ["keepalive 9 #3"]);
    assert!(
        replica.told(woken, renewed(9, 2)).is_empty(),
        "it was sent before"
    );

    // Won back: all of it goes on.
    let mut won = replica;
    assert_eq!(
        won.told(woken, renewed(9, 3)),
        [
            "complete one",
            "status b terminated",
            "begin two 9",
            "begin three 9"
        ]
    );

    // Lost: none of it.
    let mut replica = Replica::leading(0, 9);
    replica.asked(0, &one);
    replica.asked(0, &two);
    replica.tick(woken);
    replica.finished(woken, &one, done());
    replica.0.exited(woken, &name("b"), 1, Exit::Code(0));
    replica.words();
    assert_eq!(replica.told(woken, lost()), ["campaign"]);
    assert!(
        replica.told(woken, renewed(9, 3)).is_empty(),
        "no late answer brings it back"
    );
    assert!(!replica.0.leads());
    // `promote` fails on anything else that is said: what is owed to the old leadership and exits of that time
    // are not the new one's to tell.
    replica.promote(woken, 12);
}

/// The numbers of keepalives begin anew with each token.
#[test]
fn a_renewal_of_the_token_before_gives_no_right_under_the_new_one() {
    let mut replica = Replica::standing_by();
    replica.told(0, granted(9));
    replica.told(0, lost());
    assert_eq!(replica.told(0, granted(12)), ["keepalive 12 #1"]);
    assert!(replica.told(0, renewed(9, 1)).is_empty());
    assert_eq!(replica.told(0, renewed(12, 1)), ["take over 12"]);
}

#[test]
fn a_node_that_is_gone_after_a_freeze_is_left_with_the_token_in_hand() {
    let mut replica = Replica::leading(0, 9);
    replica.0.tick(60_000);
    assert_eq!(replica.words(), ["reconnect: nothing was heard for 60000 ms"]);
    assert_eq!(
        replica.connect(60_100, Some(9)),
        ["hello 0 [9]", "keepalive 9 #3"]
    );
    let one = start("one", "a", 9);
    assert_eq!(
        replica.asked(60_100, &one),
        ["ack one"],
        "not before the guard is valid"
    );
    assert_eq!(replica.told(60_110, renewed(9, 3)), ["begin one 9"]);
}

#[test]
fn commands_of_another_leadership_are_refused() {
    let mut replica = Replica::leading(0, 9);
    let words = replica.asked(0, &start("old", "a", 8));
    assert!(
        words[0].starts_with("failed old false fencing token 8 is older than 9"),
        "{words:?}"
    );
    let words = replica.asked(0, &start("new", "a", 10));
    assert!(
        words[0].starts_with("failed new true fencing token 10 is newer than 9"),
        "{words:?}"
    );
    assert_eq!(
        replica.asked(0, &start("own", "a", 9)),
        ["ack own", "begin own 9"],
        "and raise nothing"
    );
}

#[test]
fn who_ends_begins_no_more_and_gives_the_lease_back() {
    let mut replica = Replica::leading(0, 9);
    let (one, two) = (start("one", "a", 9), command("two", "stop_session", "a", 9));
    replica.asked(0, &one);
    replica.asked(0, &two);
    replica.0.retire();
    assert!(!replica.0.is_idle());
    assert!(replica.asked(0, &start("three", "b", 9)).is_empty());
    assert_eq!(
        replica.tick(INTERVAL),
        ["keepalive 9 #3"],
        "it leads until what it does is done"
    );
    assert_eq!(
        replica.finished(INTERVAL, &one, done()),
        ["complete one"],
        "told, and two is not begun"
    );
    assert!(replica.0.is_idle());
    replica.0.release(INTERVAL);
    assert_eq!(replica.words(), ["release 9"]);
    assert!(replica.0.permit().is_none());

    let mut standby = Replica::standing_by();
    standby.0.retire();
    assert!(standby.0.is_idle());
    assert_eq!(
        standby.told(0, granted(9)),
        ["release 9"],
        "it is too late for it"
    );
    standby.0.release(0);
    assert!(standby.words().is_empty());
}

#[test]
fn a_refused_campaign_is_made_again_after_a_pause_and_so_is_one_without_an_answer() {
    let mut replica = Replica::standing_by();
    let mut now = 0;
    for _ in 0..20 {
        assert!(replica.told(now, refused(Code::WrongState)).is_empty());
        let next = replica.0.next_tick().unwrap();
        assert!(next <= now + 10_000, "the pause is bounded");
        now = next;
        while !replica.tick(now).contains(&"campaign".to_owned()) {
            now = replica.0.next_tick().unwrap();
        }
    }
    let unanswered = now;
    while !replica.tick(now).contains(&"campaign".to_owned()) {
        now = replica.0.next_tick().unwrap();
    }
    assert_eq!(now, unanswered + 10_000);
    assert!(replica.told(now, observed(3)).is_empty());
    while now < unanswered + 40_000 {
        now = replica.0.next_tick().unwrap();
        assert!(
            replica.tick(now).is_empty(),
            "in the queue there is nothing to ask for"
        );
    }
}

#[test]
fn a_takeover_that_does_not_succeed_makes_room_for_another_replica() {
    let mut replica = Replica::standing_by();
    replica.told(0, granted(9));
    replica.told(0, renewed(9, 1));
    replica
        .0
        .takeover_failed(0, Token(9), "the fence file is damaged");
    assert_eq!(replica.words(), ["release 9"]);
    let again = replica.0.next_tick().unwrap();
    assert_eq!(replica.tick(again), ["campaign"]);
}

#[test]
fn an_exit_around_the_takeover_is_in_the_list_or_reported_after_it() {
    let mut replica = Replica::standing_by();
    replica.0.exited(0, &name("before"), 1, Exit::Code(0));
    replica.told(0, granted(9));
    replica.told(0, renewed(9, 1));
    // Both are in the list that is being made, as running and as ended.
    replica.0.exited(0, &name("after"), 1, Exit::Code(3));
    let found = [
        here("after", ObservedState::Running),
        here("listed", ObservedState::Exited(Exit::Code(0))),
    ];
    assert_eq!(replica.took_over(0, 9, &found), ["hello 2 [9]"]);
    replica.0.exited(0, &name("later"), 1, Exit::Code(0));
    assert!(replica.words().is_empty(), "not before it leads");
    assert_eq!(
        replica.told(0, welcome(Some(9))),
        ["keepalive 9 #2", "status after failed", "status later terminated"]
    );
}

/// An agent without replicas lost exits that were told while it dialed: the list made before undid them.
#[test]
fn an_exit_between_the_list_and_the_connection_is_reported() {
    let mut session = ControlSession::new(Known::default());
    session.exited(0, &name("a"), 1, Exit::Code(3));
    session.connected(0, &[here("a", ObservedState::Running)]);
    session.frame(0, welcome(Some(5)));
    let words: Vec<String> = std::iter::from_fn(|| session.next_effect())
        .filter_map(|effect| match effect {
            Effect::Send(frame) => match *frame {
                AgentFrame::Status(status) => Some(status.session_id.to_string()),
                _ => None,
            },
            _ => None,
        })
        .collect();
    assert_eq!(words, ["a"]);
}

/// Numbers that look random and are the same each time.
struct Dice(u64);

impl Dice {
    /// Below `sides`. After Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (2014).
    fn throw(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }
}

/// What must hold, kept apart from the machine: from frames sent and answers given alone.
#[derive(Default)]
struct Model {
    /// When each keepalive was sent, by token and number.
    sent: BTreeMap<(u64, u64), u64>,
    /// Until when each token is acknowledged.
    valid: BTreeMap<u64, u64>,
    /// Tokens that were said to be lost.
    lost: BTreeSet<u64>,
    /// What the last `hello` offered, and what the last welcome confirmed.
    offered: Option<u64>,
    confirmed: Option<u64>,
    taken: BTreeSet<u64>,
    begun: usize,
}

impl Model {
    fn may_act(&self, now: u64, token: u64) -> bool {
        self.confirmed == Some(token)
            && !self.lost.contains(&token)
            && self.taken.contains(&token)
            && self.taken.last() == Some(&token)
            && self.valid.get(&token).is_some_and(|&until| now < until)
    }

    fn saw(&mut self, now: u64, effect: &Effect, step: &str) {
        match effect {
            Effect::Send(frame) => match &**frame {
                AgentFrame::Hello(hello) => {
                    self.offered = hello.leases.first().map(|lease| lease.token.0);
                    if let Some(token) = self.offered {
                        assert!(
                            self.taken.contains(&token),
                            "{step}: {token} is offered before it is taken over"
                        );
                        assert!(
                            !self.lost.contains(&token),
                            "{step}: {token} is offered after it was lost"
                        );
                    }
                }
                AgentFrame::LeaseKeepalive(keepalive) => {
                    let key = (keepalive.token.0, keepalive.seq);
                    assert!(
                        self.sent.insert(key, now).is_none(),
                        "{step}: {key:?} is sent twice"
                    );
                }
                AgentFrame::Complete(_) | AgentFrame::Status(_) | AgentFrame::Ack(_) => {
                    let token = self
                        .confirmed
                        .unwrap_or_else(|| panic!("{step}: {frame:?} by a standby"));
                    assert!(
                        !self.lost.contains(&token),
                        "{step}: {frame:?} after {token} was lost"
                    );
                    if !matches!(**frame, AgentFrame::Ack(_)) {
                        assert!(self.may_act(now, token), "{step}: {frame:?} at {now}");
                    }
                }
                _ => {}
            },
            Effect::Begin(command) => {
                assert!(self.may_act(now, command.token.0), "{step}: {command:?} at {now}");
                self.begun += 1;
            }
            _ => {}
        }
    }
}

#[test]
fn whatever_happens_nothing_is_begun_or_told_without_a_valid_guard() {
    let mut begun = 0;
    for seed in 0..400 {
        let (mut dice, mut model) = (Dice(seed), Model::default());
        let mut session = Replica::knowing(0).0;
        let (mut now, mut next_token, mut held) = (0_u64, 1_u64, 0_u64);
        let (mut connected, mut hello_open) = (false, false);
        let (mut working, mut pending): (Vec<CommandFrame>, BTreeSet<u64>) = Default::default();
        for at in 0..200 {
            let dice_now = dice.throw(14);
            let step = format!("seed {seed}, step {at}, action {dice_now}");
            let seq = model
                .sent
                .keys()
                .filter(|(token, _)| *token == held)
                .map(|(_, seq)| *seq)
                .max();
            match dice_now {
                0 if !connected => {
                    session.connected(now, &[]);
                    (connected, hello_open) = (true, true);
                    model.confirmed = None;
                }
                0 if dice.throw(6) == 0 => {
                    session.disconnected();
                    (connected, hello_open) = (false, false);
                    model.confirmed = None;
                }
                1 | 2 if hello_open => {
                    hello_open = false;
                    let confirms = model.offered.filter(|_| dice.throw(8) > 0);
                    model.confirmed = confirms.filter(|token| !model.lost.contains(token));
                    if confirms.is_none() {
                        model.lost.extend(model.offered);
                    }
                    session.frame(now, welcome(confirms));
                }
                3 if connected && model.confirmed.is_none() && held < next_token => {
                    held = next_token;
                    next_token += 1 + dice.throw(3);
                    session.frame(now, granted(held));
                }
                4..=6 if connected && held > 0 => {
                    // The newest, or an older one, which may have been answered before.
                    let Some(newest) = seq else { continue };
                    let seq = newest - dice.throw(3).min(newest - 1);
                    if let Some(&sent) = model.sent.get(&(held, seq)) {
                        let until = model.valid.entry(held).or_default();
                        *until = (*until).max(sent + hold_ms(TTL));
                    }
                    session.frame(now, renewed(held, seq));
                }
                7 if connected && dice.throw(5) == 0 => {
                    model.lost.insert(held);
                    model.confirmed = None;
                    next_token = next_token.max(held + 1);
                    session.frame(now, lost());
                }
                8 | 9 => {
                    if let Some(token) = pending.pop_first() {
                        model.taken.insert(token);
                        session.taken_over(now, Token(token), &[], Vec::new());
                    }
                }
                10 | 11 if connected => {
                    let token = model.confirmed.unwrap_or(held);
                    let one = start(
                        &format!("c{}", dice.throw(30)),
                        &format!("s{}", dice.throw(4)),
                        token,
                    );
                    session.frame(now, ServerFrame::Command(one));
                }
                12 => {
                    if let Some(one) = working.pop() {
                        session.finished(now, &one, done());
                    }
                    session.exited(now, &name(&format!("s{}", dice.throw(4))), at, Exit::Code(0));
                }
                _ => {
                    now += [10, 100, 300, 2_000][usize::try_from(dice.throw(4)).unwrap()];
                    session.heard(now);
                    session.tick(now);
                }
            }
            while let Some(effect) = session.next_effect() {
                model.saw(now, &effect, &step);
                match effect {
                    Effect::TakeOver(token) => drop(pending.insert(token.0)),
                    Effect::Begin(command) => {
                        let key: RunKey = key_of(&command);
                        assert!(
                            working.iter().all(|one| key_of(one) != key),
                            "{step}: begun twice"
                        );
                        working.push(*command);
                    }
                    Effect::Reconnect(_) => {
                        (connected, hello_open) = (false, false);
                        model.confirmed = None;
                    }
                    Effect::Send(frame) if matches!(*frame, AgentFrame::Hello(_)) => {
                        hello_open = true;
                    }
                    _ => {}
                }
            }
            if let Some((token, until)) = session.permit() {
                assert!(
                    !model.lost.contains(&token.0),
                    "{step}: a permit for what is lost"
                );
                assert!(until <= model.valid.get(&token.0).copied().unwrap_or(0), "{step}");
            }
        }
        begun += model.begun;
    }
    assert!(begun > 500, "the walk led nowhere: {begun}");
}
