//! The watchdog: the parent of the program, which ends it before the lease can be another's, also when `hold`
//! was killed or is frozen.
//!
//! One thread, no tokio, asleep in `poll` on three things: the socket to `hold`, whose end is the end of `hold`;
//! the program's pidfd; and a timer on the clock that runs during suspend, so that it acts right after one.
//! It leads a process group of its own, so that nothing that is meant for `hold` or for the program hits it.
//!
//! Invariant: the program is not reaped before its group is empty, so the number of the group is not used
//! again while it is signalled; and there is no moment in which the program runs and this does not know it.

use std::ffi::OsString;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::time::Duration;

use regent_client::clock::boot_ms;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, waitid};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use tokio::signal::unix::{SignalKind, signal};

use super::group::Group;
use super::plan::{Deed, Happened, Leads, Plan};
use super::wire::{MAX_LINE, News, Order};

/// How long `hold` may take to say until when the guard lasts: it waits for nobody before.
const FIRST_ORDER: Duration = Duration::from_secs(5);
/// How often the group is looked at while it ends.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// How often the program is looked at where the kernel has no pidfd (before Linux 5.3), and for having been
/// stopped from a terminal.
const LOOK_NOW_AND_THEN: Duration = Duration::from_millis(200);

/// The hidden flags of `regent internal watchdog`.
#[derive(Debug, clap::Args)]
pub(crate) struct WatchdogArgs {
    /// The socket of `hold`.
    #[arg(long)]
    pub(super) socket: PathBuf,
    /// How long a guard lasts, in milliseconds.
    #[arg(long)]
    pub(super) hold_ms: u64,
    /// The program and its arguments.
    #[arg(last = true, required = true)]
    pub(super) program: Vec<OsString>,
}

/// Runs it.
pub(crate) fn main(args: &WatchdogArgs) -> ExitCode {
    match Watchdog::start(args).and_then(Watchdog::run) {
        Ok(()) => ExitCode::SUCCESS,
        // `hold` sees the end of the socket; this one's standard error is the program's.
        Err(_) => ExitCode::FAILURE,
    }
}

/// The socket to `hold`.
struct Line {
    stream: UnixStream,
    rest: Vec<u8>,
}

/// The program's place before the terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Terminal {
    /// `hold` has not said yet whether it lends its own; until then the program is not reaped.
    Unknown,
    /// There is none.
    None,
    /// It goes back to this group.
    Of(Group),
}

struct Watchdog {
    line: Option<Line>,
    plan: Plan,
    program: Child,
    group: Group,
    pidfd: Option<OwnedFd>,
    timer: OwnedFd,
    terminal: Terminal,
    has_ended: bool,
}

impl Watchdog {
    fn start(args: &WatchdogArgs) -> io::Result<Self> {
        survive_signals()?;
        let mut line = Line {
            stream: UnixStream::connect(&args.socket)?,
            rest: Vec::new(),
        };
        let until = line.first_until()?;
        line.stream.set_nonblocking(true)?;
        let mut plan = Plan::new(Leads::of(args.hold_ms), until);
        if plan.due(boot_ms()).is_some() {
            line.tell(News::Late);
            return Err(io::ErrorKind::TimedOut.into());
        }
        let timer = timerfd_create(
            TimerfdClockId::Boottime,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        let started = Command::new(&args.program[0])
            .args(&args.program[1..])
            .process_group(0)
            .spawn();
        let program = match started {
            Ok(program) => program,
            Err(error) => {
                line.tell(News::Failed(error.raw_os_error().unwrap_or_default()));
                return Err(error);
            }
        };
        let pid = Pid::from_child(&program);
        let group = Group::of(pid.as_raw_nonzero().get()).expect("a child is never process 1");
        line.tell(News::Started(pid.as_raw_nonzero().get()));
        Ok(Self {
            line: Some(line),
            plan,
            program,
            group,
            // A child that was not waited for keeps its number, so this is certainly its pidfd.
            pidfd: pidfd_open(pid, PidfdFlags::empty()).ok(),
            timer,
            terminal: Terminal::Unknown,
            has_ended: false,
        })
    }

    fn run(mut self) -> io::Result<()> {
        let ended = self.watch();
        if ended.is_err() {
            // Nobody would watch it any more.
            let _ = self.group.signal(Signal::KILL);
        }
        ended?;
        self.end()
    }

    /// Until nothing is left of the group.
    fn watch(&mut self) -> io::Result<()> {
        loop {
            while let Some(deed) = self.plan.due(boot_ms()) {
                let _ = match deed {
                    Deed::Terminate => self.group.terminate(),
                    Deed::Kill => self.group.signal(Signal::KILL),
                };
            }
            if !self.has_ended && self.program_has_ended()? {
                self.has_ended = true;
                if self.group.is_alive()? {
                    self.plan.happened(boot_ms(), Happened::ProgramEnded);
                    continue;
                }
            }
            if self.has_ended && self.terminal != Terminal::Unknown && !self.group.is_alive()? {
                return Ok(());
            }
            self.wait()?;
            self.listen();
        }
    }

    /// Until something happens, or it is time for something.
    fn wait(&mut self) -> io::Result<()> {
        // In the past is at once; all zeros would be never.
        let wake = self.plan.wake().map_or(0, |wake| wake.max(1));
        let wake = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: i64::try_from(wake / 1_000).unwrap_or(i64::MAX),
                tv_nsec: i64::try_from(wake % 1_000 * 1_000_000).expect("below a second"),
            },
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &wake)?;
        let mut fds = vec![PollFd::new(&self.timer, PollFlags::IN)];
        if let Some(line) = &self.line {
            fds.push(PollFd::new(&line.stream, PollFlags::IN));
        }
        if let Some(pidfd) = self.pidfd.as_ref().filter(|_| !self.has_ended) {
            fds.push(PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN));
        }
        let from_a_terminal = matches!(self.terminal, Terminal::Of(_));
        let limit = if self.has_ended {
            Some(LOOK_AGAIN)
        } else if self.pidfd.is_none() || from_a_terminal {
            Some(LOOK_NOW_AND_THEN)
        } else {
            None
        };
        let limit = limit.map(|limit| Timespec {
            tv_sec: 0,
            tv_nsec: limit.subsec_nanos().into(),
        });
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Takes what `hold` says.
    fn listen(&mut self) {
        let Some(line) = &mut self.line else { return };
        let (orders, over) = line.orders();
        for order in orders {
            match order {
                Order::Until(until) => self.plan.happened(boot_ms(), Happened::Until(until)),
                Order::Lost => self.plan.happened(boot_ms(), Happened::Lost),
                Order::Signal(number) => {
                    if let Some(signal) = Signal::from_named_raw(number) {
                        let _ = self.group.signal(signal);
                    }
                }
                Order::Terminal(group) => {
                    self.terminal = Group::of(group).map_or(Terminal::None, Terminal::Of);
                }
            }
        }
        if over {
            self.line = None;
            if self.terminal == Terminal::Unknown {
                self.terminal = Terminal::None;
            }
            if !self.has_ended {
                self.plan.happened(boot_ms(), Happened::HolderGone);
            }
        }
    }

    /// Without reaping it.
    fn program_has_ended(&self) -> io::Result<bool> {
        let pid = WaitId::Pid(Pid::from_child(&self.program));
        let mut ended = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        if waitid(pid, ended)?.is_some() {
            return Ok(true);
        }
        // Nobody could continue what was stopped from the terminal: its shell only knows `hold`.
        ended = WaitIdOptions::STOPPED | WaitIdOptions::NOHANG;
        let pid = WaitId::Pid(Pid::from_child(&self.program));
        if matches!(self.terminal, Terminal::Of(_)) && waitid(pid, ended)?.is_some() {
            self.group.signal(Signal::CONT)?;
        }
        Ok(false)
    }

    /// Nothing is left of the group.
    fn end(mut self) -> io::Result<()> {
        if let Terminal::Of(owner) = self.terminal {
            give_terminal_back(self.group, owner);
        }
        let code = code_of(self.program.wait()?);
        if let Some(mut line) = self.line {
            line.tell(News::Exited {
                code,
                for_the_lease: self.plan.for_the_lease(),
            });
        }
        Ok(())
    }
}

impl Line {
    fn first_until(&mut self) -> io::Result<u64> {
        self.stream.set_read_timeout(Some(FIRST_ORDER))?;
        let give_up_at = boot_ms() + u64::try_from(FIRST_ORDER.as_millis()).unwrap_or(u64::MAX);
        loop {
            let (orders, over) = self.orders();
            match orders.first() {
                Some(Order::Until(until)) => return Ok(*until),
                Some(_) => return Err(io::ErrorKind::InvalidData.into()),
                None if over => return Err(io::ErrorKind::UnexpectedEof.into()),
                None if boot_ms() >= give_up_at => return Err(io::ErrorKind::TimedOut.into()),
                None => {}
            }
        }
    }

    /// What was said, and whether that was all for ever.
    fn orders(&mut self) -> (Vec<Order>, bool) {
        let mut piece = [0; 4096];
        let mut over = match self.stream.read(&mut piece) {
            Ok(0) => true,
            Ok(read) => {
                self.rest.extend_from_slice(&piece[..read]);
                false
            }
            Err(error) => !matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ),
        };
        let mut orders = Vec::new();
        while let Some(length) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=length).take(length).collect();
            match std::str::from_utf8(&line).map(str::parse) {
                Ok(Ok(order)) => orders.push(order),
                _ => over = true,
            }
        }
        (orders, over || self.rest.len() > MAX_LINE)
    }

    /// `hold` may be gone: then nobody wants to know.
    fn tell(&mut self, news: News) {
        let _ = self.stream.write_all(format!("{news}\n").as_bytes());
    }
}

/// What ends `hold` and the program in good order must not end this first, as when a service manager sends
/// SIGTERM to all of a unit. Without `unsafe` a signal cannot be ignored, but taken by a handler that does
/// nothing; a program that is started does not inherit that.
fn survive_signals() -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let _entered = runtime.enter();
    for kind in [
        SignalKind::terminate(),
        SignalKind::interrupt(),
        SignalKind::hangup(),
        SignalKind::quit(),
        SignalKind::user_defined1(),
        SignalKind::user_defined2(),
    ] {
        // The handler stays when this is dropped.
        drop(signal(kind)?);
    }
    Ok(())
}

/// Only who is before the terminal may say who comes next: a helper in the program's group, whose leader is
/// not reaped yet.
fn give_terminal_back(from: Group, to: Group) {
    let Ok(own) = std::env::current_exe() else { return };
    let _ = Command::new(own)
        .args(["internal", "terminal", "--group"])
        .arg(to.pid().as_raw_nonzero().to_string())
        .process_group(from.pid().as_raw_nonzero().get())
        .status();
}

/// As a shell gives it.
fn code_of(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    u8::try_from(code).unwrap_or(u8::MAX)
}
