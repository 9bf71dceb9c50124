//! What is measured, the same for etcd and Regent. A work knows its rows and their goals, and how to measure
//! them at a cluster that runs.

mod agents;
mod disk;
mod growth;
mod keepalive;
mod lease;
mod memory;
mod observe;
mod process_sessions;
mod read;
mod restart;
mod sessions;
mod stalls;
mod transfer;
mod watch;
mod write;
mod writers;

use std::time::Duration;

use serde::Serialize;

use crate::cluster::Cluster;
use crate::load::{Plan, Seen};
use crate::measure::{Bound, Goal, Metric, Row, Values};

/// Connections that more clients of etcd than that share, as its own clients do.
pub(crate) const ETCD_CONNECTIONS: usize = 64;

/// How much of everything.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Settings {
    pub(crate) plan: Plan,
    /// Keys or sessions.
    pub(crate) records: usize,
    /// Leases that are kept alive, over how many streams, and how many keepalives a second.
    pub(crate) leases: usize,
    pub(crate) streams: usize,
    pub(crate) keepalives: f64,
    /// Watched writes a second.
    pub(crate) watched: f64,
    /// Records of memory, restart and growth.
    pub(crate) many: usize,
    /// How often a fault is tried.
    pub(crate) trials: usize,
    /// Agents that are connected, and how long they are watched.
    pub(crate) agents: usize,
    #[serde(serialize_with = "crate::load::as_seconds")]
    pub(crate) agents_for: Duration,
    /// Sessions that run as processes.
    pub(crate) real_sessions: usize,
    /// Writes after which it is asked what came to the disk, and those after which the folder is judged.
    pub(crate) disk_writes: u64,
    pub(crate) folder_writes: u64,
    /// How long an idle cluster is left alone before its memory is read.
    #[serde(serialize_with = "crate::load::as_seconds")]
    pub(crate) quiet: Duration,
    /// How long the members may take to become quiet before a measurement.
    #[serde(serialize_with = "crate::load::as_seconds")]
    pub(crate) settle: Duration,
}

/// A work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// Durable small writes.
    Write { clients: usize },
    /// Reads of one record: linearizable, or of what the member has itself.
    Read { clients: usize, local: bool },
    /// Leases granted and released.
    Lease { clients: usize },
    /// From a write to its event at another member, while others write.
    Watch { writers: usize },
    /// Leases kept alive at a steady pace.
    Keepalive,
    /// The leader is killed, or frozen, while others write.
    Stalls { fault: Fault },
    /// The leader hands over while others write.
    Transfer,
    /// Memory and folder: of an idle cluster, or with many records.
    Memory { full: bool },
    /// How everything grows: at one part of the many records.
    Growth { part: usize },
    /// From the start of members with many records until they serve.
    Restart,
    /// From a request for a session until its agent has the command.
    Sessions { clients: usize },
    /// The same until a process runs, and what ten such sessions cost.
    ProcessSessions,
    /// Many agents that do nothing but live.
    Agents,
    /// What comes to the disk for each byte of the values.
    Disk,
    /// How large a folder gets after many writes.
    Folder,
}

/// What happens to a leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It is killed (-9), and started again after the trial.
    Kill,
    /// It is stopped, and goes on once the others have a leader.
    Freeze,
}

/// Which cluster a work is measured at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// One with the records that are asked for, shared with other works, in each round.
    Shared,
    /// A new one, shared with the works of the same name that stand beside it; once in a run.
    Own(&'static str),
}

/// What a work saw, for one of its rows.
pub(crate) struct Result {
    /// Which of [`Work::rows`].
    pub(crate) row: usize,
    pub(crate) values: Values,
    pub(crate) failure: Option<String>,
}

impl Result {
    /// What clients saw of one kind of requests; the row has the same number.
    fn new(kind: usize, seen: &Seen) -> Self {
        Self {
            row: kind,
            values: seen.values(kind),
            failure: seen.failure.clone(),
        }
    }
}

impl Work {
    /// All, in the order in which they are measured.
    pub(crate) fn all() -> Vec<Self> {
        vec![
            Self::Write { clients: 1 },
            Self::Write { clients: 16 },
            Self::Write { clients: 64 },
            Self::Write { clients: 256 },
            Self::Read {
                clients: 1,
                local: false,
            },
            Self::Read {
                clients: 64,
                local: false,
            },
            Self::Read {
                clients: 64,
                local: true,
            },
            Self::Lease { clients: 64 },
            Self::Watch { writers: 0 },
            Self::Watch { writers: 16 },
            Self::Keepalive,
            Self::Stalls { fault: Fault::Kill },
            Self::Stalls { fault: Fault::Freeze },
            Self::Transfer,
            Self::Memory { full: false },
            Self::Growth { part: 100 },
            Self::Growth { part: 10 },
            Self::Memory { full: true },
            Self::Growth { part: 1 },
            Self::Restart,
            Self::Sessions { clients: 16 },
            Self::Sessions { clients: 64 },
            Self::ProcessSessions,
            Self::Agents,
            Self::Disk,
            Self::Folder,
        ]
    }

    /// Its name for `--only`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Write { .. } => "write",
            Self::Read { local: false, .. } => "read",
            Self::Read { local: true, .. } => "local-read",
            Self::Lease { .. } => "lease",
            Self::Watch { .. } => "watch",
            Self::Keepalive => "keepalive",
            Self::Stalls { .. } => "stalls",
            Self::Transfer => "transfer",
            Self::Memory { .. } => "memory",
            Self::Growth { .. } => "growth",
            Self::Restart => "restart",
            Self::Sessions { .. } | Self::ProcessSessions => "sessions",
            Self::Agents => "agents",
            Self::Disk => "disk",
            Self::Folder => "folder",
        }
    }

    /// Where it is measured.
    pub(crate) fn place(self) -> Place {
        match self {
            Self::Write { .. }
            | Self::Read { .. }
            | Self::Lease { .. }
            | Self::Watch { .. }
            | Self::Keepalive => Place::Shared,
            Self::Stalls { .. } | Self::Transfer => Place::Own("faults"),
            Self::Memory { .. } | Self::Growth { .. } | Self::Restart => Place::Own("many records"),
            Self::Sessions { .. } => Place::Own("sessions"),
            Self::ProcessSessions => Place::Own("process sessions"),
            Self::Agents => Place::Own("agents"),
            Self::Disk | Self::Folder => Place::Own("disk"),
        }
    }

    /// Whether etcd has no counterpart.
    pub(crate) fn is_regent_only(self) -> bool {
        match self {
            Self::Write { .. }
            | Self::Read { .. }
            | Self::Lease { .. }
            | Self::Watch { .. }
            | Self::Keepalive
            | Self::Stalls { .. }
            | Self::Transfer
            | Self::Memory { .. }
            | Self::Restart
            | Self::Disk => false,
            Self::Growth { .. }
            | Self::Sessions { .. }
            | Self::ProcessSessions
            | Self::Agents
            | Self::Folder => true,
        }
    }

    /// The rows that it fills.
    pub(crate) fn rows(self, settings: &Settings) -> Vec<Row> {
        let row = |title: String, goals: &[(Metric, Bound)]| Row {
            id: title.replace([',', '(', ')', ':'], "").replace(' ', "-"),
            title,
            goals: goals
                .iter()
                .map(|(metric, bound)| Goal {
                    metric: *metric,
                    bound: *bound,
                })
                .collect(),
            regent_only: self.is_regent_only(),
        };
        let shown = |metrics: &[Metric]| -> Vec<(Metric, Bound)> {
            metrics.iter().map(|metric| (*metric, Bound::Shown)).collect()
        };
        let no_worse = (Metric::P99, Bound::AtMostTimes(1.0));
        let times = |times: f64| (Metric::Rate, Bound::AtLeastTimes(times));
        match self {
            Self::Write { clients: 1 } => vec![row(format!("durable write, {}", many(1)), &[times(1.0)])],
            Self::Write { clients } => {
                vec![row(
                    format!("durable write, {}", many(clients)),
                    &[times(3.0), no_worse],
                )]
            }
            Self::Read { clients, local } => {
                let kind = if local { "local" } else { "linearizable" };
                let goals = [times(2.0)];
                let goals = if clients == 1 { &[][..] } else { &goals };
                vec![row(format!("{kind} read, {}", many(clients)), goals)]
            }
            Self::Lease { clients } => vec![
                row(format!("lease grant, {}", many(clients)), &[times(3.0)]),
                row(format!("lease release, {}", many(clients)), &[times(3.0)]),
            ],
            Self::Watch { writers: 0 } => vec![row("watch (paced)".to_owned(), &[no_worse])],
            Self::Watch { writers } => {
                let goals = [no_worse, (Metric::BesideRate, Bound::Shown)];
                vec![row(format!("watch (paced), {writers} writers"), &goals)]
            }
            Self::Keepalive => {
                vec![row(
                    "lease keepalives (paced)".to_owned(),
                    &[(Metric::Cores, Bound::AtMostTimes(0.5))],
                )]
            }
            Self::Stalls { fault } => {
                let title = match fault {
                    Fault::Kill => "leader killed, 16 writers",
                    Fault::Freeze => "leader frozen, 16 writers",
                };
                let mut goals = vec![
                    (Metric::StallMedian, Bound::AtMost(700.0)),
                    (Metric::StallMax, Bound::AtMost(1500.0)),
                ];
                goals.extend(shown(&[
                    Metric::StallMin,
                    Metric::Elected,
                    Metric::Broken,
                    Metric::BrokenMax,
                ]));
                vec![row(title.to_owned(), &goals)]
            }
            Self::Transfer => {
                let mut goals = vec![
                    (Metric::StallMax, Bound::AtMost(50.0)),
                    (Metric::BrokenMax, Bound::AtMost(0.0)),
                ];
                goals.extend(shown(&[Metric::StallMedian, Metric::BrokenElsewhere]));
                vec![row("leadership handed over, 16 writers".to_owned(), &goals)]
            }
            Self::Memory { full } => {
                let title = if full {
                    format!("memory, {}", records(settings.many))
                } else {
                    "memory, idle".to_owned()
                };
                let goals = [
                    (Metric::MemberMb, Bound::AtMostTimes(0.5)),
                    (Metric::DataMb, Bound::Shown),
                ];
                vec![row(title, &goals)]
            }
            Self::Growth { part } => {
                let metrics = [
                    Metric::ReadRate,
                    Metric::MemberMb,
                    Metric::DataMb,
                    Metric::SnapshotMb,
                    Metric::SnapshotMs,
                    Metric::Ready,
                ];
                let title = format!(
                    "growth, {}: write, 64 clients",
                    records(growth::count(settings, part))
                );
                vec![row(title, &shown(&metrics))]
            }
            Self::Restart => restart::TITLES
                .iter()
                .map(|title| {
                    let title = format!("restart of {title}, {}", records(settings.many));
                    row(title, &[(Metric::Ready, Bound::AtMostTimes(1.0))])
                })
                .collect(),
            Self::Sessions { clients } => {
                vec![row(
                    format!("session until its agent has it, {}", many(clients)),
                    &[],
                )]
            }
            Self::ProcessSessions => {
                let goals = [
                    (Metric::MemberMb, Bound::AtMost(1073.7)),
                    (Metric::Cores, Bound::AtMost(0.5)),
                    (Metric::AgentMb, Bound::AtMost(536.9)),
                    (Metric::AgentCores, Bound::AtMost(0.2)),
                ];
                vec![
                    row("session until its process runs, 1 client".to_owned(), &[]),
                    row("10 sessions that run: a node, an agent".to_owned(), &goals),
                ]
            }
            Self::Agents => {
                let mut goals = shown(&[Metric::AgentKb, Metric::AgentKbAll, Metric::Cores]);
                goals.push((Metric::LogEntries, Bound::AtMost(0.0)));
                vec![row(format!("{} agents connected", settings.agents), &goals)]
            }
            Self::Disk => vec![row(
                "written to disk, 64 clients".to_owned(),
                &shown(&[Metric::DiskFactor]),
            )],
            Self::Folder => {
                let goals = [
                    (Metric::FolderShare, Bound::AtMost(1.0)),
                    (Metric::DataMb, Bound::Shown),
                    (Metric::SnapshotMb, Bound::Shown),
                ];
                vec![row(
                    format!("folder after {} writes", settings.folder_writes),
                    &goals,
                )]
            }
        }
    }

    /// Measures it.
    pub(crate) async fn run(self, cluster: &mut Cluster, settings: &Settings) -> anyhow::Result<Vec<Result>> {
        match self {
            Self::Write { clients } => write::run(cluster, clients, settings).await,
            Self::Read { clients, local } => read::run(cluster, clients, local, settings).await,
            Self::Lease { clients } => lease::run(cluster, clients, settings).await,
            Self::Watch { writers } => watch::run(cluster, writers, settings).await,
            Self::Keepalive => keepalive::run(cluster, settings).await,
            Self::Stalls { fault } => stalls::run(cluster, fault, settings).await,
            Self::Transfer => transfer::run(cluster, settings).await,
            Self::Memory { full } => memory::run(cluster, full, settings).await,
            Self::Growth { part } => growth::run(cluster, part, settings).await,
            Self::Restart => restart::run(cluster, settings).await,
            Self::Sessions { clients } => sessions::run(cluster, clients, settings).await,
            Self::ProcessSessions => process_sessions::run(cluster, settings).await,
            Self::Agents => agents::run(cluster, settings).await,
            Self::Disk => disk::run(cluster, settings).await,
            Self::Folder => disk::folder(cluster, settings).await,
        }
    }
}

fn records(count: usize) -> String {
    format!("{count} records")
}

fn many(clients: usize) -> String {
    if clients == 1 {
        "1 client".to_owned()
    } else {
        format!("{clients} clients")
    }
}
