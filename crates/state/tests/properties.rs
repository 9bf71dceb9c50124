//! Properties of the state machine under random stories. The harness checks after every operation
//! that indexes, usage and connections agree with the records, that no open command is out of its
//! queue, and that a rejection changed nothing; and at the end that a replica fed with the encoded
//! log, and one that goes on from a snapshot, come to the same bytes. A failing story is printed.

// Clippy knows only functions marked as tests.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod harness;
mod restored;

use std::collections::BTreeMap;

use harness::world::World;
use proptest::prelude::*;
use regent_state::record::{Command, CommandState, Usage};
use regent_types::{AgentId, CommandId, Epoch, LeaseName, Token};

/// Three numbers, from which a step is made that has a fair chance to do something in the present state.
type Choice = (u8, u8, u8);

fn choices(steps: usize) -> impl Strategy<Value = Vec<Choice>> {
    proptest::collection::vec((any::<u8>(), any::<u8>(), any::<u8>()), 1..steps)
}

const AGENTS: [&str; 3] = ["dev", "east", "west"];
const USERS: [&str; 2] = ["alice", "bob"];
const LEASES: [&str; 3] = ["jobs", "agent/dev", "agent/east"];

fn begin(world: &mut World) {
    for line in [
        "init",
        "user alice sessions=4 memory=3Gi",
        "user bob role=operator",
        "agent dev sessions=3",
        "agent east memory=1Gi labels=gpu:yes",
        "connect dev sessions=",
    ] {
        world.step(line);
    }
}

/// The step for a choice. `at` makes ids that were never used.
fn line(world: &World, at: usize, (kind, a, b): Choice) -> String {
    let pick = |of: &[&'static str], n: u8| of[usize::from(n) % of.len()];
    let (agent, user, lease) = (pick(&AGENTS, a), pick(&USERS, a), pick(&LEASES, a));
    let caller = pick(&["admin", "alice", "bob", "agent-dev"], b);
    let session = nth(world.state.sessions().keys(), a).unwrap_or_else(|| "nobody".to_owned());
    let open = world
        .state
        .commands()
        .values()
        .filter(|c| !c.state.is_final())
        .map(|c| &c.id);
    let open = nth(open, a).unwrap_or_else(|| "nothing".to_owned());
    let any = nth(world.state.commands().keys(), a).unwrap_or_else(|| "nothing".to_owned());
    let deliverable = world.state.deliverable(&agent.parse().unwrap(), world.now);
    match kind % 46 {
        0..=4 => {
            let wish = pick(
                &[
                    "",
                    "queue",
                    "queue labels=gpu:yes",
                    "memory=700Mi",
                    "queue memory=900Mi",
                ],
                b,
            );
            format!(
                "create s{at} command=c{at} user={user} as={} {wish}",
                pick(&["admin", user], b)
            )
        }
        5..=11 => match deliverable.get(usize::from(b) % deliverable.len().max(1)) {
            Some(command) => format!("sent {}", command.id),
            None => format!("sent {open}"),
        },
        12..=13 => format!("ack {open}"),
        14..=18 => format!("complete {open} {}", pick(&["", "url=http://a", "run=1"], b)),
        19 => format!("fail {open} {}", pick(&["retryable", ""], b)),
        20 => format!("stop {session} command=c{at} as={caller}"),
        21 => format!("hibernate {session} command=c{at} as={caller}"),
        22 => format!("wake {session} command=c{at}"),
        23 => {
            let waiting: Vec<_> = world
                .state
                .waiting_sessions()
                .enumerate()
                .map(|(n, s)| format!("{}:c{at}-{n}", s.name))
                .collect();
            if waiting.is_empty() {
                "prune".to_owned()
            } else {
                format!("place {}", waiting.join(" "))
            }
        }
        24 => format!("session-overdue {session} command=c{at}"),
        25 => format!("overdue {open}"),
        26 => format!(
            "report {agent} {session} {}",
            pick(&["running", "exited", "failed", "hibernated"], b)
        ),
        27 => {
            let id = agent.parse().unwrap();
            let all: Vec<_> = world
                .state
                .sessions_of_agent(&id)
                .map(|s| format!("{}:running:{}", s.name, s.generation))
                .collect();
            let kept = all.len() - all.len().min(usize::from(b % 3));
            let sessions = pick(&["list", "unknown"], b);
            let sessions = if sessions == "list" {
                all[..kept].join(",")
            } else {
                "unknown".to_owned()
            };
            format!(
                "connect {agent} sessions={sessions} {}",
                pick(
                    &[
                        "",
                        "",
                        "replica=one holds=current",
                        "replica=two holds=current",
                        "replica=two",
                        "runtime=r2",
                    ],
                    b
                )
            )
        }
        28 => format!(
            "disconnect {agent} {}",
            pick(&["", "", "replica=one", "replica=two", "epoch=3"], b)
        ),
        29 => format!(
            "command c{at} agent={agent} as={caller} {}",
            pick(&["", "expires=5s", "action=stop_session"], b)
        ),
        30 => format!("{} {any} as={caller}", pick(&["cancel", "retry"], b)),
        31 => format!(
            "acquire {lease} as={} key=k{}",
            pick(&["alice", "bob", "agent-dev", "agent-east"], b),
            b % 8
        ),
        32 => format!(
            "release {lease} as={}",
            pick(&["alice", "bob", "agent-dev", "node"], b)
        ),
        33 => format!(
            "expire {lease} {}",
            pick(&["", "", "leadership=9/9", "token=2"], b)
        ),
        34 => format!(
            "{} {agent} as={caller}",
            pick(&["cordon", "drain", "uncordon", "force-release agent/dev"], b)
        ),
        35 => match b % 5 {
            0 => format!("agent {agent} sessions=2"),
            1 => format!("delete-agent {agent} {}", if a < 100 { "force" } else { "" }),
            2 => format!("delete-user {user}"),
            3 => format!(
                "user {user} sessions=3 as={}",
                if a < 128 { "admin" } else { "bob" }
            ),
            _ => format!("quota {user} sessions=2"),
        },
        36 => match b % 4 {
            0 => format!("token t{at} user={user} ttl=30s"),
            1 => format!("token t{at} user={user} login=hash-1 ttl=1h"),
            2 => format!(
                "revoke {}",
                nth(world.state.tokens().keys(), a)
                    .filter(|t| t != "admin")
                    .unwrap_or_default()
                    + " x"
            ),
            _ => format!("password {user} hash-1 as={caller}"),
        },
        37 => "prune".to_owned(),
        38 => format!("patch {session} tags=a,b as={caller} max=1h"),
        39..=40 => format!(
            "campaign jobs candidate={} as={} node={}",
            pick(&["a", "b", "c"], a),
            pick(&["alice", "bob", "agent-dev"], b),
            1 + b % 3
        ),
        41..=42 => format!("campaign agent/{agent} replica={}", pick(&["one", "two"], b)),
        43 => format!(
            "withdraw jobs candidate={} as={} node={}",
            pick(&["a", "b", "c"], a),
            pick(&["alice", "bob", "node"], b),
            1 + b % 3
        ),
        44 => {
            let lapsed = nth(
                world
                    .state
                    .candidates()
                    .map(|c| format!("{}@{}", c.lease, c.place)),
                b,
            );
            let lapsed = lapsed.map(|one| format!("lapsed={one}")).unwrap_or_default();
            format!("end {lease} {lapsed}")
        }
        _ => format!("advance {}", pick(&["1s", "11s", "3m", "25h"], b)),
    }
}

fn nth<T: ToString>(of: impl Iterator<Item = T>, n: u8) -> Option<String> {
    let all: Vec<_> = of.collect();
    // The newest ones most of the time: old ones are mostly final.
    let from_end = usize::from(n) % all.len().max(1);
    all.len().checked_sub(1 + from_end).map(|at| all[at].to_string())
}

/// What was, to compare with what is.
#[derive(Default)]
struct Before {
    open: Vec<CommandId>,
    steps: BTreeMap<CommandId, (u32, u8)>,
    leases: BTreeMap<LeaseName, Token>,
    epochs: BTreeMap<(String, String), Epoch>,
    allocated: BTreeMap<AgentId, Usage>,
    led_under: BTreeMap<AgentId, Token>,
}

/// How far a command is within its run.
fn progress(command: &Command) -> (u32, u8) {
    let status = match command.state {
        CommandState::Pending { .. } => 0,
        CommandState::Sent { .. } => 1,
        CommandState::Acknowledged { .. } => 2,
        CommandState::Completed { .. }
        | CommandState::Failed { .. }
        | CommandState::Cancelled { .. }
        | CommandState::Expired { .. } => 3,
    };
    (command.run, status)
}

impl Before {
    fn check(&mut self, world: &World) {
        let state = &world.state;
        for id in std::mem::take(&mut self.open) {
            let command = state
                .command(&id)
                .unwrap_or_else(|| panic!("command {id} was open and is gone"));
            let queued = state.queue(&command.agent).any(|queued| queued.id == id);
            assert_eq!(
                queued,
                !command.state.is_final(),
                "command {id} is not where it belongs"
            );
        }
        for command in state.commands().values() {
            let now = progress(command);
            let was = self.steps.insert(command.id.clone(), now).unwrap_or_default();
            assert!(
                now >= was,
                "command {} went from {was:?} back to {now:?}",
                command.id
            );
            if !command.state.is_final() {
                self.open.push(command.id.clone());
            }
        }
        for lease in state.leases().values() {
            let was = self
                .leases
                .insert(lease.name.clone(), lease.token)
                .unwrap_or_default();
            assert!(
                lease.token >= was,
                "the token of {} went from {was} to {}",
                lease.name,
                lease.token
            );
        }
        for agent in state.agents().values() {
            for (replica, connection) in &agent.connections {
                let key = (agent.id.to_string(), replica.to_string());
                let was = self.epochs.insert(key, connection.epoch).unwrap_or_default();
                assert!(connection.epoch >= was, "an epoch of {} went back", agent.id);
            }
            if let Some((_, token)) = &agent.leader {
                let was = self
                    .led_under
                    .insert(agent.id.clone(), *token)
                    .unwrap_or(Token(0));
                assert!(*token >= was, "{} is led under an older token", agent.id);
            }
        }
        for agent in state.agents().values() {
            let (used, capacity) = (agent.allocated, agent.capacity);
            let was = self.allocated.insert(agent.id.clone(), used).unwrap_or_default();
            // What was placed stays when the capacity shrinks; but then nothing comes on top.
            let over = (used.sessions > was.sessions
                && capacity.max_sessions.is_some_and(|max| used.sessions > max))
                || (used.memory > was.memory && capacity.memory.is_some_and(|max| used.memory > max));
            assert!(
                !over,
                "agent {} is oversubscribed: {used:?} of {capacity:?}",
                agent.id
            );
        }
        let gone = |id: &AgentId| state.agent(id).is_none();
        self.allocated.retain(|id, _| !gone(id));
    }
}

fn tell(story: &[Choice], snapshot_at: usize) -> World {
    let mut world = World::new();
    begin(&mut world);
    let mut before = Before::default();
    let mut told = Vec::new();
    for (at, choice) in story.iter().enumerate() {
        if at == snapshot_at {
            world.take_snapshot();
        }
        let line = line(&world, at, *choice);
        told.push(line.clone());
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            world.step(&line);
            before.check(&world);
        }));
        if let Err(panic) = result {
            eprintln!("the story was:\n{}", told.join("\n"));
            std::panic::resume_unwind(panic);
        }
    }
    world
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn replicas_agree_and_invariants_hold(story in choices(160), snapshot_at in 0_usize..160) {
        tell(&story, snapshot_at).verify();
    }

    #[test]
    fn whatever_was_can_be_restored(story in choices(160), keep in any::<bool>()) {
        let world = tell(&story, 0);
        restored::check(&world.state, world.now, keep);
    }
}

/// The generator must reach what the properties are about: a story that only collects refusals
/// would prove nothing.
#[test]
fn random_stories_reach_what_matters() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    let mut runner = TestRunner::deterministic();
    let mut seen = BTreeMap::<String, usize>::new();
    for _ in 0..40 {
        let story = choices(160).new_tree(&mut runner).unwrap().current();
        for (_, event) in tell(&story, 0).state.events().iter() {
            *seen.entry(event.name()).or_default() += 1;
        }
    }
    for name in [
        "session.running",
        "session.starting",
        "session.hibernated",
        "session.terminated",
        "session.failed",
        "session.lost",
        "command.sent",
        "command.acknowledged",
        "command.completed",
        "command.failed",
        "command.cancelled",
        "lease.granted",
        "lease.expired",
        "lease.queued",
        "lease.left",
        "agent.offline",
        "agent.online",
        "agent.deleted",
        "session.deleted",
        "command.deleted",
    ] {
        assert!(seen.contains_key(name), "no story reached {name}: {seen:?}");
    }
}
