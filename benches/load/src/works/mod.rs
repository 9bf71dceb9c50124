//! What is measured, the same for etcd and Regent. A work knows its rows and their goals, and how to measure
//! them at a cluster that runs.

mod keepalive;
mod lease;
mod read;
mod watch;
mod write;

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
        }
    }

    /// The rows that it fills.
    pub(crate) fn rows(self) -> Vec<Row> {
        let row = |title: String, goals: &[(Metric, Bound)]| Row {
            id: title.replace([',', '(', ')'], "").replace(' ', "-"),
            title,
            goals: goals
                .iter()
                .map(|(metric, bound)| Goal {
                    metric: *metric,
                    bound: *bound,
                })
                .collect(),
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
        }
    }
}

fn many(clients: usize) -> String {
    if clients == 1 {
        "1 client".to_owned()
    } else {
        format!("{clients} clients")
    }
}
