//! Leases against a simulated world: the real state machine, the real lease clock and the real guard of
//! holders, with clocks that drift, a network that delays, doubles and reorders, and leaders that come and go.
//!
//! The property is the one that everything is for: **at no real time are two guards valid.** Each rule of the
//! design that it hangs on can be broken here, and must then be seen to matter: a simulation that stays green
//! with a broken rule would prove nothing. So must the bound on the drift.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use regent_client::guard::Guard;
use regent_state::operation::{Campaign, InitCluster};
use regent_state::record::{Keeping, WaitsAt};
use regent_state::{Applied, Caller, Leadership, Meta, Operation, Outcome, Request, State};
use regent_types::{CandidateId, ClusterId, LeaseName, NodeId, Revision, Token, TokenId, UserName};

use crate::lease_clock::LeaseClock;

/// The TTL, in milliseconds.
const TTL: u64 = 1_000;
/// Programs that want the lease.
const HOLDERS: usize = 3;
/// Nodes that may lead.
const NODES: usize = 3;

/// A rule of the design that is broken, to see that it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// A promoted candidate acts as soon as it is told, counted from then.
    ActsWhenTold,
    /// A guard counts from when the acknowledgement came, not from when the keepalive left.
    CountsFromTheAnswer,
    /// An expiry counts whoever's leadership decided it.
    AnyLeadershipExpires,
    /// A new leadership goes on with the clock of that node's last one.
    ClockLivesOn,
    /// A lease whose expiry is on its way is still renewed.
    RenewsWhatExpires,
    /// A deposed leader answers keepalives.
    DeposedAnswers,
}

/// Rates of clocks, in millionths.
#[derive(Debug, Clone)]
struct Rates {
    nodes: [u64; NODES],
    holders: [u64; HOLDERS],
}

/// What is on its way. It arrives when the story says so, if ever.
#[derive(Debug, Clone)]
enum Message {
    Keepalive {
        holder: usize,
        token: Token,
        seq: u64,
        to: usize,
    },
    Renewed {
        holder: usize,
        token: Token,
        seq: u64,
    },
    Lost {
        holder: usize,
        token: Token,
    },
    Granted {
        holder: usize,
        token: Token,
    },
    Expire {
        decided: Leadership,
        due: Vec<(LeaseName, Token)>,
    },
    Release {
        token: Token,
    },
}

struct Node {
    /// The clock of its last leadership.
    clock: Option<LeaseClock>,
}

#[derive(Default)]
struct Holder {
    /// By token: one that was frozen may still hold an old guard when it gets a new one.
    guards: BTreeMap<Token, Guard>,
    current: Option<Token>,
}

struct World {
    broken: Broken,
    rates: Rates,
    /// Real time, in milliseconds.
    now: u64,
    state: State,
    leadership: Leadership,
    nodes: Vec<Node>,
    holders: Vec<Holder>,
    network: Vec<Message>,
    candidacies: u64,
    told: u64,
    promotions: u64,
}

fn lease() -> LeaseName {
    LeaseName::new("l").unwrap()
}

fn at(rate: u64, now: u64) -> u64 {
    // Another origin for each clock would change nothing: only differences are used.
    now * rate / 1_000_000
}

impl World {
    fn new(rates: Rates, broken: Broken) -> Self {
        let mut world = Self {
            broken,
            rates,
            now: 10_000,
            state: State::new(),
            leadership: Leadership {
                term: 1,
                node: NodeId(0),
            },
            nodes: (0..NODES).map(|_| Node { clock: None }).collect(),
            holders: (0..HOLDERS).map(|_| Holder::default()).collect(),
            network: Vec::new(),
            candidacies: 0,
            told: 0,
            promotions: 0,
        };
        let init = InitCluster {
            cluster_id: ClusterId::new("c").unwrap(),
            feature_level: 1,
            admin: UserName::new("admin").unwrap(),
            password_hash: None,
            token: Some((TokenId::new("t").unwrap(), [1; 32])),
        };
        world
            .apply(Caller::Node(NodeId(0)), Operation::InitCluster(init))
            .unwrap();
        world.lead(0);
        world
    }

    fn node_now(&self, node: usize) -> u64 {
        at(self.rates.nodes[node], self.now)
    }

    fn holder_now(&self, holder: usize) -> u64 {
        at(self.rates.holders[holder], self.now)
    }

    fn leader(&self) -> usize {
        usize::try_from(self.leadership.node.0).unwrap()
    }

    /// Applies an operation; the leader's clock sees what became of the lease, and a promotion is told.
    fn apply(&mut self, caller: Caller, operation: Operation) -> Applied {
        let before = self.state.lease(&lease()).cloned();
        let revision = Revision(self.state.revision().0 + 1);
        let meta = Meta {
            revision,
            leadership: self.leadership,
            at: self.now,
        };
        let request = Request {
            caller,
            idempotency: None,
            operation,
        };
        let applied = self.state.apply(&meta, &request);
        let after = self.state.lease(&lease()).cloned();
        if before.as_ref().map(|lease| lease.token) != after.as_ref().map(|lease| lease.token) {
            let (leader, now) = (self.leader(), self.node_now(self.leader()));
            if let Some(clock) = &mut self.nodes[leader].clock {
                if let Some(before) = &before {
                    clock.gone(&before.name, before.token);
                }
                match &after {
                    Some(lease) if before.is_some() => {
                        clock.promoted(lease.name.clone(), lease.token, TTL, now);
                    }
                    Some(lease) => clock.granted(lease.name.clone(), lease.token, TTL, now),
                    None => {}
                }
            }
            if let (Some(_), Some(lease)) = (before, after) {
                self.promotions += 1;
                let holder = lease.holder.parse().unwrap();
                self.network.push(Message::Granted {
                    holder,
                    token: lease.token,
                });
            }
        }
        applied
    }

    fn lead(&mut self, node: usize) {
        self.leadership = Leadership {
            term: self.leadership.term + 1,
            node: NodeId(node as u64),
        };
        let held = self.state.leases().values();
        let held = held.map(|lease| (lease.name.clone(), lease.token, lease.ttl_ms));
        let fresh = LeaseClock::new(self.leadership, held, self.node_now(node));
        if self.broken != Broken::ClockLivesOn || self.nodes[node].clock.is_none() {
            self.nodes[node].clock = Some(fresh);
        }
    }

    fn campaign(&mut self, holder: usize) {
        // A program campaigns when it does not hold the lease, as far as it knows.
        if self.holders[holder].current.is_some() || self.candidacies > 10_000 {
            return;
        }
        self.candidacies += 1;
        let campaign = Campaign {
            name: lease(),
            candidate: CandidateId::new(format!("h{holder}-{}", self.candidacies)).unwrap(),
            holder: holder.to_string(),
            ttl_ms: TTL,
            at: WaitsAt {
                node: NodeId(0),
                start: 0,
            },
            connection: None,
            resume: None,
        };
        if self
            .state
            .queue_of(&lease())
            .any(|c| c.holder == holder.to_string())
        {
            return;
        }
        let sent = self.holder_now(holder);
        let applied = self.apply(
            Caller::Token(TokenId::new("t").unwrap()),
            Operation::Campaign(campaign),
        );
        if let Ok(Outcome::Lease(lease)) = applied {
            // Granted at once: it counts from when the request was sent.
            let mut guard = Guard::new(TTL);
            let seq = guard.sending(sent);
            guard.acknowledged(seq, TTL);
            self.holders[holder].guards.insert(lease.token, guard);
            self.holders[holder].current = Some(lease.token);
        }
    }

    fn keepalive(&mut self, holder: usize) {
        let now = self.holder_now(holder);
        let Some(token) = self.holders[holder].current else {
            return;
        };
        let guard = self.holders[holder].guards.get_mut(&token).unwrap();
        let seq = guard.sending(now);
        for to in 0..NODES {
            // Whoever it thinks leads: any node, so that a deposed one is asked too.
            self.network.push(Message::Keepalive {
                holder,
                token,
                seq,
                to,
            });
        }
    }

    fn release(&mut self, holder: usize) {
        if let Some(token) = self.holders[holder].current.take() {
            if let Some(guard) = self.holders[holder].guards.get_mut(&token) {
                guard.lost();
            }
            self.network.push(Message::Release { token });
        }
    }

    fn look(&mut self, node: usize) {
        // A deposed leader that does not know it yet looks too; a frozen one that wakes does so at once.
        let now = self.node_now(node);
        if let Some(clock) = &mut self.nodes[node].clock {
            let decided = match self.broken {
                Broken::ClockLivesOn => self.leadership,
                _ => clock.leadership(),
            };
            let due = clock.due(now, 10);
            if !due.is_empty() {
                self.network.push(Message::Expire { decided, due });
            }
        }
    }

    fn deliver(&mut self, message: Message) {
        match message {
            Message::Keepalive {
                holder,
                token,
                seq,
                to,
            } => {
                let leads = to == self.leader();
                if !leads && self.broken != Broken::DeposedAnswers {
                    return; // no quorum confirms it
                }
                let now = self.node_now(to);
                let held = self
                    .state
                    .lease(&lease())
                    .is_some_and(|lease| lease.token == token);
                let Some(clock) = &mut self.nodes[to].clock else {
                    return;
                };
                let mut renewed = clock.renew(&lease(), token, now).is_some();
                if self.broken == Broken::RenewsWhatExpires {
                    renewed = true;
                }
                // A deposed leader looks into a state that is as old as it is.
                let held = held || (!leads && renewed);
                self.network.push(if held && renewed {
                    Message::Renewed { holder, token, seq }
                } else {
                    Message::Lost { holder, token }
                });
            }
            Message::Renewed { holder, token, seq } => {
                let now = self.holder_now(holder);
                let late = self.broken == Broken::CountsFromTheAnswer;
                if let Some(guard) = self.holders[holder].guards.get_mut(&token)
                    && guard.acknowledged(seq, TTL)
                    && late
                {
                    let seq = guard.sending(now);
                    guard.acknowledged(seq, TTL);
                }
            }
            Message::Lost { holder, token } => {
                if let Some(guard) = self.holders[holder].guards.get_mut(&token) {
                    guard.lost();
                }
                if self.holders[holder].current == Some(token) {
                    self.holders[holder].current = None;
                }
            }
            Message::Granted { holder, token } => {
                let now = self.holder_now(holder);
                let mut guard = Guard::new(TTL);
                if self.broken == Broken::ActsWhenTold {
                    let seq = guard.sending(now);
                    guard.acknowledged(seq, TTL);
                }
                let newer = self.holders[holder].current.is_none_or(|current| current < token);
                if newer && !self.holders[holder].guards.contains_key(&token) {
                    self.told += 1;
                    self.holders[holder].guards.insert(token, guard);
                    self.holders[holder].current = Some(token);
                }
            }
            Message::Expire { decided, due } => {
                let leadership = if self.broken == Broken::AnyLeadershipExpires {
                    self.leadership
                } else {
                    decided
                };
                let operation = Operation::EndLeases {
                    leadership,
                    leases: due,
                    lapsed: Vec::new(),
                };
                let _ = self.apply(Caller::Node(NodeId(0)), operation);
            }
            Message::Release { token } => {
                let operation = Operation::ReleaseLease { name: lease(), token };
                let _ = self.apply(Caller::Node(NodeId(0)), operation);
            }
        }
    }

    /// The leader looks, what it decides is written, and whoever is promoted by it is told and renews, all at
    /// once; what else is on its way stays there. The shortest way from one holder to the next.
    fn hurry(&mut self) {
        self.look(self.leader());
        let is_of_it =
            |message: &Message| matches!(message, Message::Expire { .. } | Message::Granted { .. });
        while let Some(at) = self.network.iter().position(is_of_it) {
            let message = self.network.remove(at);
            self.deliver(message);
        }
        for holder in 0..HOLDERS {
            let Some(token) = self.holders[holder].current else {
                continue;
            };
            if self.holders[holder].guards[&token].valid_until() > 0 {
                continue;
            }
            let now = self.holder_now(holder);
            let guard = self.holders[holder].guards.get_mut(&token).unwrap();
            let seq = guard.sending(now);
            let to = self.leader();
            self.deliver(Message::Keepalive {
                holder,
                token,
                seq,
                to,
            });
            let answer = self.network.pop().expect("the leader answers");
            self.deliver(answer);
        }
    }

    /// One step of a story.
    fn step(&mut self, (what, which, how): Choice) {
        let pick = usize::from(which);
        match what % 16 {
            0..=2 => self.campaign(pick % HOLDERS),
            3..=5 => self.keepalive(pick % HOLDERS),
            6 => self.release(pick % HOLDERS),
            7 => self.lead(pick % NODES),
            8 => self.look(pick % NODES),
            9 => self.hurry(),
            10 if !self.network.is_empty() => {
                // Doubled: it arrives, and may do so again.
                let message = self.network[pick % self.network.len()].clone();
                self.deliver(message);
            }
            11..=14 if !self.network.is_empty() => {
                let message = self.network.remove(pick % self.network.len());
                self.deliver(message);
            }
            _ => self.now += u64::from(how) * 4,
        }
        // What is on its way for ever would only slow the story down.
        if self.network.len() > 64 {
            self.network.remove(0);
        }
        self.now += u64::from(how % 8);
    }

    /// Who may act now, by their own clocks.
    fn acting(&self) -> Vec<(usize, Token)> {
        let mut acting = Vec::new();
        for (number, holder) in self.holders.iter().enumerate() {
            let now = self.holder_now(number);
            let valid = holder.guards.iter().filter(|(_, guard)| guard.is_valid(now));
            acting.extend(valid.map(|(token, _)| (number, *token)));
        }
        acting
    }
}

/// What happens, to whom, and how long it takes.
type Choice = (u8, u8, u8);

fn story() -> impl Strategy<Value = Vec<Choice>> {
    proptest::collection::vec(any::<Choice>(), 50..400)
}

/// All clocks within the given distance of the true rate, in millionths.
fn rates(within: u64) -> impl Strategy<Value = Rates> {
    let rate = (1_000_000 - within)..=(1_000_000 + within);
    (
        proptest::array::uniform3(rate.clone()),
        proptest::array::uniform3(rate),
    )
        .prop_map(|(nodes, holders)| Rates { nodes, holders })
}

/// Tells a story; gives what was wrong.
fn tell(rates: Rates, broken: Broken, story: &[Choice]) -> Result<World, String> {
    let mut world = World::new(rates, broken);
    for (at, choice) in story.iter().enumerate() {
        world.step(*choice);
        let acting = world.acting();
        if acting.len() > 1 {
            return Err(format!(
                "after step {at} at {}: {acting:?} act at once",
                world.now
            ));
        }
        let kept = world.state.lease(&lease()).map(|lease| &lease.kept);
        assert!(kept.is_none_or(|kept| matches!(kept, Keeping::Candidacy(..))));
    }
    Ok(world)
}

/// In how many of so many random stories two act at once.
fn found(within: u64, broken: Broken, stories: u32) -> u32 {
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(ProptestConfig::default(), rng);
    let mut found = 0;
    for _ in 0..stories {
        use proptest::strategy::ValueTree as _;
        let (rates, story) = (rates(within), story()).new_tree(&mut runner).unwrap().current();
        found += u32::from(tell(rates, broken, &story).is_err());
    }
    found
}

/// The bound of the clock model: 1 %.
const RHO: u64 = 10_000;

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, ..ProptestConfig::default() })]

    #[test]
    fn at_no_time_are_two_guards_valid(rates in rates(RHO), story in story()) {
        if let Err(error) = tell(rates, Broken::Nothing, &story) {
            prop_assert!(false, "{}", error);
        }
    }
}

/// Stories that are told to see a broken rule.
const STORIES: u32 = 3_000;

/// Also says in how many, so that one that is hardly ever seen is noticed by people.
fn must_be_seen(broken: Broken) {
    let seen = found(RHO, broken, STORIES);
    assert!(seen > 0, "{broken:?} was not noticed in {STORIES} stories");
    #[allow(clippy::print_stderr)]
    {
        eprintln!("{broken:?}: seen in {seen} of {STORIES} stories");
    }
}

#[test]
fn a_promoted_candidate_that_acts_when_told_is_seen() {
    must_be_seen(Broken::ActsWhenTold);
}

#[test]
fn a_guard_that_counts_from_the_answer_is_seen() {
    must_be_seen(Broken::CountsFromTheAnswer);
}

#[test]
fn an_expiry_of_another_leadership_is_seen() {
    must_be_seen(Broken::AnyLeadershipExpires);
}

#[test]
fn a_lease_clock_that_lives_on_is_seen() {
    must_be_seen(Broken::ClockLivesOn);
}

#[test]
fn a_renewal_of_what_is_being_expired_is_seen() {
    must_be_seen(Broken::RenewsWhatExpires);
}

#[test]
fn a_deposed_leader_that_answers_is_seen() {
    must_be_seen(Broken::DeposedAnswers);
}

#[test]
fn beyond_the_bound_of_the_clock_model_two_guards_are_valid() {
    assert!(
        found(60_000, Broken::Nothing, STORIES) > 0,
        "the bound does not matter"
    );
    assert_eq!(found(RHO, Broken::Nothing, STORIES), 0);
}

#[test]
fn the_stories_reach_what_they_are_about() {
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(ProptestConfig::default(), rng);
    let (mut promotions, mut told, mut terms) = (0, 0, 0);
    for _ in 0..200 {
        use proptest::strategy::ValueTree as _;
        let (rates, story) = (rates(RHO), story()).new_tree(&mut runner).unwrap().current();
        let world = tell(rates, Broken::Nothing, &story).unwrap();
        promotions += world.promotions;
        told += world.told;
        terms += world.leadership.term;
    }
    assert!(
        promotions > 200 && told > 100 && terms > 1_000,
        "{promotions} {told} {terms}"
    );
}
