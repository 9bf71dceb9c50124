//! `deploy/kubernetes`: three nodes and an agent, applied to the tests' cluster by kustomize.
//!
//! What the cluster of the tests does not have is put over it: there is one machine, so the nodes may share it; its
//! volumes have 1Gi; and pods have no DNS, so each node gets a Service whose address stands in `hostAliases`.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use regent_client::{Client, Trust};
use regent_types::session::SessionState;
use regent_types::{AgentId, NodeId};
use serde_json::{Value, json};

use crate::harness::{eventually, lacks, session_state};
use crate::image::{self, ADMIN, deploy, sleeper};

const NODES: [&str; 3] = ["regent-0", "regent-1", "regent-2"];
/// The pod of `deploy/kubernetes-join`.
const JOINER: &str = "regent-4-0";

/// The namespace that `deploy/kubernetes` names, removed with the test.
struct Installed {
    kubeconfig: String,
}

impl Installed {
    fn command(&self, args: &[&str], input: &str) -> std::process::Output {
        let mut child = Command::new("kubectl")
            .args(["--kubeconfig", &self.kubeconfig, "--namespace", "regent"])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().expect("it is piped");
        stdin.write_all(input.as_bytes()).unwrap();
        drop(stdin);
        child.wait_with_output().unwrap()
    }

    fn kubectl(&self, args: &[&str]) -> String {
        self.with_input(args, "")
    }

    fn with_input(&self, args: &[&str], input: &str) -> String {
        let output = self.command(args, input);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl {args:?}: {error}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Applies what [`over`] made.
    fn apply(&self, folder: &Path, part: &str) {
        let over = folder.join(format!("{part}-over"));
        self.kubectl(&["apply", "-k", over.to_str().unwrap()]);
    }

    fn get(&self, what: &str) -> Value {
        serde_json::from_str(&self.kubectl(&["get", what, "-o", "json"])).unwrap()
    }

    /// A Service for each node, whose addresses stand in for the names that a cluster's DNS would give; as
    /// `hostAliases` of a pod.
    fn names(&self) -> Value {
        let names = NODES.iter().chain([&JOINER]);
        let aliases = names.map(|name| {
            let service = json!({
                "apiVersion": "v1", "kind": "Service", "metadata": { "name": name },
                "spec": {
                    "selector": { "statefulset.kubernetes.io/pod-name": name }, "publishNotReadyAddresses": true,
                    "ports": [{ "name": "http", "port": 8000 }, { "name": "peer", "port": 7000 }]
                }
            });
            self.with_input(&["apply", "-f", "-"], &service.to_string());
            let address = self.get(&format!("service/{name}"))["spec"]["clusterIP"].clone();
            json!({ "ip": address, "hostnames": [format!("{name}.regent")] })
        });
        json!(aliases.collect::<Vec<_>>())
    }

    /// The Service of the clients, and its address.
    fn api(&self) -> String {
        let service = self.get("service/regent-api");
        service["spec"]["clusterIP"].as_str().unwrap().to_owned()
    }

    /// The secrets of the manual, out of a cluster's folder; or new ones of the same names.
    fn secrets(&self, cluster: &Path) {
        let file = |name: &str| cluster.join(name).display().to_string();
        let from = |name: &str| format!("--from-file={}", file(name));
        let shared = ["cluster.secret", "admin.token", "ca/ca.pem"].map(from);
        let mut all = vec![
            [
                vec!["generic".to_owned(), "regent-cluster".to_owned()],
                shared.to_vec(),
            ]
            .concat(),
        ];
        for (name, node) in NODES.iter().zip(1..) {
            let file = |kind: &str| file(&format!("node-{node}/node.{kind}"));
            all.push(vec![
                "tls".to_owned(),
                (*name).to_owned(),
                format!("--cert={}", file("pem")),
                format!("--key={}", file("key")),
            ]);
        }
        for secret in all {
            let words: Vec<&str> = secret.iter().map(String::as_str).collect();
            let create = ["create", "secret"];
            let shown = self.kubectl(&[&create, &words[..], &["--dry-run=client", "-o", "yaml"]].concat());
            self.with_input(&["apply", "-f", "-"], &shown);
        }
    }

    /// Waits until all three nodes are ready; their pods' ids, by which a new pod is told from an old one.
    async fn ready(&self) -> Vec<String> {
        eventually("three ready nodes", || async {
            let set = self.get("statefulset/regent");
            (set["status"]["readyReplicas"] == 3).then_some(())
        })
        .await;
        let id = |name: &str| {
            self.get(&format!("pod/{name}"))["metadata"]["uid"]
                .as_str()
                .unwrap()
                .to_owned()
        };
        NODES.map(id).to_vec()
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for what in [
                &["get", "all"][..],
                &["describe", "pods"],
                &["logs", "regent-0"],
                &["logs", JOINER],
            ] {
                eprintln!("{}", String::from_utf8_lossy(&self.command(what, "").stdout));
            }
        }
        self.command(&["delete", "namespace", "regent", "--wait=false"], "");
    }
}

/// `deploy/kubernetes-before-1.21` with what this cluster needs put over it.
fn overlay(folder: &Path, aliases: &Value) {
    let argument =
        |text: &str| json!({ "op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": text });
    let agent = json!([
        named(aliases),
        argument("--kubernetes-home-size=1Gi"),
        // The image of the tests names no user.
        argument("--kubernetes-run-as-user=1000")
    ]);
    copy(folder, "kubernetes");
    over(
        folder,
        "kubernetes-before-1.21",
        &[
            ("StatefulSet", "regent", node(aliases)),
            ("Deployment", "regent-agent", agent),
        ],
    );
}

/// What nodes need here.
fn node(aliases: &Value) -> Value {
    json!([
        named(aliases),
        { "op": "remove", "path": "/spec/template/spec/affinity" },
        { "op": "replace", "path": "/spec/volumeClaimTemplates/0/spec/resources/requests/storage", "value": "1Gi" }
    ])
}

fn named(aliases: &Value) -> Value {
    json!({ "op": "add", "path": "/spec/template/spec/hostAliases", "value": aliases })
}

fn copy(folder: &Path, part: &str) {
    let copied = Command::new("cp")
        .arg("-r")
        .arg(deploy(part))
        .arg(folder)
        .status();
    assert!(copied.unwrap().success());
}

/// A part of `deploy/` with patches, each for the object of this kind and name.
fn over(folder: &Path, part: &str, patches: &[(&str, &str, Value)]) {
    copy(folder, part);
    let over = folder.join(format!("{part}-over"));
    std::fs::create_dir(&over).unwrap();
    let patches: Vec<Value> = patches
        .iter()
        .map(|(kind, name, patch)| {
            let path = format!("{name}.json");
            std::fs::write(over.join(&path), patch.to_string()).unwrap();
            json!({
                "target": { "group": "apps", "version": "v1", "kind": kind, "name": name, "namespace": "regent" },
                "path": path
            })
        })
        .collect();
    let kustomization = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "bases": [format!("../{part}")], "patchesJson6902": patches
    });
    std::fs::write(over.join("kustomization.yaml"), kustomization.to_string()).unwrap();
}

#[tokio::test]
async fn kubernetes_the_manifests_bring_up_three_nodes_and_an_agent_and_a_lost_node_comes_back() {
    let kubeconfig = std::env::var("REGENT_TEST_KUBECONFIG").ok();
    let host = std::env::var("REGENT_TEST_KUBERNETES_DOCKER").ok();
    if lacks("kubernetes", kubeconfig.is_some() && host.is_some()) {
        return;
    }
    image::build(&host.expect("it was just looked at"));
    let installed = Installed {
        kubeconfig: kubeconfig.expect("it was just looked at"),
    };
    let folder = tempfile::tempdir().unwrap();
    installed.kubectl(&["create", "namespace", "regent"]);
    let mut aliases = installed.names();
    overlay(folder.path(), &aliases);
    installed.apply(folder.path(), "kubernetes-before-1.21");
    // The pods have waited for their secrets. Without DNS a client out here calls the Service by its address.
    let hosts = format!("regent-api,regent-api.regent,{}", installed.api());
    let nodes: Vec<String> = NODES
        .iter()
        .zip(1..)
        .map(|(name, node)| format!("{node}={name}.regent,{hosts}"))
        .collect();
    let cluster = image::cluster_folder(folder.path(), &nodes);
    installed.secrets(&cluster);
    let before = installed.ready().await;
    let budget = installed.get("poddisruptionbudget/regent");
    assert_eq!(budget["spec"]["maxUnavailable"], 1);

    // The agent's pods have waited for their token.
    let ca = cluster.join("ca/ca.pem");
    let trust = Trust {
        ca: Some(ca.clone()),
        ..Trust::default()
    };
    let client = |scheme: &str| {
        let url = format!("{scheme}://{}:8000", installed.api());
        Client::with_trust([url], Some(ADMIN.to_owned()), &trust).unwrap()
    };
    let refused = client("http").cluster().await.unwrap_err().to_string();
    assert!(refused.contains("speaks TLS only"), "{refused}");
    let client = client("https");
    let id = AgentId::new("k8s").unwrap();
    let register = serde_json::from_value(json!({ "agentId": id, "platform": "kubernetes" })).unwrap();
    client.register_agent(&register).await.unwrap();
    let token = client.create_agent_token(&id).await.unwrap().token.unwrap();
    installed.with_input(
        &[
            "create",
            "secret",
            "generic",
            "regent-agent",
            "--from-file=token=/dev/stdin",
            &format!("--from-file={}", ca.display()),
        ],
        &format!("{token}\n"),
    );
    eventually("three replicas of the agent, one of which leads", || async {
        let agent = client.agent(&id).await.ok()?;
        let leaders = agent.replicas.iter().filter(|replica| replica.leader).count();
        (agent.replicas.len() == 3 && leaders == 1).then_some(())
    })
    .await;
    client
        .create_template(&serde_json::from_str(&sleeper("regent-test:1")).unwrap())
        .await
        .unwrap();
    let wish = serde_json::from_value(json!({ "template": "sleeper" })).unwrap();
    let session = client.create_session(&wish).await.unwrap();
    session_state(&client, &session.name, SessionState::Running).await;

    // A node's pod is lost, without the time to end in order: the Service goes on through the others, and the next pod is
    // the same node with the same data.
    installed.kubectl(&["delete", "pod", "regent-1", "--grace-period=0", "--force"]);
    let second = eventually("a session made by the nodes that are left", || async {
        client.create_session(&wish).await.ok()
    })
    .await;
    session_state(&client, &second.name, SessionState::Running).await;
    let after = eventually("another pod of the node", || async {
        let pods = installed.ready().await;
        (pods[1] != before[1]).then_some(pods)
    })
    .await;
    assert_eq!(
        (&after[0], &after[2]),
        (&before[0], &before[2]),
        "the others were left alone"
    );

    // New certificates become new secrets, and the nodes take them up as they run. The kubelet brings them within a
    // minute or so, and at once to a pod that is changed.
    image::cluster_folder(folder.path(), &nodes);
    installed.secrets(&cluster);
    for node in NODES {
        installed.kubectl(&["annotate", "pod", node, "regent.dev/certificates=new"]);
        eventually("new certificates", || async {
            let logs = installed.kubectl(&["logs", node]);
            logs.contains("new certificates are in use").then_some(())
        })
        .await;
    }
    assert_eq!(installed.ready().await, after);
    client.cluster().await.unwrap();

    // A claim is lost: another node takes the place of its node.
    installed.kubectl(&["scale", "statefulset/regent", "--replicas=2"]);
    let lost = ["delete", "pvc/data-regent-2"];
    installed.kubectl(&lost);
    image::cluster_folder(folder.path(), &[format!("4={JOINER}.regent,{hosts}")]);
    let file = |kind: &str| cluster.join(format!("node-4/node.{kind}")).display().to_string();
    let (cert, key) = (
        format!("--cert={}", file("pem")),
        format!("--key={}", file("key")),
    );
    installed.kubectl(&["create", "secret", "tls", "regent-4", &cert, &key]);
    let wish = serde_json::from_value(json!({ "join": "node", "expiresIn": "10m" })).unwrap();
    let token = client.create_token(&wish).await.unwrap().token.unwrap();
    let secret = [
        "create",
        "secret",
        "generic",
        "regent-4-join",
        "--from-file=join=/dev/stdin",
    ];
    installed.with_input(&secret, &token);
    let names = aliases.as_array_mut().expect("they are a list");
    names.push(json!({ "ip": installed.api(), "hostnames": ["regent-api.regent"] }));
    over(
        folder.path(),
        "kubernetes-join",
        &[("StatefulSet", "regent-4", node(&aliases))],
    );
    installed.apply(folder.path(), "kubernetes-join");
    eventually("the vote of the node in its place", || async {
        let cluster = client.cluster().await.ok()?;
        let mut members = cluster.members.iter();
        members
            .any(|member| member.id == NodeId(4) && member.voter)
            .then_some(())
    })
    .await;
    client.remove_member(NodeId(3)).await.unwrap();

    for session in [&session.name, &second.name] {
        client.stop_session(session).await.unwrap();
        eventually("the end of the session", || async {
            let label = format!("regent.dev/session={session}");
            installed
                .kubectl(&["get", "deployments", "-l", &label, "-o", "name"])
                .is_empty()
                .then_some(())
        })
        .await;
    }
}
