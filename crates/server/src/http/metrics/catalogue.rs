//! Every metric of a node: its name, its kind, its labels and what it means, in one table.
//!
//! The HELP texts come from here, and the table in docs/operations.md is compared with it in a test, so neither
//! goes stale. What counts trouble is there with 0 from the start: an alert on something that never happened
//! yet must find its series.

/// What a metric is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

use Kind::{Counter, Gauge, Histogram};

/// Name, kind, labels, meaning. Labels are bounded sets of words: routes, states, kinds, members; never a name that
/// a user chose.
pub(super) const METRICS: &[(&str, Kind, &[&str], &str)] = &[
    (
        "regent_build_info",
        Gauge,
        &["version", "feature_level"],
        "1, for the program that runs",
    ),
    ("regent_ready", Gauge, &[], "1 while this node serves"),
    (
        "regent_member_reachable",
        Gauge,
        &["member"],
        "1 for each member that this node reaches",
    ),
    (
        "regent_alarms",
        Gauge,
        &["kind"],
        "What a person must look at: clock, digest_split or diverged, as in /health",
    ),
    (
        "regent_clock_offset_seconds",
        Gauge,
        &[],
        "The leader's wall clock minus cluster time",
    ),
    (
        "regent_applied_revision",
        Gauge,
        &[],
        "Last revision applied on this node",
    ),
    ("regent_raft_term", Gauge, &[], "Raft term"),
    ("regent_raft_is_leader", Gauge, &[], "1 while this node leads"),
    (
        "regent_raft_leader_id",
        Gauge,
        &[],
        "The leader that this node knows; 0 for none",
    ),
    (
        "regent_raft_last_log_index",
        Gauge,
        &[],
        "Last entry in this node's log",
    ),
    (
        "regent_raft_applied_index",
        Gauge,
        &[],
        "Last entry applied on this node",
    ),
    (
        "regent_raft_snapshot_index",
        Gauge,
        &[],
        "Last entry in this node's newest snapshot",
    ),
    (
        "regent_raft_reachable_voters",
        Gauge,
        &[],
        "Voters that this node reaches, itself included",
    ),
    (
        "regent_raft_proposals_total",
        Counter,
        &["outcome"],
        "Writes that came in here, by what became of them",
    ),
    (
        "regent_raft_proposal_seconds",
        Histogram,
        &[],
        "Time of a write until it is applied here or refused",
    ),
    (
        "regent_raft_proposals_under_way",
        Gauge,
        &[],
        "Writes of this node that wait for their outcome; 8192 at most",
    ),
    (
        "regent_raft_snapshot_seconds",
        Histogram,
        &[],
        "Time to write a snapshot",
    ),
    (
        "regent_raft_failures_total",
        Counter,
        &[],
        "Failures of consensus or storage that end the node; must stay 0",
    ),
    (
        "regent_raft_digest_alarms_total",
        Counter,
        &[],
        "Times that members' states differed; must stay 0",
    ),
    (
        "regent_peer_connections_failed_total",
        Counter,
        &["kind"],
        "Connections of peers that were refused or lost",
    ),
    (
        "regent_log_sync_seconds",
        Histogram,
        &[],
        "Time of one sync of the log to disk",
    ),
    (
        "regent_log_appended_entries_total",
        Counter,
        &[],
        "Entries appended to the log",
    ),
    (
        "regent_log_appended_bytes_total",
        Counter,
        &[],
        "Bytes of the entries appended to the log",
    ),
    ("regent_log_entries", Gauge, &[], "Entries kept in the log"),
    ("regent_log_bytes", Gauge, &[], "Size of the log's files"),
    (
        "regent_snapshot_bytes",
        Gauge,
        &[],
        "Size of the newest snapshot; 0 for none",
    ),
    (
        "regent_snapshot_timestamp_seconds",
        Gauge,
        &[],
        "When the newest snapshot was written, in Unix time; 0 for none",
    ),
    (
        "regent_disk_free_bytes",
        Gauge,
        &[],
        "Free space on the file system of the data folder",
    ),
    (
        "regent_disk_size_bytes",
        Gauge,
        &[],
        "Size of the file system of the data folder",
    ),
    (
        "regent_http_requests_total",
        Counter,
        &["method", "route", "status"],
        "Requests answered",
    ),
    (
        "regent_http_request_duration_seconds",
        Histogram,
        &["method", "route"],
        "Time to the head of the answer",
    ),
    ("regent_http_requests_in_flight", Gauge, &[], "Requests under way"),
    (
        "regent_login_limited_total",
        Counter,
        &[],
        "Logins refused after too many failures",
    ),
    (
        "regent_event_streams",
        Gauge,
        &[],
        "Event streams open on this node",
    ),
    (
        "regent_event_streams_slow_total",
        Counter,
        &[],
        "Event streams closed because they were read too slowly",
    ),
    (
        "regent_agent_connections",
        Gauge,
        &[],
        "Connections of agents that this node holds",
    ),
    (
        "regent_agent_connections_closed_total",
        Counter,
        &["code"],
        "Connections of agents closed by this node, by close code",
    ),
    (
        "regent_agent_connections_superseded_total",
        Counter,
        &[],
        "Connections superseded by a newer one of the same agent",
    ),
    (
        "regent_agent_slow_consumers_total",
        Counter,
        &[],
        "Connections closed because the agent did not read",
    ),
    (
        "regent_agent_frames_total",
        Counter,
        &["direction"],
        "Frames from agents (in) and to them (out)",
    ),
    (
        "regent_agent_frames_ignored_total",
        Counter,
        &["why"],
        "Frames of agents that were ignored",
    ),
    (
        "regent_agent_reports_superseded_total",
        Counter,
        &[],
        "Reports that came too late to count",
    ),
    (
        "regent_agent_reports_rejected_total",
        Counter,
        &[],
        "Reports that were refused",
    ),
    (
        "regent_agents_let_go_total",
        Counter,
        &[],
        "Times that this node was cut off and let its agents go",
    ),
    (
        "regent_commands_sent_total",
        Counter,
        &[],
        "Commands sent to agents",
    ),
    (
        "regent_command_progress_total",
        Counter,
        &[],
        "Reports of progress",
    ),
    (
        "regent_command_seconds",
        Histogram,
        &["stage"],
        "Time from sent to acknowledged, and from queued to completed, by cluster time",
    ),
    (
        "regent_events_applied_total",
        Counter,
        &["kind", "to"],
        "What happened in the cluster, as applied here",
    ),
    (
        "regent_lease_waiters",
        Gauge,
        &[],
        "Requests and connections that wait for leases at this node",
    ),
    (
        "regent_keepalives_total",
        Counter,
        &[],
        "Renewals of leases sent to the leader",
    ),
    (
        "regent_keepalive_round_seconds",
        Histogram,
        &[],
        "Time of one batch of renewals",
    ),
    (
        "regent_keepalive_rounds_failed_total",
        Counter,
        &[],
        "Batches of renewals that no leader confirmed",
    ),
    (
        "regent_leases_expired_total",
        Counter,
        &[],
        "Leases expired by this node while it led",
    ),
    (
        "regent_certificate_expiry_timestamp_seconds",
        Gauge,
        &[],
        "When this node's certificate ends, in seconds since 1970; 0 without TLS",
    ),
    (
        "regent_http_handshakes_failed_total",
        Counter,
        &["kind"],
        "Connections to the HTTP port that did not become TLS",
    ),
    (
        "regent_http_connections_refused_total",
        Counter,
        &[],
        "Connections closed because their address had too many",
    ),
    (
        "regent_requests_limited_total",
        Counter,
        &[],
        "Requests refused because their token asked too often",
    ),
    (
        "regent_backups_total",
        Counter,
        &["outcome"],
        "Scheduled backups of this node: done or failed",
    ),
    (
        "regent_backup_last_success_timestamp_seconds",
        Gauge,
        &[],
        "When the newest scheduled backup in this node's folder was begun; 0 for none",
    ),
    (
        "regent_reconciled_total",
        Counter,
        &[],
        "What the reconcilers did on this node while it led",
    ),
    ("regent_sessions", Gauge, &["state"], "Sessions, as applied here"),
    ("regent_agents", Gauge, &["status"], "Agents, as applied here"),
    (
        "regent_commands",
        Gauge,
        &["status"],
        "Commands kept, as applied here",
    ),
    ("regent_leases", Gauge, &[], "Leases held, as applied here"),
    ("regent_events", Gauge, &[], "Events kept, as applied here"),
    (
        "regent_idempotency_keys",
        Gauge,
        &[],
        "Idempotency keys kept, as applied here",
    ),
    (
        "regent_runtime_workers",
        Gauge,
        &[],
        "Worker threads of the runtime",
    ),
    ("regent_runtime_tasks", Gauge, &[], "Tasks alive in the runtime"),
    (
        "regent_runtime_queue_depth",
        Gauge,
        &[],
        "Tasks that wait for any worker",
    ),
];

/// Outcomes of a write, as `regent-raft` counts them.
const OUTCOMES: [&str; 7] = [
    "done",
    "no_leader",
    "no_quorum",
    "busy",
    "too_large",
    "unknown",
    "stopped",
];

/// Tells the recorder what each means, and makes those that have no labels, and those that alerts look at.
pub(super) fn register() {
    for &(name, kind, labels, help) in METRICS {
        match kind {
            Counter => metrics::describe_counter!(name, help),
            Gauge => metrics::describe_gauge!(name, help),
            Histogram => metrics::describe_histogram!(name, help),
        }
        if !labels.is_empty() {
            continue;
        }
        // Made, and not changed: shown, though nothing has set it yet.
        match kind {
            Counter => metrics::counter!(name).increment(0),
            Gauge => metrics::gauge!(name).increment(0.0),
            Histogram => drop(metrics::histogram!(name)),
        }
    }
    for outcome in OUTCOMES {
        metrics::counter!("regent_raft_proposals_total", "outcome" => outcome).increment(0);
    }
    for outcome in ["done", "failed"] {
        metrics::counter!("regent_backups_total", "outcome" => outcome).increment(0);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_as_prometheus_wants_them() {
        let mut seen = BTreeSet::new();
        for (name, kind, _, help) in METRICS {
            assert!(seen.insert(name), "{name} is there twice");
            assert!(!help.ends_with('.'), "{name}: {help:?} ends with a full stop");
            assert_eq!(name.ends_with("_total"), *kind == Counter, "{name} is a {kind:?}");
            if *kind == Histogram {
                assert!(name.ends_with("_seconds"), "{name} has no buckets");
            }
        }
    }

    /// The table in the documentation is this one.
    #[test]
    fn the_documentation_has_every_metric_and_no_other() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/operations.md");
        let text = std::fs::read_to_string(path).unwrap();
        let documented: BTreeSet<&str> = text
            .lines()
            .filter(|line| line.starts_with("| `regent_"))
            .collect();
        let table: Vec<String> = METRICS
            .iter()
            .map(|(name, kind, labels, help)| {
                let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
                let kind = format!("{kind:?}").to_lowercase();
                format!("| `{name}` | {kind} | {} | {help} |", labels.join(", "))
            })
            .collect();
        if std::env::var_os("REGENT_UPDATE_DOCS").is_some() {
            let begin = text.find("| `regent_").unwrap();
            let end = text.rfind("\n| `regent_").unwrap() + 1;
            let end = end + text[end..].find('\n').unwrap();
            let updated = format!("{}{}{}", &text[..begin], table.join("\n"), &text[end..]);
            std::fs::write(path, updated).unwrap();
            return;
        }
        let expected: BTreeSet<&str> = table.iter().map(String::as_str).collect();
        let missing: Vec<_> = expected.difference(&documented).collect();
        let stale: Vec<_> = documented.difference(&expected).collect();
        assert!(
            missing.is_empty() && stale.is_empty(),
            "docs/operations.md lacks {missing:#?} and has {stale:#?}; REGENT_UPDATE_DOCS=1 writes the table anew"
        );
    }
}
