//! Damaged snapshots, by real processes on real folders: three nodes, each a process of its own over its own sled
//! database, killed with -9. A snapshot that is torn, cut or altered is never used and never installed elsewhere;
//! the node has its state again, the same as the others', from an older one and its log or from another node.
//!
//! This program is also the node: started with `REGENT_TEST_NODE` it runs one and answers questions on a socket.

// All of it is a test. What is measured goes to stderr.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use regent_raft::{ClusterSecret, LogStore, Node, Options, SnapshotPolicy, Storage, Timing};
use regent_state::operation::InitCluster;
use regent_state::{Caller, Operation, Request};
use regent_types::{NodeId, TokenId, UserName};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};

use support::{Echo, PATIENCE, SECRET, make_user, soon, until};

/// Tells this program that it is a node: id, folder, ports of all, entries between snapshots, entries kept.
const NODE: &str = "REGENT_TEST_NODE";

/// How often what needs a purged log is tried.
const TRIES: usize = 5;

/// A way to spoil a file.
type Damage = fn(&mut Vec<u8>);
const DAMAGES: [(&str, Damage); 4] = [
    ("cut", |bytes| bytes.truncate(bytes.len() * 2 / 3)),
    ("a flipped bit", |bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
    }),
    ("torn", |bytes| {
        let third = bytes.len() / 3;
        bytes[third..2 * third].fill(0);
    }),
    ("empty", Vec::clear),
];

#[tokio::test]
async fn a_node_whose_newest_snapshot_is_damaged_has_its_state_from_an_older_one_and_the_log() {
    if let Ok(node) = std::env::var(NODE) {
        return be_a_node(&node).await;
    }
    let mut cluster = Cluster::start(SnapshotPolicy { every: 30, keep: 60 }).await;
    let leader = cluster.leader().await;
    let victim = cluster.other_than(&[leader]);
    for (how, damage) in DAMAGES {
        cluster.write(40).await;
        cluster.same_state().await;
        cluster.kill(victim);
        let newest = cluster.snapshots(victim).pop().expect("there is a snapshot");
        spoil(&newest, damage);
        // What it misses meanwhile.
        cluster.write(3).await;
        cluster.spawn(victim);
        cluster.same_state().await;
        let aside = newest.with_extension("damaged");
        assert!(aside.exists(), "{how}: {} is set aside", newest.display());
        let log = cluster.log(victim);
        let named = |line: &&str| line.contains(newest.to_str().unwrap()) && line.contains("is damaged");
        assert!(
            log.lines().any(|line| named(&line)),
            "{how}: the file is named: {log}"
        );
    }
}

#[tokio::test]
async fn a_snapshot_that_is_damaged_at_the_leader_is_not_installed_and_a_new_one_is_sent() {
    let mut cluster = Cluster::start(SnapshotPolicy { every: 30, keep: 5 }).await;
    let leader = cluster.leader().await;
    let lagging = cluster.other_than(&[leader]);
    for (how, damage) in DAMAGES {
        // A leader may keep a part of its log for a moment longer; then no snapshot is needed, and it is done again.
        let mut named = false;
        for _ in 0..TRIES {
            cluster.kill(lagging);
            cluster.write(80).await;
            // Whichever of the two leads, and whichever file it sends.
            let mut spoiled = Vec::new();
            for node in cluster.running() {
                spoiled.extend(cluster.snapshots(node));
            }
            for snapshot in &spoiled {
                spoil(snapshot, damage);
            }
            cluster.spawn(lagging);
            let begun = std::time::Instant::now();
            cluster.same_state().await;
            eprintln!("{how}: the same state after {:?}", begun.elapsed());
            let log = cluster.log(cluster.leader().await);
            let aside = |path: &&PathBuf| path.with_extension("damaged").exists();
            named = spoiled
                .iter()
                .filter(aside)
                .any(|path| log.contains(path.to_str().unwrap()));
            if named {
                break;
            }
        }
        assert!(named, "{how}: the file is named and set aside");
        let log = cluster.log(lagging);
        assert!(
            log.contains("a snapshot from the leader is installed"),
            "{how}: {log}"
        );
    }
    cluster.all_still_run();
}

#[tokio::test]
async fn a_node_without_any_good_snapshot_is_refused_and_takes_one_of_another_node() {
    let mut cluster = Cluster::start(SnapshotPolicy { every: 30, keep: 5 }).await;
    let leader = cluster.leader().await;
    let victim = cluster.other_than(&[leader]);
    cluster.write(100).await;
    cluster.same_state().await;
    cluster.kill(victim);
    let snapshots = cluster.snapshots(victim);
    for snapshot in &snapshots {
        spoil(snapshot, DAMAGES[1].1);
    }
    cluster.spawn(victim);
    let status = cluster.ends(victim).await;
    assert_eq!(status.code(), Some(1));
    let log = cluster.log(victim);
    assert!(log.contains("the log begins after index"), "{log}");
    for snapshot in &snapshots {
        assert!(
            log.contains(snapshot.to_str().unwrap()),
            "every file is named: {log}"
        );
        assert!(snapshot.exists(), "a refused start changes nothing");
    }
    cluster.write(10).await;

    // The way back that it names.
    let whole = cluster.snapshots(leader).pop().expect("there is one");
    let taken = cluster
        .data(victim)
        .join("snapshots")
        .join(whole.file_name().unwrap());
    assert!(
        log.contains(taken.parent().unwrap().to_str().unwrap()),
        "the folder is named: {log}"
    );
    fs::copy(&whole, &taken).unwrap();
    cluster.spawn(victim);
    cluster.same_state().await;
    cluster.write(10).await;
    cluster.same_state().await;
}

fn spoil(file: &Path, damage: Damage) {
    let mut bytes = fs::read(file).unwrap();
    damage(&mut bytes);
    fs::write(file, bytes).unwrap();
}

/// Three processes.
struct Cluster {
    folder: TempDir,
    policy: SnapshotPolicy,
    ports: Vec<u16>,
    nodes: BTreeMap<u64, Child>,
    written: usize,
}

impl Cluster {
    async fn start(policy: SnapshotPolicy) -> Self {
        let mut cluster = Self {
            folder: tempfile::Builder::new().prefix("regent-test-").tempdir().unwrap(),
            policy,
            ports: free_ports(3),
            nodes: BTreeMap::new(),
            written: 0,
        };
        for id in 1..=3 {
            cluster.spawn(id);
        }
        let leader = cluster.leader().await;
        let done = until("the cluster is initialised", || cluster.ask(leader, "init")).await;
        assert_eq!(done, "done");
        cluster
    }

    fn data(&self, id: u64) -> PathBuf {
        self.folder.path().join(format!("node-{id}"))
    }

    fn spawn(&mut self, id: u64) {
        let data = self.data(id);
        fs::create_dir_all(&data).unwrap();
        let log = fs::File::create(data.with_extension("log")).unwrap();
        let SnapshotPolicy { every, keep } = self.policy;
        let ports: Vec<String> = self.ports.iter().map(ToString::to_string).collect();
        let test = "a_node_whose_newest_snapshot_is_damaged_has_its_state_from_an_older_one_and_the_log";
        let node = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(
                NODE,
                format!("{id} {} {} {every} {keep}", data.display(), ports.join(",")),
            )
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.nodes.insert(id, node);
    }

    fn kill(&mut self, id: u64) {
        let mut node = self.nodes.remove(&id).expect("it runs");
        node.kill().unwrap();
        node.wait().unwrap();
    }

    fn running(&self) -> Vec<u64> {
        self.nodes.keys().copied().collect()
    }

    fn other_than(&self, these: &[u64]) -> u64 {
        *self
            .nodes
            .keys()
            .find(|id| !these.contains(id))
            .expect("there are three")
    }

    /// Asks a node, which answers in one line.
    fn ask(&self, id: u64, question: &str) -> Option<String> {
        let mut socket = UnixStream::connect(self.data(id).with_extension("socket")).ok()?;
        socket.set_read_timeout(Some(PATIENCE)).ok()?;
        socket.write_all(format!("{question}\n").as_bytes()).ok()?;
        let mut answer = String::new();
        BufReader::new(socket).read_line(&mut answer).ok()?;
        answer.strip_suffix('\n').map(str::to_owned)
    }

    async fn leader(&self) -> u64 {
        until("a node leads", || {
            self.running().into_iter().find(|id| self.leads(*id))
        })
        .await
    }

    async fn write(&mut self, count: usize) {
        for _ in 0..count {
            self.written += 1;
            let question = format!("write user-{}", self.written);
            until("a write is done", || {
                let leader = self.running().into_iter().find(|id| self.leads(*id))?;
                let answer = self.ask(leader, &question)?;
                // The second answer is that of a write whose first one was lost in an election.
                (answer == "done" || answer.contains("AlreadyExists")).then_some(())
            })
            .await;
        }
    }

    fn leads(&self, id: u64) -> bool {
        self.ask(id, "leads").as_deref() == Some("true")
    }

    /// Waits until all nodes have applied the same, which must then be all that was written.
    async fn same_state(&self) {
        let states = until("all nodes have applied the same", || {
            let states: Vec<String> = (1..=3).map(|id| self.ask(id, "state")).collect::<Option<_>>()?;
            let index = |state: &String| state.split_once(' ').map(|(index, _)| index.to_owned());
            let complete = states[0].ends_with(&format!(" {}", self.written));
            (complete && states.iter().all(|state| index(state) == index(&states[0]))).then_some(states)
        })
        .await;
        assert!(
            states.iter().all(|state| *state == states[0]),
            "the states differ: {states:?}"
        );
    }

    /// The snapshots of a node, oldest first.
    fn snapshots(&self, id: u64) -> Vec<PathBuf> {
        let mut found: Vec<PathBuf> = fs::read_dir(self.data(id).join("snapshots"))
            .unwrap()
            .map(|item| item.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "snapshot"))
            .collect();
        found.sort();
        found
    }

    fn log(&self, id: u64) -> String {
        fs::read_to_string(self.data(id).with_extension("log")).unwrap()
    }

    async fn ends(&mut self, id: u64) -> ExitStatus {
        let mut node = self.nodes.remove(&id).expect("it was started");
        until("the node ends", || node.try_wait().unwrap()).await
    }

    fn all_still_run(&mut self) {
        for (id, node) in &mut self.nodes {
            assert!(node.try_wait().unwrap().is_none(), "node {id} has ended");
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in self.nodes.values_mut() {
            let _ = node.kill();
            let _ = node.wait();
        }
        if std::thread::panicking() {
            self.folder.disable_cleanup(true);
            eprintln!("logs and data are kept in {}", self.folder.path().display());
        }
    }
}

/// Ports that nobody listens on, below those that connections get.
fn free_ports(count: usize) -> Vec<u16> {
    /// Tests of this program that run at the same time begin in different places.
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let begin = u16::try_from(std::process::id() % 1_500).expect("a small number") * 12;
    let mut found = Vec::new();
    while found.len() < count {
        let port = 12_000 + (begin + NEXT.fetch_add(1, Ordering::Relaxed)) % 18_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            found.push(port);
        }
    }
    found
}

/// Runs a node until it is killed, or until it can no longer go on.
async fn be_a_node(what: &str) {
    tracing_subscriber::fmt()
        .with_env_filter("info,openraft=warn")
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    let words: Vec<&str> = what.split(' ').collect();
    let [id, data, ports, every, keep] = words[..] else {
        panic!("{NODE} is {what:?}");
    };
    let (id, data) = (NodeId(id.parse().unwrap()), PathBuf::from(data));
    let addresses = ports.split(',').map(|port| format!("127.0.0.1:{port}"));
    let members: BTreeMap<NodeId, String> = (1..).map(NodeId).zip(addresses).collect();
    let started = Node::start(
        Options {
            node: id,
            data: data.clone(),
            listen: members[&id].parse().unwrap(),
            advertise_peer: members[&id].clone(),
            advertise_http: format!("http://node-{id}"),
            members,
            secret: ClusterSecret::new(SECRET).unwrap(),
            timing: Timing::default(),
            snapshots: SnapshotPolicy {
                every: every.parse().unwrap(),
                keep: keep.parse().unwrap(),
            },
            listener: None,
            sockets: Arc::new(regent_raft::Tcp),
            storage: Storage::Disk(LogStore::Sled),
        },
        Arc::new(Echo),
    )
    .await;
    let node = match started {
        Ok(node) => node,
        Err(error) => {
            eprintln!("cannot start: {:#}", anyhow::Error::from(error));
            std::process::exit(1);
        }
    };
    let path = data.with_extension("socket");
    let _ = fs::remove_file(&path);
    let questions = tokio::net::UnixListener::bind(path).unwrap();
    loop {
        let (socket, _) = tokio::select! {
            why = node.failed() => {
                eprintln!("stopped: {why}");
                std::process::exit(1);
            }
            socket = questions.accept() => socket.unwrap(),
        };
        let (read, mut write) = socket.into_split();
        let question = tokio::io::BufReader::new(read).lines().next_line().await;
        if let Ok(Some(question)) = question {
            let _ = write
                .write_all(format!("{}\n", answer(&node, &question).await).as_bytes())
                .await;
        }
    }
}

async fn answer(node: &Node, question: &str) -> String {
    let request = match question.split_once(' ') {
        Some(("write", name)) => make_user(name),
        None if question == "init" => Request {
            caller: Caller::Node(node.id()),
            idempotency: None,
            operation: Operation::InitCluster(InitCluster {
                cluster_id: node.cluster_id().unwrap(),
                feature_level: 1,
                admin: UserName::new("admin").unwrap(),
                password_hash: None,
                token: Some((TokenId::new("root").unwrap(), [7; 32])),
            }),
        },
        None if question == "leads" => return node.leadership().borrow().mine.is_some().to_string(),
        None if question == "state" => {
            let view = node.view();
            let (content, rolling) = (view.state.content_digest(), view.state.digest());
            let users = view.state.users().len().saturating_sub(1);
            return format!("{} {content:016x} {rolling:016x} {users}", view.applied_index);
        }
        _ => panic!("what is {question:?}"),
    };
    match node.propose(&request, soon()).await {
        Ok(proposed) => proposed
            .applied
            .map_or_else(|why| format!("{why:?}"), |_| "done".to_owned()),
        Err(error) => error.to_string(),
    }
}
