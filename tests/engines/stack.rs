//! `deploy/swarm`: three nodes, and three replicas of an agent of which exactly one leads. StreamSpace's election by
//! the Swarm's task ids made no leader at all (fault 4); here it is run as it is deployed.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::compose::{agent, ended, running};
use crate::engine::Engine;
use crate::harness::eventually;
use crate::image::{
    self, by_tls_only, cluster_folder, deploy, group_of, json, members, nodes, regent, secret, served, votes,
};

/// As `docker stack deploy` is typed, with these variables beside those that all of it needs.
fn deployed(engine: &Engine, cluster: &Path, files: &[&str], variables: &[(&str, &str)]) {
    let socket = engine.host.trim_start_matches("unix://");
    let files = files
        .iter()
        .flat_map(|file| ["-c".into(), deploy(file).into_os_string()]);
    let output = Command::new("/usr/bin/docker")
        .args(["stack", "deploy"])
        .args(files)
        .arg("regent")
        .env("DOCKER_HOST", &engine.host)
        .env("DOCKER_SOCKET", socket)
        .env("DOCKER_GROUP", group_of(socket))
        .env("REGENT_CLUSTER", cluster)
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The container of a service's task.
async fn container(engine: &Engine, task: &str) -> String {
    eventually("a container of the task", || async {
        let filter = format!("name=regent_{task}.");
        let id = engine.docker(&["ps", "-q", "--filter", &filter]);
        (!id.is_empty() && !id.contains('\n')).then_some(id)
    })
    .await
}

/// The agent once three replicas are connected and one of them leads by a newer token.
async fn led_after(engine: &Engine, node: &str, token: u64) -> Value {
    eventually("one leader among three replicas", || async {
        let agent = json(engine, node, &["agent", "get", "swarm"]).ok()?;
        let replicas = agent["replicas"].as_array()?.len();
        (replicas == 3 && leaders(&agent).len() == 1 && agent["token"].as_u64()? > token).then_some(agent)
    })
    .await
}

fn leaders(agent: &Value) -> Vec<String> {
    let replicas = agent["replicas"].as_array().unwrap().iter();
    let leading = replicas.filter(|replica| replica["leader"] == true);
    leading
        .map(|replica| replica["name"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn fault_4_the_swarm_stack_elects_one_leader_and_another_when_it_is_killed() {
    let _one = crate::swarm::ONE_AT_A_TIME.lock().await;
    let Some(engine) = Engine::own("fault_4_the_swarm_stack_elects_one_leader_and_another_when_it_is_killed")
    else {
        return;
    };
    image::build(&engine.host);
    let folder = tempfile::tempdir().unwrap();
    let cluster = cluster_folder(folder.path(), &nodes());
    engine.docker(&[
        "swarm",
        "init",
        "--advertise-addr",
        "127.0.0.1",
        "--listen-addr",
        "127.0.0.1:0",
    ]);
    let machine = engine.docker(&["node", "ls", "-q"]);
    for label in ["node-1", "node-2", "node-3", "agent"] {
        engine.docker(&[
            "node",
            "update",
            "--label-add",
            &format!("regent.{label}=yes"),
            &machine,
        ]);
    }
    let first = ["swarm/stack.yaml"];
    deployed(&engine, &cluster, &first, &[]);
    let node = container(&engine, "node-1").await;
    served(&engine, &node, 3).await;
    by_tls_only(&engine, &node);

    agent(&engine, &node, "swarm", &cluster);
    let all = ["swarm/stack.yaml", "swarm/agent.yaml"];
    deployed(&engine, &cluster, &all, &[]);
    let before = led_after(&engine, &node, 0).await;
    let session = running(&engine, &node).await;

    let leader = leaders(&before).remove(0);
    let slot = leader.trim_start_matches("slot-").to_owned();
    let task = container(&engine, &format!("agent.{slot}")).await;
    engine.docker(&["kill", &task]);
    led_after(&engine, &node, before["token"].as_u64().unwrap()).await;
    let now: Value = json(&engine, &node, &["session", "get", &session]).unwrap();
    assert_eq!(
        (&now["state"], &now["generation"]),
        (&"running".into(), &1.into())
    );

    // A node's container is killed too: the Swarm makes another one, with its data.
    engine.docker(&["kill", &container(&engine, "node-2").await]);
    served(&engine, &node, 3).await;
    ended(&engine, &node, &session).await;

    // New certificates of one node: its task is replaced by one that has them, and the others are left alone.
    let old = container(&engine, "node-2").await;
    cluster_folder(folder.path(), &nodes()[1..2]);
    deployed(&engine, &cluster, &all, &[("REGENT_NODE_2_FILES", "2")]);
    eventually("another task of the node", || async {
        (container(&engine, "node-2").await != old).then_some(())
    })
    .await;
    served(&engine, &node, 3).await;
    assert_eq!(container(&engine, "node-1").await, node);
    let secrets = engine.docker(&["service", "inspect", "regent_node-2"]);
    assert!(secrets.contains("regent-node-2-key.2"), "{secrets}");
    by_tls_only(&engine, &node);

    replaced(&engine, &node, &machine, folder.path()).await;
    engine.docker(&["stack", "rm", "regent"]);
}

/// Node 3 is lost with its volume, and node 4 takes its place.
async fn replaced(engine: &Engine, node: &str, machine: &str, folder: &Path) {
    let lost = container(engine, "node-3").await;
    let cluster = cluster_folder(folder, &["4=node-4".to_owned()]);
    let token = regent(engine, node, &["cluster", "add"]).unwrap();
    secret(&cluster.join("node-4/join"), &token);
    engine.docker(&["node", "update", "--label-add", "regent.node-4=yes", machine]);
    let all = ["swarm/stack.yaml", "swarm/join.yaml", "swarm/agent.yaml"];
    deployed(engine, &cluster, &all, &[("REGENT_NODE_2_FILES", "2")]);
    eventually("the end of the lost node's task", || async {
        let running = engine.docker(&["ps", "-q", "--no-trunc"]);
        (!running.contains(&lost)).then_some(())
    })
    .await;
    votes(engine, node, 4).await;
    regent(engine, node, &["cluster", "remove", "3"]).unwrap();
    members(engine, node, &[1, 2, 4]).await;
}
