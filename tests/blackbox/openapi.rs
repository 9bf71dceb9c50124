//! The served OpenAPI document, exercised by schemathesis: whatever it makes of the document, no node
//! answers with a 5xx that is not its honest "not now".

use std::process::{Command, Stdio};

use crate::harness::{Dev, lacks};

/// Examples for each operation: enough for every field to go wrong, and for the whole to end in a minute.
const EXAMPLES: &str = "15";
/// The same cases in every run, so that a failure can be looked at.
const SEED: &str = "20";

/// Paths that schemathesis leaves out, each with why.
const EXCLUDED: [(&str, &str); 4] = [
    ("/api/v1/events", "its answer is a stream without an end"),
    (
        "/api/v1/leases/{name}/watch",
        "its answer is a stream without an end",
    ),
    ("/api/v1/agents/connect", "its answer is a WebSocket"),
    (
        "/api/v1/cluster/members/{id}",
        "it takes the node out that is asked",
    ),
];

/// Paths that may revoke the token that all calls come with: they have a run of their own, at the end.
const LAST: [&str; 3] = [
    "/api/v1/auth/logout",
    "/api/v1/tokens/{id}",
    "/api/v1/users/{name}",
];

#[tokio::test]
async fn schemathesis_finds_no_server_error() {
    let there = Command::new("schemathesis")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if lacks("schemathesis", there.is_ok_and(|status| status.success())) {
        return;
    }
    let dev = Dev::start();
    let mut first: Vec<&str> = EXCLUDED
        .iter()
        .flat_map(|(path, _why)| ["--exclude-path", *path])
        .collect();
    first.extend(LAST.iter().flat_map(|path| ["--exclude-path", *path]));
    run(&dev, &first).await;
    let left = dev.api(0).get("cluster").await.ok(200);
    assert!(left["leader"].is_number(), "{left}");
    let last: Vec<&str> = LAST.iter().flat_map(|path| ["--include-path", *path]).collect();
    run(&dev, &last).await;
    for node in &dev.file.nodes {
        let log = dev.path().join(format!("node-{}.log", node.id));
        let log = std::fs::read_to_string(log).unwrap();
        assert!(!log.contains("panicked"), "node {} panicked", node.id);
    }
}

/// Runs schemathesis over a choice of the document's paths; panics with what it found.
async fn run(dev: &Dev, choice: &[&str]) {
    let node = &dev.file.nodes[1].http;
    let mut command = Command::new("schemathesis");
    command
        .args(["run", &format!("{node}/openapi.json"), "--url", node])
        .args([
            "--header",
            &format!("Authorization: Bearer {}", dev.file.admin_token),
        ])
        .args(["--checks", "not_a_server_error"])
        .args(["--phases", "examples,coverage,fuzzing"])
        .args(["--max-examples", EXAMPLES, "--seed", SEED, "--workers", "1"])
        .args(["--request-timeout", "15", "--continue-on-failure"])
        // How many examples its generator throws away is no matter of ours.
        .args(["--suppress-health-check", "all"])
        .args(["--no-color", "--generation-database", "none"])
        .args(choice)
        .current_dir(std::env::temp_dir());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap());
    let output = output.await.unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let tail = said.get(said.len().saturating_sub(8_000)..).unwrap_or(&said);
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tail}\n{err}");
}
