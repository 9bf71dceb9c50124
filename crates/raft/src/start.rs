//! Starting a node: store, identity, peer port, tasks, and in the background openraft.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use openraft::error::{InitializeError, RaftError};
use regent_types::NodeId;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::clock::ClusterClock;
use crate::config::{Member, raft_config};
use crate::error::StartError;
use crate::forming;
use crate::identity::{Identity, Record, Settlement, members_text};
use crate::log::{self, Log, LogError};
use crate::machine::{Machine, Raft};
use crate::node::{Halt, LeadershipView, Node, PeerService, Shared};
use crate::offload::Offload;
use crate::options::{Options, Storage};
use crate::roster::Roster;
use crate::sockets::Port;
use crate::transport::listener;
use crate::transport::network::Factory;
use crate::transport::peers::Peers;
use crate::{members, propose, read, watch as watching};

/// Name of the identity record in the log store's metadata.
const IDENTITY: &str = "identity";

/// How long a follower may leave a replication request unanswered before its connection is made anew:
/// well over the time of a slow sync, since giving up resends everything that is under way.
const REPLICATION_PATIENCE: Duration = Duration::from_secs(5);

/// See [`Node::start`].
pub(crate) async fn start(options: Options, service: Arc<dyn PeerService>) -> Result<Node, StartError> {
    // Settings are checked before anything is touched; the cluster's name is not known yet.
    raft_config("regent", &options.timing, &options.snapshots)
        .map_err(|e| StartError::Config(e.to_string()))?;

    let log = open_log(options.storage.clone(), &options.data).await?;
    let record = load_record(&log, &options).await?;
    let (machine, published) = Machine::open(&options.data, &log).await?;
    let roster = Roster::new(published.clone());
    let listener = listen(&options).await.map_err(StartError::Listen)?;

    let identity = Arc::new(Identity::new(
        record,
        options.members.clone(),
        roster.clone(),
        options.secret.clone(),
        options.sockets.clone(),
    ));
    let stop = CancellationToken::new();
    let peers = Arc::new(Peers::new(&identity, watching::PATIENCE, &stop));
    let (proposals, proposal_ends) = propose::queues();
    let (reads, read_end) = read::queue();
    let applied = published.load().state.now();
    let shared = Arc::new(Shared {
        node: options.node,
        members: options.members,
        advertise_peer: options.advertise_peer,
        advertise_http: options.advertise_http,
        data: options.data,
        offload: log.offload(),
        timing: options.timing,
        identity,
        roster,
        roster_changed: Notify::new(),
        settled: Notify::new(),
        log: Mutex::new(Some(log.clone())),
        peers,
        service,
        raft: OnceLock::new(),
        published,
        leadership: watch::Sender::new(LeadershipView::default()),
        halt: watch::Sender::new(None),
        quorum_lost: Mutex::new(None),
        clock: Mutex::new(ClusterClock::new(applied, Duration::ZERO)),
        started: Instant::now(),
        proposals,
        reads,
        reports: Mutex::default(),
        alarms: Mutex::default(),
        clock_offset_ms: 0.into(),
        waiting: Mutex::new("the other members".to_owned()),
        stop: stop.clone(),
        tasks: TaskTracker::new(),
    });

    let tasks = shared.tasks.clone();
    tasks.spawn(listener::run(
        listener,
        shared.identity.clone(),
        shared.clone(),
        tasks.clone(),
        stop,
    ));
    tasks.spawn(propose::run(shared.clone(), proposal_ends));
    tasks.spawn(read::run(shared.clone(), read_end));
    tasks.spawn(watching::watch_quorum(shared.clone()));
    tasks.spawn(watching::end_on_failure(shared.clone()));
    tasks.spawn(watching::watch_store(shared.clone(), log.failed()));
    shared.peers.set(&shared.known_members());
    tasks.spawn(members::follow(shared.clone()));
    let snapshots = options.snapshots;
    tasks.spawn({
        let shared = shared.clone();
        async move {
            let run = boot(&shared, log, machine, &snapshots);
            let result = tokio::select! {
                result = run => result,
                () = shared.stop.cancelled() => return,
            };
            if let Err(why) = result {
                shared.halt(Halt::Failed(why));
            }
        }
    });
    Ok(Node { shared })
}

/// Opens what keeps log and vote.
pub(crate) async fn open_log(storage: Storage, data: &Path) -> Result<Log, StartError> {
    let data = data.to_owned();
    let store = match storage {
        Storage::Memory(disk) => return Ok(Log::in_memory(disk)?),
        Storage::Disk(store) => store,
    };
    let opened = Offload::Threads.run(move || Log::open(log::open(&data, store)?));
    Ok(opened
        .await
        .map_err(|error| StartError::Raft(error.to_string()))??)
}

/// The identity of the data folder, made now if the folder is new.
async fn load_record(log: &Log, options: &Options) -> Result<Record, StartError> {
    if let Some(record) = stored_record(log, &options.data, options.node)? {
        return Ok(record);
    }
    // Only who founds a cluster is named in a list; who joins one has a record by now.
    if !options.members.contains_key(&options.node) {
        return Err(StartError::NotAMember {
            node: options.node,
            members: members_text(&options.members),
        });
    }
    let record = Record::new(options.node);
    store_record(log, &record).await?;
    Ok(record)
}

/// The identity of the data folder, if it has one.
pub(crate) fn stored_record(log: &Log, data: &Path, node: NodeId) -> Result<Option<Record>, StartError> {
    let Some(record) = whose(log, data)? else {
        return Ok(None);
    };
    if record.node != node.0 {
        return Err(StartError::NodeIdChanged {
            data: data.to_owned(),
            found: NodeId(record.node),
            given: node,
        });
    }
    Ok(Some(record))
}

/// The identity of the data folder, whosever it is.
pub(crate) fn whose(log: &Log, data: &Path) -> Result<Option<Record>, LogError> {
    let damaged = |what| LogError::Damaged {
        place: data.display().to_string(),
        what,
    };
    let Some(bytes) = log.get_metadata(IDENTITY)? else {
        if log.is_pristine() {
            return Ok(None);
        }
        return Err(damaged("the identity record is missing".to_owned()));
    };
    Record::decode(&bytes)
        .map(Some)
        .map_err(|error| damaged(format!("the identity record: {error}")))
}

/// Stores the identity, synced.
pub(crate) async fn store_record(log: &Log, record: &Record) -> Result<(), LogError> {
    log.put_metadata(IDENTITY, &record.encode()).await
}

async fn listen(options: &Options) -> std::io::Result<Box<dyn Port>> {
    match &options.listener {
        Some(listener) => {
            let listener = listener.try_clone()?;
            listener.set_nonblocking(true)?;
            Ok(Box::new(tokio::net::TcpListener::from_std(listener)?))
        }
        None => options.sockets.bind(options.listen).await,
    }
}

/// Settles the identity, starts openraft, and on the founder initialises the cluster.
async fn boot(
    shared: &Arc<Shared>,
    log: Log,
    machine: Machine,
    snapshots: &crate::config::SnapshotPolicy,
) -> Result<(), String> {
    forming::settle(shared).await?;
    let settlement = shared
        .identity
        .settlement()
        .expect("`settle` returns once there is one");
    tracing::info!(node = %shared.node, cluster = settlement.cluster, "the identity is settled");
    shared.set_waiting("consensus to start");

    let config =
        raft_config(&settlement.cluster, &shared.timing, snapshots).map_err(|error| error.to_string())?;
    let factory = Factory {
        identity: shared.identity.clone(),
        peers: shared.peers.clone(),
        patience: REPLICATION_PATIENCE,
    };
    let raft = Raft::new(shared.node.0, Arc::new(config), factory, log, machine)
        .await
        .map_err(|error| error.to_string())?;
    shared
        .tasks
        .spawn(watching::follow_raft(shared.clone(), raft.clone()));
    if shared.raft.set(raft.clone()).is_err() {
        unreachable!("a node boots once");
    }

    let initialized = raft.is_initialized().await.map_err(|error| error.to_string())?;
    if shared.identity.is_founder() && !initialized {
        forming::announce(shared, &settlement).await;
        forming::wait_for_links(shared).await;
        initialize(&raft, &settlement).await?;
    }
    Ok(())
}

async fn initialize(raft: &Raft, settlement: &Settlement) -> Result<(), String> {
    let members: BTreeMap<u64, Member> = settlement
        .members
        .iter()
        .map(|(id, settled)| (*id, settled.member.clone()))
        .collect();
    match raft.initialize(members).await {
        // Not allowed: already done by an earlier start, as its entry shows.
        Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}
