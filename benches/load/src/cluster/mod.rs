//! Three members of etcd or of Regent, started by the bench in a folder of their own and ended with it. What is
//! the same for both is here: processes, what they use, when they are quiet; what differs is in [`etcd`] and
//! [`regent`].

pub(crate) mod agent;
pub(crate) mod etcd;
mod ports;
pub(crate) mod regent;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::ValueEnum;
use rustix::process::Signal;
use serde::Serialize;

use crate::process::{self, Process, Usage};

/// How many members a cluster has.
pub(crate) const MEMBERS: usize = 3;
/// How long a cluster may take to start, or to come back. Far above what either takes.
const READY_WITHIN: Duration = Duration::from_mins(1);
/// How often it is asked.
const ASK_EVERY: Duration = Duration::from_millis(20);
/// A cluster is quiet when its members together use less than this, in cores.
pub(crate) const QUIET: f64 = 0.10;
/// Over how long that is looked at.
const QUIET_FOR: Duration = Duration::from_millis(300);

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum System {
    Etcd,
    Regent,
}

impl System {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::Regent => "Regent",
        }
    }
}

/// A running cluster.
pub(crate) enum Cluster {
    Etcd(etcd::Etcd),
    Regent(regent::Regent),
}

/// One member: a process, and how to start it again.
pub(crate) struct Member {
    /// Where clients connect.
    pub(crate) address: SocketAddr,
    pub(crate) pid: u32,
    /// Its data folder.
    pub(crate) data: PathBuf,
    command: Vec<String>,
    log: PathBuf,
    /// `None` once it was killed.
    process: Option<Process>,
}

impl Member {
    /// Starts one that listens for clients on this port of loopback.
    fn new(port: u16, data: PathBuf, command: Vec<String>, log: PathBuf) -> anyhow::Result<Self> {
        let process = Process::start(&command, &log)?;
        Ok(Self {
            address: SocketAddr::from(([127, 0, 0, 1], port)),
            pid: process.pid(),
            data,
            command,
            log,
            process: Some(process),
        })
    }

    fn program(&self) -> &str {
        self.command.first().map_or("", String::as_str)
    }

    /// An error, with what it wrote last, when it ended by itself.
    fn check(&mut self) -> anyhow::Result<()> {
        if let Some(process) = &mut self.process
            && let Some(status) = process.ended()?
        {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            bail!(
                "a member ended with {status}: {}",
                log.lines().last().unwrap_or_default()
            );
        }
        Ok(())
    }

    /// Kills it (-9) and waits until it is gone.
    pub(crate) async fn kill(&mut self) -> anyhow::Result<()> {
        process::send(self.pid, Signal::KILL)?;
        self.process = None;
        let pid = self.pid;
        until("the end of a member", async || Ok(!process::is_alive(pid))).await
    }

    /// Asks it to end, and waits until it has.
    pub(crate) async fn terminate(&mut self) -> anyhow::Result<()> {
        process::send(self.pid, Signal::TERM)?;
        let pid = self.pid;
        until("the end of a member", async || Ok(!process::is_alive(pid))).await?;
        self.process = None;
        Ok(())
    }

    /// Stops it in place; [`Self::thaw`] lets it go on.
    pub(crate) fn freeze(&self) -> anyhow::Result<()> {
        process::send(self.pid, Signal::STOP)
    }

    pub(crate) fn thaw(&self) -> anyhow::Result<()> {
        process::send(self.pid, Signal::CONT)
    }

    /// Starts it again after [`Self::kill`], with the command it had.
    pub(crate) fn start(&mut self) -> anyhow::Result<()> {
        let process = Process::start(&self.command, &self.log)?;
        self.pid = process.pid();
        self.process = Some(process);
        Ok(())
    }
}

impl Cluster {
    /// Starts three members in a new folder, and waits until they serve. `regent` is how the command of a node of
    /// Regent begins.
    pub(crate) async fn start(system: System, folder: &Path, regent: &[String]) -> anyhow::Result<Self> {
        std::fs::create_dir_all(folder)?;
        match system {
            System::Etcd => Ok(Self::Etcd(etcd::Etcd::start(folder).await?)),
            System::Regent => Ok(Self::Regent(regent::Regent::start(folder, regent).await?)),
        }
    }

    /// Its records: keys, or sessions. Makes those that are missing.
    pub(crate) async fn prepare(&mut self, records: usize) -> anyhow::Result<()> {
        match self {
            Self::Etcd(etcd) => etcd.prepare(records).await,
            Self::Regent(regent) => regent.prepare(records).await,
        }
    }

    /// Waits until every member serves again.
    pub(crate) async fn ready(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Etcd(etcd) => etcd.ready().await,
            Self::Regent(regent) => regent.ready().await,
        }
    }

    pub(crate) fn version(&self) -> &str {
        match self {
            Self::Etcd(etcd) => &etcd.version,
            Self::Regent(regent) => &regent.version,
        }
    }

    pub(crate) fn members(&self) -> &[Member] {
        match self {
            Self::Etcd(etcd) => &etcd.members,
            Self::Regent(regent) => &regent.members,
        }
    }

    pub(crate) fn members_mut(&mut self) -> &mut [Member] {
        match self {
            Self::Etcd(etcd) => &mut etcd.members,
            Self::Regent(regent) => &mut regent.members,
        }
    }

    /// Ends all members at a time.
    pub(crate) fn end(self) {
        for member in self.members() {
            // One that has ended already is fine.
            let _ = process::send(member.pid, Signal::TERM);
        }
    }

    /// The index of the member that leads.
    pub(crate) async fn leader(&self) -> anyhow::Result<usize> {
        match self {
            Self::Etcd(etcd) => etcd.leader().await,
            Self::Regent(regent) => regent.leader().await,
        }
    }

    pub(crate) fn pids(&self) -> Vec<u32> {
        self.members().iter().map(|member| member.pid).collect()
    }

    /// Waits until the members have nothing left to do from the work before, but not longer than `within`: what
    /// works on for longer is part of what it costs. Gives the cores that they use then.
    pub(crate) async fn settle(&self, within: Duration) -> f64 {
        let deadline = Instant::now() + within;
        let pids = self.pids();
        loop {
            let (before, since) = (Usage::of_all(&pids).cpu, Instant::now());
            tokio::time::sleep(QUIET_FOR).await;
            let cores = (Usage::of_all(&pids).cpu - before) / since.elapsed().as_secs_f64();
            if cores < QUIET || Instant::now() >= deadline {
                return cores;
            }
        }
    }
}

/// Asks again until it is so, or it takes too long.
pub(crate) async fn until(
    what: &str,
    mut is_so: impl AsyncFnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + READY_WITHIN;
    while !is_so()
        .await
        .with_context(|| format!("while waiting for {what}"))?
    {
        ensure!(
            Instant::now() < deadline,
            "{what} did not come within {READY_WITHIN:?}"
        );
        tokio::time::sleep(ASK_EVERY).await;
    }
    Ok(())
}
