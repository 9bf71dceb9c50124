//! A closed-loop load generator for the REST API: N clients spread over all nodes, each sends its
//! next request when the last one is answered. Prints the rate, the latencies of the answers, and
//! the longest time in which nobody got an answer (kill a node meanwhile to see the stall).
//!
//! Closed loop: latencies under saturation are queueing, and a stall is one long sample per client.

mod keepalive;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use hdrhistogram::Histogram;
use serde_json::{Value, json};

#[derive(Debug, Parser)]
struct Args {
    /// Nodes, comma-separated; clients are spread over them.
    #[arg(long, env = "REGENT_URL")]
    url: String,
    /// An admin's token.
    #[arg(long, env = "REGENT_TOKEN", hide_env_values = true)]
    token: String,
    /// What is asked.
    #[arg(long, value_enum, default_value_t = Work::Write)]
    work: Work,
    /// Clients at the same time.
    #[arg(long, default_value_t = 16)]
    clients: usize,
    /// For how long, in seconds.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Over how many sessions. They wait for a region that does not exist, so no process runs.
    #[arg(long, default_value_t = 1000)]
    sessions: usize,
    /// A request that takes longer is given up, in milliseconds.
    #[arg(long, default_value_t = 5000)]
    timeout_ms: u64,
    /// Keepalive: leases that are held.
    #[arg(long, default_value_t = 10_000)]
    leases: usize,
    /// Keepalive: connections that they are held over.
    #[arg(long, default_value_t = 64)]
    sockets: usize,
    /// Keepalive: the TTL, in milliseconds.
    #[arg(long, default_value_t = 15_000)]
    ttl_ms: u64,
    /// Keepalive: how often each lease is renewed within its TTL.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=100))]
    per_ttl: u64,
    /// Keepalive: the folder of `regent dev --data`, to see what the nodes use.
    #[arg(long)]
    dev: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Work {
    /// PATCH of 256 bytes of tags.
    Write,
    /// Linearizable GET of one session.
    Read,
    /// Stale GET of one session.
    StaleRead,
    /// Leases renewed over the agent WebSocket, at a steady pace.
    Keepalive,
}

const TAG: &str = "bench";

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let urls: Vec<String> = args.url.split(',').map(|u| u.trim().trim_end_matches('/').to_owned()).collect();
    if args.work == Work::Keepalive {
        return keepalive::run(&args, &urls).await;
    }
    let names = Arc::new(sessions(&args, &urls).await?);
    let begin = Instant::now();
    let end = begin + Duration::from_secs(args.seconds);
    let last_answer = Arc::new(AtomicU64::new(0));
    let longest_gap = Arc::new(AtomicU64::new(0));
    let tasks: Vec<_> = (0..args.clients)
        .map(|client| {
            let url = urls[client % urls.len()].clone();
            let (names, last, gap) = (names.clone(), last_answer.clone(), longest_gap.clone());
            let (token, work, clients) = (args.token.clone(), args.work, args.clients);
            let http = client_for(args.timeout_ms);
            tokio::spawn(async move {
                let http = http?;
                let mut histogram = Histogram::<u64>::new_with_bounds(1, 600_000_000, 3)?;
                let mut failed = 0u64;
                let mut n = client;
                while Instant::now() < end {
                    let name = &names[n % names.len()];
                    n += clients;
                    let sent = Instant::now();
                    let request = match work {
                        Work::Write => http.patch(format!("{url}/api/v1/sessions/{name}")).json(&json!({ "tags": tags(n) })),
                        Work::Read => http.get(format!("{url}/api/v1/sessions/{name}")),
                        Work::Keepalive => unreachable!("has a loop of its own"),
                        Work::StaleRead => http.get(format!("{url}/api/v1/sessions/{name}?consistency=stale")),
                    };
                    let answered = match request.bearer_auth(&token).send().await {
                        Ok(answer) if answer.status().is_success() => answer.bytes().await.is_ok(),
                        Ok(_) | Err(_) => false,
                    };
                    if answered {
                        histogram.record(micros(sent.elapsed()).max(1))?;
                        let now = micros(begin.elapsed());
                        let before = last.fetch_max(now, Ordering::Relaxed);
                        gap.fetch_max(now.saturating_sub(before), Ordering::Relaxed);
                    } else {
                        failed += 1;
                        // A refused connection answers at once: do not spin on a dead node.
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                }
                anyhow::Ok((histogram, failed))
            })
        })
        .collect();
    let mut all = Histogram::<u64>::new_with_bounds(1, 600_000_000, 3)?;
    let mut failed = 0;
    for task in tasks {
        let (histogram, f) = task.await??;
        all.add(histogram)?;
        failed += f;
    }
    let seconds = begin.elapsed().as_secs_f64();
    println!(
        "{:?} clients={} rate={:.0}/s p50={:.2}ms p99={:.2}ms max={:.2}ms failed={failed} longest_gap={:.0}ms",
        args.work,
        args.clients,
        all.len() as f64 / seconds,
        all.value_at_quantile(0.50) as f64 / 1000.0,
        all.value_at_quantile(0.99) as f64 / 1000.0,
        all.max() as f64 / 1000.0,
        longest_gap.load(Ordering::Relaxed) as f64 / 1000.0,
    );
    Ok(())
}

fn client_for(timeout_ms: u64) -> reqwest::Result<reqwest::Client> {
    reqwest::Client::builder().no_proxy().timeout(Duration::from_millis(timeout_ms)).build()
}

/// Eight tags, 256 bytes in all, different each time.
fn tags(n: usize) -> Vec<String> {
    (0..8).map(|i| format!("{n:016x}{i:016x}")).collect()
}

/// The sessions of earlier runs, and as many new ones as are missing.
async fn sessions(args: &Args, urls: &[String]) -> anyhow::Result<Vec<String>> {
    let http = client_for(30_000)?;
    let mut names = Vec::new();
    let mut cursor = String::new();
    loop {
        let url = format!("{}/api/v1/sessions?limit=500&state=pending{cursor}", urls[0]);
        let page: Value =
            http.get(url).bearer_auth(&args.token).send().await?.error_for_status()?.json().await?;
        let page_names = page["sessions"].as_array().context("no list of sessions")?;
        names.extend(page_names.iter().filter_map(|s| s["name"].as_str().map(str::to_owned)));
        match page["nextCursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    while names.len() < args.sessions {
        let missing = (args.sessions - names.len()).min(16);
        let body = json!({ "template": "sleep", "tags": [TAG], "whenFull": "queue", "placement": { "region": "nowhere" } });
        let made = (0..missing).map(|n| {
            let request = http
                .post(format!("{}/api/v1/sessions", urls[n % urls.len()]))
                .bearer_auth(&args.token)
                .json(&body);
            tokio::spawn(async move { request.send().await?.error_for_status()?.json::<Value>().await })
        });
        for session in made.collect::<Vec<_>>() {
            names.push(session.await??["name"].as_str().context("a session without a name")?.to_owned());
        }
    }
    names.truncate(args.sessions);
    Ok(names)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
