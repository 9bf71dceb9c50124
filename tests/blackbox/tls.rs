//! Between machines: certificates by one command, nodes, an agent and clients over TLS, and what is refused.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use rand::RngExt as _;
use regent_client::{Client, Identity, Trust};
use regent_types::agent::AgentStatus;
use regent_types::session::SessionState;
use regent_types::{AgentId, Code};
use rustix::process::Signal;

use crate::harness::{PATIENCE, REGENT, eventually, lifeline, restrict, send, session_of, session_state};

/// Where ports are chosen from, and how they are held: as `regent dev` does it.
const PORTS: std::ops::Range<u16> = 10_000..32_768;

#[tokio::test]
async fn three_nodes_an_agent_and_a_session_over_tls_with_certificates_of_one_command() {
    let mut cluster = Cluster::new(3);
    cluster.start_all();
    let client = cluster.client();
    eventually("a leader", || async { client.cluster().await.ok()?.leader }).await;
    eventually("all members with their addresses", || async {
        let members = client.cluster().await.ok()?.members;
        let secured = |member: &regent_types::cluster::Member| member.http.starts_with("https://127.0.0.1:");
        members.iter().all(secured).then_some(())
    })
    .await;

    let agent = cluster.start_agent(&client).await;
    eventually("the agent", || async {
        let agent = client.agent(&agent).await.ok()?;
        (agent.status == AgentStatus::Online).then_some(())
    })
    .await;
    let session = client.create_session(&session_of("sleep")).await.unwrap();
    session_state(&client, &session.name, SessionState::Running).await;

    let ca = cluster.file("node-1/ca.pem");
    let ca = [("REGENT_CA_FILE", ca.to_str().unwrap())];
    let listed = cluster.cli(&["session", "list"], &ca);
    assert!(text(&listed.stdout).contains(session.name.as_str()), "{listed:?}");
    let held = cluster.cli(&["lease", "hold", "nightly", "--", "sh", "-c", "exit 7"], &ca);
    assert_eq!(held.status.code(), Some(7), "{held:?}");

    // The CA of another cluster, and whom the machine trusts: neither believes these nodes.
    let others = Cluster::new(1);
    let other = others.file("node-1/ca.pem");
    for env in [&[("REGENT_CA_FILE", other.to_str().unwrap())][..], &[]] {
        let refused = cluster.cli(&["session", "list"], env);
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        let told = text(&refused.stderr);
        assert!(told.contains("is not of this cluster's CA; --ca-file"), "{told}");
    }
}

#[tokio::test]
async fn who_speaks_plain_http_to_a_node_is_told_so() {
    let mut cluster = Cluster::new(1);
    cluster.start_all();
    cluster.ready(0).await;
    let url = cluster.url(0).replace("https://", "http://");
    let plain = Client::new([url], Some(cluster.token())).unwrap();
    let refused = plain.cluster().await.unwrap_err();
    assert_eq!(refused.code(), Some(Code::InvalidRequest));
    assert!(refused.to_string().contains("speaks TLS only"), "{refused}");
}

#[tokio::test]
async fn a_node_is_refused_without_a_certificate_with_anothers_and_with_another_cas() {
    let mut cluster = Cluster::new(3);
    cluster.start_all();
    cluster.ready(2).await;
    cluster.stop(2);

    // Its own start: the certificate of node 2.
    let own = cluster.take_node_files(2, &cluster.file("node-2"));
    let refused = cluster.command(2).output().unwrap();
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(
        text(&refused.stderr).contains("is node 2's, and this is node 3"),
        "{refused:?}"
    );

    // Everything as it should be, but another cluster's CA: the others do not believe it, nor it them.
    let others = Cluster::new(3);
    cluster.take_node_files(2, &others.file("node-3"));
    cluster.start(2);
    cluster.logged(2, "is not of this cluster's CA").await;
    cluster
        .logged(
            0,
            "refuses the certificate of this one: it is not of its cluster's CA",
        )
        .await;
    cluster.stop(2);

    // Without certificates.
    cluster.start_with(2, &[]);
    cluster
        .logged(2, "one of the two speaks TLS and the other does not")
        .await;
    cluster.logged(0, "the other side does not speak TLS").await;
    cluster.stop(2);

    // The others went on, and with its own it is back.
    register(&cluster.client(), &AgentId::new("while-away").unwrap()).await;
    cluster.take_node_files(2, own.path());
    cluster.start(2);
    cluster.ready(2).await;
}

#[tokio::test]
async fn new_certificates_are_taken_up_while_the_node_runs_and_bad_ones_are_not() {
    let mut cluster = Cluster::new(1);
    cluster.start_all();
    cluster.ready(0).await;
    let first = cluster.certificate_ends(0).await;

    cluster.make(&["--days", "30"]);
    cluster.hang_up(0);
    cluster.logged(0, "new certificates are in use").await;
    let second = cluster.certificate_ends(0).await;
    assert!(second < first, "{second} is not before {first}");

    let (cert, good) = (cluster.file("node-1/node.pem"), cluster.read("node-1/node.pem"));
    std::fs::write(&cert, "no certificate at all").unwrap();
    cluster.hang_up(0);
    cluster
        .logged(0, "new certificates are not used, the old ones stay")
        .await;
    assert_eq!(cluster.certificate_ends(0).await, second);

    // Nobody tells it this time.
    std::fs::write(&cert, good).unwrap();
    cluster.make(&["--days", "60"]);
    eventually("the next certificate", || async {
        (cluster.certificate_ends(0).await > second).then_some(())
    })
    .await;
}

/// Connections that say nothing, on both ports: nobody waits for them, and they are let go.
#[tokio::test]
async fn who_does_not_finish_a_handshake_is_given_up() {
    let mut cluster = Cluster::new(1);
    cluster.start_all();
    cluster.ready(0).await;
    let node = &cluster.nodes[0];
    let mut silent: Vec<_> = [node.http, node.peer]
        .into_iter()
        .flat_map(|port| std::iter::repeat_n(port, 100))
        .map(|port| TcpStream::connect(("127.0.0.1", port)).unwrap())
        .collect();
    cluster.client().cluster().await.unwrap();
    for stream in &mut silent {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the node closes it");
    }
}

#[tokio::test]
async fn a_node_may_ask_its_clients_for_certificates() {
    let mut cluster = Cluster::new(1);
    cluster.start_with(
        0,
        &[&cluster.tls_flags(0)[..], &["--tls-clients".to_owned()]].concat(),
    );
    let (ca, out) = (cluster.file("ca"), cluster.file("alice"));
    let made = run(Command::new(REGENT)
        .args(["cert", "client", "--name", "alice", "--ca"])
        .arg(ca)
        .arg("--out")
        .arg(&out));
    assert!(made.status.success(), "{made:?}");
    let trust = Trust {
        identity: Some(Identity {
            cert: out.join("client.pem"),
            key: out.join("client.key"),
        }),
        ..cluster.trust()
    };
    let alice = Client::with_trust([cluster.url(0)], Some(cluster.token()), &trust).unwrap();
    eventually("an answer to alice", || async {
        alice.cluster().await.ok()?.leader
    })
    .await;

    let (ca, cert, key) = (out.join("ca.pem"), out.join("client.pem"), out.join("client.key"));
    let mut env = vec![
        ("REGENT_CA_FILE", ca.to_str().unwrap()),
        ("REGENT_CERT_FILE", cert.to_str().unwrap()),
        ("REGENT_KEY_FILE", key.to_str().unwrap()),
    ];
    let served = cluster.cli(&["cluster", "status"], &env);
    assert!(served.status.success(), "{served:?}");
    env.pop();
    let half = cluster.cli(&["cluster", "status"], &env);
    assert_eq!(half.status.code(), Some(2), "{half:?}");
    env.pop();
    let refused = cluster.cli(&["cluster", "status"], &env);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(
        text(&refused.stderr).contains("CertificateRequired"),
        "{refused:?}"
    );
}

#[test]
fn plain_text_between_machines_must_be_asked_for_by_name() {
    let cluster = Cluster::new(1);
    let with = |flags: &[&str]| {
        let refused = run(cluster.command_with(0, &[]).args(flags));
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        text(&refused.stderr)
    };
    for flag in ["--http", "--peer"] {
        let mut command = cluster.command_with(0, &[]);
        // An address for documents, which no machine has: nothing listens before the refusal.
        let refused = run(replace(&mut command, flag, "192.0.2.1:7000"));
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        let told = text(&refused.stderr);
        assert!(
            told.contains(&format!("{flag} 192.0.2.1:7000 is not a loopback address")),
            "{told}"
        );
        assert!(told.contains("--plaintext"), "{told}");

        // By name it is taken, and then there is no such address here.
        let mut command = cluster.command_with(0, &["--plaintext".to_owned()]);
        let taken = run(replace(&mut command, flag, "192.0.2.1:7000"));
        assert_eq!(taken.status.code(), Some(1), "{taken:?}");
        assert!(
            text(&taken.stderr).contains("cannot listen on 192.0.2.1:7000"),
            "{taken:?}"
        );
    }
    let cert = cluster.file("node-1/node.pem");
    assert!(with(&["--tls-cert", cert.to_str().unwrap()]).contains("--tls-key and --tls-ca is missing"));
    assert!(with(&["--tls-clients"]).contains("tls-clients needs certificates"));
    let both = run(cluster.command(0).arg("--plaintext"));
    assert!(text(&both.stderr).contains("contradict each other"), "{both:?}");

    let key = cluster.file("node-1/node.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let loose = run(&mut cluster.command(0));
    assert_eq!(loose.status.code(), Some(2), "{loose:?}");
    assert!(text(&loose.stderr).contains("chmod 600"), "{loose:?}");

    restrict(&key);
    let data = cluster.file("data-1");
    std::fs::create_dir(&data).unwrap();
    std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o750)).unwrap();
    let loose = run(&mut cluster.command(0));
    assert_eq!(loose.status.code(), Some(2), "{loose:?}");
    assert!(text(&loose.stderr).contains("chmod 700"), "{loose:?}");
}

/// Nodes as an operator starts them, in a folder that `regent cert cluster` has made.
struct Cluster {
    folder: tempfile::TempDir,
    nodes: Vec<Node>,
    children: BTreeMap<String, Child>,
}

struct Node {
    http: u16,
    peer: u16,
    _held: [UdpSocket; 2],
}

impl Cluster {
    fn new(nodes: usize) -> Self {
        let nodes = (0..nodes)
            .map(|_| {
                let ((http, one), (peer, two)) = (port(), port());
                Node {
                    http,
                    peer,
                    _held: [one, two],
                }
            })
            .collect();
        let cluster = Self {
            folder: tempfile::Builder::new().prefix("regent-test-").tempdir().unwrap(),
            nodes,
            children: BTreeMap::new(),
        };
        cluster.make(&[]);
        cluster
    }

    /// The one command, also for renewal.
    fn make(&self, flags: &[&str]) {
        let mut command = Command::new(REGENT);
        command
            .args(["cert", "cluster"])
            .args(flags)
            .arg("--out")
            .arg(self.folder.path());
        for node in 1..=self.nodes.len() {
            command.args(["--node", &format!("{node}=127.0.0.1")]);
        }
        let made = run(&mut command);
        assert!(made.status.success(), "{made:?}");
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.file(name)).unwrap()
    }

    fn token(&self) -> String {
        self.read("admin.token")
    }

    fn url(&self, node: usize) -> String {
        format!("https://127.0.0.1:{}", self.nodes[node].http)
    }

    fn urls(&self) -> Vec<String> {
        (0..self.nodes.len()).map(|node| self.url(node)).collect()
    }

    fn trust(&self) -> Trust {
        Trust {
            ca: Some(self.file("ca/ca.pem")),
            identity: None,
        }
    }

    fn client(&self) -> Client {
        Client::with_trust(self.urls(), Some(self.token()), &self.trust()).unwrap()
    }

    fn tls_flags(&self, node: usize) -> Vec<String> {
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

    fn command(&self, node: usize) -> Command {
        self.command_with(node, &self.tls_flags(node))
    }

    fn command_with(&self, node: usize, tls: &[String]) -> Command {
        let members: Vec<String> = self
            .nodes
            .iter()
            .zip(1..)
            .map(|(node, id)| format!("{id}=127.0.0.1:{}", node.peer))
            .collect();
        let its = self.file(&format!("node-{}", node + 1));
        let mut command = Command::new(REGENT);
        command
            .args(["server", "--node-id", &(node + 1).to_string()])
            .args(["--http", &format!("127.0.0.1:{}", self.nodes[node].http)])
            .args(["--peer", &format!("127.0.0.1:{}", self.nodes[node].peer)])
            .args(["--members", &members.join(","), "--lifeline", &lifeline()])
            .arg("--cluster-secret-file")
            .arg(its.join("cluster.secret"))
            .arg("--bootstrap-token-file")
            .arg(its.join("admin.token"))
            .arg("--data")
            .arg(self.file(&format!("data-{}", node + 1)))
            .args(tls)
            .stdin(Stdio::null());
        command
    }

    fn start_all(&mut self) {
        for node in 0..self.nodes.len() {
            self.start(node);
        }
    }

    fn start(&mut self, node: usize) {
        self.start_with(node, &self.tls_flags(node));
    }

    fn start_with(&mut self, node: usize, tls: &[String]) {
        let command = self.command_with(node, tls);
        self.spawn(&format!("node-{}", node + 1), command);
    }

    fn spawn(&mut self, name: &str, mut command: Command) {
        let log = std::fs::File::create(self.file(&format!("{name}.log"))).unwrap();
        let child = command
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.children.insert(name.to_owned(), child);
    }

    fn stop(&mut self, node: usize) {
        let mut child = self.children.remove(&format!("node-{}", node + 1)).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn hang_up(&self, node: usize) {
        send(self.children[&format!("node-{}", node + 1)].id(), Signal::HUP);
    }

    /// Replaces certificate, key and CA of a node, and keeps what was there.
    fn take_node_files(&self, node: usize, from: &Path) -> tempfile::TempDir {
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

    async fn ready(&self, node: usize) {
        let client = Client::with_trust([self.url(node)], Some(self.token()), &self.trust()).unwrap();
        eventually("a node that serves", || async { client.readyz().await.ok() }).await;
    }

    async fn logged(&self, node: usize, words: &str) {
        let log = format!("node-{}.log", node + 1);
        eventually(&format!("{words:?} in {log}"), || async {
            self.read(&log).contains(words).then_some(())
        })
        .await;
    }

    /// When the certificate that a node uses ends, as it says.
    async fn certificate_ends(&self, node: usize) -> u64 {
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

    async fn start_agent(&mut self, client: &Client) -> AgentId {
        let id = AgentId::new("far").unwrap();
        register(client, &id).await;
        let token = client.create_agent_token(&id).await.unwrap().token.unwrap();
        let file = self.file("agent.token");
        std::fs::write(&file, token).unwrap();
        restrict(&file);
        let mut command = Command::new(REGENT);
        command
            .args(["agent", "run", "--agent-id", id.as_str(), "--runtime", "process"])
            .args(["--servers", &self.urls().join(","), "--lifeline", &lifeline()])
            .arg("--token-file")
            .arg(file)
            .arg("--ca-file")
            .arg(self.file("node-1/ca.pem"))
            .arg("--data")
            .arg(self.file("agent"))
            .stdin(Stdio::null());
        self.spawn("agent", command);
        id
    }

    /// Runs a client command; of the certificates it knows what `env` says.
    fn cli(&self, args: &[&str], env: &[(&str, &str)]) -> Output {
        run(Command::new(REGENT)
            .args(args)
            .env("REGENT_URL", self.urls().join(","))
            .env("REGENT_TOKEN", self.token())
            .envs(env.iter().copied()))
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

fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A command with another value for a flag that it has.
fn replace<'a>(command: &'a mut Command, flag: &str, value: &str) -> &'a mut Command {
    let mut args: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
    let at = args.iter().position(|arg| arg == flag).unwrap();
    args[at + 1] = value.into();
    *command = Command::new(REGENT);
    command.args(args)
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

async fn register(client: &Client, id: &AgentId) {
    let agent = serde_json::json!({ "agentId": id, "platform": "process" });
    client
        .register_agent(&serde_json::from_value(agent).unwrap())
        .await
        .unwrap();
}
