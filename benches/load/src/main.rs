//! Measures etcd and Regent in turn: the same work, on the same machine, in the same run, with both data
//! folders on the same file system.
//!
//! `main` says what is measured in which order; [`cluster`] starts and ends three real members of either,
//! [`works`] holds what is asked of them, [`load`] drives many clients and counts, [`measure`] has the values
//! and the goals, [`report`] and [`plot`] show them.

mod args;
mod cluster;
mod disk;
mod grpc;
mod http;
mod load;
mod machine;
mod measure;
mod pace;
mod plot;
mod process;
mod report;
mod rpc;
mod works;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use tempfile::TempDir;
use tokio::signal::unix::SignalKind;

use args::Args;
use cluster::etcd::Etcd;
use cluster::{Cluster, QUIET, System};
use machine::Machine;
use measure::{Measured, Metric, Row};
use report::{Report, say};
use works::{Place, Work};

/// The name of Regent's program.
const PROGRAM: &str = "regent";
/// What a shell gives a program that Ctrl-C ended.
const ENDED_BY_SIGNAL: u8 = 130;

fn main() -> anyhow::Result<ExitCode> {
    process::guarded()?;
    process::many_files()?;
    let args = Args::read();
    // One thread is the cheapest, and the generator shares the cores with what it measures.
    let mut builder = if args.threads > 1 {
        tokio::runtime::Builder::new_multi_thread()
    } else {
        tokio::runtime::Builder::new_current_thread()
    };
    let runtime = builder.worker_threads(args.threads.into()).enable_all().build()?;
    runtime.block_on(async {
        tokio::select! {
            result = run(&args) => result,
            // All that was started ends with what is dropped.
            signal = signal() => signal,
        }
    })
}

async fn signal() -> anyhow::Result<ExitCode> {
    let mut term = tokio::signal::unix::signal(SignalKind::terminate())?;
    tokio::select! {
        ctrl_c = tokio::signal::ctrl_c() => ctrl_c?,
        _ = term.recv() => {}
    }
    Ok(ExitCode::from(ENDED_BY_SIGNAL))
}

async fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let chosen = |work: &Work| args.only.is_empty() || args.only.iter().any(|only| only == work.name());
    let works: Vec<Work> = Work::all().into_iter().filter(chosen).collect();
    for only in &args.only {
        ensure!(
            works.iter().any(|work| work.name() == only),
            "--only: there is no work {only:?}"
        );
    }
    let Some(systems) = systems(args) else {
        return Ok(ExitCode::FAILURE);
    };
    let data = args.data.clone().unwrap_or_else(|| own("target/data"));
    std::fs::create_dir_all(&data)?;
    let bench = Bench {
        args,
        regent: program(args, &data)?,
        data: &data,
    };
    let machine = Machine::of(&data, args.disk_for())?;
    say(machine.text());
    let mut report = Report {
        time: SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
        machine,
        versions: Vec::new(),
        regent_args: args.regent_arg.clone(),
        settings: args.settings(),
        rows: rows(&works, args),
        measured: Vec::new(),
    };
    for round in 0..usize::from(args.rounds) {
        // Who comes second finds a warmer machine, so they take turns.
        let mut turns = systems.clone();
        if round % 2 == 1 {
            turns.reverse();
        }
        for system in turns {
            // A smoke test starts each system once: that all of it works is seen there as well.
            for works in works.chunk_by(|a, b| args.smoke || a.place() == b.place()) {
                let place = works[0].place();
                // Those that take a cluster of their own bring their own repetitions.
                if round > 0 && place != Place::Shared {
                    continue;
                }
                let works: Vec<Work> = works
                    .iter()
                    .copied()
                    .filter(|work| system == System::Regent || !work.is_regent_only())
                    .collect();
                if !works.is_empty() {
                    bench.measure(system, round, &works, &mut report).await?;
                }
            }
        }
    }
    say(format!("\n{}", report.text()));
    let out = args.out.clone().unwrap_or_else(|| own("target/report"));
    report.write(&out)?;
    say(format!(
        "\nbench.json, bench.md and bench.svg are in {}",
        out.display()
    ));
    Ok(if report.failures().is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The rows of the works. Where the pace is given, a rate is no goal.
fn rows(works: &[Work], args: &Args) -> Vec<Row> {
    let settings = args.settings();
    let mut rows: Vec<Row> = works.iter().flat_map(|work| work.rows(&settings)).collect();
    if args.rate.is_some() {
        for row in &mut rows {
            row.goals.retain(|goal| goal.metric != Metric::Rate);
        }
    }
    rows
}

/// What is measured, in this order; `None` when something is missing that is required.
fn systems(args: &Args) -> Option<Vec<System>> {
    let mut systems = vec![System::Etcd, System::Regent];
    systems.retain(|system| args.system.is_none_or(|only| only == *system));
    if systems.contains(&System::Etcd) && Etcd::program().is_none() {
        say("SKIPPED: etcd-server is not installed");
        if args.require.iter().any(|required| required.trim() == "etcd") {
            return None;
        }
        systems.retain(|system| *system != System::Etcd);
    }
    Some(systems)
}

/// Regent's program, copied: a build meanwhile must not put another one in its place.
fn program(args: &Args, data: &Path) -> anyhow::Result<TempDir> {
    let program = match &args.regent {
        Some(regent) => regent.clone(),
        None => build()?,
    };
    let folder = tempfile::Builder::new().prefix("program-").tempdir_in(data)?;
    std::fs::copy(&program, folder.path().join(PROGRAM))
        .with_context(|| format!("no program: {}", program.display()))?;
    Ok(folder)
}

/// Builds the release of the workspace above.
fn build() -> anyhow::Result<PathBuf> {
    let workspace = own("../..").canonicalize()?;
    let target = workspace.join("target");
    let status = std::process::Command::new("cargo")
        .args([
            "build",
            "--release",
            "--locked",
            "--package",
            "regent",
            "--target-dir",
        ])
        .arg(&target)
        .current_dir(&workspace)
        .status()
        .context("cargo")?;
    ensure!(status.success(), "Regent could not be built");
    Ok(target.join("release").join(PROGRAM))
}

/// A path in the folder of the bench itself.
fn own(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

struct Bench<'a> {
    args: &'a Args,
    regent: TempDir,
    data: &'a Path,
}

impl Bench<'_> {
    /// Works of one place on one of the two, in a cluster and a folder of its own, which is kept when that fails.
    async fn measure(
        &self,
        system: System,
        round: usize,
        works: &[Work],
        report: &mut Report,
    ) -> anyhow::Result<()> {
        let folder = tempfile::Builder::new().prefix("bench-").tempdir_in(self.data)?;
        let failures = report.failures_of_measured();
        let measured = self.measure_in(folder.path(), system, round, works, report).await;
        if measured.is_err() {
            let kept = folder.keep();
            return measured
                .with_context(|| format!("{}; its logs are in {}", system.name(), kept.display()));
        }
        if report.failures_of_measured() > failures {
            say(format!(
                "{}: something failed; its logs are in {}",
                system.name(),
                folder.keep().display()
            ));
        }
        measured
    }

    async fn measure_in(
        &self,
        folder: &Path,
        system: System,
        round: usize,
        works: &[Work],
        report: &mut Report,
    ) -> anyhow::Result<()> {
        let settings = self.args.settings();
        let mut regent = vec![
            self.regent.path().join(PROGRAM).display().to_string(),
            "server".to_owned(),
        ];
        regent.extend(self.args.regent_arg.iter().cloned());
        // What the one before left to the kernel to write is not this one's to wait for.
        if !self.args.smoke {
            rustix::fs::sync();
        }
        let mut cluster = Cluster::start(system, folder, &regent).await?;
        if round == 0 && !report.versions.iter().any(|(known, _)| *known == system) {
            report.versions.push((system, cluster.version().to_owned()));
        }
        if works.iter().any(|work| work.place() == Place::Shared) {
            cluster.prepare(settings.records).await?;
        }
        for work in works {
            let cores = cluster.settle(settings.settle).await;
            if cores > QUIET {
                say(format!(
                    "the members of {} still use {cores:.2} cores",
                    system.name()
                ));
            }
            let rows: Vec<Row> = work.rows(&settings);
            let results = work.run(&mut cluster, &settings).await;
            for result in results.with_context(|| format!("the work {:?}", work.name()))? {
                let row = &rows[result.row];
                let measured = Measured {
                    row: row.id.clone(),
                    system,
                    round,
                    values: result.values,
                    failure: result.failure,
                };
                say(report::line(row, &measured));
                report.measured.push(measured);
            }
        }
        cluster.end();
        Ok(())
    }
}
