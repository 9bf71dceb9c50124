//! One run: a cluster, its clients, rounds of faults, and the verdict.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use regent_history::Violation;
use regent_types::AgentId;
use regent_types::session::SessionState;
use tokio::task::JoinSet;

use crate::cluster::Cluster;
use crate::harness::processes_naming;
use crate::nemesis::{Ongoing, soon};
use crate::network::Network;
use crate::plan::{Change, Nemesis, Plan, Round};
use crate::workload::leases::Leases;
use crate::workload::registers::Registers;
use crate::workload::reports::{self, Reports};
use crate::workload::sessions::Sessions;
use crate::workload::watches::Watches;
use crate::workload::{Run, ended};
use crate::{members, programs, resources, verdict};

/// The name in [`Violation::checker`] for a cluster that is not well again in time.
pub(crate) const RECOVERY: &str = "recovery";
/// The name in [`Violation::checker`] for processes that end by themselves, or do not end when they are told to.
pub(crate) const PROCESSES: &str = "processes end when they are told to";

/// How often a node is asked whether it serves again.
const ASK_EVERY: Duration = Duration::from_millis(20);
/// How long the agents and sessions may take to come to rest at the end; far more than they need.
const SETTLED_WITHIN: Duration = Duration::from_secs(90);

/// What a run is asked to do.
pub(crate) struct Wish {
    pub(crate) plan: Plan,
    /// Rounds begin until then.
    pub(crate) lasts: Duration,
    /// So many do in any case.
    pub(crate) at_least: u64,
    /// Instead of the plan's rounds, these, again and again.
    pub(crate) rounds: Option<Vec<Round>>,
    /// A fault that is seeded in the nodes.
    pub(crate) fault: Option<&'static str>,
    /// The program of an earlier commit, for a plan that has it.
    pub(crate) previous: Option<PathBuf>,
    /// How soon after the last fault is healed every node must serve.
    pub(crate) recovers_within: Duration,
    /// The run ends with the round after which this checker has found something: for seeded faults.
    pub(crate) until: Option<&'static str>,
}

/// What came of it.
pub(crate) struct Outcome {
    pub(crate) violations: Vec<Violation>,
    pub(crate) folder: PathBuf,
}

/// What the clients recorded.
pub(crate) struct Records {
    pub(crate) registers: Arc<Registers>,
    pub(crate) leases: Arc<Leases>,
    pub(crate) reports: Arc<Reports>,
    pub(crate) sessions: Arc<Sessions>,
    pub(crate) watches: Arc<Watches>,
}

/// Runs all of it, on the hosts of a network that is made for it.
pub(crate) fn run(network: Network, wish: Wish) -> Outcome {
    let folder = tempfile::Builder::new()
        .prefix("regent-faults-")
        .tempdir()
        .unwrap();
    let path = folder.keep();
    // The host after those of the nodes: see `Cluster::hosts`.
    let inside = network.inside(Cluster::clients(&wish.plan));
    let previous = wish.previous.clone();
    let cluster = Cluster::start(network, &path, wish.plan.clone(), wish.fault, previous);
    let whole = {
        let cluster = cluster.clone();
        // The clients are on a host of the network, and so is everything that this thread starts.
        std::thread::spawn(move || {
            inside.enter();
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(whole(cluster, wish))
        })
    };
    let mut violations = whole.join();
    let well = violations.as_ref().is_ok_and(Vec::is_empty);
    cluster.end(!well);
    let left = processes_naming(&path.display().to_string());
    if let Ok(violations) = &mut violations
        && well
        && !left.is_empty()
    {
        let what = format!("processes are left behind: {left:?}");
        violations.push(Violation::new(PROCESSES, what));
    }
    let well = violations.as_ref().is_ok_and(Vec::is_empty);
    if well {
        let _ = std::fs::remove_dir_all(&path);
    } else {
        eprintln!("logs and data are kept in {}", path.display());
    }
    match violations {
        Ok(violations) => Outcome {
            violations,
            folder: path,
        },
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

async fn whole(cluster: Arc<Cluster>, wish: Wish) -> Vec<Violation> {
    eprintln!("seed {}: {:?}", wish.plan.seed, wish.plan);
    cluster.led().await;
    if wish.plan.change == Change::Members {
        // A moment after the first start; a cluster that has lost a founder before cannot replace it.
        members::agreed(&cluster)
            .await
            .expect("a cluster with nothing in its way");
    }
    cluster.start_agent().await;
    let run = Run::new(cluster.clone());
    let records = Records {
        registers: Registers::new(&run).await,
        leases: Arc::default(),
        reports: Reports::new(&run).await,
        sessions: Sessions::new(&run).await,
        watches: Arc::default(),
    };
    let before = resources::held(&cluster);
    let mut samples = resources::Samples::default();
    let mut clients = JoinSet::new();
    records.registers.spawn(&run, &mut clients);
    records.leases.spawn(&run, &mut clients);
    records.sessions.spawn(&run, &mut clients);
    records.reports.spawn(&run, &mut clients);
    records.watches.spawn(&run, &mut clients);

    let mut violations = Vec::new();
    let begun = Instant::now();
    let mut number = 0;
    let mut longest = Duration::ZERO;
    while number < wish.at_least || begun.elapsed() < wish.lasts {
        let round = match &wish.rounds {
            Some(rounds) => rounds[usize::try_from(number).unwrap() % rounds.len()].clone(),
            None => wish.plan.round(number),
        };
        number += 1;
        longest = longest.max(disturb(&cluster, &run, &records, &wish, round, &mut violations).await);
        samples.take(&cluster);
        if let Some(checker) = wish.until {
            violations = verdict::so_far(&records);
            if violations.iter().any(|violation| violation.checker == checker) {
                break;
            }
        }
    }
    eprintln!(
        "seed {}: {number} rounds in {} s; all nodes served again after at most {} ms",
        wish.plan.seed,
        begun.elapsed().as_secs(),
        longest.as_millis()
    );
    if let Change::Programs { .. } = wish.plan.change {
        cluster.is_to_change(programs::RAISED);
        let finished = programs::finish(&cluster).await;
        violations.extend(finished.map_err(|what| Violation::new(RECOVERY, what)).err());
    }
    eprintln!("seed {}: {:?}", wish.plan.seed, cluster.changes());
    run.stop();
    ended(clients).await;
    if wish.until.is_none() && !violations.is_empty() {
        // What was recorded may say why.
        violations.extend(verdict::so_far(&records));
    } else if wish.until.is_none() {
        violations.extend(ended_by_themselves(&cluster));
        let agreed = members::agreed(&cluster).await;
        violations.extend(agreed.map_err(|what| Violation::new(RECOVERY, what)).err());
        settle(&cluster, &records, &mut violations).await;
        violations.extend(verdict::at_the_end(&cluster, &records).await);
        let mut before = before;
        before.retain(|name, _| cluster.is_to_run(name));
        violations.extend(resources::check(&before, &resources::held(&cluster)).err());
        violations.extend(samples.check().err());
        violations.extend(verdict::vacuous(&cluster, &records));
    }
    violations.extend(panics(cluster.path()));
    violations
}

/// One round; gives how long it took until all nodes served again.
async fn disturb(
    cluster: &Arc<Cluster>,
    run: &Arc<Run>,
    records: &Records,
    wish: &Wish,
    round: Round,
    violations: &mut Vec<Violation>,
) -> Duration {
    eprintln!("  round {}, {} ms:", round.number, round.lasts.as_millis());
    let mut ongoing = Vec::new();
    let host_lost = round.faults.contains(&Nemesis::LoseHost);
    for fault in round.faults {
        match Ongoing::begin(cluster, fault).await {
            Ok(fault) => ongoing.push(fault),
            Err(what) => violations.push(Violation::new(PROCESSES, what)),
        }
    }
    tokio::time::sleep(round.lasts).await;
    for fault in &mut ongoing {
        let healed = fault.heal().await;
        violations.extend(healed.map_err(|what| Violation::new(PROCESSES, what)).err());
    }
    violations.extend(ended_by_themselves(cluster));
    let healed = Instant::now();
    let members = cluster.members().into_iter();
    let serves = members.map(|node| serves(run, records, node));
    let patience = wish.recovers_within * 6;
    let all = tokio::time::timeout(patience, futures::future::join_all(serves)).await;
    let took = healed.elapsed();
    let what = match all {
        Err(_) => Some(format!(
            "not all nodes serve {patience:?} after everything was healed"
        )),
        Ok(_) if took > wish.recovers_within => {
            Some(format!("all nodes served {took:?} after everything was healed"))
        }
        Ok(_) => None,
    };
    if let Some(what) = what {
        let what = format!(
            "round {}: {what}; at most {:?}",
            round.number, wish.recovers_within
        );
        violations.push(Violation::new(RECOVERY, what));
    }
    for fault in &mut ongoing {
        let finished = fault.finish().await;
        violations.extend(finished.map_err(|what| Violation::new(RECOVERY, what)).err());
    }
    if host_lost {
        let resident = async || records.sessions.resident_runs().then_some(());
        let again = soon("session that runs again after the loss of its host", resident).await;
        violations.extend(again.map_err(|what| Violation::new(RECOVERY, what)).err());
    }
    tokio::time::sleep(round.calm).await;
    took
}

/// Starts what does not run; what was not made to end is a violation.
fn ended_by_themselves(cluster: &Cluster) -> Vec<Violation> {
    let ended = cluster.start_missing().into_iter();
    ended
        .map(|name| Violation::new(PROCESSES, format!("{name} has ended, and nobody ended it")))
        .collect()
}

/// Until a write and a read through this node succeed.
async fn serves(run: &Run, records: &Records, node: usize) {
    while !records.registers.probe(run, node).await {
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// Until everything that was asked for is done: all sessions are ended, and no command is open.
async fn settle(cluster: &Cluster, records: &Records, violations: &mut Vec<Violation>) {
    let client = cluster.client(0);
    // Nobody will ever answer its commands.
    for agent in reports::AGENTS {
        let _ = client.delete_agent(&AgentId::new(agent).unwrap(), true).await;
    }
    let deadline = Instant::now() + SETTLED_WITHIN;
    loop {
        let sessions = client
            .all_sessions(&regent_client::SessionFilter::default())
            .await;
        let sessions = sessions.unwrap_or_default();
        let open: Vec<_> = sessions
            .iter()
            // The registers stay: they were never placed.
            .filter(|session| Sessions::users().any(|user| user == session.user.as_str()))
            .filter(|session| !session.state.is_final())
            .collect();
        for session in &open {
            if session.state != SessionState::Terminating {
                let _ = client.stop_session(&session.name).await;
            }
        }
        let commands = client
            .all_commands(&regent_client::CommandFilter::default())
            .await;
        let unfinished = commands.as_ref().map_or(usize::MAX, |commands| {
            commands
                .iter()
                .filter(|command| !command.status.is_final())
                .count()
        });
        let left = records.sessions.processes();
        if !sessions.is_empty() && open.is_empty() && unfinished == 0 && left.is_empty() {
            return;
        }
        if Instant::now() > deadline {
            let what = format!("{SETTLED_WITHIN:?} after the end not everything is done");
            let states = open
                .iter()
                .map(|session| format!("{} {}: {}", session.name, session.state.as_str(), session.reason));
            let commands = commands.unwrap_or_default();
            let commands = commands
                .iter()
                .filter(|command| !command.status.is_final())
                .map(|command| format!("{command:?}"));
            let left = left
                .iter()
                .map(|(session, pid)| format!("{session} runs as {pid}"));
            violations.push(
                Violation::new(regent_history::effects::ENDS, what)
                    .with(states.chain(commands).chain(left).collect::<Vec<_>>()),
            );
            return;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// A panic in any log.
fn panics(folder: &Path) -> Vec<Violation> {
    let logs = std::fs::read_dir(folder).into_iter().flatten().flatten();
    logs.filter_map(|log| {
        let text = std::fs::read_to_string(log.path()).ok()?;
        let line = text.lines().find(|line| line.contains("panicked at"))?.to_owned();
        let name = log.file_name().to_string_lossy().into_owned();
        Some(Violation::new(PROCESSES, format!("{name} has a panic")).with([line]))
    })
    .collect()
}
