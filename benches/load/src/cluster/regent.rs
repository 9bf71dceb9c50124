//! Three real nodes of Regent, started by the commands that an operator would type, with the timeouts that ship.
//! (`regent dev` would start them with shorter ones for agents.)
//!
//! The records are sessions that run on an agent which the bench plays itself ([`super::agent`]), so that no
//! process runs for them and no command is pending while something is measured.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

use super::agent::Agent;
use super::{MEMBERS, Member, ports, until};
use crate::http::Connection;

/// Sessions that are made at a time.
const PREPARING: usize = 64;
/// Sessions that may be made before they run. The agent's heartbeats stand in line with what it reports, so too
/// long a line would make it look dead.
const NOT_RUNNING: u64 = 256;
/// Sessions after which another agent is played: an agent says hello with all that it runs in one frame, which may
/// have a mebibyte.
const SESSIONS_OF_AN_AGENT: usize = 5_000;
/// How often makers look whether they may go on.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// How often it is counted what runs.
const COUNT_EVERY: Duration = Duration::from_millis(20);

/// The cluster.
pub(crate) struct Regent {
    agents: Vec<Agent>,
    pub(crate) members: Vec<Member>,
    pub(crate) token: String,
    pub(crate) version: String,
    /// The names of the sessions.
    pub(crate) sessions: Vec<String>,
}

impl Regent {
    pub(super) async fn start(folder: &Path, begin: &[String]) -> anyhow::Result<Self> {
        let ports = ports::choose(2 * MEMBERS)?;
        let (http, peer) = ports.split_at(MEMBERS);
        let list: Vec<String> = peer
            .iter()
            .zip(1..)
            .map(|(port, id)| format!("{id}=127.0.0.1:{port}"))
            .collect();
        let token = secret()?;
        let (token_file, secret_file) = (folder.join("admin.token"), folder.join("cluster.secret"));
        write_secret(&token_file, &token)?;
        write_secret(&secret_file, &secret()?)?;
        let mut members = Vec::new();
        for n in 0..MEMBERS {
            let data = folder.join(format!("node-{}", n + 1));
            let flags = [
                ("--node-id", (n + 1).to_string()),
                ("--data", data.display().to_string()),
                ("--http", format!("127.0.0.1:{}", http[n])),
                ("--peer", format!("127.0.0.1:{}", peer[n])),
                ("--members", list.join(",")),
                ("--cluster-secret-file", secret_file.display().to_string()),
                ("--bootstrap-token-file", token_file.display().to_string()),
            ];
            let mut command = begin.to_vec();
            command.extend(
                flags
                    .into_iter()
                    .flat_map(|(flag, value)| [flag.to_owned(), value]),
            );
            let log = folder.join(format!("node-{}.log", n + 1));
            members.push(Member::new(http[n], data, command, log)?);
        }
        let mut regent = Self {
            agents: Vec::new(),
            members,
            token,
            version: String::new(),
            sessions: Vec::new(),
        };
        regent.ready().await?;
        let version = regent.call(0, "GET", "/version", None).await?;
        version["version"]
            .as_str()
            .unwrap_or("unknown")
            .clone_into(&mut regent.version);
        Ok(regent)
    }

    /// Waits until every member serves.
    pub(super) async fn ready(&mut self) -> anyhow::Result<()> {
        for n in 0..self.members.len() {
            until("a member of Regent", async || {
                self.members[n].check()?;
                Ok(self.call(n, "GET", "/readyz", None).await.is_ok())
            })
            .await?;
        }
        Ok(())
    }

    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        self.members.iter().map(|member| member.address).collect()
    }

    /// Regent's program, and the folder of this cluster.
    pub(crate) fn program(&self) -> anyhow::Result<(String, &Path)> {
        let member = self.members.first().context("a cluster without members")?;
        let folder = member.data.parent().context("a folder of its own")?;
        Ok((member.program().to_owned(), folder))
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
            // Ids count from 1, in the order of the members.
            if let Some(id) = leader.filter(|id| (1..=self.members.len()).contains(id)) {
                return Ok(id - 1);
            }
        }
        bail!("no member leads")
    }

    /// Makes the sessions that are missing, and waits until all of them run.
    pub(super) async fn prepare(&mut self, records: usize) -> anyhow::Result<()> {
        while self.agents.len() < records.div_ceil(SESSIONS_OF_AN_AGENT) {
            let id = format!("bench-{}", self.agents.len() + 1);
            self.agents.push(Agent::start(self, &id).await?);
            for member in 0..self.members.len() {
                until("the bench's agent", async || {
                    let agent = self
                        .call(member, "GET", &format!("/api/v1/agents/{id}"), None)
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
                // As large as what works write to it later.
                let tags: Vec<String> = (0..8).map(|tag| format!("{task:016x}{tag:016x}")).collect();
                let body =
                    json!({ "template": "sleep", "placement": { "region": Agent::REGION }, "tags": tags });
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
            for agent in &self.agents {
                agent.check()?;
            }
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

/// 32 hexadecimal digits that nobody can guess.
fn secret() -> anyhow::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("{:032x}", u128::from_le_bytes(bytes)))
}

/// A file that only its owner may read.
fn write_secret(path: &Path, secret: &str) -> anyhow::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    Ok(file.write_all(secret.as_bytes())?)
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
