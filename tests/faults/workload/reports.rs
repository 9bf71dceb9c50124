//! Reports over a connection that is over: an agent connects to one node, then to another, and what it still says
//! over the first connection must not count.
//!
//! The agent is this client itself. Its commands say of themselves who completed them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::{SinkExt as _, StreamExt as _};
use rand::RngExt as _;
use regent_history::fencing::{Grant, Use};
use regent_types::AgentId;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use super::{Answer, Run, send};
use crate::harness::eventually;

/// The agents. Each meets trouble at another moment.
pub(crate) const AGENTS: [&str; 6] = ["twice-1", "twice-2", "twice-3", "twice-4", "twice-5", "twice-6"];
/// How long a frame is waited for; then the whole is begun again.
const FRAME_WITHIN: Duration = Duration::from_secs(3);

/// A node that does not answer for so long is in trouble; it still takes its leader for one.
const IN_TROUBLE: Duration = Duration::from_millis(120);
/// How long a node may take to end a connection that is over: longer than it is away.
const CLOSED_WITHIN: Duration = Duration::from_secs(5);
/// How long what it has sent on before may need to be applied, were it applied: TCP sends again what was lost.
const TAKEN_WITHIN: Duration = Duration::from_millis(1_500);

/// One agent: what was granted to it, and what was accepted.
struct Agent {
    name: &'static str,
    token: String,
    known: Mutex<(Vec<Grant>, Vec<Use>)>,
}

/// All of them.
pub(crate) struct Reports(Vec<Arc<Agent>>);

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

impl Reports {
    pub(crate) async fn new(run: &Arc<Run>) -> Arc<Self> {
        let client = run.cluster.client(0);
        let mut agents = Vec::new();
        for name in AGENTS {
            let register = serde_json::from_value(json!({ "agentId": name, "platform": "test" })).unwrap();
            let token = eventually("an agent of the reports", || async {
                client.register_agent(&register).await.ok()?;
                // No session is ever placed on it.
                let id = AgentId::new(name).unwrap();
                client.cordon_agent(&id).await.ok()?;
                client.create_agent_token(&id).await.ok()?.token
            })
            .await;
            agents.push(Arc::new(Agent {
                name,
                token,
                known: Mutex::default(),
            }));
        }
        Arc::new(Self(agents))
    }

    pub(crate) fn spawn(&self, run: &Arc<Run>, clients: &mut JoinSet<()>) {
        for (agent, number) in self.0.iter().zip(4_000..) {
            clients.spawn(agent.clone().client(run.clone(), number));
        }
    }

    /// What was granted and accepted, by agent.
    pub(crate) fn known(&self) -> Vec<(&'static str, Vec<Grant>, Vec<Use>)> {
        let known = self.0.iter().map(|agent| {
            let known = agent.known.lock().unwrap_or_else(PoisonError::into_inner);
            (agent.name, known.0.clone(), known.1.clone())
        });
        known.collect()
    }
}

impl Agent {
    async fn client(self: Arc<Self>, run: Arc<Run>, number: u64) {
        let mut random = run.random(number);
        while run.goes_on() {
            let nodes = run.cluster.members();
            let at = random.random_range(0..nodes.len());
            let other = (at + random.random_range(1..nodes.len())) % nodes.len();
            let (first, second) = (nodes[at], nodes[other]);
            let hold = Duration::from_millis(random.random_range(0..4_000));
            if self.twice(&run, first, second, hold).await.is_none() {
                run.rest(Duration::from_millis(100)).await;
            }
        }
    }

    /// `None` when a node did not do its part, as in trouble it may.
    async fn twice(&self, run: &Run, first: usize, second: usize, hold: Duration) -> Option<()> {
        let (mut old, old_epoch) = self.connect(run, first).await?;
        let body = json!({ "action": "note", "payload": {}, "expiresIn": "30s" });
        let path = format!("agents/{}/commands", self.name);
        let Answer::Done { body, .. } = send(run.request(second, Method::POST, &path).json(&body)).await
        else {
            return None;
        };
        let command = body["commandId"].as_str()?.to_owned();
        let run_of_it = loop {
            let payload = frame(&mut old, "command").await?;
            if payload["commandId"] == command.as_str() {
                break payload["run"].clone();
            }
            // One of before, that was left in the middle.
            acknowledge(&mut old, &payload["commandId"], &payload["run"]).await?;
            complete(&mut old, &payload["commandId"], &payload["run"], old_epoch).await?;
        };
        // By itself: what is said of one command is decided one after another, and the rest must not wait for this.
        acknowledge(&mut old, &json!(command), &run_of_it).await?;
        self.hold(run, first, &command, hold).await;
        let (mut new, new_epoch) = self.connect(run, second).await?;
        let known = run.now();
        self.known
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .0
            .push(Grant {
                to: format!("a connection to node {}", second + 1),
                token: new_epoch,
                known,
            });
        let invoked = run.now();
        let said = complete(&mut old, &json!(command), &run_of_it, old_epoch).await;
        if said.is_some() {
            // The first node ends it once it knows of the second; what it has sent on by then may still be on its way.
            let _ = tokio::time::timeout(CLOSED_WITHIN, async {
                while let Some(Ok(_)) = old.next().await {}
            })
            .await;
            if self.is_completed_by(run, second, &command, old_epoch).await {
                let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
                known.1.push(Use {
                    by: format!("command {command} completed over node {}", first + 1),
                    token: old_epoch,
                    invoked,
                });
            }
        }
        complete(&mut new, &json!(command), &run_of_it, new_epoch).await
    }

    /// So long, or until the node is in trouble: what comes next is most telling then.
    async fn hold(&self, run: &Run, node: usize, command: &str, hold_for: Duration) {
        let path = format!("commands/{command}");
        let hold = async {
            while run.goes_on() {
                let read = run.request(node, Method::GET, &path).timeout(IN_TROUBLE);
                if !matches!(send(read).await, Answer::Done { .. }) {
                    return;
                }
                run.rest(Duration::from_millis(50)).await;
            }
        };
        let _ = tokio::time::timeout(hold_for, hold).await;
    }

    /// Whether a command is completed under this epoch, or soon will be.
    async fn is_completed_by(&self, run: &Run, node: usize, command: &str, epoch: u64) -> bool {
        let deadline = tokio::time::Instant::now() + TAKEN_WITHIN;
        let path = format!("commands/{command}");
        while tokio::time::Instant::now() < deadline {
            if let Answer::Done { body, .. } = send(run.request(node, Method::GET, &path)).await
                && body["result"]["by"] == epoch
            {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        false
    }

    /// A connection, and its epoch.
    async fn connect(&self, run: &Run, node: usize) -> Option<(Socket, u64)> {
        let url = run.cluster.url(node).replace("http://", "ws://");
        let url = format!("{url}/api/v1/agents/connect?agent_id={}&protocol=3", self.name);
        let mut request = url.into_client_request().unwrap();
        request
            .headers_mut()
            .insert("x-agent-api-key", self.token.parse().unwrap());
        let connecting = tokio_tungstenite::connect_async(request);
        let (mut socket, _) = tokio::time::timeout(FRAME_WITHIN, connecting).await.ok()?.ok()?;
        let hello = json!({ "type": "hello", "payload": {
            "protocol": 3, "features": [], "runtimeId": "of the reports", "sessions": [] } });
        say(&mut socket, &hello).await?;
        let welcome = frame(&mut socket, "welcome").await?;
        Some((socket, welcome["epoch"].as_u64()?))
    }
}

async fn acknowledge(socket: &mut Socket, command: &Value, run: &Value) -> Option<()> {
    let ack = json!({ "type": "ack", "payload": { "commandId": command, "run": run } });
    say(socket, &ack).await
}

async fn complete(socket: &mut Socket, command: &Value, run: &Value, epoch: u64) -> Option<()> {
    let complete = json!({ "type": "complete", "payload": {
        "commandId": command, "run": run, "result": { "by": epoch } } });
    say(socket, &complete).await
}

async fn say(socket: &mut Socket, frame: &Value) -> Option<()> {
    let sending = socket.send(Message::text(frame.to_string()));
    tokio::time::timeout(FRAME_WITHIN, sending).await.ok()?.ok()
}

/// The payload of the next frame of a type.
async fn frame(socket: &mut Socket, kind: &str) -> Option<Value> {
    let reading = async {
        loop {
            if let Message::Text(text) = socket.next().await?.ok()? {
                let frame: Value = serde_json::from_str(&text).ok()?;
                if frame["type"] == kind {
                    return Some(frame["payload"].clone());
                }
            }
        }
    };
    tokio::time::timeout(FRAME_WITHIN, reading).await.ok()?
}
