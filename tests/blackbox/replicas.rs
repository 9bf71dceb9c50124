//! Agents with replicas: exactly one leads, and whatever ends it, the next one takes over what it ran.
//! (StreamSpace's fault 4: three replicas with a file lock were three leaders, with Swarm none.)

use std::time::{Duration, Instant};

use regent_client::Client;
use regent_types::agent::{Agent, AgentStatus};
use regent_types::session::{CreateSession, SessionState};
use regent_types::{AgentId, Token};
use rustix::process::Signal;
use serde_json::json;

use crate::harness::{Dev, eventually, send, session_state};
use crate::process::Frozen;
use crate::workload::{process_of, running};

const NAMES: [&str; 3] = ["one", "two", "three"];
/// The default of `--lease-ttl`.
const TTL: Duration = Duration::from_secs(4);

/// A session that only the replicated agent takes.
fn on_trio() -> CreateSession {
    serde_json::from_value(json!({ "template": "sleep", "placement": { "labels": { "of": "trio" } } }))
        .unwrap()
}

struct Trio {
    dev: Dev,
    id: AgentId,
    /// Indexes of the replicas in `dev`, in the order of `NAMES`.
    replicas: Vec<usize>,
}

impl Trio {
    async fn start() -> Self {
        Self::start_with(&[]).await
    }

    async fn start_with(flags: &[&str]) -> Self {
        let mut dev = Dev::start();
        let flags: Vec<&str> = ["--label", "of=trio"].iter().chain(flags).copied().collect();
        let replicas = dev.add_replicas("trio", &NAMES, &flags).await;
        Self {
            dev,
            id: AgentId::new("trio").unwrap(),
            replicas,
        }
    }

    /// Waits until all of these are connected and one of them leads.
    async fn settled(&self, connected: usize) -> Agent {
        eventually("a leader among all replicas", || async {
            let agent = self.dev.client().agent(&self.id).await.ok()?;
            (agent.replicas.len() == connected && leaders(&agent).len() == 1).then_some(agent)
        })
        .await
    }

    /// Waits for a leader under a newer token.
    async fn led_after(&self, token: Option<Token>) -> Agent {
        eventually("the next leader", || async {
            let agent = self.dev.client().agent(&self.id).await.ok()?;
            (agent.token > token && agent.token.is_some()).then_some(agent)
        })
        .await
    }

    /// The index in `dev` of the one that leads.
    fn leader(&self, agent: &Agent) -> usize {
        let name = leaders(agent).pop().expect("somebody leads");
        self.replicas[NAMES.iter().position(|one| *one == name).unwrap()]
    }
}

fn leaders(agent: &Agent) -> Vec<String> {
    let leading = agent.replicas.iter().filter(|replica| replica.leader);
    leading.map(|replica| replica.name.to_string()).collect()
}

/// StreamSpace's file lock gave three.
#[tokio::test]
async fn fault_4_three_replicas_never_give_three_leaders() {
    let trio = Trio::start().await;
    let agent = trio.settled(3).await;
    let client = trio.dev.client();
    let sessions = running(&client, &on_trio(), 3).await;
    // Whichever node is asked, it is the same one, under one token, and it stays.
    for node in 0..3 {
        for _ in 0..10 {
            let seen = trio.dev.client_of(node).agent(&trio.id).await.unwrap();
            assert_eq!((seen.token, leaders(&seen)), (agent.token, leaders(&agent)));
        }
    }
    // Each session was started once, by that one.
    for session in &sessions {
        let process = process_of(session);
        let fence = crate::process::environment(process.pid, "REGENT_FENCING_TOKEN");
        assert_eq!(fence, agent.token.map(|token| token.to_string()));
    }
    let lease = client
        .lease(&regent_types::LeaseName::of_agent(&trio.id))
        .await
        .unwrap();
    assert_eq!((Some(lease.token), lease.candidates.len()), (agent.token, 2));
}

/// StreamSpace's Swarm backend gave none. Here one leads whatever becomes of the others, down to the last.
#[tokio::test]
async fn fault_4_three_replicas_never_give_none() {
    let mut trio = Trio::start_with(&["--lease-ttl", "1s"]).await;
    let mut left = trio.replicas.clone();
    let mut agent = trio.settled(3).await;
    while left.len() > 1 {
        let leader = trio.leader(&agent);
        trio.dev.kill_agent(leader);
        left.retain(|one| *one != leader);
        agent = trio.led_after(agent.token).await;
        running(&trio.dev.client(), &on_trio(), 1).await;
    }
    // All come back, and there is still one.
    for replica in trio.replicas.clone() {
        if !left.contains(&replica) {
            trio.dev.restart_agent(replica);
        }
    }
    assert_eq!(trio.settled(3).await.token, agent.token);
}

#[tokio::test]
async fn the_next_replica_adopts_what_a_killed_leader_ran() {
    let mut trio = Trio::start().await;
    let before = trio.settled(3).await;
    let client = trio.dev.client();
    let sessions = running(&client, &on_trio(), 3).await;
    let processes: Vec<_> = sessions.iter().map(process_of).collect();
    let leader = trio.leader(&before);
    let killed = Instant::now();
    trio.dev.kill_agent(leader);
    let after = trio.led_after(before.token).await;
    eprintln!(
        "kill -9: the next replica led after {:?}; its TTL is {TTL:?}",
        killed.elapsed()
    );
    assert_ne!(trio.leader(&after), leader);
    for (session, process) in sessions.iter().zip(processes) {
        let now = session_state(&client, &session.name, SessionState::Running).await;
        assert_eq!((process_of(&now), now.generation), (process, session.generation));
    }
    // It has them in hand, and takes new ones.
    client.stop_session(&sessions[0].name).await.unwrap();
    session_state(&client, &sessions[0].name, SessionState::Terminated).await;
    running(&client, &on_trio(), 1).await;
    // The killed one comes back as a standby.
    trio.dev.restart_agent(leader);
    let again = trio.settled(3).await;
    assert_eq!(again.token, after.token);
}

/// The window in which a session has been started and nobody was told.
#[tokio::test]
async fn sessions_that_were_starting_when_the_leader_was_killed_start_once() {
    let mut trio = Trio::start().await;
    let before = trio.settled(3).await;
    let client = trio.dev.client();
    let created = futures::future::try_join_all((0..12).map(|_| async {
        let wish = on_trio();
        client.create_session(&wish).await
    }))
    .await
    .unwrap();
    let leader = trio.leader(&before);
    trio.dev.kill_agent(leader);
    trio.led_after(before.token).await;
    for session in created {
        let now = session_state(&client, &session.name, SessionState::Running).await;
        process_of(&now);
        let named = crate::harness::processes_naming(&format!("REGENT_SESSION={}", now.name));
        let groups: std::collections::BTreeSet<_> = named
            .iter()
            .filter_map(|pid| crate::process::environment(*pid, "REGENT_GENERATION"))
            .collect();
        assert_eq!(groups.len(), 1, "{} runs as {named:?}", now.name);
    }
}

#[tokio::test]
async fn a_leader_that_is_stopped_hands_over_at_once() {
    let mut trio = Trio::start().await;
    let mut agent = trio.settled(3).await;
    let client = trio.dev.client();
    let sessions = running(&client, &on_trio(), 2).await;
    let processes: Vec<_> = sessions.iter().map(process_of).collect();
    for left in [2, 1] {
        let leader = trio.leader(&agent);
        let stopped = Instant::now();
        send(trio.dev.file.agents[leader].pid, Signal::TERM);
        let next = trio.led_after(agent.token).await;
        eprintln!(
            "stopped in good order: the next replica led after {:?}",
            stopped.elapsed()
        );
        assert!(
            stopped.elapsed() < TTL,
            "it waited for the lease to run out instead of being given it"
        );
        trio.dev.stop_agent(leader);
        agent = trio.settled(left).await;
        assert_eq!(agent.token, next.token);
    }
    for (session, process) in sessions.iter().zip(processes) {
        let now = client.session(&session.name).await.unwrap();
        assert_eq!((now.state, process_of(&now)), (SessionState::Running, process));
    }
}

#[tokio::test]
async fn a_frozen_leader_does_nothing_under_its_old_token_when_it_wakes() {
    let trio = Trio::start().await;
    let before = trio.settled(3).await;
    let client = trio.dev.client();
    let sessions = running(&client, &on_trio(), 3).await;
    let leader = trio.leader(&before);
    let frozen = Frozen::new(trio.dev.file.agents[leader].pid);
    // What the frozen one was sent and did not read is in its socket when it wakes.
    let stopping = sessions[0].name.clone();
    client.stop_session(&stopping).await.unwrap();
    let since = Instant::now();
    let after = trio.led_after(before.token).await;
    eprintln!("SIGSTOP: the next replica led after {:?}", since.elapsed());
    session_state(&client, &stopping, SessionState::Terminated).await;
    let new = running(&client, &on_trio(), 2).await;
    drop(frozen);
    let settled = trio.settled(3).await;
    assert_eq!((settled.token, leaders(&settled)), (after.token, leaders(&after)));
    for session in sessions[1..].iter().chain(&new) {
        let now = client.session(&session.name).await.unwrap();
        assert_eq!(
            (now.state, process_of(&now), now.generation),
            (SessionState::Running, process_of(session), session.generation)
        );
    }
    // The woken one is a standby that is ready: it leads when its turn comes.
    let mut trio = trio;
    for connected in [3, 2] {
        let agent = trio.settled(connected).await;
        let leader = trio.leader(&agent);
        trio.dev.stop_agent(leader);
        trio.led_after(agent.token).await;
    }
    running(&client, &on_trio(), 1).await;
}

#[tokio::test]
async fn replicas_and_a_process_without_a_replica_name_do_not_share_an_agent() {
    let mut trio = Trio::start().await;
    trio.settled(3).await;
    let alone = trio.dev.add_agent("trio", &[]).await;
    eventually("the reason in its log", || async {
        let log = trio.dev.agent_log(alone);
        (log.contains("replica") && log.contains("name")).then_some(())
    })
    .await;
    let agent = trio.settled(3).await;
    assert!(
        agent
            .replicas
            .iter()
            .all(|replica| !replica.name.as_str().is_empty())
    );
}

#[tokio::test]
async fn a_replica_on_another_runtime_is_refused_with_the_reason() {
    let mut trio = Trio::start().await;
    let before = trio.settled(3).await;
    let client: Client = trio.dev.client();
    let sessions = running(&client, &on_trio(), 2).await;
    let elsewhere = trio.dev.path().join("elsewhere").display().to_string();
    let index = trio.dev.add_replicas("trio", &["four"], &[]).await[0];
    trio.dev.kill_agent(index);
    let command = &mut trio.dev.file.agents[index].command;
    let at = command.iter().position(|word| word == "--data").unwrap();
    command[at + 1] = elsewhere;
    trio.dev.restart_agent(index);
    eventually("the reason in its log", || async {
        trio.dev.agent_log(index).contains("runtime").then_some(())
    })
    .await;
    let agent = trio.settled(3).await;
    assert_eq!(agent.token, before.token);
    for session in sessions {
        process_of(&client.session(&session.name).await.unwrap());
    }
}

/// Off by default; with it the next replica need not wait for the TTL, which is a minute here.
#[tokio::test]
async fn a_lease_can_be_given_up_early_when_its_connection_is_lost() {
    let mut trio = Trio::start_with(&["--lease-ttl", "60s", "--release-on-disconnect", "300ms"]).await;
    let before = trio.settled(3).await;
    let leader = trio.leader(&before);
    let killed = Instant::now();
    trio.dev.kill_agent(leader);
    trio.led_after(before.token).await;
    eprintln!(
        "given up early: the next replica led after {:?}",
        killed.elapsed()
    );
    assert_eq!(
        trio.dev.client().agent(&trio.id).await.unwrap().status,
        AgentStatus::Online
    );
}

/// The node that holds the leader's connection dies: the leader goes to another and leads on, under the same
/// token, and no standby is lost.
#[tokio::test]
async fn a_leader_whose_node_dies_leads_on() {
    let mut trio = Trio::start_with(&["--lease-ttl", "10s"]).await;
    let before = trio.settled(3).await;
    let client = trio.dev.client();
    let sessions = running(&client, &on_trio(), 2).await;
    let node = before.node.expect("it is connected");
    let node = trio.dev.file.nodes.iter().position(|one| one.id == node).unwrap();
    trio.dev.kill_node(node);
    let after = eventually("all replicas at the other nodes", || async {
        let agent = trio.dev.client().agent(&trio.id).await.ok()?;
        let elsewhere = agent
            .replicas
            .iter()
            .all(|replica| replica.node != trio.dev.file.nodes[node].id);
        (elsewhere && agent.replicas.len() == 3 && leaders(&agent).len() == 1).then_some(agent)
    })
    .await;
    assert_eq!((after.token, leaders(&after)), (before.token, leaders(&before)));
    for session in sessions {
        process_of(&client.session(&session.name).await.unwrap());
    }
    running(&client, &on_trio(), 1).await;
}
