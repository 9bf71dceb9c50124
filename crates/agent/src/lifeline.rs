//! A lifeline: another process whose death must end this one and all that it started.
//!
//! `regent dev` promises that nothing of it is left after it dies, also by SIGKILL, when it can no longer
//! tell anybody. So each of its children is given its pid and start time and watches it through a pidfd.
//! Invariant: a pid is only trusted together with the start time that the kernel gave the process, and
//! the start time is compared after the pidfd was opened, so a reused pid is never watched or killed.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::str::FromStr;
use std::time::Duration;

use regent_types::problem::quoted;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use tokio::io::unix::AsyncFd;

/// How often a process is looked at where the kernel has no pidfd (before Linux 5.3).
const POLL_WITHOUT_PIDFD: Duration = Duration::from_millis(200);

/// One process of this machine since its last boot: a pid and when the process with it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProcessId {
    /// The process id.
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat`: clock ticks from boot to the start of the process.
    pub start: u64,
}

impl ProcessId {
    /// This process.
    pub fn current() -> io::Result<Self> {
        Self::of(std::process::id())
    }

    /// The process that has this pid now; `NotFound` if there is none or it is only waiting to be reaped.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = Stat::read(pid)?;
        if stat.is_dead() {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Self {
            pid,
            start: stat.start,
        })
    }

    /// Whether it still runs (a zombie does not).
    pub fn is_alive(self) -> bool {
        Self::of(self.pid).is_ok_and(|now| now == self)
    }

    /// Opens it for watching and signalling; `None` if it is gone.
    pub fn open(self) -> io::Result<Option<ProcessHandle>> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Some(pidfd),
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(rustix::io::Errno::NOSYS) => None,
            Err(errno) => return Err(errno.into()),
        };
        // Only now is it certain whose pidfd this is.
        Ok(self.is_alive().then_some(ProcessHandle { process: self, pidfd }))
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.pid, self.start)
    }
}

impl FromStr for ProcessId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once(':').and_then(|(pid, start)| {
            Some(Self {
                pid: pid.parse().ok().filter(|pid| *pid > 0)?,
                start: start.parse().ok()?,
            })
        });
        parsed.ok_or_else(|| format!("{} is not PID:STARTTIME", quoted(text)))
    }
}

impl Serialize for ProcessId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ProcessId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

/// A live process that is held by a pidfd: its pid may be reused, this still means the old one.
#[derive(Debug)]
pub struct ProcessHandle {
    process: ProcessId,
    pidfd: Option<OwnedFd>,
}

impl ProcessHandle {
    /// Which process.
    pub fn process(&self) -> ProcessId {
        self.process
    }

    /// The pidfd, readable once the process has ended; `None` where the kernel has none.
    pub fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().map(AsFd::as_fd)
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        !self.process.is_alive()
    }

    /// Sends a signal; a process that is gone is a success.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let sent = match &self.pidfd {
            Some(pidfd) => pidfd_send_signal(pidfd, signal),
            None if self.has_ended() => Ok(()),
            None => {
                let pid = i32::try_from(self.process.pid).ok().and_then(Pid::from_raw);
                rustix::process::kill_process(pid.expect("opened with this pid"), signal)
            }
        };
        match sent {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Blocks until it has ended, at most for `timeout`; whether it has.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<bool> {
        wait_any(&[self], timeout)?;
        Ok(self.has_ended())
    }
}

/// Blocks until one of these has ended or the time is over. May return early; look again.
pub fn wait_any(processes: &[&ProcessHandle], timeout: Option<Duration>) -> io::Result<()> {
    let mut fds: Vec<PollFd<'_>> = processes
        .iter()
        .filter_map(|p| p.pidfd())
        .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
        .collect();
    let limit = if fds.len() < processes.len() {
        Some(timeout.unwrap_or(POLL_WITHOUT_PIDFD).min(POLL_WITHOUT_PIDFD))
    } else {
        timeout
    };
    poll_for(&mut fds, limit)
}

/// `poll(2)` with a [`Duration`]; an interrupted call is an early return.
pub(crate) fn poll_for(fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> io::Result<()> {
    let timeout = timeout.map(|t| Timespec {
        tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: t.subsec_nanos().into(),
    });
    match poll(fds, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// A process that this one must not outlive.
#[derive(Debug)]
pub struct Lifeline {
    process: ProcessId,
    held: Option<ProcessHandle>,
}

impl Lifeline {
    /// Takes hold of it. One that is gone already is not an error: the lifeline has ended.
    pub fn open(process: ProcessId) -> io::Result<Self> {
        Ok(Self {
            process,
            held: process.open()?,
        })
    }

    /// Which process.
    pub fn process(&self) -> ProcessId {
        self.process
    }

    /// The handle, unless it had ended when it was opened.
    pub fn handle(&self) -> Option<&ProcessHandle> {
        self.held.as_ref()
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.held.as_ref().is_none_or(ProcessHandle::has_ended)
    }

    /// Blocks this thread until it ends.
    pub fn wait(&self) -> io::Result<()> {
        while let Some(held) = self.held.as_ref().filter(|held| !held.has_ended()) {
            held.wait(None)?;
        }
        Ok(())
    }

    /// Completes when it ends. Needs a tokio runtime with I/O and time.
    pub async fn ended(self) -> io::Result<()> {
        match self.held {
            Some(held) => ended(held).await,
            None => Ok(()),
        }
    }
}

/// Completes when this process has ended.
pub async fn ended(held: ProcessHandle) -> io::Result<()> {
    let ProcessHandle { process, pidfd } = held;
    match pidfd {
        Some(pidfd) => {
            // Its replacement is an unsafe function, which is forbidden here; what it asks to be promised,
            // that the descriptor stays the same while registered, is what an `OwnedFd` is.
            #[expect(
                deprecated,
                reason = "the successor is unsafe; an OwnedFd keeps what it asks for"
            )]
            let pidfd = AsyncFd::with_interest(pidfd, tokio::io::Interest::READABLE)?;
            while process.is_alive() {
                pidfd.readable().await?.clear_ready();
            }
        }
        None => {
            while process.is_alive() {
                tokio::time::sleep(POLL_WITHOUT_PIDFD).await;
            }
        }
    }
    Ok(())
}

/// The fields of `/proc/PID/stat` that say who a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stat {
    /// One letter: `R`, `S`, `T` stopped, `Z` zombie ...
    pub(crate) state: char,
    /// The session (`setsid`) it belongs to.
    pub(crate) sid: u32,
    /// Clock ticks from boot to its start.
    pub(crate) start: u64,
}

impl Stat {
    pub(crate) fn read(pid: u32) -> io::Result<Self> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).map_err(|error| {
            // A process that ends between open and read answers ESRCH.
            if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) {
                io::ErrorKind::NotFound.into()
            } else {
                error
            }
        })?;
        Self::parse(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// The second field is the program's name in parentheses and may itself hold `) R 1`, so the fields
    /// are counted from the last parenthesis.
    fn parse(text: &str) -> Option<Self> {
        let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
        Some(Self {
            state: fields.next()?.chars().next()?,
            sid: fields.nth(2)?.parse().ok()?,
            start: fields.nth(15)?.parse().ok()?,
        })
    }

    /// Only waiting to be reaped, or on the way out.
    pub(crate) fn is_dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn sleeper() -> std::process::Child {
        Command::new("sleep")
            .arg("600")
            .stdin(Stdio::null())
            .spawn()
            .unwrap()
    }

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = Stat::parse("7 (a) R 1 (b) S 1 7 6 0 -1 0 1 2 3 4 5 6 7 8 20 0 1 0 4242 9 9").unwrap();
        assert_eq!(
            stat,
            Stat {
                state: 'S',
                sid: 6,
                start: 4242
            }
        );
    }

    #[test]
    fn the_current_process_is_alive_and_survives_text() {
        let me = ProcessId::current().unwrap();
        assert!(me.is_alive());
        assert_eq!(me.to_string().parse::<ProcessId>().unwrap(), me);
        for bad in ["", "1", "0:1", "a:b", "1:"] {
            assert!(bad.parse::<ProcessId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn another_start_time_is_another_process() {
        let me = ProcessId::current().unwrap();
        let other = ProcessId {
            start: me.start + 1,
            ..me
        };
        assert!(!other.is_alive());
        assert!(other.open().unwrap().is_none());
        assert!(Lifeline::open(other).unwrap().has_ended());
    }

    #[tokio::test]
    async fn a_lifeline_ends_when_its_process_dies() {
        let mut child = sleeper();
        let process = ProcessId::of(child.id()).unwrap();
        let lifeline = Lifeline::open(process).unwrap();
        let blocking = Lifeline::open(process).unwrap();
        assert!(!lifeline.has_ended());
        let thread = std::thread::spawn(move || blocking.wait());
        let watcher = tokio::spawn(lifeline.ended());
        child.kill().unwrap();
        // Not reaped yet: a zombie is dead.
        watcher.await.unwrap().unwrap();
        thread.join().unwrap().unwrap();
        assert!(!process.is_alive());
        child.wait().unwrap();
    }
}
