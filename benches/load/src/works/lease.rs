//! Leases granted and released in turn, by each client one of its own.

use anyhow::{Context as _, ensure};
use serde::Deserialize;

use super::write::channels;
use super::{Result, Settings};
use crate::cluster::{Cluster, MEMBERS};
use crate::grpc::{Call, Channel};
use crate::http::Connection;
use crate::load::{self, Client};
use crate::rpc::{LeaseGrantRequest, LeaseGrantResponse, LeaseRevokeRequest, LeaseRevokeResponse};

/// No lease runs out while it is measured.
const TTL_SECONDS: i64 = 60;
/// Kinds of requests; the rows have the same order.
const GRANT: usize = 0;
const RELEASE: usize = 1;

pub(super) const GRANT_PATH: &str = "/etcdserverpb.Lease/LeaseGrant";
pub(super) const REVOKE_PATH: &str = "/etcdserverpb.Lease/LeaseRevoke";

pub(super) async fn run(
    cluster: &Cluster,
    clients: usize,
    settings: &Settings,
) -> anyhow::Result<Vec<Result>> {
    let seen = match cluster {
        Cluster::Etcd(etcd) => {
            let channels = channels(etcd, clients).await?;
            let pairs = (0..clients).map(|client| {
                let channel = channels[client % channels.len()].clone();
                anyhow::Ok(EtcdPair {
                    grant: channel.method(GRANT_PATH)?,
                    revoke: channel.method(REVOKE_PATH)?,
                    channel,
                    held: None,
                })
            });
            let pairs = pairs.collect::<anyhow::Result<Vec<_>>>()?;
            load::drive(cluster, pairs, 2, settings.plan).await?
        }
        Cluster::Regent(regent) => {
            let mut pairs = Vec::new();
            for client in 0..clients {
                pairs.push(RegentPair {
                    connection: regent.connect(client % MEMBERS).await?,
                    acquire: format!("/api/v1/leases/bench%2Fpair%2F{client}/acquire"),
                    release: format!("/api/v1/leases/bench%2Fpair%2F{client}/release"),
                    held: None,
                });
            }
            load::drive(cluster, pairs, 2, settings.plan).await?
        }
    };
    Ok(vec![Result::new(GRANT, &seen), Result::new(RELEASE, &seen)])
}

struct EtcdPair {
    channel: Channel,
    grant: Call<LeaseGrantRequest, LeaseGrantResponse>,
    revoke: Call<LeaseRevokeRequest, LeaseRevokeResponse>,
    held: Option<i64>,
}

impl Client for EtcdPair {
    async fn request(&mut self, _: u64) -> anyhow::Result<usize> {
        if let Some(id) = self.held.take() {
            self.revoke.call(&LeaseRevokeRequest { id }).await?;
            return Ok(RELEASE);
        }
        let asked = LeaseGrantRequest {
            ttl: TTL_SECONDS,
            id: 0,
        };
        let granted = self.grant.call(&asked).await?;
        ensure!(
            granted.error.is_empty() && granted.id != 0,
            "not granted: {}",
            granted.error
        );
        self.held = Some(granted.id);
        Ok(GRANT)
    }

    async fn reopen(&mut self) -> anyhow::Result<()> {
        self.channel = self.channel.again().await?;
        self.grant = self.channel.method(GRANT_PATH)?;
        self.revoke = self.channel.method(REVOKE_PATH)?;
        Ok(())
    }
}

struct RegentPair {
    connection: Connection,
    acquire: String,
    release: String,
    held: Option<u64>,
}

#[derive(Deserialize)]
struct Granted {
    token: u64,
}

impl Client for RegentPair {
    async fn request(&mut self, _: u64) -> anyhow::Result<usize> {
        if let Some(token) = self.held.take() {
            let body = format!("{{\"token\":{token}}}");
            self.connection
                .request("POST", &self.release, body.as_bytes())
                .await?
                .ok()?;
            return Ok(RELEASE);
        }
        let body = format!("{{\"holder\":\"bench\",\"ttlMs\":{}}}", TTL_SECONDS * 1000);
        let answer = self
            .connection
            .request("POST", &self.acquire, body.as_bytes())
            .await?
            .ok()?;
        let granted: Granted = serde_json::from_slice(answer.body).context("no token")?;
        self.held = Some(granted.token);
        Ok(GRANT)
    }

    async fn reopen(&mut self) -> anyhow::Result<()> {
        self.connection.reopen().await
    }
}
