//! Reads of one record: linearizable, or of what the member has itself.

use std::sync::Arc;

use anyhow::ensure;

use super::write::{Turn, channels, paths};
use super::{Result, Settings};
use crate::cluster::etcd::Etcd;
use crate::cluster::{Cluster, MEMBERS};
use crate::grpc::{Call, Channel};
use crate::http::Connection;
use crate::load::{self, Client};
use crate::rpc::{RangeRequest, RangeResponse};

pub(super) async fn run(
    cluster: &Cluster,
    clients: usize,
    local: bool,
    settings: &Settings,
) -> anyhow::Result<Vec<Result>> {
    let seen = match cluster {
        Cluster::Etcd(etcd) => {
            let channels = channels(etcd, clients).await?;
            let gets = Turn::all(clients, 0..etcd.records).map(|records| {
                let channel = channels[records.client % channels.len()].clone();
                anyhow::Ok(Range {
                    call: channel.method(RANGE)?,
                    channel,
                    records,
                    local,
                })
            });
            let gets = gets.collect::<anyhow::Result<Vec<_>>>()?;
            load::drive(cluster, gets, 1, settings.plan).await?
        }
        Cluster::Regent(regent) => {
            let paths = paths(regent, if local { "?consistency=stale" } else { "" });
            let mut gets = Vec::new();
            for records in Turn::all(clients, 0..paths.len()) {
                gets.push(Get {
                    connection: regent.connect(records.client % MEMBERS).await?,
                    paths: paths.clone(),
                    records,
                });
            }
            load::drive(cluster, gets, 1, settings.plan).await?
        }
    };
    Ok(vec![Result::new(0, &seen)])
}

const RANGE: &str = "/etcdserverpb.KV/Range";

struct Range {
    channel: Channel,
    call: Call<RangeRequest, RangeResponse>,
    records: Turn,
    local: bool,
}

impl Client for Range {
    async fn request(&mut self, n: u64) -> anyhow::Result<usize> {
        let request = RangeRequest {
            key: Etcd::key(self.records.record(n)),
            serializable: self.local,
            ..RangeRequest::default()
        };
        let answer = self.call.call(&request).await?;
        ensure!(answer.kvs.len() == 1, "{} keys instead of one", answer.kvs.len());
        Ok(0)
    }

    async fn reopen(&mut self) -> anyhow::Result<()> {
        self.channel = self.channel.again().await?;
        self.call = self.channel.method(RANGE)?;
        Ok(())
    }
}

struct Get {
    connection: Connection,
    paths: Arc<[String]>,
    records: Turn,
}

impl Client for Get {
    async fn request(&mut self, n: u64) -> anyhow::Result<usize> {
        let path = &self.paths[self.records.record(n)];
        let answer = self.connection.request("GET", path, b"").await?.ok()?;
        ensure!(!answer.body.is_empty(), "an empty session");
        Ok(0)
    }

    async fn reopen(&mut self) -> anyhow::Result<()> {
        self.connection.reopen().await
    }
}
