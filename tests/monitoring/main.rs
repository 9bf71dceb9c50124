//! What watches a cluster, against a real Prometheus: it scrapes a running cluster by the configuration of
//! `deploy/prometheus`, every metric that a rule or a panel names is there, and an alert fires when a node dies.

#![allow(clippy::unwrap_used, clippy::print_stderr)] // all of it is a test

#[allow(dead_code)] // the black-box tests use the rest
#[path = "../blackbox/harness.rs"]
mod harness;
#[allow(dead_code)] // the black-box tests use the rest
#[path = "../blackbox/secured.rs"]
mod secured;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use harness::{Dev, eventually, free_address, lacks, session_of};
use regent_types::session::SessionState;
use secured::Cluster;
use serde_json::Value;

/// Where the artefacts are.
const DEPLOY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy");
/// Where the configuration of Prometheus looks for the CA of the nodes.
const CA_FILE: &str = "/etc/prometheus/regent-ca.pem";

#[tokio::test(flavor = "multi_thread")]
async fn prometheus_finds_every_metric_and_tells_of_a_dead_node() {
    if lacks("prometheus", has("prometheus") && has("promtool")) {
        return;
    }
    let rules = Path::new(DEPLOY).join("prometheus/regent-rules.yml");
    let checked = Command::new("promtool")
        .args(["check", "rules"])
        .arg(&rules)
        .output()
        .unwrap();
    assert!(
        checked.status.success(),
        "{}",
        String::from_utf8_lossy(&checked.stderr)
    );

    let mut dev = Dev::start();
    // What is counted by label is there once it happened.
    let session = dev.client().create_session(&session_of("demo")).await.unwrap();
    eventually("a running session", || async {
        let session = dev.client().session(&session.name).await.ok()?;
        (session.state == SessionState::Running).then_some(())
    })
    .await;
    let nodes: Vec<String> = dev.file.nodes.iter().map(|node| node.http.clone()).collect();
    let prometheus = Prometheus::start(&nodes, None);
    eventually("all nodes scraped", || async {
        (prometheus.query("up == 1").await?.len() == dev.file.nodes.len()).then_some(())
    })
    .await;

    let rule_text = std::fs::read_to_string(&rules).unwrap();
    let rule_queries: Vec<String> = rule_text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("expr: "))
        .map(str::to_owned)
        .collect();
    let dashboard = std::fs::read(Path::new(DEPLOY).join("grafana/regent.json")).unwrap();
    let mut panel_queries = Vec::new();
    gather_queries(&serde_json::from_slice(&dashboard).unwrap(), &mut panel_queries);
    assert!(
        rule_queries.len() > 10 && panel_queries.len() > 20,
        "the queries were not found"
    );
    for query in rule_queries.iter().chain(&panel_queries) {
        let query = query.replace("$__rate_interval", "1m");
        let names = metric_names(&query);
        assert!(!names.is_empty(), "no metric is found in {query}");
        for name in names {
            let found = prometheus
                .query(&name)
                .await
                .expect("a query for one metric is valid");
            assert!(
                !found.is_empty(),
                "there is no metric {name}, which this names: {query}"
            );
        }
        assert!(
            prometheus.query(&query).await.is_some(),
            "Prometheus refuses {query}"
        );
    }

    assert!(
        !prometheus.fires("RegentNodeDown").await.unwrap(),
        "all nodes are up"
    );
    let leader = dev.leader().await;
    dev.kill_node((leader + 1) % 3);
    eventually("an alert of a node that is down", || async {
        prometheus.fires("RegentNodeDown").await?.then_some(())
    })
    .await;
    eventually("an alert of a member out of reach", || async {
        prometheus.fires("RegentMemberUnreachable").await?.then_some(())
    })
    .await;
    dev.restart_node((leader + 1) % 3);
    for alert in ["RegentNodeDown", "RegentMemberUnreachable"] {
        eventually("an end of the alert", || async {
            (!prometheus.fires(alert).await?).then_some(())
        })
        .await;
    }
}

/// As it is shipped it scrapes nodes with certificates, and only those that the CA in its file speaks for.
#[tokio::test(flavor = "multi_thread")]
async fn prometheus_scrapes_over_tls_by_the_configuration_as_shipped() {
    if lacks("prometheus", has("prometheus")) {
        return;
    }
    let mut cluster = Cluster::new(1);
    cluster.start_all();
    cluster.ready(0).await;
    let prometheus = Prometheus::start(&cluster.urls(), Some(&cluster.file("node-1/ca.pem")));
    let expiry = eventually("a scraped node", || async {
        let ready = prometheus
            .query("up{job=\"regent\"} == 1 and regent_ready == 1")
            .await?;
        let expiry = prometheus
            .query("regent_certificate_expiry_timestamp_seconds")
            .await?;
        (ready.len() == 1).then(|| expiry.into_iter().next())?
    })
    .await;
    assert_eq!(expiry["value"][1], cluster.certificate_ends(0).await.to_string());

    let others = Cluster::new(1);
    let deceived = Prometheus::start(&cluster.urls(), Some(&others.file("node-1/ca.pem")));
    let why = eventually("a scrape that fails", || async { deceived.why_down().await }).await;
    assert!(why.contains("certificate signed by unknown authority"), "{why}");
}

/// Every alert has its runbook, and no runbook is of an alert that is gone.
#[test]
fn every_alert_has_a_runbook() {
    let rules = std::fs::read_to_string(Path::new(DEPLOY).join("prometheus/regent-rules.yml")).unwrap();
    let of = |key: &str| -> Vec<String> {
        let values = rules.lines().filter_map(|line| line.trim().strip_prefix(key));
        values.map(str::to_owned).collect()
    };
    let alerts = of("- alert: ");
    let expected: Vec<String> = alerts
        .iter()
        .map(|alert| format!("docs/operations.md#{}", alert.to_lowercase()))
        .collect();
    assert_eq!(of("runbook: "), expected);
    let docs = std::fs::read_to_string(Path::new(DEPLOY).join("../docs/operations.md")).unwrap();
    let headings: Vec<&str> = docs
        .lines()
        .filter_map(|line| line.strip_prefix("### "))
        .collect();
    let runbooks: Vec<&str> = headings
        .into_iter()
        .filter(|heading| heading.starts_with("Regent"))
        .collect();
    assert_eq!(runbooks, alerts);
}

/// Each alert fires when it should and not before, by Prometheus's own unit tests of rules.
#[test]
fn every_alert_fires_on_what_it_is_for_and_not_before() {
    if lacks("prometheus", has("promtool")) {
        return;
    }
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/monitoring/rules.yml");
    let checked = Command::new("promtool")
        .args(["test", "rules"])
        .arg(&tests)
        .output()
        .unwrap();
    assert!(
        checked.status.success(),
        "{}{}",
        String::from_utf8_lossy(&checked.stdout),
        String::from_utf8_lossy(&checked.stderr)
    );
    let tests = std::fs::read_to_string(tests).unwrap();
    let rules = std::fs::read_to_string(Path::new(DEPLOY).join("prometheus/regent-rules.yml")).unwrap();
    for alert in rules
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "))
    {
        for expected in ["[]\n", "\n          - exp_labels:\n"] {
            let case = format!("alertname: {alert}\n        exp_alerts:");
            let is_there = tests.match_indices(&case).any(|(at, _)| {
                tests[at + case.len()..]
                    .trim_start_matches(' ')
                    .starts_with(expected)
            });
            assert!(
                is_there,
                "tests/monitoring/rules.yml has no case {expected:?} for {alert}"
            );
        }
    }
}

/// The bundle has what a report needs, and nothing that opens a door.
#[tokio::test(flavor = "multi_thread")]
async fn a_debug_bundle_has_no_secret_in_it() {
    let dev = Dev::start();
    let command = serde_json::json!({ "action": "noop", "payload": { "password": "hidden-in-a-payload" } });
    let agent = dev.agent_id();
    dev.client()
        .create_command(&agent, &serde_json::from_value(command).unwrap())
        .await
        .unwrap();
    let secret_file = flag_of(&dev.file.nodes[0].command, "--cluster-secret-file");
    let secret = std::fs::read_to_string(&secret_file).unwrap().trim().to_owned();
    let agent_token_file = flag_of(&dev.file.agents[0].command, "--token-file");
    let agent_token = std::fs::read_to_string(agent_token_file)
        .unwrap()
        .trim()
        .to_owned();
    let config = dev.path().join("server.toml");
    let text = format!("node-id = 1\ntoken = \"{agent_token}\"\ncluster-secret-file = {secret_file:?}\n");
    std::fs::write(&config, text).unwrap();
    // A log in which somebody wrote what should not be there.
    let log = dev.path().join("node.log");
    let line = format!(
        "a line\ntoken {} secret {secret} agent {agent_token}\n",
        dev.file.admin_token
    );
    std::fs::write(&log, line).unwrap();
    let out = dev.path().join("bundle.tar.gz");
    let path = |path: &Path| path.display().to_string();
    let args = [
        "debug",
        "--config",
        &path(&config),
        "--log",
        &path(&log),
        "--out",
        &path(&out),
    ];
    let (code, stdout, stderr) = dev.cli(&args);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains(&path(&out)), "{stdout}");
    let (code, _, stderr) = dev.cli(&args);
    assert_eq!(code, 1, "a bundle was written over");
    assert!(stderr.contains("exists"), "{stderr}");

    let unpacked = tempfile::tempdir().unwrap();
    let tar = Command::new("tar")
        .arg("-xzf")
        .arg(&out)
        .arg("-C")
        .arg(unpacked.path())
        .status()
        .unwrap();
    assert!(tar.success());
    let mut files = Vec::new();
    gather_files(unpacked.path(), &mut files);
    let names: Vec<String> = files
        .iter()
        .map(|file| path(file.strip_prefix(unpacked.path()).unwrap()))
        .collect();
    for expected in [
        "version.json",
        "agents.json",
        "commands.json",
        "leases.json",
        "events.jsonl",
        "configuration.json",
        "logs/0-node.log",
    ] {
        assert!(
            names.iter().any(|name| name.ends_with(expected)),
            "{expected} is not in {names:?}"
        );
    }
    for node in 1..=3 {
        for file in ["cluster.json", "metrics.txt", "readyz.json", "health.json"] {
            let expected = format!("node-{node}/{file}");
            assert!(
                names.iter().any(|name| name.ends_with(&expected)),
                "{expected} is not in {names:?}"
            );
        }
    }
    for file in files {
        let text = String::from_utf8(std::fs::read(&file).unwrap()).unwrap();
        assert!(!text.is_empty(), "{} is empty", file.display());
        for secret in [
            &dev.file.admin_token,
            &dev.file.admin_password,
            &secret,
            &agent_token,
        ] {
            assert!(
                !text.contains(secret.as_str()),
                "{} has a secret in it",
                file.display()
            );
        }
        assert!(
            !text.contains("hidden-in-a-payload"),
            "{} has a payload in it",
            file.display()
        );
    }
    let metrics = std::fs::read_to_string(unpacked.path().join("regent-debug/node-1/metrics.txt")).unwrap();
    assert!(metrics.contains("regent_ready 1"), "{metrics}");
}

fn flag_of(command: &[String], flag: &str) -> String {
    let at = command
        .iter()
        .position(|word| word == flag)
        .expect("the command has this flag");
    command[at + 1].clone()
}

fn gather_files(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            gather_files(&path, files);
        } else {
            files.push(path);
        }
    }
}

fn has(tool: &str) -> bool {
    Command::new(tool)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok()
}

/// The queries of all panels, at whatever depth.
fn gather_queries(value: &Value, queries: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            queries.extend(fields.get("expr").and_then(Value::as_str).map(str::to_owned));
            fields.values().for_each(|value| gather_queries(value, queries));
        }
        Value::Array(values) => values.iter().for_each(|value| gather_queries(value, queries)),
        _ => {}
    }
}

/// The metrics that a query names: words that begin as ours and the process's do.
fn metric_names(query: &str) -> BTreeSet<String> {
    let ours = |word: &&str| word.starts_with("regent_") || word.starts_with("process_") || *word == "up";
    query
        .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'))
        .filter(ours)
        .map(str::to_owned)
        .collect()
}

/// A running Prometheus, ended with the test.
struct Prometheus {
    process: Child,
    url: String,
    folder: tempfile::TempDir,
}

impl Prometheus {
    /// By the configuration of `deploy`, with this cluster's addresses and every wait a second, so that a test
    /// does not wait for minutes. The CA is put where it names one; without one it scrapes in plain text, which is
    /// all that `regent dev` speaks.
    fn start(nodes: &[String], ca: Option<&Path>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let lines = |path: &Path, change: &dyn Fn(&str) -> String| -> String {
            let text = std::fs::read_to_string(path).unwrap();
            text.lines().map(|line| change(line) + "\n").collect()
        };
        let put = |line: &str, key: &str, value: &str| {
            let indent = &line[..line.len() - line.trim_start().len()];
            let dash = if line.trim_start().starts_with("- ") {
                "- "
            } else {
                ""
            };
            format!("{indent}{dash}{key} {value}")
        };
        let rules = Path::new(DEPLOY).join("prometheus/regent-rules.yml");
        let hastened = lines(&rules, &|line| {
            if line.trim().starts_with("for: ") {
                put(line, "for:", "1s")
            } else {
                line.to_owned()
            }
        });
        std::fs::write(folder.path().join("regent-rules.yml"), hastened).unwrap();
        let targets: Vec<&str> = nodes
            .iter()
            .map(|node| node.split_once("://").unwrap().1)
            .collect();
        let targets = serde_json::to_string(&targets).unwrap();
        let config = lines(
            &Path::new(DEPLOY).join("prometheus/prometheus.yml"),
            &|line| match line.trim().split_once(": ").map_or("", |(key, _)| key) {
                "scrape_interval" => put(line, "scrape_interval:", "1s"),
                "evaluation_interval" => put(line, "evaluation_interval:", "1s"),
                "- targets" => put(line, "targets:", &targets),
                "scheme" if ca.is_none() => put(line, "scheme:", "http"),
                "tls_config" if ca.is_none() => String::new(),
                _ => line.to_owned(),
            },
        );
        let config = match ca {
            None => config,
            Some(ca) => {
                assert!(config.contains(CA_FILE), "it names no {CA_FILE}: {config}");
                config.replace(CA_FILE, &ca.display().to_string())
            }
        };
        assert!(
            config.contains(&targets),
            "the targets were not found in {config}"
        );
        let file = folder.path().join("prometheus.yml");
        std::fs::write(&file, config).unwrap();
        let address = free_address();
        let process = Command::new("prometheus")
            .arg(format!("--config.file={}", file.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                folder.path().join("data").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(folder.path().join("prometheus.log")).unwrap())
            .spawn()
            .unwrap();
        Self {
            process,
            url: format!("http://{address}/api/v1"),
            folder,
        }
    }

    /// The series that a query gives; `None` when there is no answer, or the query is refused.
    async fn query(&self, query: &str) -> Option<Vec<Value>> {
        let request = reqwest::Client::new()
            .get(format!("{}/query", self.url))
            .query(&[("query", query)]);
        let answer: Value = request.send().await.ok()?.json().await.ok()?;
        answer["data"]["result"].as_array().cloned()
    }

    /// Why a target cannot be scraped; `None` while none is known to be down.
    async fn why_down(&self) -> Option<String> {
        let answer = reqwest::get(format!("{}/targets", self.url)).await.ok()?;
        let answer: Value = answer.json().await.ok()?;
        let targets = answer["data"]["activeTargets"].as_array()?;
        let down = targets.iter().find(|target| target["health"] == "down")?;
        down["lastError"].as_str().map(str::to_owned)
    }

    /// Whether an alert of this name fires now.
    async fn fires(&self, name: &str) -> Option<bool> {
        let answer = reqwest::get(format!("{}/alerts", self.url)).await.ok()?;
        let answer: Value = answer.json().await.ok()?;
        let alerts = answer["data"]["alerts"].as_array()?;
        Some(
            alerts
                .iter()
                .any(|alert| alert["labels"]["alertname"] == name && alert["state"] == "firing"),
        )
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.folder.path().join("prometheus.log"));
            eprintln!("--- prometheus\n{}", log.unwrap_or_default());
        }
    }
}
