//! Starting and stopping a node.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use regent_raft::{
    ClusterSecret, Node, Places, SecretTooShort, Sockets, StartError, Storage, Tcp, Timing, Tls,
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::leader::{self, Leader};
use crate::options::Options;
use crate::service::Service;
use crate::{
    activity, backups, bootstrap, describe, dispatch, gateway, http, keepalive, listener, membership, peer,
    reconcile, waiting,
};

/// How often a node that starts looks whether it serves; what that depends on has no one event.
const READY_EVERY: Duration = Duration::from_millis(100);
/// How long agents may take to be let go, their disconnects written.
const LET_GO_WITHIN: Duration = Duration::from_millis(1_500);
/// How long requests in flight may take to finish.
const FINISH_WITHIN: Duration = Duration::from_secs(1);
/// How long the leadership and the store may take; with the two above it stays below 5 s.
const NODE_WITHIN: Duration = Duration::from_millis(2_300);

/// Why a node could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The options contradict themselves.
    #[error("{0}")]
    Options(String),
    /// The cluster secret is too short.
    #[error(transparent)]
    Secret(#[from] SecretTooShort),
    /// The port of REST and gateway, or that of the peers, could not be opened.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Log, snapshots or peer transport could not be started.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// A running node.
pub struct Server {
    service: Service,
    http_addr: SocketAddr,
    peer_addr: SocketAddr,
    /// Ends the serving of HTTP.
    http_stop: CancellationToken,
    http: JoinHandle<()>,
    /// Ends everything else.
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Server {
    /// Opens ports and data folder and starts everything. Returns as soon as requests are answered; that
    /// the cluster is formed and serves is for `/readyz` to say.
    pub async fn start(mut options: Options) -> Result<Self, Error> {
        options.check().map_err(Error::Options)?;
        regent_tls::install_provider();
        let tls = options.tls.clone();
        let (http_port, peer_listener) = open(&mut options).await?;
        let (http_addr, peer_addr) = (options.http, options.peer);
        if options.advertise_http.is_empty() {
            let scheme = if tls.is_some() { "https" } else { "http" };
            options.advertise_http = format!("{scheme}://{http_addr}");
        }
        if options.advertise_peer.is_empty() {
            options.advertise_peer = peer_addr.to_string();
        }
        if options.members.is_empty() {
            options
                .members
                .insert(options.node, options.advertise_peer.clone());
        }

        let leader = Arc::new(Leader::default());
        let storage = match &options.memory {
            Some(disk) => Storage::Memory(disk.clone()),
            None => Storage::Disk(options.log_store),
        };
        let raft = regent_raft::Options {
            node: options.node,
            data: options.data.clone(),
            listen: peer_addr,
            advertise_peer: options.advertise_peer.clone(),
            advertise_http: options.advertise_http.clone(),
            members: options.members.clone(),
            secret: ClusterSecret::new(&options.secret)?,
            timing: Timing::default(),
            snapshots: options.snapshots.clone(),
            listener: peer_listener,
            sockets: sockets(&options),
            storage,
        };
        let node = Node::start(raft, Arc::new(peer::Service::new(leader.clone()))).await?;
        // A simulated machine's disk is in memory, and the room on the real one is nothing that it may know.
        leader.attach(
            node.clone(),
            options.memory.is_none().then(|| options.data.clone()),
        );

        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let leases = keepalive::Handle::spawn(leader.clone(), stop.clone());
        let activity = activity::Handle::new(leases.clone());
        let http_stop = CancellationToken::new();
        let service = Service::new(node.clone(), options, leases, activity, http_stop.clone());
        tasks.spawn(leader::run(leader.clone(), node, stop.clone()));
        tasks.spawn(dispatch::run(service.clone(), stop.clone()));
        tasks.spawn(gateway::cutoff::run(service.clone(), stop.clone()));
        tasks.spawn(gateway::sweep::run(service.clone(), stop.clone()));
        tasks.spawn(waiting::run(service.clone(), stop.clone()));
        tasks.spawn(reconcile::run(service.clone(), leader, stop.clone()));
        tasks.spawn(bootstrap::run(service.clone(), stop.clone()));
        tasks.spawn(backups::run(service.clone(), stop.clone()));
        tasks.spawn(describe::run(service.clone(), stop.clone()));
        tasks.spawn(membership::run(service.clone(), stop.clone()));
        if let Some(credentials) = tls {
            tasks.spawn(credentials.follow(stop.clone()));
        }
        tasks.spawn(service.clone().confirm(stop.clone()));
        tasks.close();

        let router = http::router(service.clone());
        let places = Places::new(service.options().limits.connections_per_address);
        let http = tokio::spawn(http_port.serve(router, places, http_stop.clone()));
        tracing::info!(node = %service.id(), http = %http_addr, peer = %peer_addr, "node started");
        Ok(Self {
            service,
            http_addr,
            peer_addr,
            http_stop,
            http,
            stop,
            tasks,
        })
    }

    /// Where REST and the agent gateway listen.
    pub fn http_addr(&self) -> SocketAddr {
        self.http_addr
    }

    /// Where the peer transport listens.
    pub fn peer_addr(&self) -> SocketAddr {
        self.peer_addr
    }

    /// The replicated state of this node, for a simulation that compares nodes.
    #[doc(hidden)]
    pub fn node(&self) -> &Node {
        self.service.node()
    }

    /// Waits until the node serves, as `/readyz` would say.
    pub async fn ready(&self) {
        while self.service.is_ready().is_err() {
            tokio::time::sleep(READY_EVERY).await;
        }
    }

    /// Waits until the node cannot go on, and gives the reason. The process should then end with an error.
    pub async fn failed(&self) -> String {
        self.service.node().failed().await
    }

    /// Stops in order, within 5 s: lets its agents go to other nodes, accepts nothing more and finishes
    /// what is in flight, hands the leadership over, closes the store.
    pub async fn shutdown(self) {
        tracing::info!(node = %self.service.id(), "node stopping");
        self.service.start_draining();
        self.service
            .registry()
            .let_go("this node is stopping; connect to another");
        let mut count = self.service.registry().count();
        if tokio::time::timeout(LET_GO_WITHIN, count.wait_for(|count| *count == 0))
            .await
            .is_err()
        {
            tracing::warn!("some agents were not let go in time");
        }
        // Ends long answers (event streams) too.
        self.http_stop.cancel();
        let abort = self.http.abort_handle();
        if tokio::time::timeout(FINISH_WITHIN, self.http).await.is_err() {
            tracing::warn!("some requests were not finished in time");
            abort.abort();
        }
        if tokio::time::timeout(NODE_WITHIN, self.service.node().shutdown())
            .await
            .is_err()
        {
            tracing::warn!("the store was not closed in time");
        }
        self.stop.cancel();
        self.tasks.wait().await;
        tracing::info!(node = %self.service.id(), "node stopped");
    }
}

/// What the nodes talk over.
fn sockets(options: &Options) -> Arc<dyn Sockets> {
    match (&options.sockets, &options.tls) {
        (Some(simulated), _) => simulated.clone(),
        (None, Some(credentials)) => Arc::new(Tls::new(credentials.clone())),
        (None, None) => Arc::new(Tcp),
    }
}

/// The port of REST and gateway.
enum HttpPort {
    Tcp(tokio::net::TcpListener),
    Tls(listener::Secured),
    Simulated(listener::Simulated),
}

impl HttpPort {
    async fn serve(self, router: axum::Router, places: Places, stop: CancellationToken) {
        match self {
            Self::Tcp(listener) => listener::serve(listener, router, places, stop).await,
            Self::Tls(listener) => listener::serve(listener, router, places, stop).await,
            Self::Simulated(port) => listener::serve(port, router, places, stop).await,
        }
    }
}

/// Opens both ports and notes their addresses. In a simulation the peers' is opened by who serves it.
async fn open(options: &mut Options) -> Result<(HttpPort, Option<TcpListener>), Error> {
    if let Some(sockets) = &options.sockets {
        let address = options.http;
        let port = sockets.bind(address).await;
        let port = port.map_err(|source| Error::Listen { address, source })?;
        return Ok((HttpPort::Simulated(listener::Simulated(port)), None));
    }
    let http = listen(options.http_listener.take(), options.http)?;
    let peer = listen(options.peer_listener.take(), options.peer)?;
    (options.http, options.peer) = (address(&http)?, address(&peer)?);
    let address = options.http;
    let http = tokio::net::TcpListener::from_std(http).map_err(|source| Error::Listen { address, source })?;
    let port = match &options.tls {
        Some(credentials) => HttpPort::Tls(listener::Secured::new(http, credentials.clone())),
        None => HttpPort::Tcp(http),
    };
    Ok((port, Some(peer)))
}

fn listen(given: Option<TcpListener>, on: SocketAddr) -> Result<TcpListener, Error> {
    let open = || -> std::io::Result<TcpListener> {
        let listener = match given {
            Some(listener) => listener,
            None => TcpListener::bind(on)?,
        };
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    open().map_err(|source| Error::Listen { address: on, source })
}

fn address(listener: &TcpListener) -> Result<SocketAddr, Error> {
    let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
    listener.local_addr().map_err(|source| Error::Listen {
        address: unknown,
        source,
    })
}
