//! StreamSpace's test 3.3, which was never run: an agent that stands still is shown offline, and online
//! when it goes on, with nobody's help. And a fault of its heartbeats: they overwrote `draining`.

use std::time::Instant;

use regent_types::Code;
use regent_types::agent::{AgentStatus, DrainAgent, SchedulingState};
use regent_types::session::SessionState;

use crate::harness::{Dev, eventually, is_alive, session_of, session_state};
use crate::process::Frozen;
use crate::workload::{process_of, running_sessions};

#[tokio::test]
async fn a_frozen_agent_is_offline_everywhere_and_online_again_without_a_restart() {
    let dev = Dev::start();
    let client = dev.client();
    let session = running_sessions(&client, "sleep", 1).await.remove(0);
    let process = process_of(&session);
    let pid = dev.file.agents[0].pid;

    let frozen = Frozen::new(pid);
    let at = Instant::now();
    dev.agent_status(&dev.agent_id(), AgentStatus::Offline).await;
    eprintln!(
        "offline on all nodes {:?} after SIGSTOP (stale time 4 s)",
        at.elapsed()
    );
    let refused = client
        .with_deadline(std::time::Duration::from_millis(500))
        .create_session(&session_of("sleep"))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Some(Code::NoAgentsAvailable), "{refused}");

    drop(frozen);
    let at = Instant::now();
    dev.agent_online(&dev.agent_id()).await;
    eprintln!("online on all nodes {:?} after SIGCONT", at.elapsed());
    assert!(is_alive(pid), "it is the same process");

    running_sessions(&client, "sleep", 1).await;
    let now = client.session(&session.name).await.unwrap();
    assert_eq!((now.state, process_of(&now)), (SessionState::Running, process));
}

#[tokio::test]
async fn draining_survives_heartbeats_a_restart_of_the_agent_and_the_loss_of_its_node() {
    let mut dev = Dev::start();
    let client = dev.client();
    let id = dev.agent_id();
    let session = running_sessions(&client, "sleep", 1).await.remove(0);
    let drained = client.drain_agent(&id, &DrainAgent::default()).await.unwrap();
    assert_eq!(drained.scheduling, SchedulingState::Draining);

    // Heartbeats.
    let mut heard = drained.last_heartbeat;
    for _ in 0..2 {
        heard = eventually("newer heartbeat", || async {
            let agent = client.agent(&id).await.ok()?;
            (agent.last_heartbeat > heard).then_some(agent.last_heartbeat)
        })
        .await;
    }
    still_draining(&dev).await;

    // A restart of the agent.
    dev.kill_agent(0);
    dev.agent_status(&id, AgentStatus::Offline).await;
    dev.restart_agent(0);
    let agent = dev.agent_online(&id).await;
    still_draining(&dev).await;

    // The loss of the node that it is connected to.
    let held_by = agent.node.expect("a node holds its connection");
    let node = dev.file.nodes.iter().position(|n| n.id == held_by).unwrap();
    dev.kill_node(node);
    eventually("connection at another node", || async {
        let agent = client.agent(&id).await.ok()?;
        (agent.status == AgentStatus::Online && agent.node != Some(held_by)).then_some(())
    })
    .await;
    still_draining(&dev).await;

    // It only waits: what runs goes on, nothing new comes, until it is told so.
    let now = client.session(&session.name).await.unwrap();
    assert_eq!(now.state, SessionState::Running);
    client.uncordon_agent(&id).await.unwrap();
    let new = client.create_session(&session_of("sleep")).await.unwrap();
    session_state(&client, &new.name, SessionState::Running).await;
}

async fn still_draining(dev: &Dev) {
    let client = dev.client();
    let agent = client.agent(&dev.agent_id()).await.unwrap();
    assert_eq!(agent.scheduling, SchedulingState::Draining);
    let wish = session_of("sleep");
    let refused = client
        .with_deadline(std::time::Duration::from_millis(500))
        .create_session(&wish)
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Some(Code::NoAgentsAvailable), "{refused}");
    let reasons = refused.problem().unwrap().extra["agents"].to_string();
    assert!(reasons.contains("drain"), "the reason is named: {reasons}");
}
