//! Leases kept alive over the agent WebSocket: M leases over N sockets, spread over all nodes, each renewed at
//! a steady pace. Prints the rate, the latencies, what was lost, and, where the nodes are on this machine
//! (`--dev DIR`), their CPU and memory and by how much the log grew.
//!
//! Open loop: a renewal is due when it is due, whether or not the one before it was answered; latencies count
//! from when it was due, so that a stall of the generator or of a node is not hidden by fewer samples.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use futures_util::{SinkExt as _, StreamExt as _};
use hdrhistogram::Histogram;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

use crate::{Args, client_for, micros};

/// Campaigns of one socket that are under way at a time.
const CAMPAIGNS: usize = 64;
/// How long setting up one socket may take.
const SETUP_WITHIN: Duration = Duration::from_secs(120);

struct Outcome {
    latencies: Histogram<u64>,
    renewed: u64,
    lost: u64,
    unanswered: u64,
}

pub(crate) async fn run(args: &Args, urls: &[String]) -> anyhow::Result<()> {
    ensure!(args.leases >= args.sockets && args.sockets > 0, "--leases must be at least --sockets");
    // Names of its own: what an earlier run left behind is still held for a while.
    let run = std::process::id();
    let mut ready = Vec::new();
    for socket in 0..args.sockets {
        let leases = args.leases / args.sockets + usize::from(socket < args.leases % args.sockets);
        let (url, api) = (urls[socket % urls.len()].clone(), urls[0].clone());
        let (token, ttl_ms) = (args.token.clone(), args.ttl_ms);
        ready.push(tokio::spawn(async move {
            let set_up = Socket::open((run, socket), &url, &api, &token, leases, ttl_ms);
            tokio::time::timeout(SETUP_WITHIN, set_up).await.context("setting up took too long")?
        }));
    }
    let mut sockets = Vec::new();
    for socket in ready {
        sockets.push(socket.await??);
    }
    println!("{} leases are held over {} sockets", args.leases, args.sockets);
    let nodes = args.dev.as_deref().map(processes).transpose()?.unwrap_or_default();
    let before = usage(&nodes)?;
    let index = applied_index(args, urls).await?;
    let begin = Instant::now();
    let every = Duration::from_millis(args.ttl_ms / args.per_ttl);
    let running: Vec<_> = sockets
        .into_iter()
        .map(|socket| tokio::spawn(socket.keep(every, begin + Duration::from_secs(args.seconds))))
        .collect();
    let mut all = Outcome {
        latencies: Histogram::new_with_bounds(1, 600_000_000, 3)?,
        renewed: 0,
        lost: 0,
        unanswered: 0,
    };
    let mut kept = Vec::new();
    for socket in running {
        let (outcome, socket) = socket.await??;
        all.latencies.add(outcome.latencies)?;
        all.renewed += outcome.renewed;
        all.lost += outcome.lost;
        all.unanswered += outcome.unanswered;
        kept.push(socket);
    }
    let seconds = begin.elapsed().as_secs_f64();
    let after = usage(&nodes)?;
    let grown = applied_index(args, urls).await? - index;
    println!(
        "Keepalive leases={} sockets={} ttl={}ms rate={:.0}/s p50={:.2}ms p99={:.2}ms max={:.2}ms lost={} unanswered={} log_entries={grown}",
        args.leases,
        args.sockets,
        args.ttl_ms,
        all.renewed as f64 / seconds,
        all.latencies.value_at_quantile(0.50) as f64 / 1000.0,
        all.latencies.value_at_quantile(0.99) as f64 / 1000.0,
        all.latencies.max() as f64 / 1000.0,
        all.lost,
        all.unanswered,
    );
    for ((id, before), (_, after)) in before.iter().zip(&after) {
        println!(
            "node {id}: {:.3} cores, {:.0} MB resident",
            (after.cpu - before.cpu) / seconds,
            after.resident_mb
        );
    }
    ensure!(all.lost == 0, "leases were lost");
    drop(kept);
    Ok(())
}

type Stream = tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>;

/// A connection of an agent that only holds leases.
struct Socket {
    stream: Stream,
    leases: Vec<(String, u64)>,
    heartbeat: Duration,
}

impl Socket {
    async fn open(
        (run, number): (u32, usize),
        url: &str,
        api: &str,
        token: &str,
        leases: usize,
        ttl_ms: u64,
    ) -> anyhow::Result<Self> {
        let http = client_for(30_000)?;
        let id = format!("bench-{number}");
        let post = async |path: String, body: Value| {
            let request = http.post(format!("{api}/api/v1/{path}")).bearer_auth(token).json(&body);
            request.send().await?.error_for_status()?.json::<Value>().await
        };
        // Cordoned: it holds leases and runs no sessions.
        post("agents/register".into(), json!({ "agentId": id, "platform": "bench" })).await?;
        post(format!("agents/{id}/cordon"), json!({})).await?;
        let made = post(format!("agents/{id}/token"), json!({})).await?;
        let key = made["token"].as_str().context("no token was made")?;
        let address = url.replacen("http://", "ws://", 1);
        let mut request = format!("{address}/api/v1/agents/connect?agent_id={id}").into_client_request()?;
        request.headers_mut().insert("X-Agent-API-Key", key.parse()?);
        let (mut stream, _) = tokio_tungstenite::connect_async(request).await?;
        let hello = json!({ "protocol": 3, "runtimeId": id, "sessions": [], "leases": [] });
        stream.send(frame("hello", &hello)).await?;
        let mut socket = Self {
            stream,
            leases: Vec::with_capacity(leases),
            heartbeat: Duration::from_secs(1),
        };
        let welcome = socket.next("welcome").await?;
        socket.heartbeat = Duration::from_millis(welcome["heartbeatMs"].as_u64().context("no heartbeatMs")?);
        let mut beat = tokio::time::interval(socket.heartbeat);
        let (mut asked, mut granted) = (0, 0);
        while granted < leases {
            while asked < leases && asked - granted < CAMPAIGNS {
                let campaign = json!({ "name": format!("bench/{run}/{number}/{asked}"), "ttlMs": ttl_ms });
                socket.stream.send(frame("lease_campaign", &campaign)).await?;
                asked += 1;
            }
            tokio::select! {
                _ = beat.tick() => socket.stream.send(frame("heartbeat", &json!({}))).await?,
                grant = socket.next("lease_granted") => {
                    let grant = grant?;
                    let name = grant["name"].as_str().context("no name")?.to_owned();
                    socket.leases.push((name, grant["token"].as_u64().context("no token")?));
                    granted += 1;
                }
            }
        }
        Ok(socket)
    }

    /// The payload of the next frame of this type.
    async fn next(&mut self, kind: &str) -> anyhow::Result<Value> {
        loop {
            let Message::Text(text) = self.stream.next().await.context("the node closed the connection")?? else {
                continue;
            };
            let mut frame: Value = serde_json::from_str(&text)?;
            match frame["type"].as_str() {
                Some(found) if found == kind => return Ok(frame["payload"].take()),
                Some("lease_refused" | "lease_lost") => bail!("{text}"),
                _ => {}
            }
        }
    }

    /// Renews each lease `every` so often, spread evenly, until `end`; then waits a moment for what is open.
    async fn keep(mut self, every: Duration, end: Instant) -> anyhow::Result<(Outcome, Self)> {
        let mut outcome = Outcome {
            latencies: Histogram::new_with_bounds(1, 600_000_000, 3)?,
            renewed: 0,
            lost: 0,
            unanswered: 0,
        };
        let gap = every / u32::try_from(self.leases.len())?;
        let mut open: HashMap<u64, Instant> = HashMap::new();
        let (mut seq, mut due) = (0_u64, Instant::now());
        let mut beat = tokio::time::interval(self.heartbeat);
        let grace = end + Duration::from_secs(3);
        loop {
            let sending = due < end;
            if !sending && (open.is_empty() || Instant::now() >= grace) {
                outcome.unanswered = open.len() as u64;
                return Ok((outcome, self));
            }
            let wake = if sending { due } else { grace };
            tokio::select! {
                biased;
                _ = beat.tick() => self.stream.send(frame("heartbeat", &json!({}))).await?,
                () = tokio::time::sleep_until(wake.into()), if sending => {
                    let (name, token) = &self.leases[usize::try_from(seq)? % self.leases.len()];
                    let keepalive = json!({ "name": name, "token": token, "seq": seq });
                    open.insert(seq, due);
                    self.stream.send(frame("lease_keepalive", &keepalive)).await?;
                    seq += 1;
                    due += gap;
                }
                message = self.stream.next() => {
                    let Message::Text(text) = message.context("the node closed the connection")?? else { continue };
                    let frame: Value = serde_json::from_str(&text)?;
                    match frame["type"].as_str() {
                        Some("lease_renewed") => {
                            let seq = frame["payload"]["seq"].as_u64().context("no seq")?;
                            if let Some(sent) = open.remove(&seq) {
                                outcome.latencies.record(micros(sent.elapsed()).max(1))?;
                                outcome.renewed += 1;
                            }
                        }
                        Some("lease_lost") => outcome.lost += 1,
                        _ => {}
                    }
                }
            }
        }
    }
}

fn frame(kind: &str, payload: &Value) -> Message {
    Message::text(json!({ "type": kind, "payload": payload }).to_string())
}

async fn applied_index(args: &Args, urls: &[String]) -> anyhow::Result<u64> {
    let http = client_for(30_000)?;
    let request = http.get(format!("{}/api/v1/cluster", urls[0])).bearer_auth(&args.token);
    let cluster: Value = request.send().await?.error_for_status()?.json().await?;
    let members = cluster["members"].as_array().context("no members")?;
    let indexes = members.iter().filter_map(|member| member["appliedIndex"].as_u64());
    indexes.max().context("no member says how far it is")
}

/// The nodes of `regent dev --data DIR`, by id.
fn processes(dev: &Path) -> anyhow::Result<Vec<(u64, u32)>> {
    let text = std::fs::read_to_string(dev.join("dev.json")).context("--dev is the folder of `regent dev --data`")?;
    let dev: Value = serde_json::from_str(&text)?;
    let nodes = dev["nodes"].as_array().context("no nodes")?;
    nodes
        .iter()
        .map(|node| {
            let id = node["id"].as_u64().context("no id")?;
            Ok((id, u32::try_from(node["pid"].as_u64().context("no pid")?)?))
        })
        .collect()
}

struct Usage {
    /// Seconds of CPU since its start.
    cpu: f64,
    resident_mb: f64,
}

fn usage(nodes: &[(u64, u32)]) -> anyhow::Result<Vec<(u64, Usage)>> {
    /// Clock ticks a second, on every Linux of today (`getconf CLK_TCK`).
    const TICKS: f64 = 100.0;
    let mut found = Vec::new();
    for (id, pid) in nodes {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let fields: Vec<&str> = stat.rsplit_once(')').context("no name")?.1.split_whitespace().collect();
        let ticks = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kib: f64 = resident.trim().trim_end_matches("kB").trim().parse()?;
        let usage = Usage {
            cpu: ticks / TICKS,
            resident_mb: kib / 1024.0,
        };
        found.push((*id, usage));
    }
    Ok(found)
}
