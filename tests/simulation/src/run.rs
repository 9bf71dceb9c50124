//! One seed: a cluster is started, used and troubled, healed, and judged.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use regent_agent::runtime::ObservedState;
use regent_history::quota::Change;
use regent_history::{Violation, effects, fencing, lease, quota, register, watch};
use regent_raft::View;
use regent_state::event::EventRecord;
use regent_state::record::SessionState;
use regent_types::{AgentId, ReplicaName};
use tokio::time::Instant;

use crate::clients::agents::{self, Target, Who};
use crate::clients::{Book, Place, World, leases, registers, sessions, watches};
use crate::cluster::{Cluster, rate};
use crate::machine::{Machine, TICK_MS};
use crate::network::{Host, Network};
use crate::observe::Observer;
use crate::trace::Trace;
use crate::trouble::Trouble;

/// The name in [`Violation::checker`] for a cluster that does not come back.
pub const SERVES: &str = "it serves again after healing";
/// The name in [`Violation::checker`] for answers that no rule allows.
pub const ANSWERS: &str = "no answer is a surprise";
/// The name in [`Violation::checker`] for what the control plane and the targets say of sessions.
pub const AGREE: &str = "records and targets agree";
/// The name in [`Violation::checker`] for requests that are repeated.
pub const ONE_EFFECT: &str = "a repeated request is one request";
/// The name in [`Violation::checker`] for code that panics.
pub const PANICS: &str = "nothing panics";

/// How long the first start may take, in milliseconds.
const START_WITHIN_MS: u64 = 30_000;
/// How long it may take after healing until every node serves. Connections that hung in a partition are given up
/// within 10 s, and what was sent into one comes after another 6.4 s at most.
const HEALED_WITHIN_MS: u64 = 30_000;
/// How long commands may take to come to their end once all is well. A command that was sent to a socket that hung has
/// to wait for its deadline, and one that failed for its next run.
const COMMANDS_WITHIN_MS: u64 = 300_000;
/// How long clients may take to come to their end, and nodes to be equal.
const END_WITHIN_MS: u64 = 40_000;
/// Clients' machines.
const CLIENT_MACHINES: usize = 2;
/// Machines of agents: one that is alone, and two replicas of another.
pub const AGENT_MACHINES: usize = 3;

/// What one run is to be.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What everything is drawn from.
    pub seed: u64,
    /// How long there is trouble, in milliseconds.
    pub trouble_ms: u64,
}

/// What became of it.
#[derive(Debug, Clone)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// What it was judged.
    pub verdict: Result<(), Violation>,
    /// Simulated time, in milliseconds.
    pub simulated_ms: u64,
    /// The trace as one number.
    pub trace: u64,
    /// How many lines it has.
    pub lines: u64,
    /// What happened, for people.
    pub summary: String,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "seed {}: {} after {} s, trace {:016x} of {} lines; {}",
            self.seed,
            if self.verdict.is_ok() { "green" } else { "RED" },
            self.simulated_ms / 1_000,
            self.trace,
            self.lines,
            self.summary
        )?;
        if let Err(violation) = &self.verdict {
            write!(f, "\n{violation}\nagain: just simulate --seed {}", self.seed)?;
        }
        Ok(())
    }
}

/// Panics of tasks are caught by the runtime; they are noted here.
static PANICKED: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Runs one seed in this process, which must not have run another.
///
/// # Errors
/// The folder for snapshots cannot be made.
pub fn run(plan: &Plan, trace: &Trace) -> std::io::Result<Report> {
    let folder = snapshot_folder()?;
    std::panic::set_hook(Box::new(|panic| {
        let mut panicked = PANICKED.lock().unwrap_or_else(PoisonError::into_inner);
        panicked.push(panic.to_string());
        let stack = std::backtrace::Backtrace::force_capture();
        tracing::error!(%panic, %stack, "panicked");
    }));
    crate::machine::simulate_clocks();
    let mut rng = StdRng::seed_from_u64(plan.seed);
    let network = Network::new(rng.random(), trace.clone());
    let size = if rng.random_bool(0.75) { 3 } else { 5 };
    let cluster = Cluster::new(size, folder.path(), network.clone(), &mut rng);
    let clients = (0..CLIENT_MACHINES + AGENT_MACHINES)
        .map(|number| Machine::new(format!("outside {number}"), rate(&mut rng), 0))
        .collect();
    let agents = agents(&mut rng);
    let world = World {
        network: network.clone(),
        trace: trace.clone(),
        book: Arc::new(Mutex::new(Book::default())),
        nodes: size,
        ending: Arc::new(AtomicBool::new(false)),
    };
    let mut simulation = Simulation {
        now: 0,
        cluster,
        clients,
        agents,
        network,
        observer: Observer::default(),
        world,
        trace: trace.clone(),
        rng,
        recovered_ms: None,
        trouble: None,
    };
    let verdict = simulation.all(plan);
    // A panic explains whatever came of it.
    let panicked = std::mem::take(&mut *PANICKED.lock().unwrap_or_else(PoisonError::into_inner));
    let verdict = if panicked.is_empty() {
        verdict
    } else {
        let cause = Violation::new(PANICS, "something panicked").with(panicked);
        Err(cause.with(verdict.err().map(|violation| violation.to_string())))
    };
    let (sum, lines) = trace.sum();
    Ok(Report {
        seed: plan.seed,
        verdict,
        simulated_ms: simulation.now,
        trace: sum,
        lines,
        summary: simulation.summary(),
    })
}

/// One agent that is alone, and two replicas of another on one target.
fn agents(rng: &mut StdRng) -> Vec<(Who, Target)> {
    let id = |name: &str| AgentId::new(name).expect("a word");
    let ttl_ms = rng.random_range(2_000..6_000);
    let shared = Target::default();
    let replica = |name: &str| Who {
        agent: id("pair"),
        replica: Some(ReplicaName::new(name).expect("a word")),
        ttl_ms,
    };
    let alone = Who {
        agent: id("alone"),
        replica: None,
        ttl_ms,
    };
    vec![
        (alone, Target::default()),
        (replica("a"), shared.clone()),
        (replica("b"), shared),
    ]
}

/// In memory where the system offers that: nobody needs these files to survive the power of the real machine.
fn snapshot_folder() -> std::io::Result<tempfile::TempDir> {
    let memory = std::path::Path::new("/dev/shm");
    if memory.is_dir()
        && let Ok(folder) = tempfile::tempdir_in(memory)
    {
        return Ok(folder);
    }
    tempfile::tempdir()
}

struct Simulation {
    now: u64,
    cluster: Cluster,
    /// Those of clients, then those of agents.
    clients: Vec<Machine>,
    agents: Vec<(Who, Target)>,
    network: Network,
    observer: Observer,
    world: World,
    trace: Trace,
    rng: StdRng,
    recovered_ms: Option<u64>,
    trouble: Option<Trouble>,
}

impl Simulation {
    fn all(&mut self, plan: &Plan) -> Result<(), Violation> {
        for place in 0..self.cluster.len() {
            self.cluster.switch_on(place, self.now);
        }
        for client in &mut self.clients[..CLIENT_MACHINES] {
            client.switch_on(self.now, async {});
        }
        self.until_all_serve("the first start", START_WITHIN_MS)?;
        let count = self.begin_clients();
        for agent in 0..AGENT_MACHINES {
            self.begin_agent(agent);
        }

        let mut trouble = Trouble::new(StdRng::seed_from_u64(self.rng.random()), self.now);
        let end = self.now + plan.trouble_ms;
        while self.now < end {
            trouble.step(
                &mut self.cluster,
                &mut self.clients,
                &self.network,
                &self.trace,
                self.now,
            );
            self.note_agents();
            let now = self.now;
            for (_, machine) in trouble.agents_on.extract_if(.., |(at, _)| *at <= now) {
                self.begin_agent(machine - CLIENT_MACHINES);
            }
            self.step()?;
        }
        trouble.end(&mut self.cluster, &mut self.clients, &self.network, self.now);
        for agent in 0..AGENT_MACHINES {
            self.begin_agent(agent);
        }
        self.trouble = Some(trouble);
        self.trace.note(self.now, format_args!("healed"));

        let healed = self.now;
        self.until_all_serve("healing", HEALED_WITHIN_MS)?;
        self.recovered_ms = Some(self.now - healed);
        let last = self.cluster.node(0).and_then(|node| last_event(&node.view()));
        self.until(
            "all watchers have seen what happened",
            END_WITHIN_MS,
            |simulation| {
                let book = simulation.world.book();
                let mut watched = book.watched.iter();
                watched.all(|watched| watched.events.last().map(|event| event.id) >= last)
            },
        )?;
        self.world.ending.store(true, Ordering::Relaxed);
        self.until(
            "all clients have come to their end",
            END_WITHIN_MS,
            |simulation| simulation.world.book().done == count,
        )?;
        self.until_commands_end()?;
        self.on_client(0, |world, place| registers::read_all(world, place, 99));
        self.until("all registers are read", END_WITHIN_MS, |simulation| {
            simulation.world.book().done == count + 1
        })?;
        self.until("all nodes have applied the same", END_WITHIN_MS, |simulation| {
            let applied = |place| {
                simulation
                    .cluster
                    .node(place)
                    .map(|node| node.view().applied_index)
            };
            let first = applied(0);
            first.is_some() && (0..simulation.cluster.len()).all(|place| applied(place) == first)
        })?;
        self.judge()
    }

    /// One step of everything.
    fn step(&mut self) -> Result<(), Violation> {
        self.now += TICK_MS;
        self.network.advance(self.now);
        self.cluster.supervise(self.now);
        for member in &self.cluster.members {
            member.machine.run(self.now);
        }
        for client in &self.clients {
            client.run(self.now);
        }
        self.observer.look(&mut self.cluster, self.now)
    }

    fn until(&mut self, what: &str, within: u64, condition: impl Fn(&Self) -> bool) -> Result<(), Violation> {
        let end = self.now + within;
        while !condition(self) {
            if self.now >= end {
                let states = (0..self.cluster.len()).map(|place| match self.cluster.node(place) {
                    Some(node) => format!("node {}: {:?}", node.id(), node.status()),
                    None => format!("node {}: does not run", place + 1),
                });
                let found = format!("{}: waited {within} ms in vain until {what}", self.now);
                return Err(Violation::new(SERVES, found).with(states));
            }
            self.step()?;
        }
        Ok(())
    }

    /// Until every node has answered a linearizable read, and one whose answer is of a written cluster.
    fn until_all_serve(&mut self, after: &str, within: u64) -> Result<(), Violation> {
        let serving: Arc<Mutex<Vec<Host>>> = Arc::default();
        let size = self.cluster.len();
        let mut asked: Vec<Option<u64>> = vec![None; size];
        let end = self.now + within;
        loop {
            let known = serving.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if (0..size).all(|place| known.contains(&place)) {
                return Ok(());
            }
            if self.now >= end {
                return self.until(&format!("every node serves after {after}"), 0, |_| false);
            }
            for (place, asked) in asked.iter_mut().enumerate() {
                let again = asked.is_none_or(|at| at + 1_000 <= self.now);
                let member = &self.cluster.members[place];
                if known.contains(&place) || !again {
                    continue;
                }
                let (Some(node), Some(handle)) = (self.cluster.node(place), member.machine.handle()) else {
                    continue;
                };
                *asked = Some(self.now);
                let serving = serving.clone();
                handle.spawn(async move {
                    let read = node.read(Instant::now() + Duration::from_secs(5)).await;
                    if read.is_ok_and(|view| view.state.cluster_id().is_some()) {
                        serving.lock().unwrap_or_else(PoisonError::into_inner).push(place);
                    }
                });
            }
            self.step()?;
        }
    }

    /// Begins all clients and gives how many there are.
    fn begin_clients(&mut self) -> usize {
        let mut count = 0;
        for number in 0..6_u32 {
            let rng = StdRng::seed_from_u64(self.rng.random());
            let machine = number as usize % CLIENT_MACHINES;
            self.on_client(machine, |world, place| registers::run(world, place, number, rng));
            count += 1;
        }
        for number in 0..9_usize {
            let rng = StdRng::seed_from_u64(self.rng.random());
            let name = format!("candidate {number}");
            self.on_client(number % CLIENT_MACHINES, |world, place| {
                leases::run(world, place, name, rng)
            });
            count += 1;
        }
        let rng = StdRng::seed_from_u64(self.rng.random());
        self.on_client(0, |world, place| {
            leases::intrude(world, place, "intruder".to_owned(), rng)
        });
        count += 1;
        for number in 0..2_usize {
            let rng = StdRng::seed_from_u64(self.rng.random());
            let name = format!("user {number}");
            self.on_client(number % CLIENT_MACHINES, |world, place| {
                sessions::run(world, place, name, rng)
            });
            count += 1;
        }
        for number in 0..3_usize {
            let rng = StdRng::seed_from_u64(self.rng.random());
            let name = format!("watcher {number}");
            self.on_client(number % CLIENT_MACHINES, |world, place| {
                watches::run(world, place, name, rng)
            });
            count += 1;
        }
        count
    }

    fn on_client<F: Future<Output = ()> + Send + 'static>(
        &self,
        machine: usize,
        begin: impl FnOnce(World, Place) -> F,
    ) {
        let place = Place {
            host: self.cluster.len() + machine,
            rate: self.clients[machine].rate,
        };
        let work = begin(self.world.clone(), place);
        if let Some(handle) = self.clients[machine].handle() {
            handle.spawn(work);
        }
    }

    fn begin_agent(&mut self, agent: usize) {
        let machine = CLIENT_MACHINES + agent;
        if self.clients[machine].is_on() {
            return;
        }
        let place = Place {
            host: self.cluster.len() + machine,
            rate: self.clients[machine].rate,
        };
        self.network.light_up(place.host);
        let (who, target) = self.agents[agent].clone();
        let rng = StdRng::seed_from_u64(self.rng.random());
        let work = agents::run(self.world.clone(), place, who, target, rng);
        self.clients[machine].switch_on(self.now, work);
    }

    /// Who was switched off does not lead any more.
    fn note_agents(&mut self) {
        for (agent, (who, _)) in self.agents.iter().enumerate() {
            if !self.clients[CLIENT_MACHINES + agent].is_on() {
                self.world.book().gone(&who.name(), self.now);
            }
        }
    }

    /// Every command that was accepted comes to its end, and then records and targets say the same.
    fn until_commands_end(&mut self) -> Result<(), Violation> {
        let end = self.now + COMMANDS_WITHIN_MS;
        loop {
            let disagreement = self.compare_targets();
            let Err(violation) = disagreement else {
                return Ok(());
            };
            if self.now >= end {
                return Err(violation);
            }
            for _ in 0..100 {
                self.step()?;
            }
        }
    }

    fn compare_targets(&self) -> Result<(), Violation> {
        let Some(node) = self.cluster.leader().and_then(|place| self.cluster.node(place)) else {
            return Err(Violation::new(SERVES, "nobody leads"));
        };
        let view = node.view();
        let commands: Vec<(String, Option<String>)> = view
            .state
            .commands()
            .values()
            .map(|command| {
                let ended = command.state.is_final().then(|| "ended".to_owned());
                let what = format!(
                    "{} {:?} of {:?} for {}: {:?}",
                    command.id, command.action, command.session, command.agent, command.state
                );
                (what, ended)
            })
            .collect();
        effects::ended(&commands)?;
        for session in view.state.sessions().values() {
            let here = self.agents.iter().find_map(|(who, target)| {
                let host = target.host();
                let found = host.sessions.get(&session.name)?;
                Some((who.agent.clone(), found.generation, found.state))
            });
            let wanted = match session.state {
                SessionState::Running => Some(ObservedState::Running),
                // One that its agent has lost is asleep in the records alone.
                SessionState::Hibernated if session.gone => None,
                SessionState::Hibernated => Some(ObservedState::Hibernated),
                SessionState::Terminated | SessionState::Failed | SessionState::Lost => None,
                _ => {
                    let what = format!("{} is still {}", session.name, session.state.as_str());
                    return Err(Violation::new(AGREE, what));
                }
            };
            let wanted = wanted.and_then(|state| Some((session.agent.clone()?, session.generation, state)));
            if here != wanted {
                let what = format!(
                    "{} is {}, {}",
                    session.name,
                    session.state.as_str(),
                    session.reason
                );
                return Err(Violation::new(AGREE, what)
                    .with([format!("recorded: {wanted:?}"), format!("at a target: {here:?}")]));
            }
        }
        Ok(())
    }

    /// What the checkers say of all that was recorded.
    fn judge(&self) -> Result<(), Violation> {
        let book = self.world.book();
        if !book.surprises.is_empty() {
            return Err(Violation::new(ANSWERS, "there were answers that no rule allows")
                .with(book.surprises.clone()));
        }
        for (name, calls) in &book.registers {
            register::check(name, calls)?;
        }
        for (who, target) in &self.agents {
            let begun = target.host().begun.clone();
            effects::once_in_order(&begun, &[]).map_err(|violation| violation.with([who.name()]))?;
        }
        for (name, tenures) in &book.leases {
            lease::check(name, tenures)?;
        }
        for (name, fenced) in &book.fenced {
            fencing::check(name, &fenced.grants, &fenced.accepted)?;
        }
        // All nodes have applied the same by now, so one of them speaks for all; but it has to run.
        let Some(node) = self.cluster.node(0) else {
            return Err(Violation::new(SERVES, "node 1 does not run at the end"));
        };
        let view = node.view();
        judge_sessions(&book, &view)?;
        judge_quotas(&view)?;
        judge_watches(&book, &view)
    }

    fn summary(&self) -> String {
        let book = self.world.book();
        let calls: usize = book.registers.values().map(Vec::len).sum();
        let tenures: usize = book.leases.values().map(Vec::len).sum();
        let uses: usize = book.fenced.values().map(|fenced| fenced.accepted.len()).sum();
        let events: usize = book.watched.iter().map(|watched| watched.events.len()).sum();
        let begun: usize = self
            .agents
            .iter()
            .map(|(_, target)| target.host().begun.len())
            .sum();
        let applied = self.observer_applied();
        let troubles: u64 = self
            .trouble
            .iter()
            .flat_map(|trouble| trouble.made.values())
            .sum();
        format!(
            "{} nodes, {troubles} troubles, {} leaderships, {applied} entries, {calls} calls of registers, \
             {tenures} tenures, {uses} uses of tokens, {} sessions, {begun} begun, {} over the quota, {events} events watched, answers {:?}, {} comparisons of digests, {} parcels, served {} ms after healing",
            self.cluster.len(),
            self.observer.leaderships.len(),
            book.sessions.len(),
            book.over_quota,
            book.answers,
            self.observer.compared,
            self.network.delivered(),
            self.recovered_ms.map_or("?".to_owned(), |ms| ms.to_string()),
        )
    }

    fn observer_applied(&self) -> u64 {
        (0..self.cluster.len())
            .filter_map(|place| self.cluster.node(place))
            .map(|node| node.view().applied_index)
            .max()
            .unwrap_or(0)
    }
}

/// What was acknowledged is there, and a request that was sent twice made one session.
fn judge_sessions(book: &Book, view: &View) -> Result<(), Violation> {
    if !book.doubled.is_empty() {
        let what = "a request that was sent again was done again";
        return Err(Violation::new(ONE_EFFECT, what).with(book.doubled.clone()));
    }
    for (key, name) in &book.sessions {
        let made: Vec<String> = view
            .state
            .sessions()
            .values()
            .filter(|session| session.tags.contains(key))
            .map(|session| session.name.to_string())
            .collect();
        if made != [name.clone()] {
            let what = format!("the request {key} was answered with {name}");
            return Err(Violation::new(ONE_EFFECT, what).with(made));
        }
    }
    Ok(())
}

/// No user had more sessions than the quota allows, at any revision. The events tell what there was at each: none is
/// pruned in a run.
fn judge_quotas(view: &View) -> Result<(), Violation> {
    let mut changes: BTreeMap<String, Vec<Change>> = BTreeMap::new();
    for (id, event) in view.state.events().iter() {
        if let EventRecord::Session(session) = &event.record {
            let change = Change {
                revision: id.0.0,
                name: session.name.to_string(),
                counts: !session.state.is_final(),
            };
            changes.entry(session.user.to_string()).or_default().push(change);
        }
    }
    for (user, changes) in &changes {
        quota::check(user, sessions::QUOTA, changes)?;
    }
    Ok(())
}

/// The place of the newest event.
fn last_event(view: &View) -> Option<(u64, u64)> {
    let (id, _) = view.state.events().iter().last()?;
    Some((id.0.0, u64::from(id.1)))
}

/// Watchers saw the same events, which are those of the log, from the first one on.
fn judge_watches(book: &Book, view: &View) -> Result<(), Violation> {
    if !book.broken.is_empty() {
        let what = "a watch could not go on where it was";
        return Err(Violation::new(watch::CHECKER, what).with(book.broken.clone()));
    }
    let seen: BTreeMap<(u64, u64), &str> = book
        .watched
        .iter()
        .flat_map(|watched| &watched.events)
        .map(|event| (event.id, event.content.as_str()))
        .collect();
    let in_the_log = view.state.events().iter().map(|(id, event)| {
        let id = (id.0.0, u64::from(id.1));
        let content = seen
            .get(&id)
            .map_or_else(|| event.name(), |content| (*content).to_owned());
        watch::Event { id, content }
    });
    let log = watch::Watched {
        watcher: "the log".to_owned(),
        events: in_the_log.collect(),
    };
    let first = log.events.first();
    if let Some(late) = book.watched.iter().find(|one| one.events.first() != first) {
        let what = format!("{} did not begin with the first event", late.watcher);
        return Err(Violation::new(watch::CHECKER, what).with([format!("{first:?}")]));
    }
    // An event that nobody saw is missing all the same.
    let mut all = book.watched.clone();
    all.push(log);
    watch::check(&all)
}
