//! Measures etcd and Regent in turn: the same work, on the same machine, in the same run, with both data
//! folders on the same file system.
//!
//! `main` says what is measured in which order; [`cluster`] starts and ends three real members of either,
//! [`works`] holds what is asked of them, [`load`] drives many clients and counts, [`measure`] has the values
//! and the goals, [`report`] prints them.

mod cluster;
mod disk;
mod grpc;
mod http;
mod load;
mod measure;
mod pace;
mod process;
mod report;
mod rpc;
mod works;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Parser;

use cluster::etcd::Etcd;
use cluster::{Cluster, System};
use disk::Disk;
use measure::Measured;
use report::say;
use works::{Settings, Work};

/// Measures etcd and Regent in turn on this machine.
#[derive(Debug, Parser)]
struct Args {
    /// Regent's program; without it, the release build of the workspace above is made and used.
    #[arg(long, value_name = "FILE")]
    regent: Option<PathBuf>,
    /// Only these works, by comma: write, read, local-read, lease, watch, keepalive.
    #[arg(long, value_delimiter = ',', value_name = "WORK")]
    only: Vec<String>,
    /// Only one of the two.
    #[arg(long, value_enum)]
    system: Option<System>,
    /// How often each is measured, etcd and Regent alternating; medians are reported.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=100))]
    rounds: u64,
    /// How long each measurement takes.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// How long each is driven before it counts, in seconds.
    #[arg(long, default_value_t = 2.0)]
    warm_up: f64,
    /// Open loop: so many requests a second, of all clients together.
    #[arg(long)]
    rate: Option<f64>,
    /// Keys of etcd, sessions of Regent.
    #[arg(long, default_value_t = 10_000)]
    records: usize,
    /// Leases that are kept alive.
    #[arg(long, default_value_t = 10_000)]
    leases: usize,
    /// Streams (sockets) that they are kept alive over.
    #[arg(long, default_value_t = 64)]
    streams: usize,
    /// Keepalives a second, of all leases together.
    #[arg(long, default_value_t = 2_000.0)]
    keepalives: f64,
    /// Watched writes a second.
    #[arg(long, default_value_t = 200.0)]
    watched: f64,
    /// A request that takes longer is given up, in milliseconds.
    #[arg(long, default_value_t = 5_000)]
    timeout_ms: u64,
    /// Threads of the generator.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Where data folders are made (and removed).
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
}

fn main() -> anyhow::Result<ExitCode> {
    process::guarded()?;
    let args = Args::parse();
    let mut builder = if args.threads > 1 {
        tokio::runtime::Builder::new_multi_thread()
    } else {
        tokio::runtime::Builder::new_current_thread()
    };
    let runtime = builder.worker_threads(args.threads.max(1)).enable_all().build()?;
    runtime.block_on(async {
        tokio::select! {
            result = run(&args) => result,
            signal = signal() => {
                signal?;
                say("ended by a signal");
                Ok(ExitCode::from(130))
            }
        }
    })
}

async fn signal() -> anyhow::Result<()> {
    let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => Ok(result?),
        _ = term.recv() => Ok(()),
    }
}

async fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let works: Vec<Work> = Work::all()
        .into_iter()
        .filter(|work| args.only.is_empty() || args.only.iter().any(|only| only == work.name()))
        .collect();
    ensure!(!works.is_empty(), "--only names no work");
    let regent = match &args.regent {
        Some(regent) => regent.canonicalize().context("--regent")?,
        None => build()?,
    };
    let data = args
        .data
        .clone()
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/data"));
    std::fs::create_dir_all(&data)?;
    let disk = Disk::measure(&data, Duration::from_secs(1))?;
    say(format!(
        "{}: {:.0} appends of 4 KiB with fdatasync a second, {:.0} in place",
        disk.file_system, disk.appends, disk.overwrites
    ));
    let mut systems = Vec::new();
    if Etcd::program().is_some() {
        systems.push(System::Etcd);
    } else {
        say("SKIPPED: etcd-server is not installed");
    }
    systems.push(System::Regent);
    systems.retain(|system| args.system.is_none_or(|only| only == *system));
    let settings = Settings {
        plan: load::Plan {
            warm_up: Duration::from_secs_f64(args.warm_up),
            measure: Duration::from_secs_f64(args.seconds),
            rate: args.rate,
            timeout: Duration::from_millis(args.timeout_ms),
        },
        records: args.records,
        leases: args.leases,
        streams: args.streams,
        keepalives: args.keepalives,
        watched: args.watched,
        settle: Duration::from_secs(20),
    };
    let mut all = Vec::new();
    for round in 0..usize::try_from(args.rounds)? {
        for system in &systems {
            all.extend(measure_one(*system, round, &works, &settings, &data, &regent).await?);
        }
        // Who comes second finds a warmer machine: take turns.
        systems.reverse();
    }
    let rows: Vec<_> = works.iter().flat_map(|work| work.rows()).collect();
    say(report::table(&rows, &all));
    Ok(ExitCode::SUCCESS)
}

/// All works on one of the two, in a cluster and a folder of its own.
async fn measure_one(
    system: System,
    round: usize,
    works: &[Work],
    settings: &Settings,
    data: &Path,
    regent: &Path,
) -> anyhow::Result<Vec<Measured>> {
    let folder = tempfile::Builder::new().prefix("bench-").tempdir_in(data)?;
    let mut cluster = Cluster::start(system, folder.path(), regent).await?;
    cluster.prepare(settings.records).await?;
    let mut all = Vec::new();
    for work in works {
        cluster.settle(settings.settle).await;
        let rows = work.rows();
        for result in work.run(&mut cluster, settings).await? {
            let measured = Measured {
                row: rows[result.row].id.clone(),
                system: cluster.system(),
                round,
                values: result.values,
                failure: result.failure,
            };
            say(report::line(&rows[result.row], &measured));
            all.push(measured);
        }
    }
    Ok(all)
}

/// Builds the release of the workspace above.
fn build() -> anyhow::Result<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = std::process::Command::new(cargo)
        .args(["build", "--release", "--locked", "-p", "regent"])
        .current_dir(&workspace)
        // Those of this workspace are not meant for that one.
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("CARGO_MANIFEST_DIR")
        .status()?;
    ensure!(status.success(), "Regent could not be built");
    Ok(workspace.join("target/release/regent"))
}
