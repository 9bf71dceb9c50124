//! Sessions that run: the real agent with the process runtime, `sleep` as the session. How long from the request
//! until one runs, how many a minute, and what a node and the agent use with ten of them (`StreamSpace`'s performance
//! tests 4.1 and 4.2, with their limits for a control plane and an agent).

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::json;

use super::{Result, Settings};
use crate::cluster::agent::register;
use crate::cluster::regent::{Regent, call};
use crate::cluster::{Cluster, until};
use crate::http::Connection;
use crate::measure::{Latencies, Metric, Values};
use crate::process::{Process, Usage};

const ID: &str = "bench-process";
const REGION: &str = "process";
/// Sessions that run while memory and CPU are read, as `StreamSpace`'s test has it.
const RUNNING: usize = 10;
/// How often a session is asked for.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// How long one may take until it runs.
const RUNS_WITHIN: Duration = Duration::from_secs(30);

pub(super) async fn run(cluster: &Cluster, settings: &Settings) -> anyhow::Result<Vec<Result>> {
    let Cluster::Regent(regent) = cluster else {
        bail!("etcd has no sessions");
    };
    let agent = start_agent(regent).await?;
    let mut connection = regent.connect(0).await?;
    let mut names = Vec::new();
    let measured = measure(cluster, &agent, &mut connection, &mut names, settings).await;
    // Whatever came of it, no process of a session is left.
    let stopped = stop(&mut connection, &names).await;
    let results = measured?;
    stopped?;
    drop(agent);
    Ok(results)
}

async fn measure(
    cluster: &Cluster,
    agent: &Process,
    connection: &mut Connection,
    names: &mut Vec<String>,
    settings: &Settings,
) -> anyhow::Result<Vec<Result>> {
    let mut latencies = Latencies::new();
    let begun = Instant::now();
    for _ in 0..settings.real_sessions {
        let since = Instant::now();
        names.push(make(connection).await?);
        runs(connection, &names[names.len() - 1]).await?;
        latencies.record(since.elapsed());
    }
    let mut made = Values::new();
    made.insert(
        Metric::Rate,
        settings.real_sessions as f64 / begun.elapsed().as_secs_f64(),
    );
    latencies.write(&mut made);
    // Exactly ten run from here on.
    while names.len() > RUNNING {
        let last = names.split_off(RUNNING);
        stop(connection, &last).await?;
    }
    while names.len() < RUNNING {
        names.push(make(connection).await?);
        runs(connection, &names[names.len() - 1]).await?;
    }
    cluster.settle(settings.settle).await;
    let pids = cluster.pids();
    let sample = || -> anyhow::Result<(Vec<Usage>, Usage)> {
        let nodes: anyhow::Result<Vec<Usage>> = pids.iter().map(|pid| Usage::of(*pid)).collect();
        Ok((nodes?, Usage::of(agent.pid())?))
    };
    let (since, before) = (Instant::now(), sample()?);
    tokio::time::sleep(settings.quiet).await;
    let (seconds, after) = (since.elapsed().as_secs_f64(), sample()?);
    // A node: the one that uses most of each.
    let most = |values: Vec<f64>| values.into_iter().fold(0.0, f64::max);
    let mut used = Values::new();
    let cpu = after
        .0
        .iter()
        .zip(&before.0)
        .map(|(after, before)| after.cpu - before.cpu);
    used.insert(Metric::Cores, most(cpu.collect()) / seconds);
    let memory = after.0.iter().map(|usage| usage.resident_mb);
    used.insert(Metric::MemberMb, most(memory.collect()));
    used.insert(Metric::AgentCores, (after.1.cpu - before.1.cpu) / seconds);
    used.insert(Metric::AgentMb, after.1.resident_mb);
    Ok([made, used]
        .into_iter()
        .enumerate()
        .map(|(row, values)| Result {
            row,
            values,
            failure: None,
        })
        .collect())
}

/// Starts `regent agent run` by the command that an operator would type. Its sessions end with the bench.
async fn start_agent(regent: &Regent) -> anyhow::Result<Process> {
    let key = register(regent, ID, REGION).await?;
    let (program, folder) = regent.program()?;
    let token = folder.join("agent.token");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&token)
        .context("the agent's token")?;
    file.write_all(key.as_bytes())?;
    let servers: Vec<String> = regent
        .addresses()
        .iter()
        .map(|address| format!("http://{address}"))
        .collect();
    let mut argv: Vec<String> = vec![program, "agent".to_owned(), "run".to_owned()];
    let flags = [
        ("--agent-id", ID.to_owned()),
        ("--servers", servers.join(",")),
        ("--token-file", token.display().to_string()),
        ("--runtime", "process".to_owned()),
        ("--data", folder.join("agent").display().to_string()),
        ("--region", REGION.to_owned()),
        ("--cpu", "64".to_owned()),
        ("--memory", "64Gi".to_owned()),
        ("--lifeline", lifeline()?),
    ];
    argv.extend(
        flags
            .into_iter()
            .flat_map(|(flag, value)| [flag.to_owned(), value]),
    );
    let mut agent = Process::start(&argv, &folder.join("agent.log"))?;
    until("the agent", async || {
        if let Some(status) = agent.ended()? {
            bail!("the agent ended with {status}");
        }
        let seen = regent
            .call(0, "GET", &format!("/api/v1/agents/{ID}"), None)
            .await?;
        Ok(seen["status"] == "online")
    })
    .await?;
    Ok(agent)
}

/// This process, as the flag wants it: its pid, and when it was started. Everything of the agent ends with it.
fn lifeline() -> anyhow::Result<String> {
    let pid = std::process::id();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("no name")?;
    let start = fields.split_whitespace().nth(19).context("no start time")?;
    Ok(format!("{pid}:{start}"))
}

async fn make(connection: &mut Connection) -> anyhow::Result<String> {
    let body = json!({ "template": "sleep", "placement": { "region": REGION } });
    let session = call(connection, "POST", "/api/v1/sessions", Some(body)).await?;
    Ok(session["name"]
        .as_str()
        .context("a session without a name")?
        .to_owned())
}

/// Waits until a session runs.
async fn runs(connection: &mut Connection, name: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + RUNS_WITHIN;
    let path = format!("/api/v1/sessions/{name}");
    loop {
        let session = call(connection, "GET", &path, None).await?;
        match session["state"].as_str() {
            Some("running") => return Ok(()),
            Some("failed" | "terminated" | "lost") => bail!("{session}"),
            _ if Instant::now() >= deadline => bail!("it does not run: {session}"),
            _ => tokio::time::sleep(LOOK_EVERY).await,
        }
    }
}

/// Stops sessions, and waits until they are.
async fn stop(connection: &mut Connection, names: &[String]) -> anyhow::Result<()> {
    for name in names {
        call(connection, "DELETE", &format!("/api/v1/sessions/{name}"), None).await?;
    }
    for name in names {
        let path = format!("/api/v1/sessions/{name}");
        let deadline = Instant::now() + RUNS_WITHIN;
        while call(connection, "GET", &path, None).await?["state"] != "terminated" {
            if Instant::now() >= deadline {
                bail!("session {name} does not end");
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
    Ok(())
}
