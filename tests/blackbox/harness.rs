//! A cluster for one test: `regent dev` in a temporary folder, ended with the test. When the test
//! fails the folder is kept, with all logs and data, and named.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use regent_client::Client;
use regent_types::agent::{Agent, AgentStatus};
use regent_types::session::{CreateSession, Session, SessionState};
use regent_types::{AgentId, NodeId, SessionName, TemplateName};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;

/// The program under test.
pub(crate) const REGENT: &str = env!("CARGO_BIN_EXE_regent");

/// How long a condition may take. Far above what it takes, also on a busy machine: reaching it
/// means that it will not come.
pub(crate) const PATIENCE: Duration = Duration::from_mins(3);
/// How often a condition is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(25);

/// What `dev.json` says.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct DevFile {
    pub(crate) nodes: Vec<NodeEntry>,
    pub(crate) agents: Vec<AgentEntry>,
    pub(crate) admin_token: String,
    pub(crate) admin_password: String,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct NodeEntry {
    pub(crate) id: NodeId,
    pub(crate) http: String,
    pub(crate) pid: u32,
    pub(crate) data: PathBuf,
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct AgentEntry {
    pub(crate) id: AgentId,
    pub(crate) pid: u32,
    pub(crate) command: Vec<String>,
}

/// A running `regent dev`.
pub(crate) struct Dev {
    process: Child,
    folder: Option<tempfile::TempDir>,
    pub(crate) file: DevFile,
    /// The environment of all of it, besides this process's own.
    env: Vec<(String, String)>,
    /// What the test started itself, by name; a restarted node or agent replaces its pid in `file`.
    started: Mutex<BTreeMap<String, Child>>,
}

impl Dev {
    /// Three nodes and an agent.
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// With more flags.
    pub(crate) fn start_with(flags: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("regent-test-").tempdir().unwrap();
        Self::start_in(folder, flags)
    }

    /// With variables too.
    pub(crate) fn start_with_env(flags: &[&str], env: &[(&str, &str)]) -> Self {
        let folder = tempfile::Builder::new().prefix("regent-test-").tempdir().unwrap();
        Self::launch(folder, flags, env)
    }

    /// In a folder that may hold a cluster already.
    pub(crate) fn start_in(folder: tempfile::TempDir, flags: &[&str]) -> Self {
        Self::launch(folder, flags, &[])
    }

    fn launch(folder: tempfile::TempDir, flags: &[&str], env: &[(&str, &str)]) -> Self {
        Self::launch_program(Path::new(REGENT), folder, flags, env)
    }

    /// Of another program.
    pub(crate) fn start_program(program: &Path) -> Self {
        let folder = tempfile::Builder::new().prefix("regent-test-").tempdir().unwrap();
        Self::launch_program(program, folder, &[], &[])
    }

    fn launch_program(
        program: &Path,
        folder: tempfile::TempDir,
        flags: &[&str],
        env: &[(&str, &str)],
    ) -> Self {
        // What a test asks over HTTP by itself needs one too.
        regent_tls::install_provider();
        let mut dev = Command::new(program)
            .args(["dev", "--http-port", "0", "--data"])
            .arg(folder.path())
            .args(flags)
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(folder.path().join("dev.stderr")).unwrap())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(dev.stdout.take().unwrap()).lines();
        let ready = lines.find_map(|line| line.ok().filter(|l| l.starts_with("ready ")));
        if ready.is_none() {
            let status = dev.wait();
            let kept = folder.keep();
            let stderr = std::fs::read_to_string(kept.join("dev.stderr")).unwrap_or_default();
            panic!(
                "regent dev did not get ready ({status:?}): {stderr}\nlogs are in {}",
                kept.display()
            );
        }
        let file = read_dev_file(folder.path());
        Self {
            process: dev,
            folder: Some(folder),
            file,
            env: env
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
            started: Mutex::default(),
        }
    }

    /// The folder with all data.
    pub(crate) fn path(&self) -> &Path {
        self.folder.as_ref().expect("kept until the end").path()
    }

    /// The pid of `regent dev` itself.
    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// An admin's client over all nodes.
    pub(crate) fn client(&self) -> Client {
        let servers = self.file.nodes.iter().map(|n| n.http.clone());
        Client::new(servers, Some(self.file.admin_token.clone())).unwrap()
    }

    /// An admin's client of one node only, by its index from 0.
    pub(crate) fn client_of(&self, node: usize) -> Client {
        Client::new([&self.file.nodes[node].http], Some(self.file.admin_token.clone())).unwrap()
    }

    /// The agent that came with it.
    pub(crate) fn agent_id(&self) -> AgentId {
        self.file.agents[0].id.clone()
    }

    /// Waits until the cluster has written down who founded it, a moment after its first start: after that it writes
    /// nothing by itself.
    pub(crate) async fn written_down(&self) {
        let client = self.client();
        eventually("the members in the table of members", || async {
            let cluster = client.cluster().await.ok()?;
            cluster
                .members
                .iter()
                .all(|member| member.since.is_some())
                .then_some(())
        })
        .await;
    }

    /// The index of the node that leads.
    pub(crate) async fn leader(&self) -> usize {
        let client = self.client();
        let leader = eventually("a leader", || async { client.cluster().await.ok()?.leader }).await;
        self.file
            .nodes
            .iter()
            .position(|n| n.id == leader)
            .expect("the leader is one of the nodes")
    }

    /// Kills a node with -9.
    pub(crate) fn kill_node(&mut self, node: usize) {
        let pid = self.file.nodes[node].pid;
        kill_and_wait(pid);
        self.reap(&format!("node-{node}"));
    }

    /// Starts a node again by the command of `dev.json`.
    pub(crate) fn restart_node(&mut self, node: usize) {
        let command = self.file.nodes[node].command.clone();
        self.file.nodes[node].pid = self.spawn(&format!("node-{node}"), &command);
    }

    /// Kills an agent with -9.
    pub(crate) fn kill_agent(&mut self, agent: usize) {
        kill_and_wait(self.file.agents[agent].pid);
        self.reap(&format!("agent-{agent}"));
    }

    /// Starts an agent again by the command of `dev.json`.
    pub(crate) fn restart_agent(&mut self, agent: usize) {
        let command = self.file.agents[agent].command.clone();
        self.file.agents[agent].pid = self.spawn(&format!("agent-{agent}"), &command);
    }

    /// Registers and starts one more agent; gives its index.
    pub(crate) async fn add_agent(&mut self, id: &str, flags: &[&str]) -> usize {
        let command = self.agent_command(id, flags).await;
        self.start_agent(id, command)
    }

    /// Registers an agent and starts its replicas, which share their data; gives their indexes.
    pub(crate) async fn add_replicas(&mut self, id: &str, names: &[&str], flags: &[&str]) -> Vec<usize> {
        let command = self.agent_command(id, flags).await;
        let mut indexes = Vec::new();
        for name in names {
            let mut command = command.clone();
            command.extend(["--replica".to_owned(), (*name).to_owned()]);
            indexes.push(self.start_agent(id, command));
        }
        indexes
    }

    /// What an agent that was started by a test wrote, by its index.
    pub(crate) fn agent_log(&self, agent: usize) -> String {
        std::fs::read_to_string(self.path().join(format!("agent-{agent}.again.log"))).unwrap_or_default()
    }

    fn start_agent(&mut self, id: &str, command: Vec<String>) -> usize {
        let index = self.file.agents.len();
        let pid = self.spawn(&format!("agent-{index}"), &command);
        let id = AgentId::new(id).unwrap();
        self.file.agents.push(AgentEntry { id, pid, command });
        index
    }

    async fn agent_command(&self, id: &str, flags: &[&str]) -> Vec<String> {
        let client = self.client();
        let id = AgentId::new(id).unwrap();
        let register = serde_json::json!({ "agentId": id, "platform": "process" });
        client
            .register_agent(&serde_json::from_value(register).unwrap())
            .await
            .unwrap();
        let token = client.create_agent_token(&id).await.unwrap().token.unwrap();
        let token_file = self.path().join(format!("agent-{id}.token"));
        std::fs::write(&token_file, token).unwrap();
        restrict(&token_file);
        let mut command = self.file.agents[0].command.clone();
        for (flag, value) in [
            ("--agent-id", id.to_string()),
            ("--token-file", token_file.display().to_string()),
            (
                "--data",
                self.path().join(format!("agent-{id}")).display().to_string(),
            ),
        ] {
            let at = command
                .iter()
                .position(|word| word == flag)
                .expect("the command has this flag");
            command[at + 1] = value;
        }
        for flag in flags.chunks(2) {
            match command.iter().position(|word| word == flag[0]) {
                Some(at) => flag[1].clone_into(&mut command[at + 1]),
                None => command.extend(flag.iter().map(ToString::to_string)),
            }
        }
        command
    }

    /// Ends an agent with TERM, as `systemctl stop` does, and waits until it has.
    pub(crate) fn stop_agent(&mut self, agent: usize) {
        send(self.file.agents[agent].pid, Signal::TERM);
        self.reap(&format!("agent-{agent}"));
    }

    /// Waits until an agent is online as all nodes see it.
    pub(crate) async fn agent_online(&self, id: &AgentId) -> Agent {
        self.agent_status(id, AgentStatus::Online).await
    }

    /// Waits until all nodes that answer show the status.
    pub(crate) async fn agent_status(&self, id: &AgentId, status: AgentStatus) -> Agent {
        eventually(&format!("agent {id} {status:?} everywhere"), || async {
            let mut last = None;
            for node in 0..self.file.nodes.len() {
                if !is_alive(self.file.nodes[node].pid) {
                    continue;
                }
                last = Some(
                    self.client_of(node)
                        .agent(id)
                        .await
                        .ok()
                        .filter(|a| a.status == status)?,
                );
            }
            last
        })
        .await
    }

    /// Runs the binary against this cluster as its admin; gives exit code, stdout, stderr.
    pub(crate) fn cli(&self, args: &[&str]) -> (i32, String, String) {
        let urls: Vec<&str> = self.file.nodes.iter().map(|n| n.http.as_str()).collect();
        let output = Command::new(REGENT)
            .args(args)
            .env("REGENT_URL", urls.join(","))
            .env("REGENT_TOKEN", &self.file.admin_token)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (
            output.status.code().unwrap_or(-1),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    }

    /// Kills `regent dev` itself with -9, and nothing else.
    pub(crate) fn kill_dev(&mut self) {
        send(self.process.id(), Signal::KILL);
        let _ = self.process.wait();
    }

    /// Ends `regent dev` with a signal and waits for it; gives the folder, to start again in it.
    pub(crate) fn end(mut self, signal: Signal) -> tempfile::TempDir {
        send(self.process.id(), signal);
        let _ = self.process.wait();
        self.reap_all();
        self.folder.take().expect("kept until the end")
    }

    pub(crate) fn spawn(&self, name: &str, command: &[String]) -> u32 {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path().join(format!("{name}.again.log")))
            .unwrap();
        let child = Command::new(&command[0])
            .args(&command[1..])
            .envs(self.env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let pid = child.id();
        self.children().insert(name.to_owned(), child);
        pid
    }

    fn children(&self) -> MutexGuard<'_, BTreeMap<String, Child>> {
        self.started
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The process that a test started under this name.
    pub(crate) fn pid_of(&self, name: &str) -> Option<u32> {
        self.children().get(name).map(Child::id)
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&self, name: &str, pid: u32) -> bool {
        let mut children = self.children();
        let child = children.get_mut(name).filter(|child| child.id() == pid);
        child.is_none_or(|child| child.try_wait().is_ok_and(|status| status.is_some()))
    }

    pub(crate) fn reap(&self, name: &str) {
        if let Some(mut child) = self.children().remove(name) {
            let _ = child.wait();
        }
    }

    fn reap_all(&self) {
        for (_, mut child) in std::mem::take(&mut *self.children()) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        self.reap_all();
        if self.process.try_wait().ok().flatten().is_none() {
            send(self.process.id(), Signal::TERM);
            let deadline = Instant::now() + Duration::from_secs(15);
            while self.process.try_wait().ok().flatten().is_none() && Instant::now() < deadline {
                std::thread::sleep(LOOK_EVERY);
            }
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
        if std::thread::panicking()
            && let Some(folder) = self.folder.take()
        {
            eprintln!("logs and data are kept in {}", folder.keep().display());
        }
    }
}

/// Looks until there is something, or panics with what was missing.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, look: impl FnMut() -> F) -> T {
    eventually_or(what, &|| String::from("nothing more is known"), look).await
}

/// As `eventually`, with what was there instead.
async fn eventually_or<T, F: Future<Output = Option<T>>>(
    what: &str,
    instead: &dyn Fn() -> String,
    mut look: impl FnMut() -> F,
) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(
            Instant::now() < deadline,
            "there was no {what} after {PATIENCE:?}: {}",
            instead()
        );
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// A free port on an address of this machine's loopback that nobody else picks ports of.
pub(crate) fn free_address() -> String {
    let [a, b, c] = rand::random::<[u8; 3]>();
    let address = IpAddr::V4(Ipv4Addr::new(127, a.max(1), b, c.clamp(1, 254)));
    let listener = TcpListener::bind((address, 0)).unwrap();
    listener.local_addr().unwrap().to_string()
}

/// Waits until a session is in a state.
pub(crate) async fn session_state(client: &Client, name: &SessionName, state: SessionState) -> Session {
    let last = RefCell::new(String::from("it was never answered"));
    let what = format!("session {name} {}", state.as_str());
    eventually_or(&what, &|| last.borrow().clone(), || async {
        let session = match client.session(name).await {
            Ok(session) => session,
            Err(error) => {
                *last.borrow_mut() = error.to_string();
                return None;
            }
        };
        assert!(
            session.state == state || !session.state.is_final(),
            "session {name} is {} instead of {}: {}",
            session.state.as_str(),
            state.as_str(),
            session.reason
        );
        if session.state == state {
            return Some(session);
        }
        *last.borrow_mut() = format!("it is {}: {}", session.state.as_str(), session.reason);
        None
    })
    .await
}

/// A session of a template with nothing special.
pub(crate) fn session_of(template: &str) -> CreateSession {
    serde_json::from_value(serde_json::json!({ "template": TemplateName::new(template).unwrap() })).unwrap()
}

/// What a cluster says is wrong, but for the room on the disk of the machine that tests it.
pub(crate) fn findings(cluster: &regent_types::cluster::Cluster) -> Vec<&String> {
    let all = cluster.findings.iter();
    all.filter(|found| !found.contains("free of")).collect()
}

/// Whether a process runs: a zombie does not, unless a thread of it is still about to end. Until then its
/// ports and locks are taken.
pub(crate) fn is_alive(pid: u32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return false;
    };
    threads.flatten().any(|thread| {
        std::fs::read_to_string(thread.path().join("stat")).is_ok_and(|stat| {
            let state = stat.rsplit(')').next().unwrap_or("").trim_start().chars().next();
            !matches!(state, Some('Z' | 'X'))
        })
    })
}

/// All processes whose environment or command line names a text: for a test's folder, what belongs to it.
pub(crate) fn processes_naming(text: &str) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != std::process::id() && is_alive(*pid))
        .filter(|pid| {
            ["environ", "cmdline"].iter().any(|file| {
                std::fs::read(format!("/proc/{pid}/{file}"))
                    .is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(text))
            })
        })
        .collect()
}

/// Sends a signal.
pub(crate) fn send(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let _ = kill_process(pid, signal);
}

fn kill_and_wait(pid: u32) {
    send(pid, Signal::KILL);
    let deadline = Instant::now() + PATIENCE;
    while is_alive(pid) {
        assert!(Instant::now() < deadline, "process {pid} did not die");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// This process, for what it starts to end with it.
pub(crate) fn lifeline() -> String {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    // Field 22; the second one, a name in brackets, may hold spaces.
    let (_, after_the_name) = stat.rsplit_once(')').unwrap();
    let start = after_the_name.split_whitespace().nth(19).unwrap();
    format!("{}:{start}", std::process::id())
}

/// Makes a file readable by its owner only.
pub(crate) fn restrict(path: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

fn read_dev_file(folder: &Path) -> DevFile {
    serde_json::from_slice(&std::fs::read(folder.join("dev.json")).unwrap()).unwrap()
}

/// Whether a tool that a test needs is missing. A missing tool skips the test by name, unless
/// `REGENT_REQUIRE` lists the need: then it is a failure.
pub(crate) fn lacks(need: &str, is_there: bool) -> bool {
    if is_there {
        return false;
    }
    let required = std::env::var("REGENT_REQUIRE").unwrap_or_default();
    assert!(
        !required.split(',').any(|r| r.trim() == need),
        "REGENT_REQUIRE demands {need}, which is not here"
    );
    eprintln!(
        "SKIPPED: {} lacks {need}",
        std::thread::current().name().unwrap_or("this test")
    );
    true
}
