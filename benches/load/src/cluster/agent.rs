//! An agent that only says that it does what it is told: each start is acknowledged and completed at once, and
//! no process runs. It stays connected with its heartbeats, and comes back at another node when its own dies.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::{SinkExt as _, StreamExt as _};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use super::regent::Regent;

/// How long a connection may take to be made and welcomed.
const JOIN_WITHIN: Duration = Duration::from_secs(10);
/// How long it waits before it tries the next node.
const AGAIN_AFTER: Duration = Duration::from_millis(200);
/// Failures in a row after which it is no use.
const MAX_FAILURES: u32 = 100;

pub(crate) type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// A frame that comes in, as far as it is read.
#[derive(Deserialize)]
pub(crate) struct Frame<'a> {
    #[serde(rename = "type")]
    pub(crate) kind: &'a str,
    #[serde(borrow, default)]
    pub(crate) payload: Option<&'a serde_json::value::RawValue>,
}

#[derive(Deserialize)]
struct Command {
    #[serde(rename = "commandId")]
    id: String,
    run: u32,
    action: String,
    #[serde(default)]
    token: u64,
    #[serde(default)]
    payload: About,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct About {
    session_id: Option<String>,
    generation: u64,
}

/// What it says that it runs: generation and token of each session.
type Running = BTreeMap<String, (u64, u64)>;

/// The agent, until it is dropped.
pub(crate) struct Agent {
    task: JoinHandle<anyhow::Result<()>>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Agent {
    /// Where sessions must be placed to come to it.
    pub(crate) const REGION: &'static str = "bench";

    pub(super) async fn start(regent: &Regent, id: &str) -> anyhow::Result<Self> {
        let key = register(regent, id, Self::REGION).await?;
        let player = Player {
            id: id.to_owned(),
            key,
            addresses: regent.addresses(),
            sessions: Mutex::default(),
        };
        Ok(Self {
            task: tokio::spawn(player.play()),
        })
    }

    /// An error once it has given up.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        if self.task.is_finished() {
            bail!("the bench's agent has given up");
        }
        Ok(())
    }
}

/// Registers an agent without a bound on what it carries; gives its key.
pub(crate) async fn register(regent: &Regent, id: &str, region: &str) -> anyhow::Result<String> {
    let body = json!({ "agentId": id, "platform": "bench", "region": region });
    regent
        .call(0, "POST", "/api/v1/agents/register", Some(body))
        .await?;
    let path = format!("/api/v1/agents/{id}/token");
    let made = regent.call(0, "POST", &path, Some(json!({}))).await?;
    Ok(made["token"].as_str().context("no token was made")?.to_owned())
}

/// Connects an agent, says hello, and waits for the welcome; gives how often a heartbeat is wanted.
pub(crate) async fn join(
    address: SocketAddr,
    id: &str,
    key: &str,
    sessions: &[Value],
) -> anyhow::Result<(Socket, Duration)> {
    let mut request =
        format!("ws://{address}/api/v1/agents/connect?agent_id={id}&protocol=3").into_client_request()?;
    request.headers_mut().insert("X-Agent-API-Key", key.parse()?);
    let (mut socket, _) = tokio_tungstenite::connect_async_with_config(request, None, true).await?;
    let hello = json!({ "protocol": 3, "runtimeId": id, "sessions": sessions, "leases": [] });
    socket.send(frame("hello", &hello)).await?;
    loop {
        let Message::Text(text) = socket.next().await.context("the node closed the connection")?? else {
            continue;
        };
        let frame: Frame<'_> = serde_json::from_str(&text)?;
        if frame.kind == "welcome" {
            let welcome: Value = serde_json::from_str(frame.payload.context("an empty welcome")?.get())?;
            let heartbeat = welcome["heartbeatMs"].as_u64().context("no heartbeatMs")?;
            return Ok((socket, Duration::from_millis(heartbeat)));
        }
    }
}

/// A frame to send.
pub(crate) fn frame(kind: &str, payload: &Value) -> Message {
    Message::text(format!(r#"{{"type":"{kind}","payload":{payload}}}"#))
}

struct Player {
    id: String,
    key: String,
    addresses: Vec<SocketAddr>,
    sessions: Mutex<Running>,
}

impl Player {
    async fn play(self) -> anyhow::Result<()> {
        let mut failures = 0;
        for address in self.addresses.iter().cycle() {
            let joined = tokio::time::timeout(JOIN_WITHIN, self.join(*address)).await;
            if let Ok(Ok((socket, heartbeat))) = joined {
                failures = 0;
                // However it ended, the next node is tried.
                let _ = self.obey(socket, heartbeat).await;
            } else {
                failures += 1;
                if failures >= MAX_FAILURES {
                    break;
                }
            }
            tokio::time::sleep(AGAIN_AFTER).await;
        }
        bail!("no node takes the bench's agent")
    }

    async fn join(&self, address: SocketAddr) -> anyhow::Result<(Socket, Duration)> {
        let sessions: Vec<Value> = self
            .lock()
            .iter()
            .map(|(name, (generation, token))| {
                json!({ "sessionId": name, "state": "running", "generation": generation, "token": token })
            })
            .collect();
        join(address, &self.id, &self.key, &sessions).await
    }

    async fn obey(&self, mut socket: Socket, heartbeat: Duration) -> anyhow::Result<()> {
        let mut beat = tokio::time::interval(heartbeat);
        loop {
            tokio::select! {
                _ = beat.tick() => socket.send(frame("heartbeat", &json!({}))).await?,
                message = socket.next() => {
                    let Message::Text(text) = message.context("the node closed the connection")?? else {
                        continue;
                    };
                    let frame: Frame<'_> = serde_json::from_str(&text)?;
                    if frame.kind == "command" {
                        let command = frame.payload.context("an empty command")?.get();
                        self.done(&mut socket, serde_json::from_str(command)?).await?;
                    }
                }
            }
        }
    }

    /// Says that a command is done.
    async fn done(&self, socket: &mut Socket, command: Command) -> anyhow::Result<()> {
        let about = json!({ "commandId": command.id, "run": command.run });
        socket.feed(frame("ack", &about)).await?;
        let mut result = about;
        result["result"] = json!({});
        socket.send(frame("complete", &result)).await?;
        if let Some(name) = command.payload.session_id {
            let mut sessions = self.lock();
            match command.action.as_str() {
                "stop_session" => drop(sessions.remove(&name)),
                _ => drop(sessions.insert(name, (command.payload.generation, command.token))),
            }
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Running> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
