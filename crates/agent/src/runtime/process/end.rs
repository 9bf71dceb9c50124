//! Ends, freezes and continues all processes of a session, however many they are and whatever they forked.
//!
//! Each process is signalled through a pidfd that was checked against its start time, never by number, so
//! a reused pid is never hit. New children are found by looking again. Invariant: [`end_members`] answers
//! `Ok` only after a look that found no process of the session.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::limits;
use super::scan::Scan;
use crate::lifeline::{ProcessHandle, ProcessId, wait_any};

/// How long processes may take to die after SIGKILL: only one that hangs in the kernel takes long.
const KILL_WAIT: Duration = Duration::from_secs(5);

/// How long all processes may take to stop after SIGSTOP, which the kernel does at once.
const FREEZE_WAIT: Duration = Duration::from_secs(5);

/// How often to look for children that were forked meanwhile.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Asks all processes of the session in this folder to end, forces them after `grace`, and waits until
/// none is left. The error lists what is left.
pub(crate) fn end_members(folder: &Path, grace: Duration, cgroup: Option<&Path>) -> io::Result<()> {
    let gentle = Instant::now() + grace;
    let mut asked = BTreeSet::new();
    loop {
        let members = Scan::take()?.members(folder);
        if members.is_empty() {
            return Ok(());
        }
        let left = gentle.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        let handles = open_all(&members)?;
        for handle in &handles {
            if asked.insert(handle.process()) {
                handle.signal(Signal::TERM)?;
                // A frozen process could not act on it.
                handle.signal(Signal::CONT)?;
            }
        }
        wait_all(&handles, left.min(LOOK_AGAIN))?;
    }
    let last = Instant::now() + KILL_WAIT;
    loop {
        if let Some(cgroup) = cgroup {
            limits::kill_cgroup(cgroup);
        }
        let members = Scan::take()?.members(folder);
        if members.is_empty() {
            return Ok(());
        }
        if Instant::now() >= last {
            let left: Vec<String> = members.iter().map(|process| process.pid.to_string()).collect();
            return Err(io::Error::other(format!(
                "processes {} survived SIGKILL",
                left.join(", ")
            )));
        }
        let handles = open_all(&members)?;
        for handle in &handles {
            handle.signal(Signal::KILL)?;
        }
        wait_all(&handles, LOOK_AGAIN)?;
    }
}

/// Waits for the shims of this folder to end by themselves, which they do once the program is gone, and
/// forces them after `patience`.
pub(crate) fn end_shims(folder: &Path, patience: Duration) -> io::Result<()> {
    let gentle = Instant::now() + patience;
    let last = gentle + KILL_WAIT;
    loop {
        let shims = Scan::take()?.shims(folder);
        if shims.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        if now >= last {
            return Err(io::Error::other("the shim survived SIGKILL"));
        }
        let handles = open_all(&shims)?;
        if now >= gentle {
            for handle in &handles {
                handle.signal(Signal::KILL)?;
            }
        }
        wait_all(&handles, LOOK_AGAIN)?;
    }
}

/// Stops all processes of the session by SIGSTOP, until a look finds none that goes on. One that sleeps in the
/// kernel stops only when it wakes, which for the parent of a stopped `vfork` child is after that one has gone on:
/// it counts as stopped once it was signalled, since it runs none of its own code before.
pub(crate) fn freeze(folder: &Path) -> io::Result<()> {
    let last = Instant::now() + FREEZE_WAIT;
    let mut asked = BTreeSet::new();
    loop {
        let mut moving = Scan::take()?.unstopped(folder);
        moving.retain(|(process, sleeps)| !(*sleeps && asked.contains(process)));
        let moving: Vec<ProcessId> = moving.into_iter().map(|(process, _)| process).collect();
        if moving.is_empty() {
            return Ok(());
        }
        if Instant::now() >= last {
            return Err(io::Error::other("processes go on in spite of SIGSTOP"));
        }
        for handle in open_all(&moving)? {
            handle.signal(Signal::STOP)?;
            asked.insert(handle.process());
        }
    }
}

/// Continues all processes of the session.
pub(crate) fn thaw(folder: &Path) -> io::Result<()> {
    // A stopped process forks nothing, so one look finds them all.
    for handle in open_all(&Scan::take()?.members(folder))? {
        handle.signal(Signal::CONT)?;
    }
    Ok(())
}

fn open_all(processes: &[ProcessId]) -> io::Result<Vec<ProcessHandle>> {
    processes
        .iter()
        .filter_map(|process| process.open().transpose())
        .collect()
}

fn wait_all(handles: &[ProcessHandle], limit: Duration) -> io::Result<()> {
    let until = Instant::now() + limit;
    let mut left: Vec<&ProcessHandle> = handles.iter().collect();
    loop {
        left.retain(|handle| !handle.has_ended());
        let time = until.saturating_duration_since(Instant::now());
        if left.is_empty() || time.is_zero() {
            return Ok(());
        }
        wait_any(&left, Some(time))?;
    }
}
