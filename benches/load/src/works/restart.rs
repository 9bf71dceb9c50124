//! Members with many records are killed (-9) and started again: how long until they serve? Both serve when they
//! know a leader and answer a linearizable read; Regent says so itself at `/readyz` as well.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use super::observe::{another_leads, caught_up};
use super::{Result, Settings};
use crate::cluster::etcd::Etcd;
use crate::cluster::{Cluster, MEMBERS};
use crate::grpc::Channel;
use crate::measure::{Metric, Values, median};
use crate::rpc::{RangeRequest, RangeResponse};

/// The rows.
pub(super) const TITLES: [&str; 3] = ["a follower", "the leader", "all three"];
/// How often each is done, at most.
const TIMES: usize = 3;
/// How often a member is asked, and how long it may take to answer.
const ASK_EVERY: Duration = Duration::from_millis(2);
const ANSWER_WITHIN: Duration = Duration::from_millis(500);
/// How long it may take to serve.
const SERVES_WITHIN: Duration = Duration::from_mins(2);

pub(super) async fn run(cluster: &mut Cluster, settings: &Settings) -> anyhow::Result<Vec<Result>> {
    cluster.prepare(settings.many).await?;
    let mut results = Vec::new();
    for row in 0..TITLES.len() {
        let mut times = Vec::new();
        for _ in 0..settings.trials.min(TIMES) {
            cluster.settle(settings.settle).await;
            let leader = cluster.leader().await?;
            times.push(match row {
                0 => one(cluster, (leader + 1) % MEMBERS).await?,
                1 => one(cluster, leader).await?,
                _ => all(cluster).await?,
            });
            cluster.ready().await?;
            caught_up(cluster).await?;
        }
        let mut values = Values::new();
        values.insert(Metric::Ready, median(&times));
        values.insert(Metric::Trials, times.len() as f64);
        results.push(Result {
            row,
            values,
            failure: None,
        });
    }
    Ok(results)
}

/// Kills one member and starts it again; gives the milliseconds from then until it serves.
pub(super) async fn one(cluster: &mut Cluster, member: usize) -> anyhow::Result<f64> {
    let led = cluster.leader().await? == member;
    cluster.members_mut()[member].kill().await?;
    if led {
        another_leads(cluster, member).await?;
    }
    let begun = Instant::now();
    cluster.members_mut()[member].start()?;
    serves(cluster, member).await?;
    Ok(begun.elapsed().as_secs_f64() * 1000.0)
}

async fn all(cluster: &mut Cluster) -> anyhow::Result<f64> {
    for member in cluster.members_mut() {
        member.kill().await?;
    }
    let begun = Instant::now();
    for member in cluster.members_mut() {
        member.start()?;
    }
    for member in 0..MEMBERS {
        serves(cluster, member).await?;
    }
    Ok(begun.elapsed().as_secs_f64() * 1000.0)
}

async fn serves(cluster: &Cluster, member: usize) -> anyhow::Result<()> {
    let deadline = Instant::now() + SERVES_WITHIN;
    loop {
        match tokio::time::timeout(ANSWER_WITHIN, ask(cluster, member)).await {
            Ok(Ok(())) => return Ok(()),
            failed => ensure!(
                Instant::now() < deadline,
                "member {} does not serve: {}",
                member + 1,
                match failed {
                    Ok(Err(error)) => format!("{error:#}"),
                    _ => "no answer".to_owned(),
                }
            ),
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

async fn ask(cluster: &Cluster, member: usize) -> anyhow::Result<()> {
    match cluster {
        Cluster::Etcd(etcd) => {
            // A read that comes before there is a leader is answered only after seconds; etcd's own health check
            // asks in this order too.
            ensure!(etcd.status(member).await?.leader != 0, "no leader");
            let channel = Channel::open(etcd.members[member].address).await?;
            let request = RangeRequest {
                key: Etcd::key(0),
                ..RangeRequest::default()
            };
            let answer: RangeResponse = channel.once("/etcdserverpb.KV/Range", &request).await?;
            ensure!(answer.kvs.len() == 1, "a record is lost");
        }
        Cluster::Regent(regent) => {
            regent.call(member, "GET", "/readyz", None).await?;
            let name = regent.sessions.first().context("no session")?;
            let path = format!("/api/v1/sessions/{name}");
            regent.call(member, "GET", &path, None).await?;
        }
    }
    Ok(())
}
