//! Sessions from end to end: a client asks for one, and has it once the agent that it was placed on has the command
//! to start it. The agent is played: it takes the command, says that the session runs, and notes when it came.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::{SinkExt as _, StreamExt as _};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::Message;

use super::{Result, Settings};
use crate::cluster::agent::{Frame, Socket, frame, join, register};
use crate::cluster::regent::Regent;
use crate::cluster::{Cluster, MEMBERS};
use crate::http::Connection;
use crate::load::{self, Client};

/// Where its sessions are placed.
const REGION: &str = "end-to-end";

pub(super) async fn run(
    cluster: &Cluster,
    clients: usize,
    settings: &Settings,
) -> anyhow::Result<Vec<Result>> {
    let Cluster::Regent(regent) = cluster else {
        bail!("etcd has no sessions");
    };
    // One for each row: it begins without sessions, so its hello is short.
    let region = format!("{REGION}-{clients}");
    let agent = Agent::start(regent, &region).await?;
    let body = json!({ "template": "sleep", "placement": { "region": region } }).to_string();
    let mut makers = Vec::new();
    for number in 0..clients {
        makers.push(Maker {
            connection: regent.connect(number % MEMBERS).await?,
            body: body.clone(),
            arrivals: agent.arrivals.clone(),
        });
    }
    let seen = load::drive(cluster, makers, 1, settings.plan).await?;
    Ok(vec![Result::new(0, &seen)])
}

/// Sessions whose command has come, or that somebody waits for.
type Arrivals = Arc<Mutex<HashMap<String, Arrival>>>;

enum Arrival {
    Came,
    Awaited(oneshot::Sender<()>),
}

struct Maker {
    connection: Connection,
    body: String,
    arrivals: Arrivals,
}

#[derive(Deserialize)]
struct Made {
    name: String,
}

impl Client for Maker {
    async fn request(&mut self, _: u64) -> anyhow::Result<usize> {
        let answer = self
            .connection
            .request("POST", "/api/v1/sessions", self.body.as_bytes())
            .await?;
        let made: Made = serde_json::from_slice(answer.ok()?.body)?;
        let came = {
            let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
            // The command may be there before the answer.
            if let Some(Arrival::Came) = arrivals.remove(&made.name) {
                return Ok(0);
            }
            let (sender, came) = oneshot::channel();
            arrivals.insert(made.name, Arrival::Awaited(sender));
            came
        };
        came.await.context("the agent is gone")?;
        Ok(0)
    }

    async fn reopen(&mut self) -> anyhow::Result<()> {
        self.connection.reopen().await
    }
}

struct Agent {
    arrivals: Arrivals,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The parts that are needed of `command`.
#[derive(Deserialize)]
struct Command {
    #[serde(rename = "commandId")]
    id: String,
    run: u32,
    payload: About,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct About {
    session_id: String,
}

impl Agent {
    async fn start(regent: &Regent, region: &str) -> anyhow::Result<Self> {
        let id = format!("bench-{region}");
        let key = register(regent, &id, region).await?;
        let (socket, heartbeat) = join(regent.members[0].address, &id, &key, &[]).await?;
        for member in 0..MEMBERS {
            crate::cluster::until("the agent", async || {
                let path = format!("/api/v1/agents/{id}");
                Ok(regent.call(member, "GET", &path, None).await?["status"] == "online")
            })
            .await?;
        }
        let arrivals = Arrivals::default();
        let task = tokio::spawn(obey(socket, heartbeat, arrivals.clone()));
        Ok(Self { arrivals, task })
    }
}

async fn obey(mut socket: Socket, heartbeat: Duration, arrivals: Arrivals) -> anyhow::Result<()> {
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
                    let command: Command = serde_json::from_str(command)?;
                    came(&arrivals, command.payload.session_id.clone());
                    done(&mut socket, &command).await?;
                }
            }
        }
    }
}

fn came(arrivals: &Arrivals, name: String) {
    let mut arrivals = arrivals.lock().unwrap_or_else(PoisonError::into_inner);
    match arrivals.remove(&name) {
        // Whoever waited may have given up.
        Some(Arrival::Awaited(sender)) => drop(sender.send(())),
        Some(Arrival::Came) | None => drop(arrivals.insert(name, Arrival::Came)),
    }
}

async fn done(socket: &mut Socket, command: &Command) -> anyhow::Result<()> {
    let about = json!({ "commandId": command.id, "run": command.run });
    socket.feed(frame("ack", &about)).await?;
    let mut result = about;
    result["result"] = json!({});
    Ok(socket.send(frame("complete", &result)).await?)
}
