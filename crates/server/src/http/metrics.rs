//! `/metrics`: Prometheus text. Counters are counted where things happen; what can be read off the state
//! is read when somebody asks.
//!
//! One recorder per process: nodes that share a process (tests) share it.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use super::observe;
use super::problem::{Failure, Result};
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
            describe();
            Some(handle)
        })
        .as_ref()
}

fn describe() {
    metrics::describe_counter!(
        observe::REQUESTS,
        "Requests answered, by method, route and status"
    );
    metrics::describe_histogram!(
        observe::DURATION,
        metrics::Unit::Seconds,
        "Time to the head of the answer"
    );
    metrics::describe_gauge!(observe::IN_FLIGHT, "Requests under way");
    metrics::describe_gauge!("regent_event_streams", "Event streams open on this node");
    metrics::describe_counter!(
        "regent_event_streams_slow_total",
        "Event streams closed because they were read too slowly"
    );
    metrics::describe_counter!(
        "regent_login_limited_total",
        "Logins refused after too many failures"
    );
    metrics::describe_gauge!("regent_applied_revision", "Last revision applied on this node");
    metrics::describe_gauge!("regent_raft_term", "Raft term");
    metrics::describe_gauge!("regent_raft_leader", "1 while this node leads");
    metrics::describe_gauge!("regent_ready", "1 while this node serves");
    metrics::describe_gauge!(
        "regent_member_reachable",
        "1 for each member that this node reaches"
    );
    metrics::describe_gauge!(
        "regent_certificate_expiry_timestamp_seconds",
        "When this node's certificate ends, in seconds since 1970"
    );
    metrics::describe_counter!(
        "regent_http_handshakes_failed_total",
        "Connections to the HTTP port that did not become TLS, by kind"
    );
    metrics::describe_counter!(
        "regent_http_connections_refused_total",
        "Connections closed because their address had too many"
    );
    metrics::describe_counter!(
        "regent_requests_limited_total",
        "Requests refused because their token asked too often"
    );
    metrics::describe_gauge!("regent_sessions", "Sessions by state");
    metrics::describe_gauge!("regent_agents", "Agents by status");
    metrics::describe_gauge!("regent_commands", "Commands by status");
    metrics::describe_gauge!("regent_leases", "Leases held");
    metrics::describe_gauge!("regent_events", "Events kept");
    metrics::describe_gauge!("regent_idempotency_keys", "Idempotency keys kept");
}

/// Prometheus text.
#[utoipa::path(get, path = "/metrics", tag = "health", security(()),
    responses((status = 200, description = "Prometheus text", body = String, content_type = "text/plain"),
        super::openapi::ReadProblems))]
pub(super) async fn get(State(service): State<Service>) -> Result<Response> {
    let handle = install().ok_or_else(|| Failure::internal("metrics go to another recorder"))?;
    sample(&service);
    handle.run_upkeep();
    let content_type = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    Ok((content_type, handle.render()).into_response())
}

/// Reads gauges off the state.
fn sample(service: &Service) {
    let status = service.node().status();
    let view = service.node().view();
    let state = &view.state;
    gauge("regent_applied_revision", view.revision.0);
    gauge("regent_raft_term", status.term);
    gauge(
        "regent_raft_leader",
        u64::from(status.leader == Some(status.node)),
    );
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
