//! Processes that the bench starts, and what processes use.
//!
//! Nothing outlives the bench. Each process is ended when its [`Process`] is dropped, and the kernel kills it
//! when the bench itself is killed: it is started through this very program (`guarded`), which asks for that
//! and then becomes the program that was meant, so the pid stays the same.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rustix::process::{
    Pid, Resource, Signal, getppid, getrlimit, kill_process, set_parent_process_death_signal, setrlimit,
};

/// First argument of this program when it is to become another one.
const GUARDED: &str = "guarded";
/// How long a process may take to end after TERM.
const END_WITHIN: Duration = Duration::from_secs(15);
/// Ticks a second in /proc, on every Linux of today (`getconf CLK_TCK`).
pub(crate) const TICKS: f64 = 100.0;
/// How often it is looked whether it has ended.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A process of ours.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
}

impl Process {
    /// Starts `argv`; what it writes is appended to `log`.
    pub(crate) fn start(argv: &[String], log: &Path) -> anyhow::Result<Self> {
        let program = argv.first().context("a command without a program")?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(log)
            .context("the log of a process")?;
        let mut command = Command::new(std::env::current_exe().context("where this program is")?);
        // What is measured is what ships, whatever stands in the environment.
        for (name, _) in std::env::vars_os() {
            if name
                .to_str()
                .is_some_and(|name| name.starts_with("REGENT_") || name.starts_with("ETCD_"))
            {
                command.env_remove(name);
            }
        }
        let child = command
            .arg(GUARDED)
            .arg(std::process::id().to_string())
            .args(argv)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // A Ctrl-C is for the bench, which then ends all in order.
            .process_group(0)
            .spawn()
            .with_context(|| format!("{program} cannot be started"))?;
        Ok(Self { child })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Says how it ended, if it has.
    pub(crate) fn ended(&mut self) -> anyhow::Result<Option<std::process::ExitStatus>> {
        Ok(self.child.try_wait()?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.child.try_wait().ok().flatten().is_some() {
            return;
        }
        // A stopped process takes TERM only once it goes on.
        let _ = send(self.pid(), Signal::TERM);
        let _ = send(self.pid(), Signal::CONT);
        let deadline = Instant::now() + END_WITHIN;
        while self.child.try_wait().ok().flatten().is_none() && Instant::now() < deadline {
            std::thread::sleep(LOOK_EVERY);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Becomes the program that was meant, when this program was started for that. Comes back otherwise.
pub(crate) fn guarded() -> anyhow::Result<()> {
    let mut args = std::env::args_os().skip(1);
    if args.next().is_none_or(|first| first != GUARDED) {
        return Ok(());
    }
    let parent: Option<i32> = args.next().and_then(|pid| pid.to_str()?.parse().ok());
    let argv: Vec<OsString> = args.collect();
    let program = argv.first().context("a program")?;
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have died before that.
    ensure!(getppid().map(Pid::as_raw_pid) == parent, "the bench has ended");
    Err(Command::new(program).args(&argv[1..]).exec()).with_context(|| program.display().to_string())
}

/// Sends a signal to one process.
pub(crate) fn send(pid: u32, signal: Signal) -> anyhow::Result<()> {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .context("not a pid")?;
    kill_process(pid, signal).context("a signal cannot be sent")
}

/// Whether a process runs; a zombie does not.
pub(crate) fn is_alive(pid: u32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return false;
    };
    threads.flatten().any(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        let state = stat.rsplit(')').next().unwrap_or("").trim_start().chars().next();
        !matches!(state, None | Some('Z' | 'X'))
    })
}

/// What one process used since its start.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Usage {
    /// Seconds of CPU, in user space and in the kernel.
    pub(crate) cpu: f64,
    /// Megabytes (of 10^6 bytes) that are resident.
    pub(crate) resident_mb: f64,
}

impl Usage {
    /// Of one process.
    pub(crate) fn of(pid: u32) -> anyhow::Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .with_context(|| format!("process {pid} is gone"))?;
        parse_stat(&stat).with_context(|| format!("/proc/{pid}/stat"))
    }

    /// Of several, summed; those that are gone count as nothing.
    pub(crate) fn of_all(pids: &[u32]) -> Self {
        let each = pids.iter().filter_map(|pid| Self::of(*pid).ok());
        each.fold(Self::default(), |sum, one| Self {
            cpu: sum.cpu + one.cpu,
            resident_mb: sum.resident_mb + one.resident_mb,
        })
    }
}

/// Bytes that a process has caused to be written to disks since its start.
pub(crate) fn written(pid: u32) -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io"))
        .with_context(|| format!("what process {pid} has written"))?;
    let value = text.lines().find_map(|line| line.strip_prefix("write_bytes:"));
    Ok(value.context("no write_bytes")?.trim().parse()?)
}

/// Lets this process, and those that it starts, have as many open files as the system allows it.
pub(crate) fn many_files() -> anyhow::Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).context("the limit of open files cannot be raised")
}

fn parse_stat(stat: &str) -> anyhow::Result<Usage> {
    // The name may hold spaces and parentheses; the state follows after the last one.
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .context("no name")?
        .1
        .split_whitespace()
        .collect();
    let field = |n: usize| {
        fields
            .get(n)
            .context("too short")?
            .parse::<f64>()
            .context("not a number")
    };
    let page = rustix::param::page_size() as f64;
    Ok(Usage {
        cpu: (field(11)? + field(12)?) / TICKS,
        resident_mb: field(21)? * page / 1e6,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_spaces_and_parentheses_is_skipped() {
        let mut line = "42 (a b) c) S".to_owned();
        for n in 0..40 {
            line.push_str(&format!(" {n}"));
        }
        // After the state: fields 1.. are 0.. here, so utime is 10, stime 11, rss 20.
        let usage = parse_stat(&line).unwrap();
        assert!((usage.cpu - 0.21).abs() < 1e-9, "{usage:?}");
        assert!(usage.resident_mb > 0.0);
    }

    #[test]
    fn this_process_uses_memory_and_is_alive() {
        let pid = std::process::id();
        assert!(Usage::of(pid).unwrap().resident_mb > 0.1);
        assert!(is_alive(pid));
        assert!(!is_alive(u32::MAX - 1));
    }
}
