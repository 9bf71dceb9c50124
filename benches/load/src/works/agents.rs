//! Many agents that do nothing but live: one socket each, spread over the nodes, with a heartbeat as often as the
//! nodes ask for one. What does an agent cost in memory, all of them in CPU, and does a heartbeat ever reach the log?

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

use super::observe::metric;
use super::{Result, Settings};
use crate::cluster::agent::{Frame, frame};
use crate::cluster::regent::{Regent, call};
use crate::cluster::{Cluster, MEMBERS, until};
use crate::load;
use crate::measure::{Metric, Values};
use crate::process::Usage;

/// Registrations and connections that are under way at a time.
const AT_A_TIME: usize = 64;
/// How long one connection may take.
const JOIN_WITHIN: Duration = Duration::from_secs(30);
/// A socket of an agent reads little.
const BUFFER: usize = 4 << 10;

pub(super) async fn run(cluster: &Cluster, settings: &Settings) -> anyhow::Result<Vec<Result>> {
    let Cluster::Regent(regent) = cluster else {
        bail!("etcd has no agents");
    };
    let count = settings.agents;
    let resident = || Usage::of_all(&cluster.pids()).resident_mb;
    cluster.settle(settings.settle).await;
    let before = resident();
    register_all(regent, count).await?;
    cluster.settle(settings.settle).await;
    let registered = resident();
    let (mut agents, failed) = connect_all(regent, count).await?;
    until("all agents", async || {
        failed.check()?;
        let online = online(regent).await?;
        Ok(online >= count as u64)
    })
    .await?;
    cluster.settle(settings.settle).await;
    let logged = last_log_index(regent).await?;
    let begin = Instant::now();
    let used = load::watch(cluster, begin, begin + settings.agents_for).await?;
    let entries = last_log_index(regent).await? - logged;
    let connected = resident();
    let still = online(regent).await?;
    failed.check()?;
    let mut values = Values::new();
    let kb = |mb: f64| mb.max(0.0) * 1000.0 / count as f64;
    values.insert(Metric::AgentKb, kb(connected - registered));
    values.insert(Metric::AgentKbAll, kb(connected - before));
    values.insert(Metric::LogEntries, entries as f64 * 60.0 / used.seconds);
    used.write(&mut values);
    agents.abort_all();
    while agents.join_next().await.is_some() {}
    let failure = (still < count as u64).then(|| format!("{} agents went offline", count as u64 - still));
    Ok(vec![Result {
        row: 0,
        values,
        failure,
    }])
}

fn id(number: usize) -> String {
    format!("bench-many-{number}")
}

/// Each is registered; the admin's token lets all of them connect.
async fn register_all(regent: &Regent, count: usize) -> anyhow::Result<()> {
    let mut tasks = JoinSet::new();
    for task in 0..AT_A_TIME.min(count) {
        let mut connection = regent.connect(task % MEMBERS).await?;
        tasks.spawn(async move {
            for number in (task..count).step_by(AT_A_TIME) {
                let body = json!({ "agentId": id(number), "platform": "bench", "region": "many" });
                call(&mut connection, "POST", "/api/v1/agents/register", Some(body)).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(task) = tasks.join_next().await {
        task??;
    }
    Ok(())
}

/// The first agent that came to an end.
#[derive(Clone, Default)]
struct Failed(Arc<Mutex<Option<String>>>);

impl Failed {
    fn note(&self, error: &anyhow::Error) {
        let mut first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(|| format!("{error:#}"));
    }

    fn check(&self) -> anyhow::Result<()> {
        let first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*first {
            None => Ok(()),
            Some(error) => bail!("an agent came to an end: {error}"),
        }
    }
}

async fn connect_all(regent: &Regent, count: usize) -> anyhow::Result<(JoinSet<()>, Failed)> {
    let failed = Failed::default();
    let mut agents = JoinSet::new();
    let joined = Arc::new(AtomicUsize::new(0));
    for number in 0..count {
        // Not more at a time than are let in.
        while number - joined.load(Relaxed) >= AT_A_TIME {
            failed.check()?;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let (failed, joined) = (failed.clone(), joined.clone());
        let address = regent.members[number % MEMBERS].address;
        let token = regent.token.clone();
        agents.spawn(async move {
            let lived = async {
                let (socket, heartbeat) =
                    tokio::time::timeout(JOIN_WITHIN, join(address, &id(number), &token))
                        .await
                        .context("a connection took too long")??;
                joined.fetch_add(1, Relaxed);
                live(socket, heartbeat, number, count).await
            };
            if let Err(error) = lived.await {
                failed.note(&error);
            }
        });
    }
    Ok((agents, failed))
}

async fn join(
    address: SocketAddr,
    id: &str,
    token: &str,
) -> anyhow::Result<(WebSocketStream<TcpStream>, Duration)> {
    let mut request =
        format!("ws://{address}/api/v1/agents/connect?agent_id={id}&protocol=3").into_client_request()?;
    request.headers_mut().insert("X-Agent-API-Key", token.parse()?);
    let config = WebSocketConfig::default()
        .read_buffer_size(BUFFER)
        .write_buffer_size(BUFFER);
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (mut socket, _) = tokio_tungstenite::client_async_with_config(request, stream, Some(config)).await?;
    let hello = json!({ "protocol": 3, "runtimeId": id, "sessions": [], "leases": [] });
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

/// Heartbeats, those of all agents spread evenly.
async fn live(
    mut socket: WebSocketStream<TcpStream>,
    heartbeat: Duration,
    number: usize,
    count: usize,
) -> anyhow::Result<()> {
    ensure!(!heartbeat.is_zero(), "a heartbeat without a pause");
    let first = tokio::time::Instant::now() + heartbeat.mul_f64(number as f64 / count as f64);
    let mut beat = tokio::time::interval_at(first, heartbeat);
    loop {
        tokio::select! {
            _ = beat.tick() => socket.send(frame("heartbeat", &json!({}))).await?,
            message = socket.next() => {
                message.context("the node closed the connection")??;
            }
        }
    }
}

/// How many agents are online, as the last node sees it.
async fn online(regent: &Regent) -> anyhow::Result<u64> {
    let mut connection = regent.connect(MEMBERS - 1).await?;
    let answer = connection.request("GET", "/metrics", b"").await?.ok()?;
    let text = std::str::from_utf8(answer.body)?;
    let line = text
        .lines()
        .find(|line| line.starts_with("regent_agents{") && line.contains("\"online\""));
    let Some(value) = line.and_then(|line| line.rsplit(' ').next()) else {
        return Ok(0);
    };
    Ok(value.parse()?)
}

async fn last_log_index(regent: &Regent) -> anyhow::Result<u64> {
    let mut last = 0;
    for member in 0..MEMBERS {
        let index = metric(regent, member, "regent_raft_last_log_index").await?;
        last = last.max(index.context("no regent_raft_last_log_index")?);
    }
    Ok(last)
}
