//! Durable small writes: 256 bytes, one request a write, over all records, clients spread over all members.

use std::io::Write as _;
use std::ops::Range;
use std::sync::Arc;

use bytes::{BufMut as _, BytesMut};

use super::{ETCD_CONNECTIONS, Result, Settings};
use crate::cluster::etcd::Etcd;
use crate::cluster::regent::Regent;
use crate::cluster::{Cluster, MEMBERS};
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
        Cluster::Etcd(etcd) => {
            let channels = channels(etcd, clients).await?;
            let puts = puts(&channels, clients, 0..etcd.records)?;
            load::drive(cluster, puts, 1, settings.plan).await?
        }
        Cluster::Regent(regent) => {
            let patches = patches(regent, &EVERYWHERE, clients, 0..regent.sessions.len()).await?;
            load::drive(cluster, patches, 1, settings.plan).await?
        }
    };
    Ok(vec![Result::new(0, &seen)])
}

/// All members.
pub(super) const EVERYWHERE: [usize; MEMBERS] = [0, 1, 2];

/// Clients that write to etcd.
pub(super) fn puts(channels: &[Channel], clients: usize, records: Range<usize>) -> anyhow::Result<Vec<Put>> {
    let puts = Turn::all(clients, records).map(|records| {
        let channel = channels[records.client % channels.len()].clone();
        anyhow::Ok(Put {
            call: channel.method(PUT)?,
            channel,
            records,
            mark: 0,
            value: BytesMut::new(),
        })
    });
    puts.collect()
}

const PUT: &str = "/etcdserverpb.KV/Put";

/// Connections to all members in turn, for that many clients.
pub(super) async fn channels(etcd: &Etcd, clients: usize) -> anyhow::Result<Vec<Channel>> {
    let mut channels = Vec::new();
    for n in 0..clients.min(ETCD_CONNECTIONS) {
        channels.push(Channel::open(etcd.members[n % etcd.members.len()].address).await?);
    }
    Ok(channels)
}

/// Which record a client takes for its `n`-th request: all clients together go through all that they have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn {
    pub(super) client: usize,
    pub(super) clients: usize,
    /// The records: the first, and how many.
    pub(super) from: usize,
    pub(super) count: usize,
}

impl Turn {
    pub(super) fn all(clients: usize, records: Range<usize>) -> impl Iterator<Item = Self> {
        (0..clients).map(move |client| Self {
            client,
            clients,
            from: records.start,
            count: records.len(),
        })
    }

    pub(super) fn record(self, n: u64) -> usize {
        let n = usize::try_from(n).unwrap_or(usize::MAX);
        self.from + n.wrapping_mul(self.clients).wrapping_add(self.client) % self.count.max(1)
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
    /// Added to the word of each write.
    pub(super) mark: u64,
    value: BytesMut,
}

impl Client for Put {
    async fn request(&mut self, n: u64) -> anyhow::Result<usize> {
        let word = self.mark | self.records.word(n);
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
        self.call = self.channel.method(PUT)?;
        Ok(())
    }
}

/// Clients that write to Regent, over connections to these members in turn.
pub(super) async fn patches(
    regent: &Regent,
    members: &[usize],
    clients: usize,
    records: Range<usize>,
) -> anyhow::Result<Vec<Patch>> {
    let paths = paths(regent, "");
    let mut patches = Vec::new();
    for records in Turn::all(clients, records) {
        patches.push(Patch {
            connection: regent.connect(members[records.client % members.len()]).await?,
            paths: paths.clone(),
            records,
            mark: 0,
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
    /// Added to the word of each write.
    pub(super) mark: u64,
    body: Vec<u8>,
}

impl Client for Patch {
    async fn request(&mut self, n: u64) -> anyhow::Result<usize> {
        tags(&mut self.body, self.mark | self.records.word(n))?;
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
        let all: Vec<_> = Turn::all(3, 5..17)
            .flat_map(|turn| (0..4).map(move |n| turn.record(n)))
            .collect();
        let mut sorted = all.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (5..17).collect::<Vec<_>>(), "{all:?}");
    }
}
