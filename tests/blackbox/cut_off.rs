//! A node that is cut off from the others can neither renew the leases of its agents nor hand them
//! commands, so it lets them go; and a node that stands still with an agent's connection does not keep the
//! agent. The others are cut off here by standing still, which needs no network of one's own.

use std::time::{Duration, Instant};

use regent_types::agent::{Agent, AgentStatus};
use regent_types::session::SessionState;

use crate::harness::{Dev, eventually, session_of, session_state};
use crate::process::Frozen;
use crate::workload::{process_of, running_sessions};

#[tokio::test]
async fn a_node_cut_off_from_the_others_lets_its_agents_go_and_takes_them_again() {
    let dev = Dev::start();
    let client = dev.client();
    let session = running_sessions(&client, "sleep", 1).await.remove(0);
    let process = process_of(&session);
    let before = dev.agent_online(&dev.agent_id()).await;
    let node = holder(&dev, &before);

    let others: Vec<Frozen> = (0..3)
        .filter(|n| *n != node)
        .map(|n| Frozen::new(dev.file.nodes[n].pid))
        .collect();
    let at = Instant::now();
    eventually("word of the node that its agents are let go", || async {
        let metrics = reqwest::get(format!("{}/metrics", dev.file.nodes[node].http))
            .await
            .ok()?;
        let text = metrics.text().await.ok()?;
        let line = text
            .lines()
            .find(|line| line.starts_with("regent_agents_let_go_total"))?;
        (line.rsplit(' ').next()?.parse::<f64>().ok()? >= 1.0).then_some(())
    })
    .await;
    eprintln!(
        "the agent was let go {:?} after the others stood still",
        at.elapsed()
    );

    drop(others);
    let at = Instant::now();
    let agent = eventually("connection that is newer", || async {
        let agent = client.agent(&dev.agent_id()).await.ok()?;
        (agent.status == AgentStatus::Online && agent.epoch > before.epoch).then_some(agent)
    })
    .await;
    eprintln!(
        "online again {:?} after they went on, at node {:?}",
        at.elapsed(),
        agent.node
    );
    dev.agent_online(&dev.agent_id()).await;
    running_sessions(&client, "sleep", 1).await;
    let now = client.session(&session.name).await.unwrap();
    assert_eq!((now.state, process_of(&now)), (SessionState::Running, process));
}

/// Its old connection is still open when the node goes on: what comes of it is late and changes nothing.
#[tokio::test]
async fn an_agent_leaves_a_node_that_stands_still_and_its_late_disconnect_changes_nothing() {
    let dev = Dev::start();
    let client = dev.client();
    let before = dev.agent_online(&dev.agent_id()).await;
    let node = holder(&dev, &before);

    let frozen = Frozen::new(dev.file.nodes[node].pid);
    let at = Instant::now();
    let others: Vec<usize> = (0..3).filter(|n| *n != node).collect();
    let moved = eventually("agent at another node", || async {
        let agent = dev
            .client_of(others[0])
            .with_deadline(Duration::from_secs(2))
            .agent(&dev.agent_id())
            .await
            .ok()?;
        (agent.status == AgentStatus::Online && agent.node.is_some() && agent.node != before.node)
            .then_some(agent)
    })
    .await;
    eprintln!("the agent moved {:?} after its node stood still", at.elapsed());
    assert!(moved.epoch > before.epoch);
    let session = dev
        .client_of(others[1])
        .create_session(&session_of("sleep"))
        .await
        .unwrap();
    session_state(&dev.client_of(others[0]), &session.name, SessionState::Running).await;

    drop(frozen);
    // It has caught up when it shows a session that was made after it went on.
    let late = running_sessions(&client, "sleep", 1).await.remove(0);
    session_state(&dev.client_of(node), &late.name, SessionState::Running).await;
    let now = dev.agent_online(&dev.agent_id()).await;
    assert_eq!(
        (now.node, now.epoch),
        (moved.node, moved.epoch),
        "the newer connection holds"
    );
    client.stop_session(&late.name).await.unwrap();
    session_state(&client, &late.name, SessionState::Terminated).await;
}

fn holder(dev: &Dev, agent: &Agent) -> usize {
    dev.file
        .nodes
        .iter()
        .position(|n| Some(n.id) == agent.node)
        .expect("a node holds the agent")
}
