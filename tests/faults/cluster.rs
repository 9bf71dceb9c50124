//! The cluster under test: nodes, each on a host of its own, and an agent of three replicas on another; the clients
//! are on a third kind of host, which is where this process runs its part of the work. Nodes come and go (`seats`).
//!
//! Everything is in one folder, which is kept when a check fails. A node that ends although nobody ended it is
//! noticed: that is a fault too.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use regent_client::Client;
use regent_types::AgentId;
use regent_types::cluster::Cluster as Seen;
use rustix::process::Signal;
use serde_json::json;

use crate::harness::{REGENT, eventually, lifeline, processes_naming, restrict, send};
use crate::network::Network;
use crate::plan::{Change, Plan};
use crate::proxy::{Lateness, Proxy};
use crate::seats::{Program, Seat, Seats};
use crate::workload::sessions::{HOST_LOST, effects_file};

pub(crate) const AGENT: &str = "faults";
pub(crate) const REPLICAS: [&str; 3] = ["a", "b", "c"];
/// How often it is looked what still runs on a host that is lost.
const STOPS: usize = 100;
const ADMIN_TOKEN: &str = "regent_admin_of_a_cluster_that_is_only_tested";
const SECRET: &str = "the secret of a cluster that is only tested";
/// Room for a node's data; what is written in minutes is far less.
const ROOM: &str = "size=512m,mode=700";
/// Entries between two snapshots: some come in every round.
pub(crate) const SNAPSHOT_EVERY: u64 = 400;
/// How long a process may take to end after TERM before that is a fault.
const ENDS_WITHIN: Duration = Duration::from_secs(20);

/// Where Debian puts it.
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// Whether wall clocks can be moved here.
pub(crate) fn has_faketime() -> bool {
    Path::new(FAKETIME).is_file()
}

/// What a process is expected to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    Running,
    /// It was killed, or may end by itself.
    Ended,
}

struct Process {
    child: Option<Child>,
    expected: Expected,
}

/// See the top of this file.
pub(crate) struct Cluster {
    pub(crate) network: Network,
    pub(crate) plan: Plan,
    /// How late the proxies are, when there are any.
    pub(crate) lateness: Lateness,
    pub(crate) seats: Seats,
    folder: PathBuf,
    fault: Option<&'static str>,
    /// The program of the commit before, where nodes run it.
    previous: Option<PathBuf>,
    processes: Mutex<BTreeMap<String, Process>>,
    proxies: Vec<Proxy>,
    mounts: Mutex<Vec<PathBuf>>,
    /// How often each kind of change was made.
    changes: Mutex<BTreeMap<&'static str, usize>>,
}

impl Cluster {
    /// Everything, in a folder; `fault` is seeded in the nodes, and some may run the previous program.
    pub(crate) fn start(
        network: Network,
        folder: &Path,
        plan: Plan,
        fault: Option<&'static str>,
        previous: Option<PathBuf>,
    ) -> Arc<Self> {
        for (name, secret) in [("cluster.secret", SECRET), ("admin.token", ADMIN_TOKEN)] {
            std::fs::write(folder.join(name), secret).unwrap();
            restrict(&folder.join(name));
        }
        let mut founders = vec![Program::This; plan.nodes];
        if let Change::Programs { new } = plan.change {
            founders[new..].fill(Program::Previous);
        }
        let mut cluster = Self {
            network,
            lateness: Lateness::default(),
            seats: Seats::new(&founders, plan.seats()),
            folder: folder.to_owned(),
            fault,
            previous,
            processes: Mutex::default(),
            proxies: Vec::new(),
            mounts: Mutex::default(),
            changes: Mutex::default(),
            plan,
        };
        for node in 0..cluster.plan.seats() {
            if cluster.plan.clocks {
                cluster.move_clock(node, 0);
            }
            if cluster.plan.proxied {
                let (listen, to) = (cluster.peer(node).parse().unwrap(), BEHIND_THE_PROXY);
                let proxy = Proxy::start(&cluster.network, node, listen, to, cluster.lateness.clone());
                cluster.proxies.push(proxy);
            }
        }
        for node in cluster.seats.taken() {
            cluster.make_disk(node);
            cluster.start_node(node);
        }
        Arc::new(cluster)
    }

    /// The host of the clients of a plan.
    pub(crate) fn clients(plan: &Plan) -> usize {
        plan.seats()
    }

    /// The host of the agent.
    pub(crate) fn agents(&self) -> usize {
        self.plan.seats() + 1
    }

    /// Hosts that a cluster of this plan needs: the nodes', the clients', the agent's.
    pub(crate) fn hosts(plan: &Plan) -> usize {
        plan.seats() + 2
    }

    /// A small file system for the data of a node.
    pub(crate) fn make_disk(&self, node: usize) {
        let data = self.data(node);
        std::fs::create_dir_all(&data).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", ROOM, "tmpfs"])
            .arg(&data)
            .status()
            .unwrap();
        assert!(mounted.success(), "a small file system for a node");
        let mut mounts = self.mounts.lock().unwrap_or_else(PoisonError::into_inner);
        mounts.push(data);
    }

    /// The members that stay, by their hosts.
    pub(crate) fn members(&self) -> Vec<usize> {
        self.seats.members()
    }

    /// The process of the node on a host; nobody's, where there is none.
    pub(crate) fn name(&self, node: usize) -> String {
        match self.seats.at(node) {
            Some(seat) => node_name(seat.id),
            None => format!("nobody on host {node}"),
        }
    }

    /// What a process has written so far.
    pub(crate) fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.join(format!("{name}.log"))).unwrap_or_default()
    }

    /// The id of the node on a host.
    pub(crate) fn id(&self, node: usize) -> Option<u64> {
        self.seats.at(node).map(|seat| seat.id)
    }

    /// From now on such a change must have been made at the end.
    pub(crate) fn is_to_change(&self, what: &'static str) {
        self.changes().entry(what).or_default();
    }

    /// One more was made.
    pub(crate) fn has_changed(&self, what: &'static str) {
        *self.changes().entry(what).or_default() += 1;
    }

    /// How often each kind of change was made.
    pub(crate) fn changes(&self) -> std::sync::MutexGuard<'_, BTreeMap<&'static str, usize>> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn data(&self, node: usize) -> PathBuf {
        self.folder.join(self.name(node))
    }

    fn peer(&self, node: usize) -> String {
        format!("{}:7000", self.network.address(node))
    }

    /// Where a node's REST is.
    pub(crate) fn url(&self, node: usize) -> String {
        format!("http://{}:8000", self.network.address(node))
    }

    /// The admin's token.
    #[allow(clippy::unused_self)] // all clusters have the same, and nobody needs to know
    pub(crate) fn token(&self) -> &'static str {
        ADMIN_TOKEN
    }

    /// An admin's client of all nodes, that begins with this one.
    pub(crate) fn client(&self, first: usize) -> Client {
        let nodes = self.plan.seats();
        let urls = (0..nodes).map(|node| self.url((first + node) % nodes));
        Client::new(urls, Some(ADMIN_TOKEN.to_owned())).unwrap()
    }

    /// An admin's client of one node.
    pub(crate) fn client_of(&self, node: usize) -> Client {
        Client::new([self.url(node)], Some(ADMIN_TOKEN.to_owned())).unwrap()
    }

    /// The cluster as a node sees it, if it answers soon.
    pub(crate) async fn seen_by(&self, node: usize) -> Option<Seen> {
        let client = self.client_of(node).with_deadline(Duration::from_secs(1));
        client.cluster().await.ok()
    }

    /// Which node leads as most see it; `None` while they disagree or nobody does.
    pub(crate) async fn leader(&self) -> Option<usize> {
        let asked = self.seats.taken().into_iter().map(|node| self.seen_by(node));
        let seen = futures::future::join_all(asked).await;
        let newest = seen.iter().flatten().max_by_key(|seen| seen.term)?;
        self.seats.host_of(newest.leader?.0)
    }

    /// Waits for one that leads.
    pub(crate) async fn led(&self) -> usize {
        eventually("a leader", || self.leader()).await
    }

    /// Makes the agent and starts its replicas.
    pub(crate) async fn start_agent(&self) {
        let client = self.client(0);
        let register = json!({ "agentId": AGENT, "platform": "process" });
        let register = serde_json::from_value(register).unwrap();
        eventually("the agent is registered", || async {
            client.register_agent(&register).await.ok()
        })
        .await;
        let id = AgentId::new(AGENT).unwrap();
        let token = client.create_agent_token(&id).await.unwrap().token.unwrap();
        let file = self.folder.join("agent.token");
        std::fs::write(&file, token).unwrap();
        restrict(&file);
        for replica in 0..REPLICAS.len() {
            self.start_replica(replica);
        }
        eventually("a replica that leads", || self.leading_replica()).await;
    }

    /// The replica that leads, by its index.
    pub(crate) async fn leading_replica(&self) -> Option<usize> {
        let agent = self.client(0).agent(&AgentId::new(AGENT).unwrap()).await.ok()?;
        let leader = agent.replicas.iter().find(|replica| replica.leader)?;
        REPLICAS.iter().position(|name| *name == leader.name.as_str())
    }

    /// Starts the node that has its seat there, by the program that it is to run.
    pub(crate) fn start_node(&self, node: usize) {
        let seat = self.seats.at(node).expect("a node has its seat there");
        let program = match seat.program {
            Program::This => Path::new(REGENT),
            Program::Previous => self.previous.as_deref().expect("a plan with it has it"),
        };
        let listen = if self.plan.proxied {
            BEHIND_THE_PROXY.to_string()
        } else {
            self.peer(node)
        };
        let mut server = Command::new(program);
        server
            .args(["server", "--node-id", &seat.id.to_string()])
            .args(["--http", &format!("{}:8000", self.network.address(node))])
            .args(["--peer", &listen, "--advertise-peer", &self.peer(node)])
            .args(["--lifeline", &lifeline(), "--log-store", self.plan.log_store])
            .args(["--snapshot-every", &SNAPSHOT_EVERY.to_string()])
            .args(["--heartbeat", "1s", "--stale-after", "4s", "--data"])
            .arg(self.data(node));
        if seat.program == Program::This {
            // Network namespaces of this test, on one machine. The previous program knows nothing else.
            server.arg("--plaintext");
        }
        if seat.founder {
            let members = (0..self.plan.nodes).map(|node| format!("{}={}", node + 1, self.peer(node)));
            server
                .args(["--members", &members.collect::<Vec<_>>().join(",")])
                .arg("--cluster-secret-file")
                .arg(self.folder.join("cluster.secret"))
                .arg("--bootstrap-token-file")
                .arg(self.folder.join("admin.token"));
        } else {
            let others = self.seats.taken().into_iter().filter(|other| *other != node);
            let others: Vec<String> = others.map(|other| self.url(other)).collect();
            server
                .args(["--join", &others.join(","), "--join-token-file"])
                .arg(self.join_token(seat));
        }
        // Where members change it is those that join that are broken: whether they are looked at is in question.
        let is_broken = self.plan.change != Change::Members || !seat.founder;
        if let Some(fault) = self.fault.filter(|_| is_broken) {
            server.env("REGENT_TEST_FAULT", fault);
        }
        if self.plan.clocks {
            server
                .env("LD_PRELOAD", FAKETIME)
                .env("FAKETIME_TIMESTAMP_FILE", self.clock(node))
                .env("FAKETIME_CACHE_DURATION", "1")
                .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        }
        self.spawn(&node_name(seat.id), node, &server);
    }

    /// Where the join token of a node is.
    pub(crate) fn join_token(&self, seat: Seat) -> PathBuf {
        self.folder.join(format!("join-{}.token", seat.id))
    }

    pub(crate) fn start_replica(&self, replica: usize) {
        let servers: Vec<String> = (0..self.plan.seats()).map(|node| self.url(node)).collect();
        let mut agent = Command::new(REGENT);
        agent
            .args([
                "agent",
                "run",
                "--agent-id",
                AGENT,
                "--replica",
                REPLICAS[replica],
            ])
            .args(["--servers", &servers.join(","), "--runtime", "process"])
            .args(["--max-sessions", "200", "--cpu", "64", "--memory", "64Gi"])
            .args(["--lifeline", &lifeline(), "--data"])
            .arg(self.folder.join("agent"))
            .arg("--token-file")
            .arg(self.folder.join("agent.token"));
        self.spawn(&replica_name(replica), self.agents(), &agent);
    }

    fn spawn(&self, name: &str, host: usize, command: &Command) {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.join(format!("{name}.log")))
            .unwrap();
        let child = self
            .network
            .on(host, command)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let process = Process {
            child: Some(child),
            expected: Expected::Running,
        };
        self.processes().insert(name.to_owned(), process);
    }

    fn processes(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Process>> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pid of a process that runs.
    pub(crate) fn pid(&self, name: &str) -> Option<u32> {
        let mut processes = self.processes();
        let child = processes.get_mut(name)?.child.as_mut()?;
        child
            .try_wait()
            .is_ok_and(|ended| ended.is_none())
            .then(|| child.id())
    }

    /// Whether a process is to run: those of nodes that were taken out are not.
    pub(crate) fn is_to_run(&self, name: &str) -> bool {
        let processes = self.processes();
        processes
            .get(name)
            .is_some_and(|process| process.expected == Expected::Running)
    }

    /// From now on it may end by itself.
    pub(crate) fn may_end(&self, name: &str) {
        if let Some(process) = self.processes().get_mut(name) {
            process.expected = Expected::Ended;
        }
    }

    pub(crate) fn signal(&self, name: &str, signal: Signal) {
        if let Some(pid) = self.pid(name) {
            send(pid, signal);
        }
    }

    /// Kills it with -9 and waits until it is gone.
    pub(crate) fn kill(&self, name: &str) {
        self.may_end(name);
        let child = self
            .processes()
            .get_mut(name)
            .and_then(|process| process.child.take());
        if let Some(mut child) = child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// All replicas of the agent end at once, and all that they run. Their files stay.
    pub(crate) fn lose_agents_host(&self) -> Result<(), String> {
        let replicas: Vec<String> = (0..REPLICAS.len()).map(replica_name).collect();
        let folder = self.folder.join("agent").display().to_string();
        let running = || -> Vec<u32> {
            let sessions = processes_naming(&format!("{folder}/"));
            let replicas = replicas.iter().filter_map(|name| self.pid(name));
            sessions.into_iter().chain(replicas).collect()
        };
        for name in &replicas {
            self.may_end(name);
        }
        // Until what was begun meanwhile stands still too; then nobody sees anybody else's end. Each look finds the
        // children of those that the one before had not stopped yet.
        let mut stopped = Vec::new();
        let mut all = false;
        for _ in 0..STOPS {
            let new: Vec<u32> = running()
                .into_iter()
                .filter(|pid| !stopped.contains(pid))
                .collect();
            all = new.is_empty();
            if all {
                break;
            }
            for pid in &new {
                send(*pid, Signal::STOP);
            }
            stopped.extend(new);
        }
        for pid in stopped {
            send(pid, Signal::KILL);
        }
        for name in &replicas {
            self.kill(name);
        }
        let effects = effects_file(&self.folder);
        let file = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(effects);
        writeln!(file.unwrap(), "{HOST_LOST}").unwrap();
        if !all {
            return Err(format!(
                "after {STOPS} looks something new still ran on the agent's host"
            ));
        }
        Ok(())
    }

    /// Ends it in good order; says so if it does not end.
    pub(crate) async fn stop(&self, name: &str) -> Result<(), String> {
        self.may_end(name);
        self.signal(name, Signal::TERM);
        let deadline = tokio::time::Instant::now() + ENDS_WITHIN;
        while self.pid(name).is_some() {
            if tokio::time::Instant::now() > deadline {
                self.kill(name);
                return Err(format!("{name} did not end within {ENDS_WITHIN:?} of TERM"));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.kill(name);
        Ok(())
    }

    /// Starts what does not run, and gives what has ended although nobody ended it.
    pub(crate) fn start_missing(&self) -> Vec<String> {
        let mut unexpected = Vec::new();
        let nodes = self.members().into_iter();
        let all: Vec<(String, Box<dyn Fn() + '_>)> = nodes
            .map(|node| {
                (
                    self.name(node),
                    Box::new(move || self.start_node(node)) as Box<dyn Fn()>,
                )
            })
            .chain((0..REPLICAS.len()).map(|replica| {
                (
                    replica_name(replica),
                    Box::new(move || self.start_replica(replica)) as Box<dyn Fn()>,
                )
            }))
            .collect();
        for (name, start) in all {
            let expected = self.processes().get(&name).map(|process| process.expected);
            if self.pid(&name).is_some() {
                if let Some(process) = self.processes().get_mut(&name) {
                    process.expected = Expected::Running;
                }
                continue;
            }
            if expected == Some(Expected::Running) {
                unexpected.push(name.clone());
            }
            self.kill(&name);
            start();
        }
        unexpected
    }

    fn clock(&self, node: usize) -> PathBuf {
        self.folder.join(format!("clock-{}", node + 1))
    }

    /// Sets a node's wall clock so many seconds off.
    pub(crate) fn move_clock(&self, node: usize, seconds: i64) {
        // Whole, or as it was before.
        let next = self.clock(node).with_extension("next");
        std::fs::write(&next, format!("{seconds:+}\n")).unwrap();
        std::fs::rename(&next, self.clock(node)).unwrap();
    }

    /// Ends everything; the folder is left, with a copy of what the nodes had on their small disks.
    pub(crate) fn end(&self, keep: bool) {
        let names: Vec<String> = self.processes().keys().cloned().collect();
        for name in names {
            self.signal(&name, Signal::CONT);
            self.kill(&name);
        }
        for mount in self.mounts.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            if keep {
                let _ = Command::new("cp")
                    .arg("-r")
                    .arg(mount)
                    .arg(mount.with_extension("data"))
                    .status();
            }
            let _ = Command::new("umount").arg("--lazy").arg(mount).status();
        }
    }
}

/// Where a node listens when a proxy stands before it.
const BEHIND_THE_PROXY: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 7_001);

/// A node's process, log and data, by its id.
pub(crate) fn node_name(id: u64) -> String {
    format!("node-{id}")
}

pub(crate) fn replica_name(replica: usize) -> String {
    format!("agent-{}", REPLICAS[replica])
}
