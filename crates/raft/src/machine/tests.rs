//! The machine with both logs: openraft's own suite, and one node from start to restart.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use futures::stream;
use openraft::StorageError;
use openraft::error::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};
use openraft::storage::RaftLogStorage;
use openraft::testing::log::{StoreBuilder, Suite};
use regent_state::operation::InitCluster;
use regent_state::{Caller, Operation, decode_applied};
use regent_types::{ClusterId, TemplateName, UserName};
use tempfile::TempDir;

use super::*;
use crate::config::{Proposal, SnapshotPolicy, Timing, Vote, raft_config};
use crate::log::{LogStore, MemoryDisk};

async fn open(engine: Arc<dyn crate::log::Engine>, data: &Path) -> (Log, Machine, Published) {
    let log = Log::open(engine).unwrap();
    let (machine, published) = Machine::open(data, &log).await.unwrap();
    (log, machine, published)
}

struct OnDisk(LogStore);

impl StoreBuilder<TypeConfig, Log, Machine, TempDir> for OnDisk {
    async fn build(&self) -> Result<(TempDir, Log, Machine), StorageError<TypeConfig>> {
        let data = tempfile::tempdir().unwrap();
        let engine = crate::log::open(data.path(), self.0).unwrap();
        let (log, machine, _) = open(engine, data.path()).await;
        Ok((data, log, machine))
    }
}

struct InMemory;

impl StoreBuilder<TypeConfig, Log, Machine, TempDir> for InMemory {
    async fn build(&self) -> Result<(TempDir, Log, Machine), StorageError<TypeConfig>> {
        let data = tempfile::tempdir().unwrap();
        let (log, machine, _) = open(MemoryDisk::default().engine(), data.path()).await;
        Ok((data, log, machine))
    }
}

#[tokio::test]
async fn openrafts_suite_passes_on_sled() {
    let _alone = crate::log::ONE_SLED.lock().await;
    Suite::test_all(OnDisk(LogStore::Sled)).await.unwrap();
}

#[tokio::test]
async fn openrafts_suite_passes_on_segments() {
    Suite::test_all(OnDisk(LogStore::Segments)).await.unwrap();
}

#[tokio::test]
async fn openrafts_suite_passes_in_memory() {
    Suite::test_all(InMemory).await.unwrap();
}

/// Number 1 gives the cluster its identity, without which nothing else is done; the others put a template
/// whose text is `len` bytes that do not compress well.
pub(crate) fn request(number: u64, len: usize) -> Request {
    if number == 1 {
        return Request {
            caller: Caller::Node(NodeId(1)),
            idempotency: None,
            operation: Operation::InitCluster(InitCluster {
                cluster_id: ClusterId::new("test").unwrap(),
                feature_level: 1,
                admin: UserName::new("admin").unwrap(),
                password_hash: None,
                token: None,
            }),
        };
    }
    let mut text = format!("{{\"n\":{number},\"x\":\"");
    let mut seed = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    while text.len() < len {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        write!(text, "{seed:016x}").expect("a String takes everything");
    }
    text.push_str("\"}");
    Request {
        caller: Caller::Node(NodeId(1)),
        idempotency: None,
        operation: Operation::PutTemplate {
            name: TemplateName::new(format!("t{number}")).unwrap(),
            manifest: text,
            cpu: 100,
            memory: 1 << 20,
            create_only: false,
            if_match: None,
        },
    }
}

pub(crate) fn entry(index: u64, len: usize) -> Entry {
    let body = Bytes::from(request(index, len).encode());
    let log_id = LogId {
        leader_id: LeaderId { term: 1, node_id: 1 },
        index,
    };
    Entry {
        log_id,
        payload: Payload::Normal(Proposal {
            at: 1_000 + index,
            body,
        }),
    }
}

async fn apply(machine: &mut Machine, entries: impl IntoIterator<Item = Entry>) -> Result<(), io::Error> {
    let items: Vec<_> = entries.into_iter().map(|entry| Ok((entry, None))).collect();
    machine.apply(stream::iter(items)).await
}

#[tokio::test]
async fn two_machines_agree_and_a_snapshot_equals_the_replay() {
    let data = tempfile::tempdir().unwrap();
    let (_, mut one, published) = open(MemoryDisk::default().engine(), data.path()).await;
    apply(&mut one, (1..=300).map(|i| entry(i, 200))).await.unwrap();
    assert_eq!(published.load().applied_index, 300);
    assert_eq!(*published.subscribe().borrow(), Revision(300));
    assert_eq!(
        published
            .checkpoints()
            .iter()
            .map(|c| c.index)
            .collect::<Vec<_>>(),
        [64, 128, 192, 256]
    );

    let other_data = tempfile::tempdir().unwrap();
    let (_, mut two, other) = open(MemoryDisk::default().engine(), other_data.path()).await;
    apply(&mut two, (1..=150).map(|i| entry(i, 200))).await.unwrap();
    assert_eq!(other.checkpoints(), published.checkpoints()[..2]);
    let snapshot = one.get_snapshot_builder().await.build_snapshot().await.unwrap();
    two.install_snapshot(&snapshot.meta, snapshot.snapshot)
        .await
        .unwrap();
    assert_eq!(other.load().applied_index, 300);
    assert!(
        other.checkpoints().is_empty(),
        "digests of entries that it did not apply say nothing"
    );

    // Both go on from there and stay equal, rolling digest included.
    apply(&mut one, (301..=400).map(|i| entry(i, 200))).await.unwrap();
    apply(&mut two, (301..=400).map(|i| entry(i, 200))).await.unwrap();
    assert_eq!(
        other.load().state.content_digest(),
        published.load().state.content_digest()
    );
    assert_eq!(other.checkpoints(), published.checkpoints()[4..]);
}

#[tokio::test]
async fn an_entry_that_does_not_decode_stops_the_machine_after_the_ones_before_it() {
    let data = tempfile::tempdir().unwrap();
    let (_, mut machine, published) = open(MemoryDisk::default().engine(), data.path()).await;
    let mut broken = entry(3, 50);
    broken.payload = Payload::Normal(Proposal {
        at: 0,
        body: Bytes::from_static(&[0xff, 1, 2]),
    });
    let refused = apply(&mut machine, [entry(1, 50), entry(2, 50), broken, entry(4, 50)])
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("operation at index 3"), "{refused}");
    assert_eq!(published.load().applied_index, 2);
}

#[tokio::test]
async fn a_start_takes_the_newest_snapshot_and_refuses_a_gap() {
    let data = tempfile::tempdir().unwrap();
    let disk = MemoryDisk::default();
    let digest = {
        let (_, mut machine, published) = open(disk.engine(), data.path()).await;
        apply(&mut machine, (1..=10).map(|i| entry(i, 50))).await.unwrap();
        machine
            .get_snapshot_builder()
            .await
            .build_snapshot()
            .await
            .unwrap();
        apply(&mut machine, (11..=20).map(|i| entry(i, 50)))
            .await
            .unwrap();
        machine
            .get_snapshot_builder()
            .await
            .build_snapshot()
            .await
            .unwrap();
        published.load().state.content_digest()
    };
    let (mut log, mut machine, published) = open(disk.engine(), data.path()).await;
    assert_eq!(published.load().state.content_digest(), digest);
    assert_eq!(published.load().revision, Revision(20));
    assert_eq!(machine.applied_state().await.unwrap().0.unwrap().index, 20);

    // The log forgets more than the snapshots remember.
    log.purge(LogId {
        leader_id: LeaderId { term: 1, node_id: 1 },
        index: 25,
    })
    .await
    .unwrap();
    let Err(refused) = Machine::open(data.path(), &log).await.map(drop) else {
        panic!("entries 21 to 25 are nowhere");
    };
    assert!(
        refused.to_string().contains("the log begins after index 25"),
        "{refused}"
    );
}

/// One node needs no network.
#[derive(Clone)]
struct NoNetwork;

impl RaftNetworkFactory<TypeConfig> for NoNetwork {
    type Network = Self;
    async fn new_client(&mut self, _: u64, _: &Member) -> Self {
        self.clone()
    }
}

fn nobody() -> Unreachable<TypeConfig> {
    Unreachable::from_string("there is nobody")
}

impl RaftNetworkV2<TypeConfig> for NoNetwork {
    type SnapshotData = SnapshotFile;

    async fn append_entries(
        &mut self,
        _: AppendEntriesRequest<TypeConfig>,
        _: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        Err(nobody().into())
    }

    async fn vote(
        &mut self,
        _: VoteRequest<TypeConfig>,
        _: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        Err(nobody().into())
    }

    async fn full_snapshot(
        &mut self,
        _: Vote,
        _: Snapshot<LeaderId, u64, Member, SnapshotFile>,
        _: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        Err(nobody().into())
    }
}

/// Entries between snapshots.
const EVERY: u64 = 100;

async fn start(log: Log, machine: Machine) -> Raft {
    let policy = SnapshotPolicy {
        every: EVERY,
        keep: 20,
    };
    let config = raft_config("test", &Timing::default(), &policy).unwrap();
    Raft::new(1, Arc::new(config), NoNetwork, log, machine)
        .await
        .unwrap()
}

/// Everything together: writes, snapshots by policy, purge, stop, start, and the state is the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_node_comes_back_as_it_was() {
    let _alone = crate::log::ONE_SLED.lock().await;
    for store in [LogStore::Sled, LogStore::Segments] {
        let data = tempfile::tempdir().unwrap();
        let (log, machine, published) =
            open(crate::log::open(data.path(), store).unwrap(), data.path()).await;
        let mut ended = log.ended();
        let raft = start(log.clone(), machine).await;
        raft.initialize(BTreeMap::from([(1, Member::default())]))
            .await
            .unwrap();
        raft.wait(Some(Duration::from_secs(20)))
            .current_leader(1, "it elects itself")
            .await
            .unwrap();

        for round in 0..10 {
            let proposals = (1..=50).map(|i| {
                let body = Bytes::from(request(round * 50 + i, 300).encode());
                Proposal {
                    at: 1_000 + round,
                    body,
                }
            });
            let mut results = raft.client_write_many(proposals).await.unwrap();
            while let Some(result) = results.next().await {
                let reply = result.unwrap().unwrap().response;
                assert!(
                    published.load().revision.0 >= reply.revision,
                    "answered before it was published"
                );
                decode_applied(&reply.applied)
                    .unwrap()
                    .expect("a node may put templates");
            }
        }
        // No snapshot is due then, so none is being written when the folder is opened again.
        raft.wait(Some(Duration::from_mins(1)))
            .metrics(
                |m| {
                    let applied = m.last_applied.map_or(0, |id| id.index);
                    m.snapshot
                        .is_some_and(|s| s.index >= 400 && applied < s.index + EVERY)
                        && m.purged.is_some_and(|p| p.index >= 300)
                },
                "the last snapshot is written, and the log behind it purged",
            )
            .await
            .unwrap();
        let before = published.load();
        raft.shutdown().await.unwrap();
        drop((raft, log));
        while ended.changed().await.is_ok() {}

        let (log, machine, published) =
            open(crate::log::open(data.path(), store).unwrap(), data.path()).await;
        assert!(
            published.load().applied_index >= 400,
            "the snapshot alone reaches so far"
        );
        let mut ended = log.ended();
        let raft = start(log, machine).await;
        raft.wait(Some(Duration::from_secs(20)))
            .applied_index_at_least(Some(before.applied_index), "replayed")
            .await
            .unwrap();
        assert_eq!(
            published.load().state.content_digest(),
            before.state.content_digest()
        );
        raft.shutdown().await.unwrap();
        drop(raft);
        while ended.changed().await.is_ok() {}
    }
}
