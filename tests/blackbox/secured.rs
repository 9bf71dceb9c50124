//! A cluster for one test that speaks TLS, as an operator starts it on machines of their own: a folder that
//! `regent cert cluster` has made, a process for each node, and nodes that join.

use std::collections::BTreeMap;
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use rand::RngExt as _;
use regent_client::{Client, Trust};
use regent_types::AgentId;
use rustix::process::Signal;

use crate::harness::{REGENT, eventually, lifeline, restrict, send};

/// Where ports are chosen from, and how they are held: as `regent dev` does it.
const PORTS: std::ops::Range<u16> = 10_000..32_768;

/// Nodes as an operator starts them, in a folder that `regent cert cluster` has made.
pub(crate) struct Cluster {
    folder: tempfile::TempDir,
    pub(crate) nodes: Vec<Node>,
    /// How many of them found the cluster; the others join.
    founders: usize,
    children: BTreeMap<String, Child>,
}

pub(crate) struct Node {
    pub(crate) http: u16,
    pub(crate) peer: u16,
    _held: [UdpSocket; 2],
}

impl Cluster {
    pub(crate) fn new(nodes: usize) -> Self {
        // What a test asks over HTTP by itself needs one too.
        regent_tls::install_provider();
        let cluster = Self {
            folder: tempfile::Builder::new().prefix("regent-test-").tempdir().unwrap(),
            nodes: (0..nodes).map(|_| Node::new()).collect(),
            founders: nodes,
            children: BTreeMap::new(),
        };
        cluster.make(&[]);
        cluster
    }

    /// The one command, also for renewal.
    pub(crate) fn make(&self, flags: &[&str]) {
        let mut command = Command::new(REGENT);
        command
            .args(["cert", "cluster"])
            .args(flags)
            .arg("--out")
            .arg(self.folder.path());
        for node in 1..=self.founders {
            command.args(["--node", &format!("{node}=127.0.0.1")]);
        }
        let made = run(&mut command);
        assert!(made.status.success(), "{made:?}");
    }

    /// One more node, which joins: its certificate, of this cluster's CA, is made by the command for one node.
    pub(crate) fn add(&mut self) -> usize {
        self.nodes.push(Node::new());
        let node = self.nodes.len() - 1;
        self.certify(node);
        node
    }

    pub(crate) fn certify(&self, node: usize) {
        let id = (node + 1).to_string();
        let made = run(Command::new(REGENT)
            .args(["cert", "node", "--node-id", &id, "--host", "127.0.0.1", "--ca"])
            .arg(self.file("ca"))
            .arg("--out")
            .arg(self.file(&format!("node-{id}"))));
        assert!(made.status.success(), "{made:?}");
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.file(name)).unwrap()
    }

    pub(crate) fn token(&self) -> String {
        self.read("admin.token")
    }

    pub(crate) fn url(&self, node: usize) -> String {
        format!("https://127.0.0.1:{}", self.nodes[node].http)
    }

    pub(crate) fn urls(&self) -> Vec<String> {
        (0..self.nodes.len()).map(|node| self.url(node)).collect()
    }

    pub(crate) fn trust(&self) -> Trust {
        Trust {
            ca: Some(self.file("ca/ca.pem")),
            identity: None,
        }
    }

    pub(crate) fn client(&self) -> Client {
        Client::with_trust(self.urls(), Some(self.token()), &self.trust()).unwrap()
    }

    pub(crate) fn tls_flags(&self, node: usize) -> Vec<String> {
        let file = |name| {
            self.file(&format!("node-{}/{name}", node + 1))
                .display()
                .to_string()
        };
        [
            ("--tls-cert", file("node.pem")),
            ("--tls-key", file("node.key")),
            ("--tls-ca", file("ca.pem")),
        ]
        .into_iter()
        .flat_map(|(flag, file)| [flag.to_owned(), file])
        .collect()
    }

    /// The command of its start: of every one, also of a node that has joined.
    pub(crate) fn command(&self, node: usize) -> Command {
        self.command_with(node, &self.tls_flags(node))
    }

    pub(crate) fn command_with(&self, node: usize, tls: &[String]) -> Command {
        let mut command = Command::new(REGENT);
        command
            .args(["server", "--node-id", &(node + 1).to_string()])
            .args(["--http", &format!("127.0.0.1:{}", self.nodes[node].http)])
            .args(["--peer", &format!("127.0.0.1:{}", self.nodes[node].peer)])
            .args(["--lifeline", &lifeline(), "--data"])
            .arg(self.file(&format!("data-{}", node + 1)))
            .args(tls)
            .stdin(Stdio::null());
        if node < self.founders {
            let founders = self.nodes.iter().zip(1..=self.founders);
            let members: Vec<String> = founders
                .map(|(node, id)| format!("{id}=127.0.0.1:{}", node.peer))
                .collect();
            let its = self.file(&format!("node-{}", node + 1));
            command
                .args(["--members", &members.join(",")])
                .arg("--cluster-secret-file")
                .arg(its.join("cluster.secret"))
                .arg("--bootstrap-token-file")
                .arg(its.join("admin.token"));
        } else {
            command
                .args(["--join", &self.urls()[..self.founders].join(",")])
                .arg("--join-token-file")
                .arg(self.file("join"));
        }
        command
    }

    pub(crate) fn start_all(&mut self) {
        for node in 0..self.nodes.len() {
            self.start(node);
        }
    }

    pub(crate) fn start(&mut self, node: usize) {
        self.start_with(node, &self.tls_flags(node));
    }

    pub(crate) fn start_with(&mut self, node: usize, tls: &[String]) {
        let command = self.command_with(node, tls);
        self.spawn(&format!("node-{}", node + 1), command);
    }

    pub(crate) fn spawn(&mut self, name: &str, mut command: Command) {
        let log = std::fs::File::create(self.file(&format!("{name}.log"))).unwrap();
        let child = command
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.children.insert(name.to_owned(), child);
    }

    pub(crate) fn stop(&mut self, node: usize) {
        self.end(&format!("node-{}", node + 1));
    }

    pub(crate) fn end(&mut self, name: &str) {
        let mut child = self.children.remove(name).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub(crate) fn pid(&self, node: usize) -> u32 {
        self.children[&format!("node-{}", node + 1)].id()
    }

    pub(crate) fn hang_up(&self, node: usize) {
        send(self.pid(node), Signal::HUP);
    }

    /// Replaces certificate, key and CA of a node, and keeps what was there.
    pub(crate) fn take_node_files(&self, node: usize, from: &Path) -> tempfile::TempDir {
        let (kept, its) = (
            tempfile::tempdir().unwrap(),
            self.file(&format!("node-{}", node + 1)),
        );
        for name in ["node.pem", "node.key", "ca.pem"] {
            std::fs::copy(its.join(name), kept.path().join(name)).unwrap();
            std::fs::copy(from.join(name), its.join(name)).unwrap();
        }
        kept
    }

    pub(crate) async fn ready(&self, node: usize) {
        let client = Client::with_trust([self.url(node)], Some(self.token()), &self.trust()).unwrap();
        eventually("a node that serves", || async { client.readyz().await.ok() }).await;
    }

    pub(crate) async fn logged(&self, node: usize, words: &str) {
        self.said(&format!("node-{}", node + 1), words).await;
    }

    pub(crate) async fn said(&self, name: &str, words: &str) {
        let log = format!("{name}.log");
        eventually(&format!("{words:?} in {log}"), || async {
            self.read(&log).contains(words).then_some(())
        })
        .await;
    }

    /// When the certificate that a node uses ends, as it says.
    pub(crate) async fn certificate_ends(&self, node: usize) -> u64 {
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(regent_client::ClientConfig::clone(
                &self.trust().client_config().unwrap(),
            ))
            .build()
            .unwrap();
        let metrics = http
            .get(format!("{}/metrics", self.url(node)))
            .send()
            .await
            .unwrap();
        let metrics = metrics.text().await.unwrap();
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix("regent_certificate_expiry_timestamp_seconds "))
            .unwrap();
        line.parse().unwrap()
    }

    pub(crate) async fn start_agent(&mut self, client: &Client) -> AgentId {
        let id = AgentId::new("far").unwrap();
        register(client, &id).await;
        let token = client.create_agent_token(&id).await.unwrap().token.unwrap();
        self.write_secret("agent.token", &token);
        let command = self.agent_command(&id, "--token-file", "agent.token", &self.file("node-1/ca.pem"));
        self.spawn("agent", command);
        id
    }

    /// An agent as an operator starts it, with the token of this file, and this CA.
    pub(crate) fn agent_command(&self, id: &AgentId, flag: &str, token: &str, ca: &Path) -> Command {
        let mut command = Command::new(REGENT);
        command
            .args(["agent", "run", "--agent-id", id.as_str(), "--runtime", "process"])
            .args([
                "--servers",
                &self.urls().join(","),
                "--lifeline",
                &lifeline(),
                flag,
            ])
            .arg(self.file(token))
            .arg("--ca-file")
            .arg(ca)
            .arg("--data")
            .arg(self.file("agent"))
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn write_secret(&self, name: &str, text: &str) {
        std::fs::write(self.file(name), text).unwrap();
        restrict(&self.file(name));
    }

    /// Runs a client command; of the certificates it knows what `env` says.
    pub(crate) fn cli(&self, args: &[&str], env: &[(&str, &str)]) -> Output {
        run(Command::new(REGENT)
            .args(args)
            .env("REGENT_URL", self.urls().join(","))
            .env("REGENT_TOKEN", self.token())
            .envs(env.iter().copied()))
    }
}

impl Node {
    fn new() -> Self {
        let ((http, one), (peer, two)) = (port(), port());
        Self {
            http,
            peer,
            _held: [one, two],
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for (name, child) in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
            if std::thread::panicking() {
                let log = std::fs::read_to_string(self.folder.path().join(format!("{name}.log")));
                eprintln!("--- {name}\n{}", log.unwrap_or_default());
            }
        }
    }
}

pub(crate) fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A port that was free when it was chosen, and that no `dev` chooses while the socket lives.
fn port() -> (u16, UdpSocket) {
    let mut rng = rand::rng();
    std::iter::repeat_with(|| rng.random_range(PORTS))
        .take(1_000)
        .find_map(|port| {
            let held = UdpSocket::bind(("127.0.0.1", port)).ok()?;
            TcpListener::bind(("127.0.0.1", port)).ok()?;
            Some((port, held))
        })
        .expect("a free port on loopback")
}

pub(crate) async fn register(client: &Client, id: &AgentId) {
    let agent = serde_json::json!({ "agentId": id, "platform": "process" });
    client
        .register_agent(&serde_json::from_value(agent).unwrap())
        .await
        .unwrap();
}
