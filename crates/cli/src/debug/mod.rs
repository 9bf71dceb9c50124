//! `regent debug`: one file with what a report of a fault needs.
//!
//! It must work on a cluster that is ill, so what cannot be fetched is noted in its place and the rest goes on.
//! Invariant: every byte of the bundle has gone through [`Masks`]; nothing is written past it.

mod mask;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures::StreamExt as _;
use regent_client::{Client, Consistency, EventFilter};
use regent_types::cluster::Cluster;
use serde::Serialize;
use serde_json::{Value, json};

use crate::args::Global;
use crate::config::UsageError;
use crate::{noun, output};
use mask::Masks;

/// How long one answer may take: a bundle of an ill cluster must end too.
const WITHIN: Duration = Duration::from_secs(6);
/// How far back events are taken, in revisions.
const EVENTS_BACK: u64 = 2_000;
/// Most events that are taken.
const MAX_EVENTS: usize = 4_000;
/// Where no event has come for so long, those that were kept have all come.
const EVENTS_IDLE: Duration = Duration::from_secs(1);
/// So much is taken of the end of each log.
const LOG_BYTES: u64 = 16 * 1024 * 1024;
/// The folder in the bundle.
const FOLDER: &str = "regent-debug";

/// Flags of `regent debug`.
#[derive(Debug, clap::Args)]
pub(crate) struct DebugArgs {
    /// The bundle to write [default: regent-debug-TIME.tar.gz]; a file that exists is not written over.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// A log whose end goes along; may be repeated.
    #[arg(long = "log", value_name = "FILE")]
    logs: Vec<PathBuf>,
}

/// Gathers and writes the bundle.
pub(crate) async fn run(args: DebugArgs, global: &Global) -> anyhow::Result<()> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_secs());
    let out = args
        .out
        .unwrap_or_else(|| PathBuf::from(format!("regent-debug-{now}.tar.gz")));
    let configuration = configuration(global.config.as_deref())?;
    let logs = args
        .logs
        .iter()
        .map(|log| tail(log))
        .collect::<Result<Vec<_>, _>>()?;
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&out)
        .with_context(|| format!("{} cannot be made", out.display()))?;
    let masks = Masks::of(&configuration);
    let mut bundle = Bundle {
        tar: tar::Builder::new(GzEncoder::new(file, Compression::default())),
        masks,
        now,
    };
    bundle.json(
        "version.json",
        &json!({ "version": env!("CARGO_PKG_VERSION"), "url": global.url }),
    )?;
    bundle.json("configuration.json", &configuration)?;
    for (place, (path, text)) in args.logs.iter().zip(&logs).enumerate() {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        bundle.text(&format!("logs/{place}-{name}"), text)?;
    }
    gather(&mut bundle, global).await?;
    bundle.tar.into_inner()?.finish()?.sync_all()?;
    output::line(format!(
        "wrote {}; names of users, sessions and hosts are in it: read it before you send it",
        out.display()
    ));
    Ok(())
}

async fn gather(bundle: &mut Bundle, global: &Global) -> anyhow::Result<()> {
    let client = noun::client(global)?
        .with_deadline(WITHIN)
        .with_consistency(Consistency::Stale);
    let cluster = client.cluster().await;
    bundle.json("cluster.json", &or_why(&cluster))?;
    for (name, url) in nodes(&client, cluster.as_ref().ok()) {
        let node = noun::client_of(&url, global)?;
        for (file, path) in [
            ("cluster.json", "/api/v1/cluster"),
            ("version.json", "/version"),
            ("readyz.json", "/readyz"),
            ("health.json", "/health"),
            ("metrics.txt", "/metrics"),
        ] {
            let text = match node.look(path).await {
                Ok((_, text)) => text,
                Err(error) => why(&error).to_string(),
            };
            bundle.text(&format!("{name}/{file}"), &text)?;
        }
    }
    bundle.json("agents.json", &or_why(&client.all_agents().await))?;
    let commands = client
        .all_commands(&regent_client::CommandFilter::default())
        .await;
    let open = commands.map(|commands| {
        let open = |status: &str| matches!(status, "pending" | "sent" | "acknowledged" | "failed");
        let kept = commands
            .into_iter()
            .filter(|command| open(command.status.as_str()));
        kept.collect::<Vec<_>>()
    });
    bundle.json("commands.json", &or_why(&open))?;
    bundle.json("leases.json", &or_why(&client.all_leases().await))?;
    let lines = events(&client).await;
    bundle.text("events.jsonl", &lines)
}

/// Every node by the name of its folder: the members, or what was asked when nobody says who they are.
fn nodes(client: &Client, cluster: Option<&Cluster>) -> Vec<(String, String)> {
    match cluster {
        Some(cluster) => cluster
            .members
            .iter()
            .map(|member| (format!("node-{}", member.id), member.http.clone()))
            .collect(),
        None => (0..)
            .zip(client.servers())
            .map(|(place, url): (u32, String)| (format!("server-{place}"), url))
            .collect(),
    }
}

async fn events(client: &Client) -> String {
    let Ok(Some(last)) = client.index().await else {
        return why(&"no node says how far it is").to_string();
    };
    let after = format!("{}.0", last.0.saturating_sub(EVENTS_BACK));
    let mut stream = client.events(EventFilter {
        after: Some(after),
        kinds: Vec::new(),
    });
    let mut lines = String::new();
    for _ in 0..MAX_EVENTS {
        // The first may take as long as any answer, the others are there.
        let within = if lines.is_empty() { WITHIN } else { EVENTS_IDLE };
        let event = match tokio::time::timeout(within, stream.next()).await {
            Ok(Some(Ok(event))) => event,
            Ok(Some(Err(error))) => {
                lines.push_str(&why(&error).to_string());
                lines.push('\n');
                break;
            }
            Ok(None) | Err(_) => break,
        };
        let mut event = serde_json::to_value(event).unwrap_or_default();
        Masks::fields(&mut event);
        lines.push_str(&event.to_string());
        lines.push('\n');
    }
    if lines.is_empty() {
        why(&"no event came").to_string()
    } else {
        lines
    }
}

/// The file that is being written.
struct Bundle {
    tar: tar::Builder<GzEncoder<File>>,
    masks: Masks,
    now: u64,
}

impl Bundle {
    fn json(&mut self, name: &str, value: &impl Serialize) -> anyhow::Result<()> {
        let mut value = serde_json::to_value(value)?;
        Masks::fields(&mut value);
        self.text(name, &format!("{value:#}\n"))
    }

    fn text(&mut self, name: &str, text: &str) -> anyhow::Result<()> {
        let text = self.masks.text(text);
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(self.now);
        self.tar
            .append_data(&mut header, format!("{FOLDER}/{name}"), text.as_bytes())?;
        Ok(())
    }
}

/// What came, or why nothing did.
fn or_why<T: Serialize>(answer: &Result<T, regent_client::Error>) -> Value {
    match answer {
        Ok(value) => serde_json::to_value(value).unwrap_or_default(),
        Err(error) => why(error),
    }
}

fn why(error: &impl std::fmt::Display) -> Value {
    json!({ "notFetched": error.to_string() })
}

/// The file with the settings, and the variables.
fn configuration(file: Option<&Path>) -> anyhow::Result<Value> {
    let settings: Value = match file {
        None => Value::Null,
        Some(file) => crate::config::any(file)?,
    };
    let variables: BTreeMap<String, String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| name.starts_with("REGENT_"))
        .map(|(name, value)| {
            (
                name["REGENT_".len()..].to_ascii_lowercase().replace('_', "-"),
                value,
            )
        })
        .collect();
    Ok(json!({ "file": settings, "variables": variables }))
}

/// The end of a log.
fn tail(path: &Path) -> anyhow::Result<String> {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_BYTES)))?;
        let mut end = Vec::new();
        file.take(LOG_BYTES).read_to_end(&mut end)?;
        Ok(end)
    };
    let end =
        read().map_err(|error| UsageError(format!("the log {} cannot be read: {error}", path.display())))?;
    Ok(String::from_utf8_lossy(&end).into_owned())
}
