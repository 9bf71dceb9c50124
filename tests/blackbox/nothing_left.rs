//! Whatever way `regent dev` ends, no process of it is left: nodes, agents, shims, sessions, its keeper.

use std::collections::BTreeSet;

use regent_types::session::SessionState;
use rustix::process::Signal;

use crate::harness::{Dev, eventually, session_state};
use crate::process::{Process, command_line, environment, family, naming};
use crate::workload::{process_of, running_sessions};

#[tokio::test]
async fn nothing_is_left_after_sigterm() {
    let dev = Dev::start();
    let family = busy(&dev).await;
    let folder = dev.end(Signal::TERM);
    // `dev` itself has waited for all of them.
    let left: Vec<String> = family
        .iter()
        .filter(|p| p.is_alive())
        .map(|p| command_line(p.pid))
        .collect();
    assert!(left.is_empty(), "left when dev had ended: {left:?}");
    assert_eq!(naming(folder.path()), Vec::<u32>::new());
}

#[tokio::test]
async fn nothing_is_left_after_kill_9() {
    let mut dev = Dev::start();
    let family = busy(&dev).await;
    dev.kill_dev();
    all_gone(&dev, family).await;
}

/// What was started by hand, from the commands of `dev.json`, belongs to it as much.
#[tokio::test]
async fn nothing_is_left_after_kill_9_with_a_node_and_an_agent_started_by_hand() {
    let mut dev = Dev::start();
    running_sessions(&dev.client(), "demo", 1).await;
    dev.kill_node(1);
    dev.restart_node(1);
    dev.kill_agent(0);
    dev.restart_agent(0);
    let pids = [dev.file.nodes[1].pid, dev.file.agents[0].pid];
    eventually("node started by hand", || async {
        dev.client_of(1).readyz().await.ok()
    })
    .await;
    dev.agent_online(&dev.agent_id()).await;
    let family = busy(&dev).await;
    for pid in pids {
        assert!(
            family.iter().any(|process| process.pid == pid),
            "{} is of the family",
            command_line(pid)
        );
    }
    dev.kill_dev();
    all_gone(&dev, family).await;
}

#[tokio::test]
async fn a_second_start_in_the_folder_starts_the_sessions_again() {
    let dev = Dev::start();
    let client = dev.client();
    let sessions = running_sessions(&client, "sleep", 3).await;
    let asleep = running_sessions(&client, "sleep", 1).await.remove(0);
    client.hibernate_session(&asleep.name).await.unwrap();
    session_state(&client, &asleep.name, SessionState::Hibernated).await;
    let stopped = running_sessions(&client, "sleep", 1).await.remove(0);
    client.stop_session(&stopped.name).await.unwrap();
    session_state(&client, &stopped.name, SessionState::Terminated).await;
    let cluster = client.cluster().await.unwrap().cluster_id;
    let processes: Vec<Process> = sessions.iter().map(process_of).collect();

    let dev = Dev::start_in(dev.end(Signal::TERM), &[]);
    let client = dev.client();
    assert_eq!(client.cluster().await.unwrap().cluster_id, cluster);
    for (session, old) in sessions.iter().zip(processes) {
        let now = eventually("session that runs again", || async {
            let now = client.session(&session.name).await.ok()?;
            assert!(
                !now.state.is_final(),
                "{} is {}: {}",
                now.name,
                now.state.as_str(),
                now.reason
            );
            let pid = u32::try_from(now.metadata["pid"].as_u64()?).ok()?;
            (now.state == SessionState::Running && Process::of(pid)? != old).then_some(now)
        })
        .await;
        assert_eq!(
            environment(process_of(&now).pid, "REGENT_SESSION").as_deref(),
            Some(now.name.as_str())
        );
    }
    let now = client.session(&stopped.name).await.unwrap();
    assert_eq!(now.state, SessionState::Terminated, "what had ended stays so");
    let now = client.session(&asleep.name).await.unwrap();
    assert!(
        !now.state.is_final(),
        "{} is {}: {}",
        now.name,
        now.state.as_str(),
        now.reason
    );
    running_sessions(&client, "sleep", 1).await;
}

/// Sessions of all kinds, and everything that runs for them.
async fn busy(dev: &Dev) -> BTreeSet<Process> {
    let client = dev.client();
    let mut sessions = running_sessions(&client, "demo", 2).await;
    sessions.extend(running_sessions(&client, "shell-loop", 2).await);
    let asleep = running_sessions(&client, "sleep", 1).await.remove(0);
    client.hibernate_session(&asleep.name).await.unwrap();
    sessions.push(session_state(&client, &asleep.name, SessionState::Hibernated).await);
    let family = family(dev);
    // Otherwise the test would look for nothing: dev, its keeper, 3 nodes, an agent, and each session.
    for session in &sessions {
        assert!(
            family.contains(&process_of(session)),
            "{} is of the family",
            session.name
        );
    }
    assert!(family.len() >= 6 + sessions.len(), "{family:?}");
    family
}

async fn all_gone(dev: &Dev, family: BTreeSet<Process>) {
    eventually("end of all processes", || async {
        let left = family.iter().any(|process| process.is_alive()) || !naming(dev.path()).is_empty();
        (!left).then_some(())
    })
    .await;
}
