//! What small writes cost the disk: bytes that all members had written for each byte of the values, and how large a
//! folder gets after very many of them.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tokio::task::JoinSet;

use super::observe::{data_mb, folder_bytes, snapshot_bytes};
use super::write::{EVERYWHERE, channels, patches, puts};
use super::{Result, Settings};
use crate::cluster::Cluster;
use crate::load::Client;
use crate::measure::{Metric, Values};
use crate::process;

const CLIENTS: usize = 64;
/// Bytes of a value.
const VALUE: u64 = 256;
/// A folder is within its bound when it has no more than so many snapshots and this.
const SNAPSHOTS: u64 = 3;
const BESIDE: u64 = 512 << 20;
/// How often a folder is looked at while it grows.
const LOOK_EVERY: Duration = Duration::from_secs(1);

pub(super) async fn run(cluster: &mut Cluster, settings: &Settings) -> anyhow::Result<Vec<Result>> {
    cluster.prepare(settings.records).await?;
    cluster.settle(settings.settle).await;
    let before = written(cluster)?;
    let rate = write(cluster, settings.disk_writes, settings).await?;
    cluster.settle(settings.settle).await;
    let bytes = written(cluster)? - before;
    let mut values = Values::new();
    values.insert(Metric::Rate, rate);
    let factor = bytes as f64 / (VALUE * settings.disk_writes) as f64;
    values.insert(Metric::DiskFactor, factor);
    values.insert(Metric::DataMb, data_mb(cluster)?);
    Ok(vec![Result {
        row: 0,
        values,
        failure: None,
    }])
}

pub(super) async fn folder(cluster: &mut Cluster, settings: &Settings) -> anyhow::Result<Vec<Result>> {
    cluster.prepare(settings.records).await?;
    let folders: Vec<PathBuf> = cluster
        .members()
        .iter()
        .map(|member| member.data.clone())
        .collect();
    let mut watched = Watched::default();
    let rate = {
        let writing = write(cluster, settings.folder_writes, settings);
        let mut writing = std::pin::pin!(writing);
        loop {
            tokio::select! {
                rate = &mut writing => break rate?,
                () = tokio::time::sleep(LOOK_EVERY) => watched.look(&folders)?,
            }
        }
    };
    cluster.settle(settings.settle).await;
    watched.look(&folders)?;
    let mut values = Values::new();
    values.insert(Metric::Rate, rate);
    values.insert(Metric::FolderShare, watched.share);
    values.insert(Metric::DataMb, watched.folder as f64 / 1e6);
    values.insert(Metric::SnapshotMb, watched.snapshot as f64 / 1e6);
    Ok(vec![Result {
        row: 0,
        values,
        failure: None,
    }])
}

/// The most that was seen of any folder.
#[derive(Default)]
struct Watched {
    share: f64,
    folder: u64,
    snapshot: u64,
}

impl Watched {
    fn look(&mut self, folders: &[PathBuf]) -> anyhow::Result<()> {
        for folder in folders {
            let (bytes, snapshot) = (folder_bytes(folder)?, snapshot_bytes(folder));
            let share = bytes as f64 / (SNAPSHOTS * snapshot + BESIDE) as f64;
            self.share = self.share.max(share);
            self.folder = self.folder.max(bytes);
            self.snapshot = self.snapshot.max(snapshot);
        }
        Ok(())
    }
}

/// Bytes that all members had written.
fn written(cluster: &Cluster) -> anyhow::Result<u64> {
    cluster.pids().into_iter().map(process::written).sum()
}

/// So many writes, all of which must be done; gives how many a second.
async fn write(cluster: &Cluster, writes: u64, settings: &Settings) -> anyhow::Result<f64> {
    let timeout = settings.plan.timeout;
    let begun = Instant::now();
    match cluster {
        Cluster::Etcd(etcd) => {
            let clients = puts(&channels(etcd, CLIENTS).await?, CLIENTS, 0..etcd.records)?;
            all(clients, writes, timeout).await?;
        }
        Cluster::Regent(regent) => {
            let clients = patches(regent, &EVERYWHERE, CLIENTS, 0..regent.sessions.len()).await?;
            all(clients, writes, timeout).await?;
        }
    }
    Ok(writes as f64 / begun.elapsed().as_secs_f64())
}

async fn all<C: Client>(clients: Vec<C>, writes: u64, timeout: Duration) -> anyhow::Result<()> {
    let mut tasks = JoinSet::new();
    let count = clients.len() as u64;
    for (number, mut client) in (0..).zip(clients) {
        let share = writes / count + u64::from(number < writes % count);
        tasks.spawn(async move {
            for n in 0..share {
                match tokio::time::timeout(timeout, client.request(n)).await {
                    Ok(written) => written.map(drop)?,
                    Err(_elapsed) => bail!("no answer within {timeout:?}"),
                }
            }
            Ok(())
        });
    }
    while let Some(task) = tasks.join_next().await {
        task?.context("a write")?;
    }
    Ok(())
}
