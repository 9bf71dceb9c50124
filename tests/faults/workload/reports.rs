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

pub(crate) const AGENT: &str = "twice";
/// How long a frame is waited for; then the whole is begun again.
const FRAME_WITHIN: Duration = Duration::from_secs(3);

/// What was granted, and what was accepted.
#[derive(Default)]
pub(crate) struct Reports {
    token: String,
    known: Mutex<(Vec<Grant>, Vec<Use>)>,
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

impl Reports {
    pub(crate) async fn new(run: &Arc<Run>) -> Arc<Self> {
        let client = run.cluster.client(0);
        let register = serde_json::from_value(json!({ "agentId": AGENT, "platform": "test" })).unwrap();
        let token = eventually("the agent of the reports", || async {
            client.register_agent(&register).await.ok()?;
            // No session is ever placed on it.
            let id = AgentId::new(AGENT).unwrap();
            client.cordon_agent(&id).await.ok()?;
            client.create_agent_token(&id).await.ok()?.token
        })
        .await;
        Arc::new(Self {
            token,
            ..Self::default()
        })
    }

    pub(crate) fn spawn(self: &Arc<Self>, run: &Arc<Run>, clients: &mut JoinSet<()>) {
        clients.spawn(self.clone().client(run.clone()));
    }

    pub(crate) fn known(&self) -> (Vec<Grant>, Vec<Use>) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn client(self: Arc<Self>, run: Arc<Run>) {
        let mut random = run.random(4_000);
        while run.goes_on() {
            let first = random.random_range(0..run.cluster.plan.nodes);
            let second = (first + random.random_range(1..run.cluster.plan.nodes)) % run.cluster.plan.nodes;
            let hold = Duration::from_millis(random.random_range(0..1_500));
            if self.twice(&run, first, second, hold).await.is_none() {
                run.rest(Duration::from_millis(100)).await;
            }
        }
    }

    /// `None` when a node did not do its part, as in trouble it may.
    async fn twice(&self, run: &Run, first: usize, second: usize, hold: Duration) -> Option<()> {
        let (mut old, old_epoch) = self.connect(run, first).await?;
        let body = json!({ "action": "note", "payload": {}, "expiresIn": "30s" });
        let path = format!("agents/{AGENT}/commands");
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
            complete(&mut old, &payload["commandId"], &payload["run"], old_epoch).await?;
        };
        run.rest(hold).await;
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
            // Time for it to be taken, were it taken.
            tokio::time::sleep(Duration::from_millis(1_500)).await;
            let path = format!("commands/{command}");
            if let Answer::Done { body, .. } = send(run.request(second, Method::GET, &path)).await
                && body["result"]["by"] == old_epoch
            {
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

    /// A connection, and its epoch.
    async fn connect(&self, run: &Run, node: usize) -> Option<(Socket, u64)> {
        let url = run.cluster.url(node).replace("http://", "ws://");
        let url = format!("{url}/api/v1/agents/connect?agent_id={AGENT}");
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

async fn complete(socket: &mut Socket, command: &Value, run: &Value, epoch: u64) -> Option<()> {
    let ack = json!({ "type": "ack", "payload": { "commandId": command, "run": run } });
    let complete = json!({ "type": "complete", "payload": {
        "commandId": command, "run": run, "result": { "by": epoch } } });
    say(socket, &ack).await?;
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
