//! What is measured, the same for etcd and Regent. A work knows its rows and their goals, and how to measure
//! them at a cluster that runs.

mod read;
mod write;

use crate::cluster::Cluster;
use crate::load::Plan;
use crate::measure::{Bound, Goal, Metric, Row, Values};

/// Connections that more clients of etcd than that share, as its own clients do.
pub(crate) const ETCD_CONNECTIONS: usize = 64;

/// How much of everything.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) plan: Plan,
    /// Keys or sessions.
    pub(crate) records: usize,
}

/// A work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// Durable small writes.
    Write { clients: usize },
    /// Reads of one record: linearizable, or of what the member has itself.
    Read { clients: usize, local: bool },
}

/// What a work saw, for one of its rows.
pub(crate) struct Result {
    /// Which of [`Work::rows`].
    pub(crate) row: usize,
    pub(crate) values: Values,
    pub(crate) failure: Option<String>,
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
        ]
    }

    /// Its name for `--only`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Write { .. } => "write",
            Self::Read { local: false, .. } => "read",
            Self::Read { local: true, .. } => "local-read",
        }
    }

    /// The rows that it fills.
    pub(crate) fn rows(self) -> Vec<Row> {
        let row = |title: String, goals: &[(Metric, Bound)]| Row {
            id: title.replace(',', "").replace(' ', "-"),
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
        }
    }

    /// Measures it.
    pub(crate) async fn run(self, cluster: &mut Cluster, settings: &Settings) -> anyhow::Result<Vec<Result>> {
        match self {
            Self::Write { clients } => write::run(cluster, clients, settings).await,
            Self::Read { clients, local } => read::run(cluster, clients, local, settings).await,
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
