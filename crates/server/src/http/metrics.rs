//! `/metrics`: Prometheus text. Counters are counted where things happen; what can be read off the state
//! is read when somebody asks.
//!
//! A scrape costs one pass over sessions, agents and commands, off the threads that serve, and nothing in between.
//! One recorder per process: nodes that share a process (tests) share it.

mod catalogue;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;
use std::time::UNIX_EPOCH;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use regent_raft::{Alarm, ClusterStatus};

use super::problem::{Failure, Result};
use crate::bootstrap::FEATURE_LEVEL;
use crate::service::Service;

/// Seconds: from a local read to several elections.
const BUCKETS: [f64; 14] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

static RECORDER: OnceLock<Option<PrometheusHandle>> = OnceLock::new();

/// Installs the recorder; again is harmless. `None` when the program has installed one of its own.
pub(crate) fn install() -> Option<&'static PrometheusHandle> {
    RECORDER
        .get_or_init(|| {
            let builder = PrometheusBuilder::new()
                .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &BUCKETS)
                .map_err(|error| tracing::warn!(%error, "no buckets for metrics"))
                .ok()?;
            let recorder = builder.build_recorder();
            let handle = recorder.handle();
            if let Err(error) = metrics::set_global_recorder(recorder) {
                tracing::warn!(%error, "metrics go to another recorder");
                return None;
            }
            catalogue::register();
            metrics_process::Collector::default().describe();
            Some(handle)
        })
        .as_ref()
}

/// Prometheus text.
#[utoipa::path(get, path = "/metrics", tag = "health", security(()),
    responses((status = 200, description = "Prometheus text", body = String, content_type = "text/plain"),
        super::openapi::ReadProblems))]
pub(super) async fn get(State(service): State<Service>) -> Result<Response> {
    let handle = install().ok_or_else(|| Failure::internal("metrics go to another recorder"))?;
    sample_runtime();
    let scrape = move || {
        sample(&service);
        handle.run_upkeep();
        handle.render()
    };
    let text = tokio::task::spawn_blocking(scrape)
        .await
        .map_err(|_| Failure::internal("the metrics could not be gathered"))?;
    let content_type = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    Ok((content_type, text).into_response())
}

/// Reads gauges off the state.
fn sample(service: &Service) {
    let status = service.node().status();
    let view = service.node().view();
    let state = &view.state;
    gauge("regent_applied_revision", view.revision.0);
    gauge("regent_ready", u64::from(service.is_ready().is_ok()));
    if let Some(tls) = &service.options().tls {
        gauge(
            "regent_certificate_expiry_timestamp_seconds",
            tls.not_after().max(0).cast_unsigned(),
        );
    }
    for member in &status.members {
        let reachable = member.reachable || member.id == status.node;
        metrics::gauge!("regent_member_reachable", "member" => member.id.to_string())
            .set(f64::from(u8::from(reachable)));
    }
    // The recorder forgets no series, and one that stayed at 0 would raise an alert for ever.
    for removed in state.members().values().filter(|member| !member.is_live()) {
        metrics::gauge!("regent_member_reachable", "member" => removed.id.to_string()).set(f64::NAN);
    }
    alarms(&status);
    if service.options().memory.is_none() {
        sample_disk(&service.options().data);
    }
    metrics_process::Collector::default().collect();
    metrics::gauge!("regent_build_info", "version" => env!("CARGO_PKG_VERSION"),
        "feature_level" => FEATURE_LEVEL.to_string())
    .set(1.0);
    gauge(
        "regent_raft_proposals_under_way",
        service.node().proposals_under_way() as u64,
    );
    let states = regent_types::session::SessionState::ALL
        .iter()
        .map(|state| state.as_str());
    by_word(
        "regent_sessions",
        "state",
        states,
        state.sessions().values().map(|s| s.state.as_str()),
    );
    let status = |agent: &regent_state::record::Agent| {
        if agent.is_online() { "online" } else { "offline" }
    };
    by_word(
        "regent_agents",
        "status",
        ["online", "offline"].into_iter(),
        state.agents().values().map(|a| status(a)),
    );
    let statuses = [
        "pending",
        "sent",
        "acknowledged",
        "completed",
        "failed",
        "cancelled",
        "expired",
    ];
    by_word(
        "regent_commands",
        "status",
        statuses.into_iter(),
        state.commands().values().map(|c| c.state.as_str()),
    );
    gauge("regent_leases", state.leases().len() as u64);
    gauge("regent_events", state.events().len() as u64);
    gauge("regent_idempotency_keys", state.idempotency_count() as u64);
}

fn alarms(status: &ClusterStatus) {
    #[allow(clippy::cast_precision_loss)] // offsets are far below 2^53 ms
    metrics::gauge!("regent_clock_offset_seconds").set(status.clock_offset_ms as f64 / 1_000.0);
    let kind = |alarm: &Alarm| match alarm {
        Alarm::Clock { .. } => "clock",
        Alarm::DigestSplit { .. } => "digest_split",
        Alarm::Diverged { .. } => "diverged",
    };
    let kinds = ["clock", "digest_split", "diverged"];
    by_word(
        "regent_alarms",
        "kind",
        kinds.into_iter(),
        status.alarms.iter().map(kind),
    );
}

/// What the data folder takes, and what is left. A file that goes away meanwhile counts for nothing.
fn sample_disk(data: &Path) {
    gauge(
        "regent_log_bytes",
        size(&data.join("log")) + size(&data.join("log-segments")),
    );
    let newest = files(&data.join("snapshots"))
        .filter(|(path, _)| path.extension().is_some_and(|is| is == "snapshot"))
        .filter_map(|(_, file)| Some((file.modified().ok()?, file.len())))
        .max();
    let written = newest.and_then(|(at, _)| at.duration_since(UNIX_EPOCH).ok());
    gauge("regent_snapshot_bytes", newest.map_or(0, |(_, bytes)| bytes));
    metrics::gauge!("regent_snapshot_timestamp_seconds").set(written.map_or(0.0, |at| at.as_secs_f64()));
    if let Ok(disk) = rustix::fs::statvfs(data) {
        gauge(
            "regent_disk_free_bytes",
            disk.f_bavail.saturating_mul(disk.f_frsize),
        );
        gauge(
            "regent_disk_size_bytes",
            disk.f_blocks.saturating_mul(disk.f_frsize),
        );
    }
}

/// Bytes of the files in a folder and in the folders in it.
fn size(folder: &Path) -> u64 {
    files(folder)
        .map(|(path, file)| {
            if file.is_dir() {
                files(&path).map(|(_, file)| file.len()).sum()
            } else {
                file.len()
            }
        })
        .sum()
}

fn files(folder: &Path) -> impl Iterator<Item = (std::path::PathBuf, std::fs::Metadata)> {
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .filter_map(|entry| Some((entry.path(), entry.metadata().ok()?)))
}

fn sample_runtime() {
    let runtime = tokio::runtime::Handle::current().metrics();
    gauge("regent_runtime_workers", runtime.num_workers() as u64);
    gauge("regent_runtime_tasks", runtime.num_alive_tasks() as u64);
    gauge("regent_runtime_queue_depth", runtime.global_queue_depth() as u64);
}

/// Sets a gauge for every word, also those that nothing has now: a gauge that is not set keeps its value.
fn by_word<'a>(
    name: &'static str,
    label: &'static str,
    words: impl Iterator<Item = &'static str>,
    found: impl Iterator<Item = &'a str>,
) {
    let mut counts: BTreeMap<&str, u64> = words.map(|word| (word, 0)).collect();
    for word in found {
        *counts.entry(word).or_default() += 1;
    }
    for (word, count) in counts {
        metrics::gauge!(name, label => word.to_owned()).set(as_f64(count));
    }
}

fn gauge(name: &'static str, value: u64) {
    metrics::gauge!(name).set(as_f64(value));
}

/// Revisions and counts stay below 2^53.
#[allow(clippy::cast_precision_loss)]
fn as_f64(value: u64) -> f64 {
    value as f64
}
