//! `deploy/compose`: three nodes and an agent, brought up and taken down by docker-compose.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use regent_client::{Client, Trust};

use crate::engine::Engine;
use crate::harness::{REGENT, eventually, lacks};
use crate::image::{
    self, by_tls_only, cluster_folder, deploy, group_of, json, manual, members, nodes, regent, secret,
    served, sleeper, votes,
};

/// A project of docker-compose on an engine of the tests.
struct Project<'a> {
    engine: &'a Engine,
    cluster: PathBuf,
    name: String,
}

impl Project<'_> {
    /// For a program that reads the variables of the manual.
    fn command(&self, program: &str) -> Command {
        let socket = self.engine.host.trim_start_matches("unix://");
        let mut command = Command::new(program);
        command
            .env("COMPOSE_PROJECT_NAME", &self.name)
            .env("DOCKER_HOST", &self.engine.host)
            .env("DOCKER_SOCKET", socket)
            .env("DOCKER_GROUP", group_of(socket))
            .env("REGENT_CLUSTER", &self.cluster)
            .env("REGENT_PORT", "0")
            .stdin(Stdio::null());
        command
    }

    fn compose(&self, args: &[&str]) -> String {
        let file = deploy("compose/compose.yaml");
        said(self.command("docker-compose").arg("--file").arg(file).args(args))
    }

    /// Runs commands of the manual's section as they stand there, after what the ones before it set for the shell.
    fn manual(&self, number: usize) -> String {
        let block = |number| manual("### On one machine, with compose", number);
        let before = (0..number).map(block).collect::<Vec<_>>().join("\n");
        let sets = |line: &&str| {
            ["alias ", "export REGENT_TOKEN"]
                .iter()
                .any(|set| line.trim().starts_with(set))
        };
        let shell: Vec<&str> = before.lines().filter(sets).collect();
        let folder = self.cluster.parent().expect("it is in the test's folder");
        // The engine of the tests is Debian's; some machines have another package's client too.
        let prelude = format!("regent() {{ {REGENT} \"$@\"; }}\ndocker() {{ /usr/bin/docker \"$@\"; }}");
        let script = [&prelude, &shell.join("\n"), &block(number)]
            .map(String::as_str)
            .join("\n");
        said(self.command("sh").args(["-euc", &script]).current_dir(folder))
    }

    fn container(&self, service: &str) -> String {
        self.compose(&["ps", "-q", service])
    }

    /// What the engine has of this project, in words.
    fn left(&self) -> String {
        let label = format!("label=com.docker.compose.project={}", self.name);
        [["ps", "-a"], ["volume", "ls"], ["network", "ls"]]
            .map(|list| {
                self.engine
                    .docker(&[&list[..], &["-q", "--filter", &label]].concat())
            })
            .concat()
    }
}

/// What a command prints, once it was done.
fn said(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Whether docker-compose is not here.
fn lacks_compose() -> bool {
    let there = Command::new("docker-compose")
        .arg("version")
        .stdout(Stdio::null())
        .status();
    lacks("docker-compose", there.is_ok_and(|status| status.success()))
}

#[tokio::test]
async fn compose_brings_up_three_nodes_and_an_agent_and_takes_all_of_it_down() {
    if lacks_compose() {
        return;
    }
    let Some(engine) = Engine::shared("compose_brings_up_three_nodes_and_an_agent_and_takes_all_of_it_down")
    else {
        return;
    };
    image::build(&engine.host);
    let folder = tempfile::tempdir().unwrap();
    let project = Project {
        engine,
        cluster: cluster_folder(folder.path(), &nodes()),
        name: format!("compose{}", std::process::id()),
    };
    project.compose(&["up", "--detach", "node-1", "node-2", "node-3"]);
    let containers = ["node-1", "node-2", "node-3"].map(|node| project.container(node));
    for node in &containers {
        served(engine, node, 3).await;
        by_tls_only(engine, node);
    }
    from_outside(&project).await;

    agent(engine, &containers[0], "docker", &project.cluster);
    project.compose(&["up", "--detach"]);
    assert_eq!(containers[0], project.container("node-1"), "what ran goes on");
    let session = running(engine, &containers[1]).await;
    // A node is lost: the others serve, and the session goes on.
    engine.docker(&["kill", &containers[0]]);
    served(engine, &containers[1], 2).await;
    regent(engine, &containers[1], &["session", "get", &session]).unwrap();
    engine.docker(&["start", &containers[0]]);
    served(engine, &containers[0], 3).await;
    ended(engine, &containers[2], &session).await;

    // New certificates, by the command that made the first ones: the nodes take them up as they run.
    cluster_folder(folder.path(), &nodes());
    for node in &containers {
        engine.docker(&["kill", "--signal", "HUP", node]);
        eventually("new certificates", || async {
            let logs = engine.docker_output(&["logs", node]).stderr;
            String::from_utf8_lossy(&logs)
                .contains("new certificates are in use")
                .then_some(())
        })
        .await;
    }
    from_outside(&project).await;

    project.compose(&["down", "--volumes"]);
    assert_eq!(project.left(), "");
}

#[tokio::test]
async fn compose_replaces_a_node_whose_volume_is_lost_and_recovers_from_the_last_volume() {
    if lacks_compose() {
        return;
    }
    let Some(engine) =
        Engine::shared("compose_replaces_a_node_whose_volume_is_lost_and_recovers_from_the_last_volume")
    else {
        return;
    };
    image::build(&engine.host);
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(deploy(""), folder.path().join("deploy")).unwrap();
    let project = Project {
        engine,
        cluster: cluster_folder(folder.path(), &nodes()),
        // As it is called in the manual.
        name: "compose".to_owned(),
    };
    project.compose(&["up", "--detach", "node-1", "node-2", "node-3"]);
    let node = project.container("node-1");
    let old = served(engine, &node, 3).await;
    // All members have said what they know some seconds after the first start.
    eventually("a cluster that lets nodes join", || async {
        regent(engine, &node, &["cluster", "add"]).ok()
    })
    .await;
    agent(engine, &node, "docker", &project.cluster);

    lost(&project, "node-3");
    project.manual(1);
    votes(engine, &node, 4).await;
    project.manual(2);
    let replaced = members(engine, &node, &[1, 2, 4]).await;
    assert_eq!(replaced["clusterId"], old["clusterId"]);
    assert_eq!(
        project.container("node-3"),
        "",
        "the lost one is not started again"
    );

    // One volume is left.
    lost(&project, "node-2");
    let label = "label=com.docker.compose.service=node-4";
    engine.docker(&["rm", "--force", &engine.docker(&["ps", "-q", "--filter", label])]);
    engine.docker(&["volume", "rm", "compose_node-4"]);
    project.manual(3);
    let node = project.container("node-1");
    let recovered = members(engine, &node, &[1]).await;
    assert_ne!(recovered["clusterId"], old["clusterId"]);
    by_tls_only(engine, &node);
    regent(engine, &node, &["agent", "get", "docker"]).unwrap();

    project.compose(&["down", "--volumes", "--remove-orphans"]);
    engine.docker(&["volume", "rm", "compose_recovered"]);
}

/// Takes a node's container and its volume away, as a failed disk does.
fn lost(project: &Project<'_>, node: &str) {
    let container = project.container(node);
    project.engine.docker(&["rm", "--force", &container]);
    project
        .engine
        .docker(&["volume", "rm", &format!("{}_{node}", project.name)]);
}

/// On the machine, a client that trusts the cluster's CA is served, and one that speaks plain text is refused.
async fn from_outside(project: &Project<'_>) {
    let address = project.compose(&["port", "node-1", "8000"]);
    let trust = Trust {
        ca: Some(project.cluster.join("ca/ca.pem")),
        ..Trust::default()
    };
    let client = |scheme: &str| {
        let url = format!("{scheme}://{address}");
        Client::with_trust([url], Some(image::ADMIN.to_owned()), &trust).unwrap()
    };
    client("https").cluster().await.unwrap();
    let refused = client("http").cluster().await.unwrap_err().to_string();
    assert!(refused.contains("speaks TLS only"), "{refused}");
}

/// Registers an agent, and puts its token where its container looks for it.
pub(crate) fn agent(engine: &Engine, node: &str, id: &str, cluster: &Path) {
    regent(engine, node, &["agent", "register", id, "--platform", "docker"]).unwrap();
    let token = regent(engine, node, &["agent", "token", id]).unwrap();
    secret(&cluster.join("agent/agent.token"), &token);
}

/// Makes a session as soon as there is an agent for it, and waits until it runs.
pub(crate) async fn running(engine: &Engine, node: &str) -> String {
    let manifest = sleeper("regent-test:1");
    let apply = Command::new("/usr/bin/docker")
        .env("DOCKER_HOST", &engine.host)
        .args([
            "exec",
            "-i",
            "-e",
            &format!("REGENT_TOKEN={}", image::ADMIN),
            node,
        ])
        .args(["regent", "template", "apply", "--file", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .and_then(|mut child| {
            use std::io::Write as _;
            child
                .stdin
                .take()
                .expect("it is piped")
                .write_all(manifest.as_bytes())?;
            child.wait()
        });
    assert!(apply.unwrap().success());
    let name = eventually("an agent that takes a session", || async {
        let made = json(engine, node, &["session", "create", "sleeper"]).ok()?;
        Some(made["name"].as_str().expect("a session has a name").to_owned())
    })
    .await;
    eventually("a session that runs", || async {
        let session = json(engine, node, &["session", "get", &name]).ok()?;
        (session["state"] == "running").then_some(())
    })
    .await;
    name
}

/// Ends a session, and waits until nothing of it runs.
pub(crate) async fn ended(engine: &Engine, node: &str, session: &str) {
    regent(engine, node, &["session", "stop", session]).unwrap();
    eventually("the end of the session", || async {
        let label = format!("label=regent.session={session}");
        engine
            .docker(&["ps", "-aq", "--filter", &label])
            .is_empty()
            .then_some(())
    })
    .await;
}
