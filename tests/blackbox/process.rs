//! Processes as the system shows them: which they are, whose children, frozen for a while.

use std::collections::BTreeSet;
use std::path::Path;

use rustix::process::Signal;

use crate::harness::{Dev, is_alive, processes_naming, send};

/// A process that no later one can be mistaken for: pids are used again, a pid with its start time is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    started: u64,
}

impl Process {
    /// The process that has this pid now.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let started = stat(pid)?.get(19)?.parse().ok()?;
        is_alive(pid).then_some(Self { pid, started })
    }

    /// Whether it still runs.
    pub(crate) fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

/// Every process of a cluster: `dev`, all that descend from it, and all that name its folder.
pub(crate) fn family(dev: &Dev) -> BTreeSet<Process> {
    let everybody: Vec<(u32, u32)> = pids()
        .filter_map(|pid| Some((pid, stat(pid)?.get(1)?.parse().ok()?)))
        .collect();
    let mut family = BTreeSet::from([dev.pid()]);
    family.extend(naming(dev.path()));
    loop {
        let before = family.len();
        for (pid, parent) in &everybody {
            if family.contains(parent) {
                family.insert(*pid);
            }
        }
        if family.len() == before {
            return family.into_iter().filter_map(Process::of).collect();
        }
    }
}

/// The processes that name a folder.
pub(crate) fn naming(folder: &Path) -> Vec<u32> {
    processes_naming(folder.to_str().expect("test folders have plain names"))
}

/// The command line of a process, for messages.
pub(crate) fn command_line(pid: u32) -> String {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}

/// The value of a variable in the environment that a process was started with.
pub(crate) fn environment(pid: u32, name: &str) -> Option<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    text.split('\0')
        .find_map(|one| Some(one.strip_prefix(name)?.strip_prefix('=')?.to_owned()))
}

/// A process that stands still until this is dropped.
pub(crate) struct Frozen(u32);

impl Frozen {
    pub(crate) fn new(pid: u32) -> Self {
        send(pid, Signal::STOP);
        Self(pid)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        send(self.0, Signal::CONT);
    }
}

fn pids() -> impl Iterator<Item = u32> {
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// The fields of `/proc/PID/stat` after the name, which may hold anything: state, parent, ...
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(')')?;
    Some(rest.split_whitespace().map(str::to_owned).collect())
}
