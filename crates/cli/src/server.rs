//! `regent server`: one node, until a signal ends it or it can no longer serve.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use regent_server::{Options, Server, SnapshotPolicy};
use regent_types::NodeId;
use regent_types::duration::Span;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::{ServerConfig, UsageError, required, secret_file};
use crate::lifeline::Lifeline;
use crate::supervisor;

/// Shorter ones can be guessed.
const MIN_SECRET: usize = 16;
/// How often agents send a heartbeat when nothing else is said.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// After how long without one an agent is offline when nothing else is said.
const STALE_AFTER: Duration = Duration::from_secs(30);

/// Runs the node.
pub(crate) async fn run(config: ServerConfig) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new()?;
    #[cfg(feature = "faults")]
    seed_fault()?;
    let lifeline = Lifeline::of(config.lifeline.as_deref())?;
    let options = options(&config)?;
    let node = options.node;
    raise_open_files();
    let server = tokio::select! {
        server = Server::start(options) => server.with_context(|| format!("node {node} cannot start"))?,
        () = signals.end() => return Ok(ExitCode::SUCCESS),
        () = lifeline.ended() => return Ok(ExitCode::FAILURE),
    };
    let serving = async {
        server.ready().await;
        supervisor::ready();
        server.failed().await
    };
    let failure = tokio::select! {
        reason = server.failed() => Some(reason),
        reason = serving => Some(reason),
        () = signals.end() => None,
        // Nobody is left to serve, and nothing may be left behind.
        () = lifeline.ended() => return Ok(ExitCode::FAILURE),
    };
    supervisor::stopping();
    server.shutdown().await;
    match failure {
        None => Ok(ExitCode::SUCCESS),
        Some(reason) => Err(anyhow::anyhow!("node {node} stopped: {reason}")),
    }
}

/// Breaks the rule that `REGENT_TEST_FAULT` names, so that a test can be seen to find it.
#[cfg(feature = "faults")]
fn seed_fault() -> anyhow::Result<()> {
    if let Ok(name) = std::env::var("REGENT_TEST_FAULT") {
        regent_server::seed_fault(&name).map_err(UsageError)?;
        tracing::warn!(fault = name, "a fault is seeded");
    }
    Ok(())
}

/// A node holds a file for each of up to 30,000 connections and 10,000 agents; many systems allow 1,024 unless
/// asked. More than the system's own limit is not to be had, and that is for whoever runs it to raise.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, wanted)
    {
        tracing::warn!(%error, "the limit of open files stays as low as it is");
    }
}

fn options(config: &ServerConfig) -> anyhow::Result<Options> {
    let node = required(config.node_id, "node-id")?;
    let data = required(config.data.clone(), "data")?;
    let http = required(config.http, "http")?;
    let peer = required(config.peer, "peer")?;
    let members = required(config.members.clone(), "members")?;
    let secret_path = required(config.cluster_secret_file.as_deref(), "cluster-secret-file")?;
    if !members.0.contains_key(&node.0) {
        return Err(UsageError(format!(
            "node {node} is not in the list of members {:?}",
            members.0
        ))
        .into());
    }
    let secret = secret_file(secret_path)?;
    if secret.len() < MIN_SECRET {
        return Err(UsageError(format!(
            "the secret in {} has {} characters; it needs at least {MIN_SECRET}",
            secret_path.display(),
            secret.len()
        ))
        .into());
    }
    let heartbeat = config.heartbeat.map_or(HEARTBEAT, Span::duration);
    let stale_after = config.stale_after.map_or(STALE_AFTER, Span::duration);
    if heartbeat.is_zero() || stale_after < heartbeat * 3 {
        return Err(UsageError(format!(
            "stale-after ({stale_after:?}) must be at least three times heartbeat ({heartbeat:?}), so that one lost heartbeat is no loss of an agent"
        ))
        .into());
    }
    Ok(Options {
        node,
        data,
        http,
        peer,
        advertise_http: config
            .advertise_http
            .clone()
            .unwrap_or_else(|| format!("http://{http}")),
        advertise_peer: config.advertise_peer.clone().unwrap_or_else(|| peer.to_string()),
        members: members
            .0
            .into_iter()
            .map(|(id, address)| (NodeId(id), address))
            .collect(),
        secret: secret.into_bytes(),
        heartbeat,
        stale_after,
        bootstrap_token: config
            .bootstrap_token_file
            .as_deref()
            .map(secret_file)
            .transpose()?,
        admin_password: config
            .bootstrap_password_file
            .as_deref()
            .map(secret_file)
            .transpose()?,
        dev: config.dev,
        log_store: config.log_store.unwrap_or_default().into(),
        snapshots: config
            .snapshot_every
            .map_or_else(SnapshotPolicy::default, |entries| {
                SnapshotPolicy::every(entries.get())
            }),
        memory: None,
        sockets: None,
        http_listener: None,
        peer_listener: None,
    })
}

/// The signals that end a process in order.
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// From now on the signals no longer kill this process.
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Until one of them comes.
    pub(crate) async fn end(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
