//! `regent dev`: a whole cluster on this machine.
//!
//! Real node processes and one agent, each a child with its own data folder, started with the very
//! commands that an operator would type; `dev.json` in the data folder lists them. A child that is
//! killed stays dead, so that one can be killed on purpose. Nothing outlives `dev`: every process,
//! down to each session's shim, watches a keeper that ends with `dev`, so even kill -9 ends all.

mod children;
mod files;
mod ports;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use regent_client::Client;
use regent_trace::OtlpEndpoint;
use regent_types::agent::{AgentStatus, Capacity, RegisterAgent};
use regent_types::{AgentId, NodeId};
use tokio::time::Instant;

use crate::agent_config::RuntimeKind;
use crate::config::{LogStore, UsageError};
use crate::{output, runtimes, secrets};
use children::Children;
use files::{AgentProcess, DevFile, Folder, NodeProcess};

/// How long the cluster may take until the first session can be made. Far above what it takes on
/// a slow machine (about two seconds), so that reaching it means that something is wrong.
const READY_WITHIN: Duration = Duration::from_mins(1);
/// How often it is asked.
const ASK_EVERY: Duration = Duration::from_millis(50);
/// The agent's id.
const AGENT: &str = "dev";

/// Flags of `regent dev`.
#[derive(Debug, clap::Args)]
pub(crate) struct DevArgs {
    /// How many nodes.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=7))]
    nodes: u64,
    /// Folder for all data; a second start resumes. Without it a temporary one is used and removed.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// The first node's HTTP port; the others follow. 0 takes any that are free [default: 8000].
    #[arg(long, value_name = "PORT")]
    http_port: Option<u16>,
    /// What sessions run on.
    #[arg(long, value_enum, default_value_t)]
    runtime: RuntimeKind,
    /// What keeps the log of each node: `sled` or `segments` [default: as before in this folder, else sled].
    #[arg(long, value_name = "STORE", value_enum, hide_possible_values = true)]
    log_store: Option<LogStore>,
    /// Nodes and agent send traces to this collector: the base of its OTLP over HTTP, such as `http://127.0.0.1:4318`
    /// [default: off].
    #[arg(long, value_name = "URL", env = "REGENT_OTLP_ENDPOINT", hide_env = true)]
    otlp_endpoint: Option<OtlpEndpoint>,
}

/// Runs until Ctrl-C or SIGTERM.
pub(crate) async fn run(args: DevArgs) -> anyhow::Result<ExitCode> {
    if args.runtime == RuntimeKind::Kubernetes {
        let told =
            "dev runs sessions as processes or in docker; for kubernetes start `regent agent run` beside it";
        return Err(UsageError(told.to_owned()).into());
    }
    // Taken first: a signal while starting must end what was started.
    let mut signals = crate::server::Signals::new()?;
    let temporary = match &args.data {
        Some(_) => None,
        None => Some(
            tempfile::Builder::new()
                .prefix("regent-dev-")
                .tempdir()
                .context("no temporary folder")?,
        ),
    };
    let path = match (&args.data, &temporary) {
        (Some(path), _) => path.clone(),
        (None, Some(temporary)) => temporary.path().to_owned(),
        (None, None) => unreachable!("one of the two was just made"),
    };
    let mut folder = Folder::open(&path)?;
    let path = path.canonicalize()?;
    let mut children = Children::new()?;
    let result = tokio::select! {
        result = start(&args, &mut folder, &mut children) => result,
        () = signals.end() => {
            children.end(&path).await;
            return Ok(ExitCode::SUCCESS);
        }
    };
    match result {
        Ok(file) => {
            announce(&file);
            children.watch_until(signals.end()).await;
            children.end(&path).await;
            if args.runtime == RuntimeKind::Docker {
                let agent = AgentId::new(AGENT)?;
                runtimes::docker::end_sessions(&agent, &folder.agent_data(&agent)).await?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            children.end(&path).await;
            if let Some(temporary) = temporary {
                // Kept: the logs say why.
                let kept = temporary.keep();
                return Err(error.context(format!(
                    "the cluster did not start; its logs are in {}",
                    kept.display()
                )));
            }
            Err(error.context(format!(
                "the cluster did not start; its logs are in {}",
                path.display()
            )))
        }
    }
}

async fn start(args: &DevArgs, folder: &mut Folder, children: &mut Children) -> anyhow::Result<DevFile> {
    let deadline = Instant::now() + READY_WITHIN;
    let lifeline = children.lifeline().to_string();
    let mut file = folder.plan(
        args.nodes,
        args.http_port,
        args.log_store,
        args.otlp_endpoint.as_ref(),
        &lifeline,
    )?;
    for node in &mut file.nodes {
        node.pid = children.spawn(
            &format!("node {}", node.id),
            &node.command,
            &folder.log(&format!("node-{}", node.id)),
        )?;
    }
    folder.write(&file)?;

    let servers: Vec<String> = file.nodes.iter().map(|n| n.http.clone()).collect();
    let client = Client::new(servers.clone(), Some(file.admin_token.clone()))?;
    until(deadline, children, "a leader", || async {
        client.cluster().await.is_ok_and(|c| c.leader.is_some())
    })
    .await?;

    let agent = AgentId::new(AGENT)?;
    let token_file = folder.agent_token(AGENT);
    if !token_file.exists() {
        let register = RegisterAgent {
            agent_id: agent.clone(),
            platform: args.runtime.as_str().to_owned(),
            region: String::new(),
            capacity: Capacity::default(),
            labels: BTreeMap::new(),
            metadata: serde_json::Value::Null,
        };
        client
            .register_agent(&register)
            .await
            .context("the agent cannot be registered")?;
        let token = client
            .create_agent_token(&agent)
            .await
            .context("the agent's token cannot be made")?;
        secrets::write(&token_file, &token.token.context("the answer holds no token")?)?;
    }
    let mut process = AgentProcess {
        id: agent.clone(),
        pid: 0,
        command: folder.agent_command(
            &agent,
            &servers,
            &token_file,
            args.runtime,
            args.otlp_endpoint.as_ref(),
            &lifeline,
        )?,
    };
    process.pid = children.spawn("the agent", &process.command, &folder.log("agent-dev"))?;
    file.agents.push(process);
    folder.write(&file)?;
    until(deadline, children, "the agent", || async {
        client
            .agent(&agent)
            .await
            .is_ok_and(|a| a.status == AgentStatus::Online)
    })
    .await?;
    // Every node serves, not only the one that was asked.
    for server in &servers {
        let one = Client::new(vec![server.clone()], Some(file.admin_token.clone()))?;
        until(deadline, children, &format!("the node at {server}"), || async {
            one.readyz().await.is_ok()
        })
        .await?;
    }
    Ok(file)
}

/// Asks again until it is so, a child has ended, or the time is up.
async fn until<F: Future<Output = bool>>(
    deadline: Instant,
    children: &mut Children,
    what: &str,
    mut is_so: impl FnMut() -> F,
) -> anyhow::Result<()> {
    loop {
        if is_so().await {
            return Ok(());
        }
        if let Some(ended) = children.first_that_ended() {
            anyhow::bail!("before {what} was there, {ended}");
        }
        anyhow::ensure!(
            Instant::now() < deadline,
            "{what} was not there after {READY_WITHIN:?}"
        );
        tokio::time::sleep(ASK_EVERY).await;
    }
}

fn announce(file: &DevFile) {
    let urls: Vec<&str> = file.nodes.iter().map(|n| n.http.as_str()).collect();
    output::line(format!("ready {}", urls[0]));
    output::line(format!("export REGENT_URL={}", urls.join(",")));
    output::line(format!("export REGENT_TOKEN={}", file.admin_token));
}

impl NodeProcess {
    fn new(id: u64, http: u16, peer: u16, folder: &Folder) -> Self {
        Self {
            id: NodeId(id),
            http: format!("http://127.0.0.1:{http}"),
            peer: format!("127.0.0.1:{peer}"),
            pid: 0,
            data: folder.node_data(id),
            command: Vec::new(),
        }
    }
}
