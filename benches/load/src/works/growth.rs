//! How each cost grows with the number of sessions: the same questions at a hundredth, a tenth and all of the many
//! records.

use super::memory::member_mb;
use super::observe::{data_mb, metric_value, snapshot_bytes};
use super::{Result, Settings, read, restart, write};
use crate::cluster::regent::Regent;
use crate::cluster::{Cluster, MEMBERS};
use crate::measure::Metric;

const CLIENTS: usize = 64;

/// The sessions at a part of the many.
pub(super) fn count(settings: &Settings, part: usize) -> usize {
    (settings.many / part).max(1)
}

pub(super) async fn run(
    cluster: &mut Cluster,
    part: usize,
    settings: &Settings,
) -> anyhow::Result<Vec<Result>> {
    cluster.prepare(count(settings, part)).await?;
    cluster.settle(settings.settle).await;
    let before = snapshots(cluster).await?;
    // The rate, the latencies and the CPU are those of the writes.
    let mut results = write::run(cluster, CLIENTS, settings).await?;
    let after = snapshots(cluster).await?;
    cluster.settle(settings.settle).await;
    let member = member_mb(cluster)?;
    let data = data_mb(cluster)?;
    let reads = read::run(cluster, CLIENTS, false, settings).await?;
    let follower = (cluster.leader().await? + 1) % MEMBERS;
    let ready = restart::one(cluster, follower).await?;
    cluster.ready().await?;
    for result in &mut results {
        let values = &mut result.values;
        values.insert(Metric::MemberMb, member);
        values.insert(Metric::DataMb, data);
        values.insert(Metric::Ready, ready);
        if after.count > before.count {
            let mean = (after.seconds - before.seconds) / (after.count - before.count);
            values.insert(Metric::SnapshotMs, mean * 1000.0);
            values.insert(Metric::SnapshotMb, after.bytes as f64 / 1e6);
        }
        for read in &reads {
            values.insert(Metric::ReadRate, read.values[&Metric::Rate]);
            *values.entry(Metric::Failed).or_default() += read.values[&Metric::Failed];
            result.failure = result.failure.take().or_else(|| read.failure.clone());
        }
    }
    Ok(results)
}

/// Those that all nodes wrote since their start.
#[derive(Default)]
struct Snapshots {
    count: f64,
    seconds: f64,
    /// Of the largest of them.
    bytes: u64,
}

async fn snapshots(cluster: &Cluster) -> anyhow::Result<Snapshots> {
    let mut all = Snapshots::default();
    if let Cluster::Regent(regent) = cluster {
        for (n, member) in regent.members.iter().enumerate() {
            all.count += of_node(regent, n, "count").await?;
            all.seconds += of_node(regent, n, "sum").await?;
            all.bytes = all.bytes.max(snapshot_bytes(&member.data));
        }
    }
    Ok(all)
}

/// Nothing was written before the metric is there.
async fn of_node(regent: &Regent, member: usize, part: &str) -> anyhow::Result<f64> {
    let name = format!("regent_raft_snapshot_seconds_{part}");
    Ok(metric_value(regent, member, &name).await?.unwrap_or(0.0))
}
