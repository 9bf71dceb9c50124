//! The leader is killed, or frozen, under 16 writers: for how long does nobody get an acknowledgement?
//!
//! Each writer gives up after a short while and goes to the next member, since a request that was sent to the dead
//! leader's follower hangs for as long as its client waits. After each trial all that was acknowledged is read back.

use std::time::{Duration, Instant};

use anyhow::ensure;

use super::observe::{another_leads, caught_up};
use super::writers::{RECORDS, Writers};
use super::{Fault, Result, Settings};
use crate::cluster::{Cluster, until};
use crate::measure::{Metric, Values, median};

/// How long a writer waits for an answer.
const PATIENCE: Duration = Duration::from_millis(250);
/// How long they write before the fault, and after it is over.
const BEFORE: Duration = Duration::from_millis(700);
const AFTER: Duration = Duration::from_millis(500);
/// How long the members may take to become quiet between two trials.
const QUIET_WITHIN: Duration = Duration::from_secs(2);

pub(super) async fn run(
    cluster: &mut Cluster,
    fault: Fault,
    settings: &Settings,
) -> anyhow::Result<Vec<Result>> {
    cluster.prepare(RECORDS).await?;
    let mut trials = Trials::default();
    for number in 0..settings.trials {
        cluster.settle(QUIET_WITHIN).await;
        let leader = cluster.leader().await?;
        let writers = Writers::start(cluster, PATIENCE, first_word(number));
        tokio::time::sleep(BEFORE).await;
        let begun = begin(&writers)?;
        let since = Instant::now();
        match fault {
            Fault::Kill => cluster.members_mut()[leader].kill().await?,
            Fault::Freeze => cluster.members()[leader].freeze()?,
        }
        another_leads(cluster, leader).await?;
        trials.elected(since);
        acknowledged_since(&writers).await?;
        tokio::time::sleep(AFTER).await;
        if fault == Fault::Freeze {
            cluster.members()[leader].thaw()?;
            tokio::time::sleep(AFTER).await;
        }
        trials.add(&writers, begun, leader);
        let books = writers.stop().await?;
        if fault == Fault::Kill {
            cluster.members_mut()[leader].start()?;
        }
        cluster.ready().await?;
        caught_up(cluster).await?;
        trials.lost.extend(books.lost(cluster).await?);
    }
    trials.result()
}

/// Words of a trial are above those of the ones before it.
pub(super) fn first_word(trial: usize) -> u64 {
    (trial as u64 + 1) << 32
}

/// The writers write, and what comes now is counted. Gives what failed before.
pub(super) fn begin(writers: &Writers) -> anyhow::Result<[u64; crate::cluster::MEMBERS]> {
    let (acknowledged, failed) = {
        let acks = writers.acks();
        (acks.acknowledged, acks.failed)
    };
    let failure = writers.acks().failure.clone();
    ensure!(
        acknowledged > 0,
        "nothing was acknowledged before the fault: {}",
        failure.unwrap_or_default()
    );
    writers.mark();
    Ok(failed)
}

/// Waits until something more is acknowledged.
pub(super) async fn acknowledged_since(writers: &Writers) -> anyhow::Result<()> {
    let before = writers.acks().acknowledged;
    until("an acknowledgement after the fault", async || {
        Ok(writers.acks().acknowledged > before)
    })
    .await
}

/// What became of each trial.
#[derive(Default)]
pub(super) struct Trials {
    /// Milliseconds.
    stalls: Vec<f64>,
    broken: Vec<f64>,
    elsewhere: Vec<f64>,
    elected: Vec<f64>,
    pub(super) lost: Vec<String>,
}

impl Trials {
    /// Another member leads now, after the fault of then.
    pub(super) fn elected(&mut self, since: Instant) {
        self.elected.push(since.elapsed().as_secs_f64() * 1000.0);
    }

    /// One trial, which ends now. `leader` had the fault.
    pub(super) fn add(&mut self, writers: &Writers, before: [u64; crate::cluster::MEMBERS], leader: usize) {
        self.stalls.push(writers.longest().as_secs_f64() * 1000.0);
        let failed = writers.acks().failed;
        let of = |member: usize| (failed[member] - before[member]) as f64;
        let members = 0..failed.len();
        self.broken.push(members.clone().map(of).sum());
        self.elsewhere
            .push(members.filter(|member| *member != leader).map(of).sum());
    }

    pub(super) fn result(self) -> anyhow::Result<Vec<Result>> {
        ensure!(!self.stalls.is_empty(), "there was no trial");
        let most = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
        let least = self.stalls.iter().copied().fold(f64::INFINITY, f64::min);
        let mut values = Values::new();
        values.insert(Metric::Trials, self.stalls.len() as f64);
        values.insert(Metric::StallMin, least);
        values.insert(Metric::StallMedian, median(&self.stalls));
        values.insert(Metric::StallMax, most(&self.stalls));
        values.insert(Metric::Elected, median(&self.elected));
        values.insert(Metric::Broken, median(&self.broken));
        values.insert(Metric::BrokenMax, most(&self.broken));
        values.insert(Metric::BrokenElsewhere, most(&self.elsewhere));
        let failure = self
            .lost
            .first()
            .map(|first| format!("{} acknowledged writes are lost: {first}", self.lost.len()));
        Ok(vec![Result {
            row: 0,
            values,
            failure,
        }])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_write_is_a_failure_and_no_trial_an_error() {
        assert!(Trials::default().result().is_err());
        let trials = Trials {
            stalls: vec![3.0, 1.0, 2.0],
            broken: vec![0.0; 3],
            elsewhere: vec![0.0; 3],
            elected: vec![1.0; 3],
            lost: vec!["record 7".to_owned()],
        };
        let result = trials.result().unwrap().remove(0);
        assert!((result.values[&Metric::StallMedian] - 2.0).abs() < 1e-9);
        assert!((result.values[&Metric::StallMin] - 1.0).abs() < 1e-9);
        assert!(result.failure.unwrap().contains("record 7"));
    }
}
