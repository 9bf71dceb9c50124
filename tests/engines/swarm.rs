//! The agent as a service of a Docker Swarm with three replicas. StreamSpace's election by the Swarm's task ids made no
//! leader at all (fault 4).

use std::path::Path;
use std::process::Command;

use regent_types::session::SessionState;

use crate::engine::Engine;
use crate::harness::{REGENT, eventually, session_state};
use crate::owed;
use crate::stage::{Play, Stage as _, leaders};

/// Engines have a bridge each for their Swarm, and all of them call it the same.
pub(crate) static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

#[tokio::test]
async fn fault_4_a_swarm_service_of_three_replicas_has_one_leader() {
    let _one = ONE_AT_A_TIME.lock().await;
    let Some(engine) = Engine::own("fault_4_a_swarm_service_of_three_replicas_has_one_leader") else {
        return;
    };
    let mut play = Play::alone(&engine, &[]).await;
    play.dev.stop_agent(play.processes[0]);
    own_image(&engine, play.dev.path());
    engine.docker(&[
        "swarm",
        "init",
        "--advertise-addr",
        "127.0.0.1",
        "--listen-addr",
        "127.0.0.1:0",
    ]);
    // Without the lifeline, a process that a container cannot see.
    let mut command = play.dev.file.agents[play.processes[0]].command.clone();
    let lifeline = command.iter().position(|word| word == "--lifeline").unwrap();
    command.drain(lifeline..lifeline + 2);
    let value = |flag: &str| command[command.iter().position(|word| word == flag).unwrap() + 1].clone();
    let bind = |path: &str| format!("type=bind,src={path},dst={path}");
    let socket = engine.host.trim_start_matches("unix://").to_owned();
    let mounts = [
        bind(&socket),
        bind(&value("--data")),
        bind(&value("--token-file")),
    ];
    let mut service: Vec<&str> = vec![
        "service",
        "create",
        "--detach",
        "--quiet",
        "--name",
        "agent",
        "--replicas",
        "3",
        "--network",
        "host",
        "--endpoint-mode",
        "dnsrr",
        "--restart-condition",
        "any",
        "--restart-delay",
        "100ms",
    ];
    for mount in &mounts {
        service.extend(["--mount", mount]);
    }
    // Each replica is called by its slot, which is as stable as a name has to be.
    service.extend([
        "--env",
        "REGENT_REPLICA=slot-{{.Task.Slot}}",
        "regent-agent:test",
        "regent",
    ]);
    service.extend(command[1..].iter().map(String::as_str));
    engine.docker(&service);
    let before = play.led_after(None, 3).await;
    assert_eq!(leaders(&before).len(), 1, "exactly one leads");
    let sessions = owed::running(&play, 3).await;
    // The leader's container is killed: another replica leads and has the sessions in hand; the Swarm starts a new one
    // in its place, which stands by.
    let leader = leaders(&before).remove(0);
    let slot = leader.trim_start_matches("slot-").to_owned();
    let task = engine.docker(&["ps", "-q", "--filter", &format!("name=agent.{slot}.")]);
    engine.docker(&["kill", &task]);
    let after = eventually("another leader", || async {
        let agent = play.client.agent(&play.id).await.ok()?;
        (agent.token > before.token && leaders(&agent).len() == 1 && agent.replicas.len() == 3)
            .then_some(agent)
    })
    .await;
    for session in &sessions {
        let now = session_state(&play.client, &session.name, SessionState::Running).await;
        assert_eq!(now.generation, 1);
        assert_eq!(engine.running(&session.name).len(), 1);
    }
    assert!(after.token > before.token);
    owed::end(&play, &engine, &sessions).await;
    engine.docker(&["service", "rm", "agent"]);
}

/// An image of the binary under test and the libraries that it is linked to.
fn own_image(engine: &Engine, folder: &Path) {
    let root = folder.join("image");
    let copy = |from: &Path, to: &Path| {
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(from, to).unwrap();
    };
    copy(Path::new(REGENT), &root.join("bin/regent"));
    let linked = Command::new("ldd").arg(REGENT).output().unwrap();
    for word in String::from_utf8(linked.stdout)
        .unwrap()
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        copy(Path::new(word), &root.join(word.trim_start_matches('/')));
    }
    std::fs::create_dir_all(root.join("tmp")).unwrap();
    let archive = folder.join("image.tar");
    let packed = Command::new("tar")
        .arg("-C")
        .arg(&root)
        .arg("-cf")
        .arg(&archive)
        .arg(".")
        .status()
        .unwrap();
    assert!(packed.success());
    engine.docker(&[
        "import",
        "--change",
        "ENV PATH=/bin",
        archive.to_str().unwrap(),
        "regent-agent:test",
    ]);
}
