//! The leader hands over on request, under 16 writers at all members: is anything felt of it?
//!
//! etcd: `MoveLeader`. Regent: `POST /api/v1/cluster/transfer`, or where there is no such call, TERM, upon which a
//! leader hands over before it ends; what fails at the other members is then the part that is comparable.

use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::observe::{another_leads, caught_up};
use super::stalls::{Trials, acknowledged_since, begin, first_word};
use super::writers::{RECORDS, Writers};
use super::{Result, Settings};
use crate::cluster::etcd::Etcd;
use crate::cluster::regent::Regent;
use crate::cluster::{Cluster, MEMBERS};
use crate::grpc::Channel;
use crate::report::say;
use crate::rpc::{MoveLeaderRequest, MoveLeaderResponse};

/// How long a writer waits for an answer: nobody should notice, so it is patient.
const PATIENCE: Duration = Duration::from_secs(1);
const BEFORE: Duration = Duration::from_millis(700);
const AFTER: Duration = Duration::from_millis(500);
/// How long the members may take to become quiet between two trials.
const QUIET_WITHIN: Duration = Duration::from_secs(2);

pub(super) async fn run(cluster: &mut Cluster, settings: &Settings) -> anyhow::Result<Vec<Result>> {
    cluster.prepare(RECORDS).await?;
    let mut trials = Trials::default();
    for number in 0..settings.trials {
        cluster.settle(QUIET_WITHIN).await;
        let leader = cluster.leader().await?;
        let writers = Writers::start(cluster, PATIENCE, first_word(number));
        tokio::time::sleep(BEFORE).await;
        let begun = begin(&writers)?;
        let since = Instant::now();
        let handed = match cluster {
            Cluster::Etcd(etcd) => move_leader(etcd, leader).await.map(|()| true)?,
            Cluster::Regent(regent) => transfer(regent, leader).await?,
        };
        if !handed {
            if number == 0 {
                say("Regent has no call for a transfer: its leader is sent TERM");
            }
            cluster.members_mut()[leader].terminate().await?;
        }
        another_leads(cluster, leader).await?;
        trials.elected(since);
        acknowledged_since(&writers).await?;
        tokio::time::sleep(AFTER).await;
        trials.add(&writers, begun, leader);
        let books = writers.stop().await?;
        if !handed {
            cluster.members_mut()[leader].start()?;
        }
        cluster.ready().await?;
        caught_up(cluster).await?;
        trials.lost.extend(books.lost(cluster).await?);
    }
    trials.result()
}

async fn move_leader(etcd: &Etcd, leader: usize) -> anyhow::Result<()> {
    let to = etcd.status((leader + 1) % MEMBERS).await?;
    let target = to.header.context("no header")?.member_id;
    let channel = Channel::open(etcd.members[leader].address).await?;
    let asked = MoveLeaderRequest { target };
    let _: MoveLeaderResponse = channel
        .once("/etcdserverpb.Maintenance/MoveLeader", &asked)
        .await
        .context("MoveLeader")?;
    Ok(())
}

/// False when there is no such call.
async fn transfer(regent: &Regent, leader: usize) -> anyhow::Result<bool> {
    let mut connection = regent.connect(leader).await?;
    let answer = connection
        .request("POST", "/api/v1/cluster/transfer", b"{}")
        .await?;
    if matches!(answer.status, 404 | 405) {
        return Ok(false);
    }
    answer.ok().context("the transfer")?;
    Ok(true)
}
