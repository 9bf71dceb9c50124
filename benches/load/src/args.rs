//! What can be typed.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use crate::cluster::System;
use crate::load::Plan;
use crate::works::Settings;

/// Records of the works that load a cluster, and of those that ask what many records cost.
const RECORDS: u32 = 10_000;
const MANY: u32 = 100_000;
/// How long the members may take to become quiet before a measurement.
const SETTLE: Duration = Duration::from_secs(20);
/// How long an idle cluster is left alone before its memory is read.
const QUIET: Duration = Duration::from_secs(10);
/// How long connected agents are watched: three of their heartbeats.
const AGENTS_FOR: Duration = Duration::from_secs(30);

/// Measures etcd and Regent in turn on this machine: the same work, in the same run, on the same file system.
///
/// Exits with 1 when a request failed or a work gave nothing, whatever the ratios are.
#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// Regent's program; without it, the release build of the workspace above is made and used.
    #[arg(long, value_name = "FILE")]
    pub(crate) regent: Option<PathBuf>,
    /// One more argument for `regent server`, such as `--regent-arg=--log-store=...`; may be given again.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub(crate) regent_arg: Vec<String>,
    /// Only these works, by comma: write, read, local-read, lease, watch, keepalive, stalls, transfer, memory, restart,
    /// growth, sessions, agents, disk, folder.
    #[arg(long, value_delimiter = ',', value_name = "WORK")]
    pub(crate) only: Vec<String>,
    /// Only one of the two.
    #[arg(long, value_enum)]
    pub(crate) system: Option<System>,
    /// How often each is measured, etcd and Regent alternating; medians are reported.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    pub(crate) rounds: u16,
    /// How long each measurement takes.
    #[arg(long, default_value_t = 10.0, value_parser = seconds)]
    pub(crate) seconds: f64,
    /// How long each is driven before it counts, in seconds.
    #[arg(long, default_value_t = 2.0, value_parser = seconds)]
    pub(crate) warm_up: f64,
    /// Open loop for writes, reads and leases: so many requests a second, of all clients together, with latencies
    /// from when each was due. Closed loop without it.
    #[arg(long, value_name = "N", value_parser = pace)]
    pub(crate) rate: Option<f64>,
    /// Keys of etcd, sessions of Regent: 10,000 when absent; 100,000 for memory, restart and growth.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(32..=1_000_000))]
    pub(crate) records: Option<u32>,
    /// How often a leader is killed, frozen, or asked to hand over.
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1_000))]
    pub(crate) trials: u16,
    /// Agents that are connected at a time.
    #[arg(long, default_value_t = 10_000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=50_000))]
    pub(crate) agents: u32,
    /// Writes after which the size of the data folder is judged (`folder`): ten million take a while.
    #[arg(long, default_value_t = 1_000_000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    pub(crate) writes: u64,
    /// Leases that are kept alive.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) leases: u32,
    /// Streams (for Regent, sockets) that they are kept alive over.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub(crate) streams: u32,
    /// Keepalives a second, of all leases together.
    #[arg(long, default_value_t = 2_000.0, value_name = "N", value_parser = pace)]
    pub(crate) keepalives: f64,
    /// Watched writes a second.
    #[arg(long, default_value_t = 200.0, value_name = "N", value_parser = pace)]
    pub(crate) watched: f64,
    /// A request that takes longer is given up and has failed, in milliseconds.
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub(crate) timeout_ms: u64,
    /// Threads of the generator, the same for both.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) threads: u16,
    /// Where data folders are made (and removed); must not be in memory.
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// Where bench.json, bench.md and bench.svg are written.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Every work, once and very short: to see that all of it works, not how fast it is.
    #[arg(long, conflicts_with_all = ["rounds", "seconds", "warm_up", "records", "leases", "streams", "keepalives", "watched", "trials", "agents", "writes"])]
    pub(crate) smoke: bool,
    /// What must be there, by comma: with `etcd`, it is an error that etcd-server is not installed.
    #[arg(long, env = "REGENT_REQUIRE", value_delimiter = ',')]
    pub(crate) require: Vec<String>,
}

impl Args {
    /// What was typed, with the small numbers of a smoke test in their places.
    pub(crate) fn read() -> Self {
        let mut args = Self::parse();
        if args.smoke {
            args.rounds = 1;
            args.seconds = 0.5;
            args.warm_up = 0.1;
            args.records = Some(256);
            args.trials = 1;
            args.agents = 60;
            args.writes = 2_000;
            args.leases = 128;
            args.streams = 8;
            args.keepalives = 100.0;
            args.watched = 100.0;
        }
        args
    }

    pub(crate) fn settings(&self) -> Settings {
        let second = Duration::from_secs(1);
        Settings {
            plan: Plan {
                warm_up: second.mul_f64(self.warm_up),
                measure: second.mul_f64(self.seconds),
                rate: self.rate,
                timeout: Duration::from_millis(self.timeout_ms),
            },
            records: self.records.unwrap_or(RECORDS) as usize,
            many: self.records.unwrap_or(MANY) as usize,
            trials: self.trials.into(),
            agents: self.agents as usize,
            disk_writes: if self.smoke { 2_000 } else { 100_000 },
            folder_writes: self.writes,
            real_sessions: if self.smoke { 2 } else { 30 },
            quiet: if self.smoke { second / 2 } else { QUIET },
            agents_for: if self.smoke { 2 * second } else { AGENTS_FOR },
            leases: self.leases as usize,
            streams: self.streams as usize,
            keepalives: self.keepalives,
            watched: self.watched,
            settle: if self.smoke { second } else { SETTLE },
        }
    }

    /// How long the disk is measured, for each kind of write.
    pub(crate) fn disk_for(&self) -> Duration {
        if self.smoke {
            Duration::from_millis(100)
        } else {
            Duration::from_secs(1)
        }
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    between(text, 0.0, 600.0)
}

fn pace(text: &str) -> Result<f64, String> {
    between(text, 1.0, 1_000_000.0)
}

fn between(text: &str, least: f64, most: f64) -> Result<f64, String> {
    let value = text.parse::<f64>().map_err(|error| error.to_string())?;
    if (least..=most).contains(&value) {
        Ok(value)
    } else {
        Err(format!("must be from {least} to {most}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_well_formed() {
        use clap::CommandFactory as _;
        Args::command().debug_assert();
        assert!(
            seconds("0.5").is_ok() && seconds("601").is_err() && pace("0").is_err() && pace("NaN").is_err()
        );
    }
}
