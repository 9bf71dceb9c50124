//! What is measured: values by metric, for each row of the table, and the goals that they are held to.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::cluster::System;

/// A kind of value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Metric {
    /// Answers a second.
    Rate,
    /// Milliseconds, the median.
    P50,
    /// Milliseconds.
    P99,
    /// Milliseconds.
    Max,
    /// CPU of the three members, in cores.
    Cores,
    /// CPU of the generator, in cores.
    GeneratorCores,
    /// CPU of everything else on the machine, in cores.
    OtherCores,
    /// Memory of the three members at the end, in MB (10^6 bytes), their mean.
    MemberMb,
    /// What else was written meanwhile, a second.
    BesideRate,
    /// Requests that failed or were given up.
    Failed,
    /// How often a fault was tried.
    Trials,
    /// Milliseconds without any acknowledgement in the whole cluster: the least of the trials.
    StallMin,
    /// The same, the median of the trials.
    StallMedian,
    /// The same, the most of the trials.
    StallMax,
    /// Milliseconds from the fault until another member says that it leads, the median of the trials.
    Elected,
    /// Requests of a trial that failed because of its fault; the median of the trials.
    Broken,
    /// The same, the most of the trials.
    BrokenMax,
    /// Those of them that were sent to another member than the one with the fault.
    BrokenElsewhere,
    /// The folders of the members, in MB (10^6 bytes), their mean.
    DataMb,
    /// Milliseconds from the start of a process until it serves.
    Ready,
    /// Linearizable reads a second.
    ReadRate,
    /// The newest snapshot, in MB (10^6 bytes).
    SnapshotMb,
    /// Milliseconds to write a snapshot, the mean of those that were written meanwhile.
    SnapshotMs,
    /// Memory of an agent's process, in MB (10^6 bytes).
    AgentMb,
    /// CPU of an agent's process, in cores.
    AgentCores,
    /// Of all members, for one connected agent, in KB (10^3 bytes).
    AgentKb,
    /// The same, with its record.
    AgentKbAll,
    /// Entries that came to the log, a minute.
    LogEntries,
    /// Bytes that all members wrote to the disk, for each byte of the values.
    DiskFactor,
    /// The largest folder of a member, as a share of what it may have.
    FolderShare,
}

impl Metric {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Rate => "rate/s",
            Self::P50 => "p50 ms",
            Self::P99 => "p99 ms",
            Self::Max => "max ms",
            Self::Cores => "cores",
            Self::GeneratorCores => "generator cores",
            Self::OtherCores => "other cores",
            Self::MemberMb => "MB a member",
            Self::BesideRate => "writes/s beside",
            Self::Failed => "failed",
            Self::Trials => "trials",
            Self::StallMin => "stall min ms",
            Self::StallMedian => "stall ms",
            Self::StallMax => "stall max ms",
            Self::Elected => "ms until another leads",
            Self::Broken => "failed in a trial",
            Self::BrokenMax => "failed in a trial, max",
            Self::BrokenElsewhere => "failed at others, max",
            Self::DataMb => "folder MB",
            Self::Ready => "ms until it serves",
            Self::ReadRate => "reads/s",
            Self::SnapshotMb => "snapshot MB",
            Self::SnapshotMs => "snapshot ms",
            Self::AgentMb => "agent MB",
            Self::AgentCores => "agent cores",
            Self::AgentKb => "KB a connection",
            Self::AgentKbAll => "KB an agent",
            Self::LogEntries => "log entries/min",
            Self::DiskFactor => "bytes/byte",
            Self::FolderShare => "folder/bound",
        }
    }
}

/// The values of one row in one round.
pub(crate) type Values = BTreeMap<Metric, f64>;

/// One row, measured once.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Measured {
    /// [`Row::id`].
    pub(crate) row: String,
    pub(crate) system: System,
    pub(crate) round: usize,
    pub(crate) values: Values,
    /// The first failure in words, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) failure: Option<String>,
}

/// A row of the table.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) id: String,
    pub(crate) title: String,
    pub(crate) goals: Vec<Goal>,
    /// Whether etcd has no counterpart.
    pub(crate) regent_only: bool,
}

/// What Regent is to reach.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Goal {
    pub(crate) metric: Metric,
    pub(crate) bound: Bound,
}

/// Of what kind a goal is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Bound {
    /// Regent's value is at least so many times etcd's.
    AtLeastTimes(f64),
    /// Regent's value is at most so many times etcd's.
    AtMostTimes(f64),
    /// Regent's value is at most this, whatever etcd's is.
    AtMost(f64),
    /// None: it is shown only.
    Shown,
}

impl Bound {
    /// Whether it is reached; `None` where it takes etcd's value and there is none.
    pub(crate) fn reached(self, etcd: Option<f64>, regent: f64) -> Option<bool> {
        match self {
            Self::AtLeastTimes(times) => Some(regent >= times * etcd?),
            Self::AtMostTimes(times) => Some(regent <= times * etcd?),
            Self::AtMost(most) => Some(regent <= most),
            Self::Shown => None,
        }
    }

    /// For a picture.
    pub(crate) fn short(self) -> String {
        match self {
            Self::AtLeastTimes(times) => format!("\u{2265} {times}"),
            Self::AtMostTimes(times) | Self::AtMost(times) => format!("\u{2264} {times}"),
            Self::Shown => "none".to_owned(),
        }
    }

    pub(crate) fn text(self) -> String {
        match self {
            Self::AtLeastTimes(times) => format!("at least {times} x"),
            Self::AtMostTimes(times) => format!("at most {times} x"),
            Self::AtMost(most) => format!("at most {most}"),
            Self::Shown => String::new(),
        }
    }
}

/// The middle of some values, the mean of the two middle ones when their count is even; 0 of none.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.get(middle) {
        None => 0.0,
        Some(value) if sorted.len() % 2 == 1 => *value,
        Some(value) => f64::midpoint(sorted[middle - 1], *value),
    }
}

/// Latencies in microseconds, up to ten minutes, to three digits.
pub(crate) struct Latencies(Histogram<u64>);

impl Latencies {
    const MAX: u64 = 600_000_000;

    pub(crate) fn new() -> Self {
        Self(
            Histogram::new_with_bounds(1, Self::MAX, 3)
                .expect("1, ten minutes and 3 digits are valid bounds"),
        )
    }

    pub(crate) fn record(&mut self, latency: Duration) {
        self.0
            .saturating_record(u64::try_from(latency.as_micros()).unwrap_or(Self::MAX).max(1));
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.0.add(&other.0).expect("both have the same bounds");
    }

    pub(crate) fn count(&self) -> u64 {
        self.0.len()
    }

    /// Writes median, p99 and maximum, in milliseconds.
    pub(crate) fn write(&self, values: &mut Values) {
        let ms = |micros: u64| micros as f64 / 1000.0;
        values.insert(Metric::P50, ms(self.0.value_at_quantile(0.50)));
        values.insert(Metric::P99, ms(self.0.value_at_quantile(0.99)));
        values.insert(Metric::Max, ms(self.0.max()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median(&[]).abs() < 1e-9);
    }

    #[test]
    fn latencies_are_shown_in_milliseconds() {
        let (mut one, mut other, mut values) = (Latencies::new(), Latencies::new(), Values::new());
        for n in 1..=99 {
            one.record(Duration::from_millis(n));
        }
        other.record(Duration::from_hours(1));
        one.add(&other);
        one.write(&mut values);
        assert_eq!(one.count(), 100);
        assert!((values[&Metric::P50] - 50.0).abs() < 0.1, "{values:?}");
        assert!((values[&Metric::P99] - 99.0).abs() < 0.1, "{values:?}");
        assert!(values[&Metric::Max] > 599_000.0, "{values:?}");
    }

    #[test]
    fn goals_are_met_at_their_bound_and_unknown_without_etcd() {
        assert_eq!(Bound::AtLeastTimes(3.0).reached(Some(10.0), 30.0), Some(true));
        assert_eq!(Bound::AtLeastTimes(3.0).reached(Some(10.0), 29.9), Some(false));
        assert_eq!(Bound::AtMostTimes(0.5).reached(Some(10.0), 5.0), Some(true));
        assert_eq!(Bound::AtMostTimes(0.5).reached(Some(10.0), 5.1), Some(false));
        assert_eq!(Bound::AtMostTimes(0.5).reached(None, 5.0), None);
        assert_eq!(Bound::AtMost(700.0).reached(None, 700.0), Some(true));
        assert_eq!(Bound::AtMost(700.0).reached(Some(1.0), 701.0), Some(false));
    }
}
