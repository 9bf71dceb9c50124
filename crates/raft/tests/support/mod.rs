//! A cluster in one process: real nodes over the in-memory store, each behind a proxy that can cut it off.

// Each test binary uses its part of this, and a test may unwrap wherever it is written.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use regent_raft::{
    ClusterSecret, MemoryDisk, Node, Options, PeerService, ProposeError, Proposed, SnapshotPolicy,
    StartError, Storage, Tcp, Timing,
};
use regent_state::operation::InitCluster;
use regent_state::{Caller, Operation, Request};
use regent_types::{NodeId, TokenId, UserName};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

/// How long a condition may take. Far above what it needs, so that only a fault reaches it.
pub const PATIENCE: Duration = Duration::from_secs(90);

pub fn soon() -> Instant {
    Instant::now() + PATIENCE
}

pub fn within(ms: u64) -> Instant {
    Instant::now() + Duration::from_millis(ms)
}

/// Waits until `condition` gives a value, or fails with `what`.
pub async fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = soon();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Answers every call with who called and what was said.
pub struct Echo;

impl PeerService for Echo {
    fn call(&self, from: NodeId, body: Bytes) -> BoxFuture<'_, Result<Bytes, String>> {
        Box::pin(async move {
            let text = String::from_utf8_lossy(&body).into_owned();
            if text == "refuse" {
                Err("as you wish".to_owned())
            } else {
                Ok(format!("{from}:{text}").into())
            }
        })
    }
}

pub const SECRET: &str = "a secret of this test cluster";

pub struct Cluster {
    pub nodes: BTreeMap<u64, Node>,
    pub members: BTreeMap<NodeId, String>,
    pub disks: BTreeMap<u64, MemoryDisk>,
    pub snapshots: SnapshotPolicy,
    folders: TempDir,
    /// Where each running node really listens.
    behind: watch::Sender<BTreeMap<u64, SocketAddr>>,
    cut: watch::Sender<BTreeSet<u64>>,
}

impl Cluster {
    /// Addresses, proxies and empty disks for three nodes; none runs yet.
    pub async fn plan() -> Self {
        // RUST_LOG=debug shows what the nodes say.
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        let _ = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_test_writer()
            .try_init();
        let (cut, _) = watch::channel(BTreeSet::new());
        let mut cluster = Self {
            nodes: BTreeMap::new(),
            members: BTreeMap::new(),
            disks: BTreeMap::new(),
            snapshots: SnapshotPolicy::default(),
            folders: tempfile::tempdir().unwrap(),
            behind: watch::Sender::default(),
            cut,
        };
        for id in 1..=3 {
            let front = TcpListener::bind("127.0.0.1:0").await.unwrap();
            cluster
                .members
                .insert(NodeId(id), front.local_addr().unwrap().to_string());
            cluster.disks.insert(id, MemoryDisk::default());
            tokio::spawn(proxy(
                front,
                id,
                cluster.behind.subscribe(),
                cluster.cut.subscribe(),
            ));
        }
        cluster
    }

    /// Three nodes that have elected a leader and hold the first operation.
    pub async fn start() -> Self {
        Self::start_with(SnapshotPolicy::default()).await
    }

    pub async fn start_with(snapshots: SnapshotPolicy) -> Self {
        let mut cluster = Self::plan().await;
        cluster.snapshots = snapshots;
        for id in 1..=3 {
            cluster.start_node(id).await;
        }
        let leader = cluster.leader().await;
        let init = InitCluster {
            cluster_id: cluster.nodes[&leader].cluster_id().unwrap(),
            feature_level: 1,
            admin: UserName::new("admin").unwrap(),
            password_hash: None,
            token: Some((TokenId::new("root").unwrap(), [7; 32])),
        };
        let request = Request {
            caller: Caller::Node(NodeId(leader)),
            idempotency: None,
            operation: Operation::InitCluster(init),
        };
        let done = cluster.nodes[&leader].propose(&request, soon()).await.unwrap();
        done.applied.unwrap();
        cluster
    }

    /// Options for node `id` on a port of its own, which the proxy is told.
    pub fn options(&self, id: u64) -> Options {
        let listener = StdListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        self.behind.send_modify(|behind| {
            behind.insert(id, address);
        });
        let data = self.folders.path().join(id.to_string());
        std::fs::create_dir_all(&data).unwrap();
        Options {
            node: NodeId(id),
            data,
            listen: address,
            advertise_peer: self.members[&NodeId(id)].clone(),
            advertise_http: format!("http://node-{id}"),
            members: self.members.clone(),
            secret: ClusterSecret::new(SECRET).unwrap(),
            timing: Timing::default(),
            snapshots: self.snapshots.clone(),
            listener: Some(listener),
            sockets: Arc::new(Tcp),
            storage: Storage::Memory(self.disks[&id].clone()),
        }
    }

    pub async fn start_node(&mut self, id: u64) {
        let node = start(self.options(id)).await.unwrap();
        self.nodes.insert(id, node);
    }

    pub async fn stop_node(&mut self, id: u64) {
        self.nodes.remove(&id).unwrap().shutdown().await;
    }

    /// The data folder of a stopped node is lost.
    pub fn wipe(&mut self, id: u64) {
        self.disks.insert(id, MemoryDisk::default());
        let _ = std::fs::remove_dir_all(self.folders.path().join(id.to_string()));
    }

    /// Cuts these nodes off from all others, silently, until [`Cluster::heal`].
    pub fn isolate(&self, ids: impl IntoIterator<Item = u64>) {
        self.cut.send_replace(ids.into_iter().collect());
    }

    pub fn heal(&self) {
        self.cut.send_replace(BTreeSet::new());
    }

    /// Waits until a node that is not cut off leads.
    pub async fn leader(&self) -> u64 {
        until("a leader is elected", || {
            let cut = self.cut.borrow();
            self.nodes
                .iter()
                .find(|(id, n)| !cut.contains(id) && n.leadership().borrow().mine.is_some())
                .map(|(id, _)| *id)
        })
        .await
    }

    /// Waits until every running node reaches every other.
    pub async fn connected(&self) {
        until("all nodes reach each other", || {
            let reaches_all = |node: &Node| node.status().members.iter().all(|member| member.reachable);
            self.nodes.values().all(reaches_all).then_some(())
        })
        .await;
    }

    pub async fn follower(&self) -> u64 {
        let leader = self.leader().await;
        *self.nodes.keys().find(|id| **id != leader).unwrap()
    }

    /// Makes a user through node `id`.
    pub async fn write(&self, id: u64, name: &str) -> Result<Proposed, ProposeError> {
        self.nodes[&id].propose(&make_user(name), soon()).await
    }

    /// Waits until every running node has applied the same and gives its users.
    pub async fn converge(&self) -> BTreeSet<String> {
        until("all nodes have applied the same", || {
            let mut indexes: Vec<u64> = self
                .nodes
                .values()
                .map(|node| node.view().applied_index)
                .collect();
            indexes.dedup();
            (indexes.len() == 1).then_some(())
        })
        .await;
        let mut all: Vec<BTreeSet<String>> = self.nodes.values().map(users).collect();
        let digests: BTreeSet<u64> = self
            .nodes
            .values()
            .map(|n| n.view().state.content_digest())
            .collect();
        assert_eq!(digests.len(), 1, "the states differ");
        all.pop().unwrap()
    }
}

pub async fn start(options: Options) -> Result<Node, StartError> {
    Node::start(options, Arc::new(Echo)).await
}

pub fn make_user(name: &str) -> Request {
    Request {
        caller: Caller::Token(TokenId::new("root").unwrap()),
        idempotency: None,
        operation: Operation::CreateUser {
            name: UserName::new(name).unwrap(),
            password_hash: "$test$".to_owned(),
            role: regent_state::record::Role::User,
            quota: regent_state::record::Quota::default(),
        },
    }
}

pub fn users(node: &Node) -> BTreeSet<String> {
    node.view()
        .state
        .users()
        .keys()
        .map(ToString::to_string)
        .filter(|name| name != "admin")
        .collect()
}

/// Waits for the reason why a node cannot go on.
pub async fn failure(node: &Node) -> String {
    timeout(PATIENCE, node.failed())
        .await
        .expect("the node should have failed")
}

async fn proxy(
    front: TcpListener,
    to: u64,
    behind: watch::Receiver<BTreeMap<u64, SocketAddr>>,
    cut: watch::Receiver<BTreeSet<u64>>,
) {
    while let Ok((client, _)) = front.accept().await {
        let behind = behind.borrow().get(&to).copied();
        if let Some(behind) = behind {
            tokio::spawn(relay(client, to, behind, cut.clone()));
        }
    }
}

/// Passes bytes both ways, but none while one of the two ends is cut off.
async fn relay(mut client: TcpStream, to: u64, behind: SocketAddr, cut: watch::Receiver<BTreeSet<u64>>) {
    let mut length = [0; 4];
    if client.read_exact(&mut length).await.is_err() {
        return;
    }
    let mut hello = vec![0; u32::from_be_bytes(length) as usize];
    if client.read_exact(&mut hello).await.is_err() {
        return;
    }
    let from = sender(&hello).unwrap_or(0);
    let Ok(mut server) = TcpStream::connect(behind).await else {
        return;
    };
    let ends = [from, to];
    open(&mut cut.clone(), ends).await;
    // Without it every small answer would wait for a delayed acknowledgement.
    if client.set_nodelay(true).is_err() || server.set_nodelay(true).is_err() {
        return;
    }
    if server.write_all(&length).await.is_err() || server.write_all(&hello).await.is_err() {
        return;
    }
    let (mut client_in, mut client_out) = client.into_split();
    let (mut server_in, mut server_out) = server.into_split();
    tokio::select! {
        () = pump(&mut client_in, &mut server_out, cut.clone(), ends) => {}
        () = pump(&mut server_in, &mut client_out, cut.clone(), ends) => {}
    }
}

async fn open(cut: &mut watch::Receiver<BTreeSet<u64>>, ends: [u64; 2]) {
    let _ = cut
        .wait_for(|cut| !ends.iter().any(|end| cut.contains(end)))
        .await;
}

async fn pump(
    from: &mut (impl AsyncReadExt + Unpin),
    to: &mut (impl AsyncWriteExt + Unpin),
    mut cut: watch::Receiver<BTreeSet<u64>>,
    ends: [u64; 2],
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let Ok(read) = from.read(&mut buffer).await else {
            return;
        };
        if read == 0 {
            return;
        }
        open(&mut cut, ends).await;
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

/// Who sent a hello: version byte, protocol, purpose, cluster (32 bytes or a text), sender.
fn sender(hello: &[u8]) -> Option<u64> {
    let after = match hello.get(3)? {
        0 => 4 + 32,
        _ => 5 + usize::from(*hello.get(4)?),
    };
    hello.get(after).map(|id| u64::from(*id))
}
