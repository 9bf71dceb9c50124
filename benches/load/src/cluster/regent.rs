//! Three real nodes of Regent, started by `regent dev` with the timeouts that ship.
//!
//! The records are sessions that run on an agent which the bench plays itself ([`super::agent`]), so that no
//! process runs for them and no command is pending while something is measured.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::agent::Agent;
use super::{MEMBERS, Member, until};
use crate::http::Connection;
use crate::process::Process;

/// Sessions that are made at a time.
const PREPARING: usize = 64;
/// Sessions that may be made before they run. The agent's heartbeats stand in line with what it reports, so too
/// long a line would make it look dead.
const NOT_RUNNING: u64 = 256;
/// How often makers look whether they may go on.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// How often it is counted what runs.
const COUNT_EVERY: Duration = Duration::from_millis(20);

/// The cluster. Fields are dropped in this order: `regent dev` last, which ends what is left.
pub(crate) struct Regent {
    agent: Option<Agent>,
    pub(crate) members: Vec<Member>,
    pub(crate) token: String,
    pub(crate) version: String,
    /// The names of the sessions.
    pub(crate) sessions: Vec<String>,
    _dev: Process,
}

/// The parts of `dev.json` that are needed.
#[derive(Deserialize)]
struct DevFile {
    nodes: Vec<Node>,
    admin_token: String,
}

#[derive(Deserialize)]
struct Node {
    http: String,
    pid: u32,
    data: PathBuf,
    command: Vec<String>,
}

impl Regent {
    pub(super) async fn start(folder: &Path, program: &Path) -> anyhow::Result<Self> {
        let (data, log) = (folder.join("dev"), folder.join("dev.log"));
        let argv = [
            program.display().to_string(),
            "dev".to_owned(),
            "--nodes".to_owned(),
            MEMBERS.to_string(),
            "--http-port".to_owned(),
            "0".to_owned(),
            "--data".to_owned(),
            data.display().to_string(),
        ];
        let mut dev = Process::start(&argv, &log)?;
        until("`regent dev`", async || {
            let said = std::fs::read_to_string(&log)?;
            if said.lines().any(|line| line.starts_with("ready ")) {
                return Ok(true);
            }
            match dev.ended()? {
                Some(status) => bail!("`regent dev` ended with {status}: {said}"),
                None => Ok(false),
            }
        })
        .await?;
        let file = std::fs::read_to_string(data.join("dev.json")).context("dev.json")?;
        let file: DevFile = serde_json::from_str(&file).context("dev.json")?;
        let members = file.nodes.into_iter().enumerate().map(|(n, node)| {
            let address = node.http.trim_start_matches("http://");
            anyhow::Ok(Member {
                address: address
                    .parse()
                    .with_context(|| format!("not an address: {address}"))?,
                pid: node.pid,
                data: node.data,
                command: node.command,
                log: folder.join(format!("again-{n}.log")),
                process: None,
            })
        });
        let mut regent = Self {
            agent: None,
            members: members.collect::<Result<_, _>>()?,
            token: file.admin_token,
            version: String::new(),
            sessions: Vec::new(),
            _dev: dev,
        };
        let version = regent.call(0, "GET", "/version", None).await?;
        version["version"]
            .as_str()
            .unwrap_or("unknown")
            .clone_into(&mut regent.version);
        Ok(regent)
    }

    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        self.members.iter().map(|member| member.address).collect()
    }

    /// A connection to a member as the admin.
    pub(crate) async fn connect(&self, member: usize) -> anyhow::Result<Connection> {
        Connection::open(self.members[member].address, &self.token).await
    }

    /// One request over a connection of its own, which must be done.
    pub(crate) async fn call(
        &self,
        member: usize,
        method: &str,
        path: &str,
        body: Option<Value>,
    ) -> anyhow::Result<Value> {
        let mut connection = self.connect(member).await?;
        call(&mut connection, method, path, body).await
    }

    pub(super) async fn leader(&self) -> anyhow::Result<usize> {
        for member in 0..self.members.len() {
            let Ok(cluster) = self.call(member, "GET", "/api/v1/cluster", None).await else {
                continue;
            };
            let leader = cluster["leader"].as_u64().and_then(|id| usize::try_from(id).ok());
            // `dev` numbers its nodes from 1, in the order of `dev.json`.
            if let Some(id) = leader.filter(|id| (1..=self.members.len()).contains(id)) {
                return Ok(id - 1);
            }
        }
        bail!("no member leads")
    }

    /// Makes the sessions that are missing, and waits until all of them run.
    pub(super) async fn prepare(&mut self, records: usize) -> anyhow::Result<()> {
        if self.agent.is_none() {
            self.agent = Some(Agent::start(self).await?);
            for member in 0..self.members.len() {
                until("the bench's agent", async || {
                    let agent = self
                        .call(member, "GET", &format!("/api/v1/agents/{}", Agent::ID), None)
                        .await?;
                    Ok(agent["status"] == "online")
                })
                .await?;
            }
        }
        let missing = records.saturating_sub(self.sessions.len());
        let makers = PREPARING.min(missing);
        // Sessions that were made, and those that the cluster says run.
        let made = Arc::new(AtomicU64::new(self.sessions.len() as u64));
        let running = Arc::new(AtomicU64::new(self.sessions.len() as u64));
        let mut tasks = Vec::new();
        for task in 0..makers {
            let (running, made) = (running.clone(), made.clone());
            let mut connection = self.connect(task % self.members.len()).await?;
            let count = missing / makers + usize::from(task < missing % makers);
            tasks.push(tokio::spawn(async move {
                let body = json!({ "template": "sleep", "placement": { "region": Agent::REGION } });
                let mut names = Vec::with_capacity(count);
                while names.len() < count {
                    if made.load(Relaxed) >= running.load(Relaxed) + NOT_RUNNING {
                        tokio::time::sleep(LOOK_EVERY).await;
                        continue;
                    }
                    made.fetch_add(1, Relaxed);
                    let session =
                        call(&mut connection, "POST", "/api/v1/sessions", Some(body.clone())).await?;
                    names.push(
                        session["name"]
                            .as_str()
                            .context("a session without a name")?
                            .to_owned(),
                    );
                }
                anyhow::Ok(names)
            }));
        }
        let mut connection = self.connect(0).await?;
        while tasks.iter().any(|task| !task.is_finished()) {
            running.store(count_running(&mut connection).await?, Relaxed);
            tokio::time::sleep(COUNT_EVERY).await;
        }
        for task in tasks {
            self.sessions.extend(task.await??);
        }
        let expected = self.sessions.len() as u64;
        until("all sessions", async || {
            self.agent
                .as_ref()
                .context("the agent was just started")?
                .check()?;
            Ok(count_running(&mut connection).await? >= expected)
        })
        .await?;
        // An open command would go on being worked on while something else is measured.
        let open = self
            .call(0, "GET", "/api/v1/commands?status=pending&limit=1", None)
            .await?;
        ensure!(
            open["total"].as_u64().unwrap_or(0) == 0,
            "commands are pending: {open}"
        );
        Ok(())
    }
}

/// How many sessions run, as a member sees it.
async fn count_running(connection: &mut Connection) -> anyhow::Result<u64> {
    let path = "/api/v1/sessions?state=running&limit=1&consistency=stale";
    let running = call(connection, "GET", path, None).await?;
    running["total"].as_u64().context("no total")
}

/// One request with JSON both ways, which must be done.
pub(crate) async fn call(
    connection: &mut Connection,
    method: &str,
    path: &str,
    body: Option<Value>,
) -> anyhow::Result<Value> {
    let body = body.map(|body| body.to_string()).unwrap_or_default();
    let answer = connection.request(method, path, body.as_bytes()).await?;
    answer.json().with_context(|| format!("{method} {path}"))
}
