//! StreamSpace's test 3.1: an agent is killed and started again while its sessions live. There, sessions
//! survived, but new ones were refused until somebody edited a row by hand, because heartbeats refreshed
//! a timestamp and not the status.

use std::time::Instant;

use regent_types::agent::AgentStatus;
use regent_types::session::{Session, SessionState};

use crate::harness::{Dev, session_of, session_state};
use crate::workload::{process_of, running_sessions};

/// Sessions that each of three agents has at least.
const EACH: usize = 3;

#[tokio::test]
async fn five_sessions_outlive_their_agent_and_a_new_one_works_at_once() {
    outlive(5).await;
}

#[tokio::test]
async fn fifty_sessions_outlive_their_agent_and_a_new_one_works_at_once() {
    outlive(50).await;
}

async fn outlive(count: usize) {
    let mut dev = Dev::start();
    let client = dev.client();
    let before = running_sessions(&client, "sleep", count).await;
    let processes: Vec<_> = before.iter().map(process_of).collect();

    dev.kill_agent(0);
    dev.agent_status(&dev.agent_id(), AgentStatus::Offline).await;
    let restarted = Instant::now();
    dev.restart_agent(0);
    dev.agent_online(&dev.agent_id()).await;
    eprintln!(
        "{count} sessions: online {:?} after the restart",
        restarted.elapsed()
    );

    let new = client.create_session(&session_of("sleep")).await.unwrap();
    session_state(&client, &new.name, SessionState::Running).await;
    eprintln!(
        "{count} sessions: a new one runs {:?} after the restart",
        restarted.elapsed()
    );

    for (session, process) in before.iter().zip(processes) {
        let now = client.session(&session.name).await.unwrap();
        assert_eq!(now.state, SessionState::Running, "{}: {}", now.name, now.reason);
        assert_eq!(process_of(&now), process, "{} was started again", now.name);
        assert_eq!(now.generation, session.generation);
    }
    let agent = client.agent(&dev.agent_id()).await.unwrap();
    assert_eq!(usize::try_from(agent.active_sessions).unwrap(), count + 1);

    // They are not only shown: the new agent has them in hand.
    client.stop_session(&before[0].name).await.unwrap();
    session_state(&client, &before[0].name, SessionState::Terminated).await;
}

/// The agent is back before anybody has noticed: nothing may be lost in a restart that is faster than the
/// stale time either.
#[tokio::test]
async fn three_agents_restarted_at_once_keep_all_their_sessions() {
    let mut dev = Dev::start();
    for id in ["second", "third"] {
        let index = dev.add_agent(id, &[]).await;
        dev.agent_online(&dev.file.agents[index].id).await;
    }
    let client = dev.client();
    // The least loaded comes first, so that these few reach every agent that is online.
    let mut before = Vec::new();
    for agent in &dev.file.agents {
        while before
            .iter()
            .filter(|s: &&Session| s.agent_id.as_ref() == Some(&agent.id))
            .count()
            < EACH
        {
            assert!(before.len() < 10 * EACH, "agent {} gets no sessions", agent.id);
            before.extend(running_sessions(&client, "sleep", EACH).await);
        }
    }
    let processes: Vec<_> = before.iter().map(process_of).collect();

    let epochs = epochs(&dev).await;
    for agent in 0..3 {
        dev.kill_agent(agent);
    }
    for agent in 0..3 {
        dev.restart_agent(agent);
    }
    for (agent, before) in dev.file.agents.iter().zip(epochs) {
        crate::harness::eventually(&format!("new connection of agent {}", agent.id), || async {
            let now = client.agent(&agent.id).await.ok()?;
            (now.status == AgentStatus::Online && now.epoch > before).then_some(())
        })
        .await;
    }
    running_sessions(&client, "sleep", 3).await;
    for (session, process) in before.iter().zip(processes) {
        let now = client.session(&session.name).await.unwrap();
        assert_eq!(now.state, SessionState::Running, "{}: {}", now.name, now.reason);
        assert_eq!((process_of(&now), &now.agent_id), (process, &session.agent_id));
    }
}

async fn epochs(dev: &Dev) -> Vec<Option<regent_types::Epoch>> {
    let client = dev.client();
    let agents = dev.file.agents.iter().map(|agent| client.agent(&agent.id));
    futures::future::try_join_all(agents)
        .await
        .unwrap()
        .into_iter()
        .map(|agent| agent.epoch)
        .collect()
}
