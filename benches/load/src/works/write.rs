//! Durable small writes: 256 bytes, one request a write, over all records, clients spread over all members.

use std::io::Write as _;
use std::sync::Arc;

use bytes::{BufMut as _, BytesMut};

use super::{ETCD_CONNECTIONS, Result, Settings};
use crate::cluster::Cluster;
use crate::cluster::etcd::Etcd;
use crate::cluster::regent::Regent;
use crate::grpc::{Call, Channel};
use crate::http::Connection;
use crate::load::{self, Client};
use crate::rpc::{PutRequest, PutResponse};

/// Bytes of a value.
const VALUE: usize = 256;

pub(super) async fn run(
    cluster: &Cluster,
    clients: usize,
    settings: &Settings,
) -> anyhow::Result<Vec<Result>> {
    let seen = match cluster {
        Cluster::Etcd(etcd) => load::drive(cluster, puts(etcd, clients).await?, 1, settings.plan).await?,
        Cluster::Regent(regent) => {
            load::drive(cluster, patches(regent, clients).await?, 1, settings.plan).await?
        }
    };
    Ok(vec![Result {
        row: 0,
        values: seen.values(0),
        failure: seen.failure,
    }])
}

/// Clients that write to etcd.
pub(super) async fn puts(etcd: &Etcd, clients: usize) -> anyhow::Result<Vec<Put>> {
    let channels = channels(etcd, clients).await?;
    let puts = (0..clients).map(|client| {
        let channel = channels[client % channels.len()].clone();
        anyhow::Ok(Put {
            call: channel.method("/etcdserverpb.KV/Put")?,
            channel,
            records: Turn {
                client,
                clients,
                count: etcd.records,
            },
            value: BytesMut::new(),
        })
    });
    puts.collect()
}

/// Connections to all members in turn, for that many clients.
pub(super) async fn channels(etcd: &Etcd, clients: usize) -> anyhow::Result<Vec<Channel>> {
    let mut channels = Vec::new();
    for n in 0..clients.min(ETCD_CONNECTIONS) {
        channels.push(Channel::open(etcd.members[n % etcd.members.len()].address).await?);
    }
    Ok(channels)
}

/// Which record a client takes for its `n`-th request: all clients together go through all of them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn {
    pub(super) client: usize,
    pub(super) clients: usize,
    pub(super) count: usize,
}

impl Turn {
    pub(super) fn record(self, n: u64) -> usize {
        let n = usize::try_from(n).unwrap_or(usize::MAX);
        n.wrapping_mul(self.clients).wrapping_add(self.client) % self.count.max(1)
    }

    /// A word that no other request of these clients has.
    pub(super) fn word(self, n: u64) -> u64 {
        n.wrapping_mul(self.clients as u64)
            .wrapping_add(self.client as u64)
    }
}

/// A client that writes to etcd.
pub(super) struct Put {
    channel: Channel,
    call: Call<PutRequest, PutResponse>,
    records: Turn,
    value: BytesMut,
}

impl Client for Put {
    async fn request(&mut self, n: u64) -> anyhow::Result<usize> {
        let word = self.records.word(n);
        self.value.reserve(VALUE);
        for part in 0..VALUE / 32 {
            write!((&mut self.value).writer(), "{word:016x}{part:016x}")?;
        }
        let request = PutRequest {
            key: Etcd::key(self.records.record(n)),
            value: self.value.split().freeze(),
            lease: 0,
        };
        self.call.call(&request).await?;
        Ok(0)
    }

    async fn reopen(&mut self) -> anyhow::Result<()> {
        self.channel = self.channel.again().await?;
        self.call = self.channel.method("/etcdserverpb.KV/Put")?;
        Ok(())
    }
}

/// Clients that write to Regent.
pub(super) async fn patches(regent: &Regent, clients: usize) -> anyhow::Result<Vec<Patch>> {
    let paths = paths(regent, "");
    let mut patches = Vec::new();
    for client in 0..clients {
        patches.push(Patch {
            connection: regent.connect(client % regent.members.len()).await?,
            paths: paths.clone(),
            records: Turn {
                client,
                clients,
                count: paths.len(),
            },
            body: Vec::new(),
        });
    }
    Ok(patches)
}

/// The path of each session, with a query.
pub(super) fn paths(regent: &Regent, query: &str) -> Arc<[String]> {
    regent
        .sessions
        .iter()
        .map(|name| format!("/api/v1/sessions/{name}{query}"))
        .collect()
}

/// A client that writes to Regent.
pub(super) struct Patch {
    connection: Connection,
    paths: Arc<[String]>,
    records: Turn,
    body: Vec<u8>,
}

impl Client for Patch {
    async fn request(&mut self, n: u64) -> anyhow::Result<usize> {
        tags(&mut self.body, self.records.word(n))?;
        let path = &self.paths[self.records.record(n)];
        self.connection.request("PATCH", path, &self.body).await?.ok()?;
        Ok(0)
    }

    async fn reopen(&mut self) -> anyhow::Result<()> {
        self.connection.reopen().await
    }
}

/// Eight tags of 32 bytes, different for each word.
pub(super) fn tags(body: &mut Vec<u8>, word: u64) -> anyhow::Result<()> {
    body.clear();
    body.extend_from_slice(b"{\"tags\":[");
    for tag in 0..VALUE / 32 {
        let comma = if tag == 0 { "" } else { "," };
        write!(body, "{comma}\"{word:016x}{tag:016x}\"")?;
    }
    body.extend_from_slice(b"]}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_json_and_hold_256_bytes() {
        let mut body = Vec::new();
        tags(&mut body, 7).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&body).unwrap();
        let tags = value["tags"].as_array().unwrap();
        assert_eq!(
            tags.iter().map(|tag| tag.as_str().unwrap().len()).sum::<usize>(),
            VALUE
        );
    }

    #[test]
    fn clients_share_the_records_among_them() {
        let all: Vec<_> = (0..3)
            .flat_map(|client| {
                (0..4).map(move |n| {
                    Turn {
                        client,
                        clients: 3,
                        count: 12,
                    }
                    .record(n)
                })
            })
            .collect();
        let mut sorted = all.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..12).collect::<Vec<_>>(), "{all:?}");
    }
}
