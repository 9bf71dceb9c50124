//! `regent server`: one node, until a signal ends it or it can no longer serve.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use regent_server::{
    BackupSchedule, Credentials, Files, HttpClients, Limits, Options, Server, SnapshotPolicy,
};
use regent_types::NodeId;
use regent_types::duration::Span;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::{LogStore, ServerConfig, UsageError, required, secret_file};
use crate::join;
use crate::lifeline::Lifeline;
use crate::secrets;
use crate::supervisor;

/// Shorter ones can be guessed.
const MIN_SECRET: usize = 16;
/// How often agents send a heartbeat when nothing else is said.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// After how long without one an agent is offline when nothing else is said.
const STALE_AFTER: Duration = Duration::from_secs(30);

/// How often backups are made when nothing else is said.
const BACKUP_EVERY: Duration = Duration::from_hours(1);
/// How many are kept when nothing else is said: a day of them.
const BACKUP_KEEP: u32 = 24;

/// Runs the node.
pub(crate) async fn run(config: ServerConfig) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new()?;
    // Taken first: it must not end this process, whenever it comes.
    let hangup = signal(SignalKind::hangup())?;
    #[cfg(feature = "faults")]
    seed_fault()?;
    let lifeline = Lifeline::of(config.lifeline.as_deref())?;
    let joined = tokio::select! {
        joined = join::run(&config) => joined?,
        () = signals.end() => return Ok(ExitCode::SUCCESS),
        () = lifeline.ended() => return Ok(ExitCode::FAILURE),
    };
    let options = options(&config, joined)?;
    let node = options.node;
    let tls = options.tls.clone();
    raise_open_files();
    let server = tokio::select! {
        server = Server::start(options) => server.with_context(|| format!("node {node} cannot start"))?,
        () = signals.end() => return Ok(ExitCode::SUCCESS),
        () = lifeline.ended() => return Ok(ExitCode::FAILURE),
    };
    let failure = tokio::select! {
        never = look_when_told(hangup, tls) => match never {},
        never = say_when_ready(&server) => match never {},
        // It may fail before it ever serves: one that was taken out while it was away is told so at once.
        reason = server.failed() => Some(reason),
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

/// A secret that is needed once. Whoever has removed its file afterwards did well.
fn for_the_first_start(file: Option<&Path>, config: &ServerConfig) -> anyhow::Result<Option<String>> {
    let begun = config.data.as_deref().and_then(LogStore::begun_in).is_some();
    match file {
        Some(file) if begun && !file.exists() => Ok(None),
        file => file.map(secret_file).transpose(),
    }
}

/// Tells whoever started this process that it serves.
async fn say_when_ready(server: &Server) -> Infallible {
    server.ready().await;
    supervisor::ready();
    std::future::pending().await
}

/// SIGHUP has the certificates looked at now.
async fn look_when_told(mut hangup: Signal, tls: Option<Arc<Credentials>>) -> Infallible {
    while hangup.recv().await.is_some() {
        if let Some(credentials) = &tls {
            credentials.look_now();
        } else {
            tracing::info!("told to look at the certificates, and there are none");
        }
    }
    std::future::pending().await
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

/// `joined`: where the cluster's secret is, for a node that does not found its cluster.
fn options(config: &ServerConfig, joined: Option<PathBuf>) -> anyhow::Result<Options> {
    let node = required(config.node_id, "node-id")?;
    let data = required(config.data.clone(), "data")?;
    secrets::check_folder(&data)?;
    let http = required(config.http, "http")?;
    let peer = required(config.peer, "peer")?;
    let members = match joined {
        Some(_) => config.members.clone().unwrap_or_default(),
        None => required(config.members.clone(), "members")?,
    };
    let secret_path = match joined.filter(|_| config.cluster_secret_file.is_none()) {
        Some(kept) => kept,
        None => required(config.cluster_secret_file.clone(), "cluster-secret-file")?,
    };
    if !members.0.is_empty() && !members.0.contains_key(&node.0) {
        return Err(UsageError(format!(
            "node {node} is not in the list of members {:?}",
            members.0
        ))
        .into());
    }
    let secret = secret_file(&secret_path)?;
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
    let tls = tls(config, node)?;
    Ok(Options {
        node,
        data,
        http,
        peer,
        advertise_http: config.advertised_http(http),
        advertise_peer: config.advertised_peer(peer),
        members: members
            .0
            .into_iter()
            .map(|(id, address)| (NodeId(id), address))
            .collect(),
        secret: secret.into_bytes(),
        heartbeat,
        stale_after,
        bootstrap_token: for_the_first_start(config.bootstrap_token_file.as_deref(), config)?,
        admin_password: for_the_first_start(config.bootstrap_password_file.as_deref(), config)?,
        dev: config.dev,
        log_store: config.log_store.unwrap_or_default().into(),
        snapshots: config
            .snapshot_every
            .map_or_else(SnapshotPolicy::default, |entries| {
                SnapshotPolicy::every(entries.get())
            }),
        backups: backups(config)?,
        remove_dead_after: config.remove_dead_after.map(Span::duration),
        min_voters: config
            .min_voters
            .map_or(regent_server::DEFAULT_MIN_VOTERS, std::num::NonZeroUsize::get),
        limits: Limits {
            connections_per_address: config
                .connections_per_address
                .unwrap_or(Limits::default().connections_per_address),
            requests_per_second: config
                .requests_per_second
                .unwrap_or(Limits::default().requests_per_second),
        },
        memory: None,
        sockets: None,
        tls,
        http_listener: None,
        peer_listener: None,
    })
}

/// Backups on a schedule; a setting that does nothing alone is a mistake.
fn backups(config: &ServerConfig) -> anyhow::Result<Option<BackupSchedule>> {
    let Some(folder) = config.backup_dir.clone() else {
        return match (config.backup_every, config.backup_keep) {
            (None, None) => Ok(None),
            _ => Err(UsageError(
                "backup-every and backup-keep do nothing without backup-dir: give --backup-dir".to_owned(),
            )
            .into()),
        };
    };
    let keep = config.backup_keep.map_or(BACKUP_KEEP, std::num::NonZeroU32::get);
    Ok(Some(BackupSchedule {
        folder,
        every: config.backup_every.map_or(BACKUP_EVERY, Span::duration),
        keep: usize::try_from(keep).unwrap_or(usize::MAX),
    }))
}

/// The certificates, which may be missing only where nothing crosses a network, or when somebody says that it may.
pub(crate) fn tls(config: &ServerConfig, node: NodeId) -> anyhow::Result<Option<Arc<Credentials>>> {
    let refused = |why: String| Err(UsageError(why).into());
    let files = match (&config.tls_cert, &config.tls_key, &config.tls_ca) {
        (Some(cert), Some(key), Some(ca)) => Files {
            cert: cert.clone(),
            key: key.clone(),
            ca: ca.clone(),
        },
        (None, None, None) if config.tls_clients => {
            return refused(
                "tls-clients needs certificates: give --tls-cert, --tls-key and --tls-ca".to_owned(),
            );
        }
        (None, None, None) => {
            let open = [("http", config.http), ("peer", config.peer)]
                .into_iter()
                .filter(|_| !config.plaintext)
                .find_map(|(key, address)| Some((key, address.filter(|a| !a.ip().is_loopback())?)));
            return match open {
                None => Ok(None),
                Some((key, address)) => refused(format!(
                    "--{key} {address} is not a loopback address and this node has no certificate, so secrets would \
                     cross the network in plain text: give --tls-cert, --tls-key and --tls-ca (`regent cert cluster` \
                     makes them), or --plaintext to have it so"
                )),
            };
        }
        (cert, key, ca) => {
            let missing: Vec<&str> = [("--tls-cert", cert), ("--tls-key", key), ("--tls-ca", ca)]
                .into_iter()
                .filter_map(|(flag, given)| given.is_none().then_some(flag))
                .collect();
            return refused(format!(
                "--tls-cert, --tls-key and --tls-ca go together; {} is missing",
                missing.join(" and ")
            ));
        }
    };
    if config.plaintext {
        return refused("certificates and --plaintext contradict each other; keep one of them".to_owned());
    }
    let clients = if config.tls_clients {
        HttpClients::Certified
    } else {
        HttpClients::Any
    };
    match Credentials::load(files, node, clients) {
        Ok(credentials) => Ok(Some(Arc::new(credentials))),
        Err(error) => refused(error.to_string()),
    }
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
