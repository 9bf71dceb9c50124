//! `simulate`: many seeds, each in a process of its own.

// What it prints is what it is for.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::Context;
use clap::Parser;
use regent_simulation::run::{Plan, run};
use regent_simulation::trace::Trace;

/// The variable that `random.c` reads.
const RANDOM: &str = "REGENT_SIMULATION_RANDOM";

/// Simulates whole clusters, one for each seed.
#[derive(Debug, Parser)]
struct Args {
    /// How many seeds.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds of trouble in each.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Seeds side by side; one for each processor when absent.
    #[arg(long)]
    jobs: Option<usize>,
    /// A rule that is broken on purpose; only in builds with the feature `faults`.
    #[arg(long)]
    fault: Option<String>,
    /// Where the trace of the seed is written, to find where two runs part.
    #[arg(long)]
    trace: Option<PathBuf>,
    /// Stop at the first seed that is red.
    #[arg(long)]
    stop: bool,
    /// Runs the one seed in this very process.
    #[arg(long, hide = true)]
    here: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    if args.here {
        return one(&args);
    }
    let jobs = args
        .jobs
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get));
    let begun = Instant::now();
    let next = AtomicU64::new(args.seed);
    let end = args.seed + args.seeds;
    let (red, simulated_ms) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs)
            .map(|_| {
                scope.spawn(|| -> anyhow::Result<()> {
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed >= end || (args.stop && red.load(Ordering::Relaxed) > 0) {
                            return Ok(());
                        }
                        let (green, ms) = in_a_process(&args, seed)?;
                        simulated_ms.fetch_add(ms, Ordering::Relaxed);
                        red.fetch_add(u64::from(!green), Ordering::Relaxed);
                    }
                })
            })
            .collect();
        for worker in workers {
            worker
                .join()
                .map_err(|_| anyhow::anyhow!("a worker panicked"))??;
        }
        anyhow::Ok(())
    })?;
    let (red, seconds) = (red.into_inner(), begun.elapsed().as_secs_f64());
    #[allow(clippy::cast_precision_loss)] // for people
    let hours = simulated_ms.into_inner() as f64 / 3_600_000.0;
    println!(
        "{} seeds, {red} red; {hours:.2} simulated hours in {seconds:.0} s, {:.2} a minute, with {jobs} jobs",
        args.seeds,
        hours * 60.0 / seconds
    );
    Ok(if red == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs a seed in a process that begins with it; gives whether it was green, and the simulated time.
fn in_a_process(args: &Args, seed: u64) -> anyhow::Result<(bool, u64)> {
    let program = std::env::current_exe().context("this program is not to be found")?;
    let mut command = Command::new(program);
    command
        .arg("--here")
        .args([
            "--seed",
            &seed.to_string(),
            "--seconds",
            &args.seconds.to_string(),
        ])
        .env(RANDOM, seed.to_string());
    if let Some(fault) = &args.fault {
        command.args(["--fault", fault]);
    }
    if let Some(trace) = &args.trace {
        command.arg("--trace").arg(trace);
    }
    let output = command.output().context("cannot run a seed")?;
    std::io::stderr().write_all(&output.stderr)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut lines = text.lines();
    let ms = lines.next().and_then(|line| line.strip_prefix("simulated_ms "));
    let ms = ms.and_then(|ms| ms.parse().ok()).unwrap_or(0);
    let rest: Vec<&str> = lines.collect();
    println!("{}", rest.join("\n"));
    if ms == 0 {
        println!(
            "seed {seed}: RED, the process ended with {}\nagain: just simulate --seed {seed}",
            output.status
        );
    }
    Ok((output.status.success(), ms))
}

fn one(args: &Args) -> anyhow::Result<ExitCode> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .without_time()
        .init();
    if let Some(fault) = &args.fault {
        regent_simulation::seed_fault(fault).map_err(anyhow::Error::msg)?;
    }
    let kept: Option<Box<dyn Write + Send>> = match &args.trace {
        None => None,
        Some(path) => Some(Box::new(std::io::BufWriter::new(
            std::fs::File::create(path).with_context(|| path.display().to_string())?,
        ))),
    };
    let plan = Plan {
        seed: args.seed,
        trouble_ms: args.seconds * 1_000,
    };
    let report = run(&plan, &Trace::kept(kept))?;
    println!("simulated_ms {}\n{report}", report.simulated_ms);
    Ok(if report.verdict.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
