//! A Kubernetes cluster as the stage: the one of `REGENT_TEST_KUBECONFIG`, each test in a namespace of its own.

use std::process::{Command, Output, Stdio};

use regent_types::SessionName;
use serde_json::{Value, json};

use crate::harness::lacks;
use crate::owed;
use crate::stage::Stage;

/// Runs until it is told to end, and then ends at once.
const SLEEP: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

/// A namespace of a cluster, removed with the test.
struct Namespace {
    kubeconfig: String,
    name: String,
}

impl Namespace {
    /// A namespace for a test; none, and said so, where there is no cluster.
    fn new(name: &str) -> Option<Self> {
        let kubeconfig = std::env::var("REGENT_TEST_KUBECONFIG").ok();
        let kubectl = Command::new("kubectl")
            .arg("version")
            .arg("--client")
            .stdout(Stdio::null())
            .status();
        if lacks("kubernetes", kubeconfig.is_some() && kubectl.is_ok()) {
            return None;
        }
        let namespace = Self {
            kubeconfig: kubeconfig.expect("it was just looked at"),
            name: format!("{name}-{}", std::process::id()),
        };
        namespace.kubectl(&["create", "namespace", &namespace.name]);
        Some(namespace)
    }

    fn run(&self, args: &[&str]) -> Output {
        Command::new("kubectl")
            .args(["--kubeconfig", &self.kubeconfig, "--namespace", &self.name])
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn kubectl(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl {args:?}: {error}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn of_session(&self, kinds: &str, session: &SessionName) -> Value {
        let label = format!("regent.dev/session={session}");
        serde_json::from_str(&self.kubectl(&["get", kinds, "-l", &label, "-o", "json"])).unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let removed = self.run(&["delete", "namespace", &self.name, "--wait=false"]);
        if !removed.status.success() {
            eprintln!(
                "the namespace {} stays: {}",
                self.name,
                String::from_utf8_lossy(&removed.stderr)
            );
        }
    }
}

impl Stage for Namespace {
    fn flags(&self) -> Vec<String> {
        [
            "--runtime",
            "kubernetes",
            "--kubernetes-kubeconfig",
            &self.kubeconfig,
            "--kubernetes-namespace",
            &self.name,
            "--kubernetes-home-size",
            "1Gi",
            "--kubernetes-run-as-user",
            "1000",
        ]
        .map(str::to_owned)
        .to_vec()
    }

    fn sleeper(&self) -> Value {
        json!({
            "baseImage": "regent-test:1", "command": ["sh", "-c"], "args": [SLEEP],
            "defaultResources": { "cpu": "10m", "memory": "16Mi" }
        })
    }

    fn endless_start(&self) -> Value {
        json!({
            "baseImage": "regent-test:1", "nodeSelector": { "regent.dev/no": "such-node" },
            "defaultResources": { "cpu": "10m", "memory": "16Mi" }
        })
    }

    fn slow_because(&self) -> &'static str {
        "nodes are available"
    }

    fn running(&self, session: &SessionName) -> Vec<(String, u32)> {
        let pods = self.of_session("pods", session);
        let live = pods["items"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        live.map(|pod| {
            let restarts = pod["status"]["containerStatuses"][0]["restartCount"]
                .as_u64()
                .unwrap_or(0);
            let id = pod["metadata"]["uid"].as_str().unwrap().to_owned();
            (id, u32::try_from(restarts).unwrap() + 1)
        })
        .collect()
    }

    fn left(&self, session: &SessionName) -> Vec<String> {
        let all = self.of_session(
            "deployments,replicasets,pods,services,persistentvolumeclaims",
            session,
        );
        let name = |one: &Value| format!("{} {}", one["kind"], one["metadata"]["name"]);
        all["items"].as_array().unwrap().iter().map(name).collect()
    }
}

#[tokio::test]
async fn kubernetes_an_agent_restart_keeps_its_sessions() {
    let Some(namespace) = Namespace::new("restart") else {
        return;
    };
    owed::an_agent_restart_keeps_its_sessions(&namespace).await;
}

#[tokio::test]
async fn kubernetes_commands_sent_while_the_agent_is_away_are_done_when_it_is_back() {
    let Some(namespace) = Namespace::new("away") else {
        return;
    };
    owed::commands_sent_while_the_agent_is_away_are_done_when_it_is_back(&namespace).await;
}

#[tokio::test]
async fn kubernetes_sessions_that_start_while_the_leader_is_killed_start_once() {
    let Some(namespace) = Namespace::new("killed") else {
        return;
    };
    owed::sessions_that_start_while_the_leader_is_killed_start_once(&namespace).await;
}

#[tokio::test]
async fn kubernetes_starts_go_side_by_side_and_a_slow_one_delays_nothing() {
    let Some(namespace) = Namespace::new("parallel") else {
        return;
    };
    owed::starts_go_side_by_side_and_a_slow_one_delays_nothing(&namespace).await;
}
