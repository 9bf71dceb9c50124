//! What the members hold in memory and on disk: idle in a new cluster, and with many records of 256 bytes.

use super::observe::data_mb;
use super::{Result, Settings};
use crate::cluster::Cluster;
use crate::measure::{Metric, Values};
use crate::process::Usage;

pub(super) async fn run(
    cluster: &mut Cluster,
    full: bool,
    settings: &Settings,
) -> anyhow::Result<Vec<Result>> {
    if full {
        cluster.prepare(settings.many).await?;
    }
    // What is left to do is done first; what is then given back to the system takes its time.
    cluster.settle(settings.settle).await;
    tokio::time::sleep(settings.quiet).await;
    let mut values = Values::new();
    values.insert(Metric::MemberMb, member_mb(cluster)?);
    values.insert(Metric::DataMb, data_mb(cluster)?);
    Ok(vec![Result {
        row: 0,
        values,
        failure: None,
    }])
}

/// What a member holds in memory, the mean of all, in MB.
pub(super) fn member_mb(cluster: &Cluster) -> anyhow::Result<f64> {
    let pids = cluster.pids();
    let mut sum = 0.0;
    for pid in &pids {
        sum += Usage::of(*pid)?.resident_mb;
    }
    Ok(sum / pids.len().max(1) as f64)
}
