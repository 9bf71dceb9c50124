//! The data folder of `regent dev`: secrets, `dev.json`, logs, and a folder for each process.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use regent_trace::OtlpEndpoint;
use regent_types::{AgentId, NodeId};
use serde::{Deserialize, Serialize};

use super::ports::{self, Ports};
use crate::agent_config::RuntimeKind;
use crate::config::LogStore;
use crate::secrets;

/// Where the first node is served when nothing else is asked for.
const DEFAULT_HTTP_PORT: u16 = 8000;

/// `dev.json`: what runs, and how to start it again by hand.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct DevFile {
    /// The nodes.
    pub(super) nodes: Vec<NodeProcess>,
    /// The agents.
    pub(super) agents: Vec<AgentProcess>,
    /// Also in the file `admin.token`.
    pub(super) admin_token: String,
    /// Of the user `admin`.
    pub(super) admin_password: String,
}

/// One node.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct NodeProcess {
    pub(super) id: NodeId,
    /// URL.
    pub(super) http: String,
    /// Address.
    pub(super) peer: String,
    pub(super) pid: u32,
    pub(super) data: PathBuf,
    pub(super) command: Vec<String>,
}

/// One agent.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct AgentProcess {
    pub(super) id: AgentId,
    pub(super) pid: u32,
    pub(super) command: Vec<String>,
}

/// The folder, held by one `regent dev` at a time.
pub(super) struct Folder {
    path: PathBuf,
    /// Locked until this process ends.
    _lock: fs::File,
    /// The ports that were chosen for it.
    held: Vec<Ports>,
}

impl Folder {
    /// Makes the folder if need be and locks it.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        secrets::folder(path)?;
        let path = path.canonicalize()?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join("dev.lock"))?;
        if lock.try_lock().is_err() {
            anyhow::bail!(
                "another `regent dev` uses {}; end it, or choose another folder with --data",
                path.display()
            );
        }
        Ok(Self {
            path,
            _lock: lock,
            held: Vec::new(),
        })
    }

    /// Decides ports and commands: those of the last start, when there was one.
    pub(super) fn plan(
        &mut self,
        nodes: u64,
        http_port: Option<u16>,
        log_store: Option<LogStore>,
        otlp: Option<&OtlpEndpoint>,
        lifeline: &str,
    ) -> anyhow::Result<DevFile> {
        let mut file = if let Some(file) = self.read()? {
            self.planned_again(file, nodes, http_port)?
        } else {
            let http = self.http_ports(http_port.unwrap_or(DEFAULT_HTTP_PORT), nodes)?;
            let peer = self.any_ports(http.len(), &http)?;
            let nodes = http
                .iter()
                .zip(&peer)
                .zip(1..)
                .map(|((h, p), id)| NodeProcess::new(id, *h, *p, self))
                .collect();
            DevFile {
                nodes,
                agents: Vec::new(),
                admin_token: secrets::random("regent_"),
                admin_password: secrets::random(""),
            }
        };
        ports::check(
            file.nodes
                .iter()
                .filter_map(|n| n.http.rsplit_once(':')?.1.parse().ok()),
        )?;
        file.agents.clear();
        for (name, text) in [
            ("cluster.secret", None),
            ("admin.token", Some(&file.admin_token)),
            ("admin.password", Some(&file.admin_password)),
        ] {
            let path = self.path.join(name);
            if !path.exists() {
                secrets::write(
                    &path,
                    text.map_or_else(|| secrets::random(""), Clone::clone).as_str(),
                )?;
            }
        }
        let members: Vec<String> = file
            .nodes
            .iter()
            .map(|n| format!("{}={}", n.id, n.peer))
            .collect();
        for node in &mut file.nodes {
            node.command = self.node_command(node, &members.join(","), log_store, otlp, lifeline)?;
        }
        Ok(file)
    }

    /// The plan of the last start, with other HTTP ports if so asked.
    fn planned_again(
        &mut self,
        mut file: DevFile,
        nodes: u64,
        http_port: Option<u16>,
    ) -> anyhow::Result<DevFile> {
        let had = file.nodes.len();
        anyhow::ensure!(
            had as u64 == nodes,
            "the cluster in {} has {had} nodes: say --nodes {had}, or choose another folder with --data",
            self.path.display(),
        );
        if let Some(port) = http_port {
            for (node, port) in file.nodes.iter_mut().zip(self.http_ports(port, nodes)?) {
                node.http = format!("http://127.0.0.1:{port}");
            }
        }
        Ok(file)
    }

    fn http_ports(&mut self, first: u16, nodes: u64) -> anyhow::Result<Vec<u16>> {
        let count = usize::try_from(nodes)?;
        if first == 0 {
            return self.any_ports(count, &[]);
        }
        let last = u64::from(first) + nodes - 1;
        anyhow::ensure!(
            u16::try_from(last).is_ok(),
            "ports {first} to {last} do not exist"
        );
        Ok((first..).take(count).collect())
    }

    /// Ports that are this folder's as long as it is open.
    fn any_ports(&mut self, count: usize, taken: &[u16]) -> anyhow::Result<Vec<u16>> {
        let ports = Ports::choose(count, taken)?;
        let numbers = ports.numbers().collect();
        self.held.push(ports);
        Ok(numbers)
    }

    fn node_command(
        &self,
        node: &NodeProcess,
        members: &str,
        log_store: Option<LogStore>,
        otlp: Option<&OtlpEndpoint>,
        lifeline: &str,
    ) -> anyhow::Result<Vec<String>> {
        let http = node.http.trim_start_matches("http://");
        let path = |name: &str| self.path.join(name).display().to_string();
        let mut command = [
            &program()?,
            "server",
            "--node-id",
            &node.id.to_string(),
            "--data",
            &node.data.display().to_string(),
            "--http",
            http,
            "--peer",
            &node.peer,
            "--members",
            members,
            "--cluster-secret-file",
            &path("cluster.secret"),
            "--bootstrap-token-file",
            &path("admin.token"),
            "--bootstrap-password-file",
            &path("admin.password"),
            "--heartbeat",
            "1s",
            "--stale-after",
            "4s",
            "--dev",
            "--lifeline",
            lifeline,
        ]
        .map(str::to_owned)
        .to_vec();
        // What the folder was begun with goes on without a flag; else the node knows the default.
        if let Some(store) = log_store.or_else(|| LogStore::begun_in(&node.data)) {
            command.extend(["--log-store", store.as_str()].map(str::to_owned));
        }
        command.extend(otlp_flag(otlp));
        Ok(command)
    }

    /// The command of an agent.
    pub(super) fn agent_command(
        &self,
        id: &AgentId,
        servers: &[String],
        token_file: &Path,
        runtime: RuntimeKind,
        otlp: Option<&OtlpEndpoint>,
        lifeline: &str,
    ) -> anyhow::Result<Vec<String>> {
        let mut command = [
            &program()?,
            "agent",
            "run",
            "--agent-id",
            id.as_str(),
            "--servers",
            &servers.join(","),
            "--token-file",
            &token_file.display().to_string(),
            "--runtime",
            runtime.as_str(),
            "--data",
            &self.agent_data(id).display().to_string(),
            "--lifeline",
            lifeline,
        ]
        .map(str::to_owned)
        .to_vec();
        command.extend(otlp_flag(otlp));
        Ok(command)
    }

    /// The data folder of a node.
    pub(super) fn node_data(&self, id: u64) -> PathBuf {
        self.path.join(format!("node-{id}"))
    }

    /// The data folder of an agent.
    pub(super) fn agent_data(&self, id: &AgentId) -> PathBuf {
        self.path.join(format!("agent-{id}"))
    }

    /// The token file of an agent.
    pub(super) fn agent_token(&self, id: &str) -> PathBuf {
        self.path.join(format!("agent-{id}.token"))
    }

    /// The log file of a process.
    pub(super) fn log(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.log"))
    }

    fn read(&self) -> anyhow::Result<Option<DevFile>> {
        let path = self.path.join("dev.json");
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).with_context(|| {
                format!(
                    "{} cannot be read; remove the folder to begin anew",
                    path.display()
                )
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("{} cannot be read", path.display())),
        }
    }

    /// Writes `dev.json`, whole or not at all.
    pub(super) fn write(&self, file: &DevFile) -> anyhow::Result<()> {
        secrets::write(&self.path.join("dev.json"), &serde_json::to_string_pretty(file)?)
    }
}

fn otlp_flag(endpoint: Option<&OtlpEndpoint>) -> Vec<String> {
    endpoint.map_or_else(Vec::new, |endpoint| {
        vec!["--otlp-endpoint".to_owned(), endpoint.to_string()]
    })
}

fn program() -> anyhow::Result<String> {
    let path = std::env::current_exe().context("this program's own path cannot be found")?;
    path.into_os_string()
        .into_string()
        .map_err(|p| anyhow::anyhow!("the path {} is not text", p.display()))
}
