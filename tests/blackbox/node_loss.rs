//! Nodes are killed with -9 under a stream of writes through all three. An acknowledged write is never
//! lost, a write with an idempotency key happens once however often it is sent, and writes go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use regent_client::{CommandFilter, SessionFilter};
use regent_types::agent::AgentStatus;
use regent_types::auth::{Quota, Role, User};
use regent_types::command::{CommandStatus, CreateCommand};
use regent_types::session::{Session, SessionState};
use regent_types::{SessionName, Time, UserName};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::harness::{Dev, PATIENCE, eventually, session_state};
use crate::process::Process;
use crate::workload::{process_of, running_sessions};

/// Acknowledged writes of each writer before, and again after, a node is killed.
const WRITES: usize = 20;
/// How long one attempt may take before it counts as unknown: longer than an election.
const ATTEMPT: Duration = Duration::from_secs(8);

#[tokio::test]
async fn a_node_is_killed_under_load_leader_or_not_and_nothing_is_lost_or_done_twice() {
    let mut dev = Dev::start();
    let leader = dev.leader().await;
    for victim in [leader, (leader + 1) % 3] {
        lose(
            &mut dev,
            victim,
            if victim == leader {
                "first leader"
            } else {
                "another node"
            },
        )
        .await;
    }
    // Whoever has the agent now, which may be either of the others.
    let agent = dev.agent_online(&dev.agent_id()).await;
    let victim = dev
        .file
        .nodes
        .iter()
        .position(|n| Some(n.id) == agent.node)
        .unwrap();
    lose(&mut dev, victim, "node of the agent").await;
}

async fn lose(dev: &mut Dev, victim: usize, what: &str) {
    let client = dev.client();
    let sessions = running_sessions(&client, "sleep", 6).await;
    let processes: Vec<Process> = sessions.iter().map(process_of).collect();
    let (tagged, stopped) = sessions.split_at(3);
    let writers: Vec<Writer> = (0..3)
        .map(|n| Writer::start(dev, n, what, &tagged[n].name))
        .collect();
    for writer in &writers {
        writer.acknowledged(WRITES).await;
    }

    // Commands under way: some are with the agent, some on their way to it.
    let stops = stopped.iter().map(|session| client.stop_session(&session.name));
    let stops = futures::future::try_join_all(stops).await.unwrap();
    let killed = dev.file.nodes[victim].id;
    let was_leader = dev.leader().await == victim;
    dev.kill_node(victim);
    let at = Instant::now();

    let before: Vec<usize> = writers.iter().map(Writer::count).collect();
    for (writer, before) in writers.iter().zip(before) {
        writer.acknowledged(before + WRITES).await;
    }
    eventually("agent at a node that lives", || async {
        let agent = client.agent(&dev.agent_id()).await.ok()?;
        (agent.status == AgentStatus::Online && agent.node.is_some_and(|node| node != killed)).then_some(())
    })
    .await;
    eprintln!(
        "{what} (leader: {was_leader}): the agent is at a living node {:?} after the kill",
        at.elapsed()
    );
    for (session, stop) in stopped.iter().zip(stops) {
        session_state(&client, &session.name, SessionState::Terminated).await;
        let command = client.command(&stop.command_id.unwrap()).await.unwrap();
        assert_eq!(command.status, CommandStatus::Completed, "{command:?}");
    }
    running_sessions(&client, "sleep", 1).await;

    let mut longest = Duration::ZERO;
    let mut writes = 0;
    for (writer, session) in writers.into_iter().zip(tagged) {
        let record = writer.end().await;
        longest = longest.max(record.longest_stall);
        writes += record.keys.len() + record.changes;
        record.check(dev, session).await;
    }
    eprintln!(
        "{what} (leader: {was_leader}): {writes} writes acknowledged, longest stall of a writer {longest:?}"
    );
    for (session, process) in tagged.iter().zip(processes) {
        let now = client.session(&session.name).await.unwrap();
        assert_eq!((now.state, process_of(&now)), (SessionState::Running, process));
        client.stop_session(&session.name).await.unwrap();
    }

    dev.restart_node(victim);
    eventually("restarted node", || async {
        dev.client_of(victim).readyz().await.ok()
    })
    .await;
    same_everywhere(dev).await;
}

/// All nodes show the same digest at a common checkpoint, and the same sessions.
async fn same_everywhere(dev: &Dev) {
    let mut views = Vec::new();
    for node in 0..3 {
        let mut all = dev
            .client_of(node)
            .all_sessions(&SessionFilter::default())
            .await
            .unwrap();
        for session in &mut all {
            // What only the leader knows, and what goes on meanwhile.
            session.status.last_activity = None;
        }
        views.push(
            all.into_iter()
                .map(|s| (s.name, s.tags, s.created_at, s.generation))
                .collect::<Vec<_>>(),
        );
    }
    assert_eq!(views[0], views[1]);
    assert_eq!(views[0], views[2]);
}

/// All at once, as in a power cut: what was acknowledged is on disk.
#[tokio::test]
async fn all_nodes_are_killed_at_once_and_everything_is_there_again() {
    let mut dev = Dev::start();
    let client = dev.client();
    let sessions = running_sessions(&client, "sleep", 3).await;
    let processes: Vec<Process> = sessions.iter().map(process_of).collect();
    let hello = CreateCommand {
        action: "hello".to_owned(),
        session_id: None,
        payload: json!({}),
        expires_in: None,
    };
    let command = client.create_command(&dev.agent_id(), &hello).await.unwrap();
    let command = eventually("end of the command", || async {
        client
            .command(&command.command_id)
            .await
            .ok()
            .filter(|c| c.status.is_final())
    })
    .await;
    let templates = client.all_templates().await.unwrap();
    let users = client.all_users().await.unwrap();
    let cluster = client.cluster().await.unwrap().cluster_id;
    let writers: Vec<Writer> = (0..3)
        .map(|n| Writer::start(&dev, n, "all three", &sessions[n].name))
        .collect();
    for writer in &writers {
        writer.acknowledged(WRITES).await;
    }

    for node in 0..3 {
        dev.kill_node(node);
    }
    let before: Vec<usize> = writers.iter().map(Writer::count).collect();
    let at = Instant::now();
    for node in 0..3 {
        dev.restart_node(node);
    }
    for (writer, before) in writers.iter().zip(before) {
        writer.acknowledged(before + WRITES).await;
    }
    eprintln!(
        "all three: every writer has {WRITES} more acknowledged {:?} after the restart",
        at.elapsed()
    );
    for (writer, session) in writers.into_iter().zip(&sessions) {
        writer.end().await.check(&dev, session).await;
    }

    dev.agent_online(&dev.agent_id()).await;
    assert_eq!(client.cluster().await.unwrap().cluster_id, cluster);
    assert_eq!(client.all_templates().await.unwrap(), templates);
    assert_eq!(who(client.all_users().await.unwrap()), who(users));
    assert_eq!(client.command(&command.command_id).await.unwrap(), command);
    for (session, process) in sessions.iter().zip(processes) {
        let now = session_state(&client, &session.name, SessionState::Running).await;
        assert_eq!(process_of(&now), process, "{} was started again", now.name);
    }
    running_sessions(&client, "sleep", 1).await;
    same_everywhere(&dev).await;
    let filter = CommandFilter::default();
    let commands = eventually("end of all commands", || async {
        let all = client.all_commands(&filter).await.ok()?;
        all.iter().all(|c| c.status.is_final()).then_some(all)
    })
    .await;
    assert!(
        commands.iter().all(|c| c.status != CommandStatus::Expired),
        "{commands:?}"
    );
}

/// Users without what their sessions use, which the writers change.
fn who(users: Vec<User>) -> Vec<(UserName, Role, Quota, Time)> {
    users
        .into_iter()
        .map(|u| (u.username, u.role, u.quota, u.created_at))
        .collect()
}

/// Writes through its own node, and when that has no answer through the next: in turn the tags of a session
/// and a new session that is never placed, under an idempotency key, until it is acknowledged.
struct Writer {
    acknowledged: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    task: JoinHandle<Record>,
}

/// What a writer knows.
#[derive(Default)]
struct Record {
    /// Keys of sessions that were acknowledged, with the name they got.
    keys: Vec<(String, String)>,
    /// How many changes of the tags were acknowledged, and what the last of them wrote.
    changes: usize,
    last_tag: Option<String>,
    /// What was sent and not answered: it may have been done, and may have come after what was sent later.
    unknown: Vec<String>,
    longest_stall: Duration,
}

impl Writer {
    fn start(dev: &Dev, node: usize, what: &str, session: &SessionName) -> Self {
        let (acknowledged, stop) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let http = Http {
            nodes: (0..3)
                .map(|n| dev.file.nodes[(node + n) % 3].http.clone())
                .collect(),
            token: dev.file.admin_token.clone(),
            client: reqwest::Client::new(),
        };
        let name = format!("{}-{node}", what.replace(' ', "-"));
        let task = write(
            http,
            name,
            session.to_string(),
            Arc::clone(&acknowledged),
            Arc::clone(&stop),
        );
        Self {
            acknowledged,
            stop,
            task: tokio::spawn(task),
        }
    }

    fn count(&self) -> usize {
        self.acknowledged.load(Ordering::Relaxed)
    }

    async fn acknowledged(&self, count: usize) {
        eventually(&format!("{count} acknowledged writes"), || async {
            assert!(!self.task.is_finished(), "the writer failed");
            (self.count() >= count).then_some(())
        })
        .await;
    }

    async fn end(self) -> Record {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap()
    }
}

async fn write(
    http: Http,
    name: String,
    session: String,
    acknowledged: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
) -> Record {
    let mut record = Record::default();
    let mut last = Instant::now();
    for n in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        if n % 4 == 0 {
            let key = format!("{name}-{n}");
            let body = json!({
                "template": "sleep", "tags": [key], "whenFull": "queue", "placement": { "region": "nowhere" }
            });
            let created = http.until_done(&key, &body).await;
            record
                .keys
                .push((key, created["name"].as_str().unwrap().to_owned()));
        } else {
            let tag = format!("{name}-{n}");
            match http.change_tags(&session, &tag).await {
                Attempt::Done(_) => {
                    record.last_tag = Some(tag);
                    record.changes += 1;
                }
                Attempt::Not => continue,
                Attempt::Unknown => {
                    record.unknown.push(tag);
                    continue;
                }
            }
        }
        record.longest_stall = record.longest_stall.max(last.elapsed());
        last = Instant::now();
        acknowledged.fetch_add(1, Ordering::Relaxed);
    }
    record
}

impl Record {
    /// Checks that every node has all that was acknowledged, once.
    async fn check(&self, dev: &Dev, session: &Session) {
        assert!(self.changes > 0 && !self.keys.is_empty(), "something was written");
        for node in 0..3 {
            if !crate::harness::is_alive(dev.file.nodes[node].pid) {
                continue;
            }
            let client = dev.client_of(node);
            let tags = client.session(&session.name).await.unwrap().tags;
            let possible = |tag: &String| self.last_tag.as_ref() == Some(tag) || self.unknown.contains(tag);
            assert!(
                tags.len() == 1 && possible(&tags[0]),
                "node {node} has {tags:?}; acknowledged last was {:?}, without an answer were {:?}",
                self.last_tag,
                self.unknown
            );
            let all = client.all_sessions(&SessionFilter::default()).await.unwrap();
            for (key, name) in &self.keys {
                let made: Vec<&str> = all
                    .iter()
                    .filter(|s| s.tags.contains(key))
                    .map(|s| s.name.as_str())
                    .collect();
                assert_eq!(
                    made,
                    [name.as_str()],
                    "node {node}: the write {key} was done once"
                );
            }
        }
    }
}

/// The three nodes, a writer's own first.
struct Http {
    nodes: Vec<String>,
    token: String,
    client: reqwest::Client,
}

/// How one attempt ended.
enum Attempt {
    Done(Value),
    /// Certainly not done.
    Not,
    /// Done or not, now or later.
    Unknown,
}

impl Http {
    /// Sends a creation under its key, to one node after the other, until one acknowledges it.
    async fn until_done(&self, key: &str, body: &Value) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            for node in &self.nodes {
                if let Attempt::Done(answer) =
                    self.once(node, Method::POST, "sessions", Some(key), body).await
                {
                    return answer;
                }
            }
            assert!(Instant::now() < deadline, "nobody took {key}");
            // All were asked: a moment for the election.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Changes the tags through the first node that says whether it did.
    async fn change_tags(&self, session: &str, tag: &str) -> Attempt {
        for node in &self.nodes {
            let body = json!({ "tags": [tag] });
            match self
                .once(node, Method::PATCH, &format!("sessions/{session}"), None, &body)
                .await
            {
                Attempt::Not => {}
                known => return known,
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        Attempt::Not
    }

    async fn once(&self, node: &str, method: Method, path: &str, key: Option<&str>, body: &Value) -> Attempt {
        let mut request = self.client.request(method, format!("{node}/api/v1/{path}"));
        request = request.bearer_auth(&self.token).timeout(ATTEMPT).json(body);
        if let Some(key) = key {
            request = request.header("Idempotency-Key", key);
        }
        let response = match request.send().await {
            Ok(response) => response,
            Err(error) if error.is_connect() => return Attempt::Not,
            Err(_) => return Attempt::Unknown,
        };
        let status = response.status();
        match (status, response.json().await) {
            (_, Err(_)) | (StatusCode::GATEWAY_TIMEOUT, _) => Attempt::Unknown,
            (StatusCode::SERVICE_UNAVAILABLE, _) => Attempt::Not,
            (status, Ok(answer)) if status.is_success() => Attempt::Done(answer),
            (status, Ok(answer)) => panic!("{path} was refused with {status}: {answer}"),
        }
    }
}
