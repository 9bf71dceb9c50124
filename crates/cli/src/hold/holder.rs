//! `hold` itself, from the moment that it leads: it starts the watchdog, tells it until when the guard lasts,
//! passes signals on, and does the watchdog's work if that is gone.
//!
//! Invariant: the watchdog is told the end of the guard before it starts the program, and of every renewal
//! after its acknowledgement, so it never believes in more than there is. Whatever the watchdog does, the
//! program's group is killed here too once the guard is over.

use std::ffi::OsString;
use std::future::poll_fn;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};
use std::task::Poll;
use std::time::Duration;

use anyhow::Context as _;
use regent_agent::lifeline::ProcessId;
use regent_client::clock::boot_ms;
use regent_client::guard::hold_ms;
use regent_client::{Leadership, Standing};
use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{Signal as Stream, SignalKind, signal};

use super::group::{Group, groups_with};
use super::plan::Leads;
use super::wire::{News, Order};
use super::{FAILED, LOST, NOT_EXECUTABLE, NOT_FOUND, terminal};
use crate::output;

/// How long the watchdog may take to start.
const START: Duration = Duration::from_secs(5);
/// A line that the watchdog does not take for this long means that it is not there: its socket holds
/// thousands of them.
const TELL: Duration = Duration::from_millis(500);
/// How often is looked whether what had to be ended is gone.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// How long a killed process may take to be gone: only one that hangs in the kernel takes long.
const KILL_WAIT: Duration = Duration::from_secs(5);

/// The signals that are passed on.
pub(super) struct Signals(Vec<(i32, Stream)>);

impl Signals {
    pub(super) fn new() -> io::Result<Self> {
        [
            SignalKind::terminate(),
            SignalKind::interrupt(),
            SignalKind::hangup(),
            SignalKind::quit(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
        ]
        .into_iter()
        .map(|kind| Ok((kind.as_raw_value(), signal(kind)?)))
        .collect::<io::Result<_>>()
        .map(Self)
    }

    /// The number of the next one.
    pub(super) async fn next(&mut self) -> i32 {
        poll_fn(|context| {
            for (number, stream) in &mut self.0 {
                if let Poll::Ready(Some(())) = stream.poll_recv(context) {
                    return Poll::Ready(*number);
                }
            }
            Poll::Pending
        })
        .await
    }
}

/// The program's group, as the watchdog has told it.
#[derive(Clone, Copy)]
struct Program {
    group: Group,
    /// `None` if it had ended by the time.
    leader: Option<ProcessId>,
}

struct Holder {
    leadership: Leadership,
    leads: Leads,
    /// What the program finds in its environment, `NAME=VALUE`.
    environment: [(&'static str, String); 2],
    watchdog: Child,
    lines: tokio::io::Lines<BufReader<OwnedReadHalf>>,
    orders: OwnedWriteHalf,
    program: Option<Program>,
    /// The last end of the guard.
    until: u64,
    /// The lease is lost, or the program was ended here as the guard was over.
    lost: bool,
    killed: bool,
}

/// Runs the program under this leadership; gives the code to exit with.
pub(super) async fn run(
    leadership: Leadership,
    ttl: Duration,
    program: &[OsString],
    signals: &mut Signals,
) -> (anyhow::Result<u8>, Leadership) {
    match Holder::start(leadership, ttl, program).await {
        Ok(mut holder) => {
            let code = holder.watch(program, signals).await;
            // It ends by itself after what it said last, and at once if it was killed.
            let _ = holder.watchdog.wait();
            (code, holder.leadership)
        }
        Err((error, leadership)) => (Err(error), leadership),
    }
}

impl Holder {
    async fn start(
        leadership: Leadership,
        ttl: Duration,
        program: &[OsString],
    ) -> Result<Self, (anyhow::Error, Leadership)> {
        let hold_ms = hold_ms(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX));
        let environment = [
            ("REGENT_LEASE_NAME", leadership.lease().to_string()),
            ("REGENT_LEASE_TOKEN", leadership.token().to_string()),
        ];
        match start_watchdog(hold_ms, &environment, program).await {
            Ok((watchdog, stream)) => {
                let (reader, orders) = stream.into_split();
                Ok(Self {
                    leads: Leads::of(hold_ms),
                    environment,
                    watchdog,
                    lines: BufReader::new(reader).lines(),
                    orders,
                    program: None,
                    until: leadership.valid_until(),
                    lost: false,
                    killed: false,
                    leadership,
                })
            }
            Err(error) => Err((error, leadership)),
        }
    }

    async fn watch(&mut self, program: &[OsString], signals: &mut Signals) -> anyhow::Result<u8> {
        let mut standing = self.leadership.changes();
        let first = standing.borrow_and_update().clone();
        let mut heard = self.stands(first).await;
        while heard.is_ok() {
            let left = Duration::from_millis(self.until.saturating_sub(boot_ms()));
            tokio::select! {
                // What the watchdog says first: after a freeze it may be that there is nothing left to kill.
                biased;
                line = self.lines.next_line() => {
                    let Some(news) = line.ok().flatten().and_then(|line| line.parse().ok()) else {
                        return self.alone().await;
                    };
                    match news {
                        News::Started(pid) => heard = self.started(pid).await,
                        News::Failed(errno) => return Ok(could_not_start(program, errno)),
                        News::Late => anyhow::bail!("the lease did not last long enough to start the program"),
                        News::Exited { code, for_the_lease } => return Ok(self.exited(code, for_the_lease)),
                    }
                }
                Ok(()) = standing.changed() => {
                    let standing = standing.borrow_and_update().clone();
                    heard = self.stands(standing).await;
                }
                signal = signals.next() => heard = self.tell(Order::Signal(signal)).await,
                () = tokio::time::sleep(left), if !self.killed => self.guard_is_over(),
            }
        }
        self.alone().await
    }

    async fn stands(&mut self, standing: Standing) -> io::Result<()> {
        match standing {
            Standing::Valid { until } => {
                self.until = until;
                self.tell(Order::Until(until)).await
            }
            // The watchdog has ended the program by then, by the end of the guard that it was told.
            Standing::Lapsed => Ok(()),
            Standing::Lost(loss) => {
                self.lost = true;
                output::error(&anyhow::anyhow!("the lease is lost: {loss}"));
                self.tell(Order::Lost).await
            }
        }
    }

    async fn started(&mut self, pid: i32) -> io::Result<()> {
        let group = Group::of(pid).ok_or(io::ErrorKind::InvalidData)?;
        self.program = Some(Program {
            group,
            leader: u32::try_from(pid).ok().and_then(|pid| ProcessId::of(pid).ok()),
        });
        let owner = terminal::lend(group).map_or(0, |own| own.as_raw_nonzero().get());
        self.tell(Order::Terminal(owner)).await
    }

    fn exited(&self, code: u8, for_the_lease: bool) -> u8 {
        if !(self.lost || for_the_lease || self.killed) {
            return code;
        }
        if !self.lost {
            output::error(&anyhow::anyhow!(
                "the lease could not be renewed in time, so the program was ended"
            ));
        }
        LOST
    }

    /// The watchdog should have ended it before this.
    fn guard_is_over(&mut self) {
        self.killed = true;
        for group in self.groups() {
            let _ = group.signal(Signal::KILL);
        }
    }

    async fn tell(&mut self, order: Order) -> io::Result<()> {
        let line = format!("{order}\n");
        tokio::time::timeout(TELL, self.orders.write_all(line.as_bytes()))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// The watchdog is gone or does not listen: its work is done here, and the program is ended.
    async fn alone(&mut self) -> anyhow::Result<u8> {
        let _ = self.watchdog.kill();
        let groups = self.groups();
        for group in &groups {
            let _ = group.terminate();
        }
        let kill_at = (boot_ms() + self.leads.term).min(self.until.saturating_sub(self.leads.kill));
        while boot_ms() < kill_at && any_alive(&groups) {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        for group in &groups {
            let _ = group.signal(Signal::KILL);
        }
        let give_up_at = tokio::time::Instant::now() + KILL_WAIT;
        while any_alive(&groups) {
            anyhow::ensure!(
                tokio::time::Instant::now() < give_up_at,
                "the watchdog of the program has ended, and the program survives SIGKILL"
            );
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        if self.lost || self.killed {
            return Ok(LOST);
        }
        anyhow::bail!("the watchdog of the program has ended, so the program was ended too")
    }

    /// The groups that the program runs in.
    fn groups(&self) -> Vec<Group> {
        if let Some(Program { group, leader }) = self.program {
            let number = group.pid().as_raw_nonzero().get().unsigned_abs();
            // Another process that has the number by now leads another group.
            let reused = ProcessId::of(number).is_ok_and(|now| leader != Some(now));
            return if reused { Vec::new() } else { vec![group] };
        }
        // A watchdog that was killed before it could tell.
        let carries = self
            .environment
            .each_ref()
            .map(|(name, value)| format!("{name}={value}"));
        let watchdog = i32::try_from(self.watchdog.id()).ok().and_then(Group::of);
        groups_with(&carries)
            .into_iter()
            .filter(|group| Some(*group) != watchdog)
            .collect()
    }
}

fn any_alive(groups: &[Group]) -> bool {
    // If nobody can look, they may be.
    groups.iter().any(|group| group.is_alive().unwrap_or(true))
}

async fn start_watchdog(
    hold_ms: u64,
    environment: &[(&str, String)],
    program: &[OsString],
) -> anyhow::Result<(Child, UnixStream)> {
    // Only its owner may enter it, and it is gone once the watchdog has come.
    let folder = tempfile::Builder::new()
        .prefix("regent-hold-")
        .tempdir()
        .context("no folder for the watchdog's socket")?;
    let socket = folder.path().join("socket");
    let listener =
        UnixListener::bind(&socket).with_context(|| format!("cannot listen at {}", socket.display()))?;
    let mut watchdog =
        Command::new(std::env::current_exe().context("this program's own path cannot be found")?)
            .args([
                "internal",
                "watchdog",
                "--hold-ms",
                &hold_ms.to_string(),
                "--socket",
            ])
            .arg(&socket)
            .arg("--")
            .args(program)
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .process_group(0)
            .spawn()
            .context("the watchdog cannot be started")?;
    let give_up_at = tokio::time::Instant::now() + START;
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, _) = accepted.context("the watchdog cannot be heard")?;
                return Ok((watchdog, stream));
            }
            () = tokio::time::sleep(LOOK_AGAIN) => {
                let ended = watchdog.try_wait().context("the watchdog cannot be watched")?;
                if ended.is_some() || tokio::time::Instant::now() >= give_up_at {
                    let _ = watchdog.kill();
                    let _ = watchdog.wait();
                    anyhow::bail!("the watchdog did not start: {ended:?}");
                }
            }
        }
    }
}

/// As env(1): 127 for what is not there, 126 for what is and cannot be executed.
fn could_not_start(program: &[OsString], errno: i32) -> u8 {
    let error = io::Error::from_raw_os_error(errno);
    let code = match error.kind() {
        io::ErrorKind::NotFound => NOT_FOUND,
        // Not the program's fault.
        io::ErrorKind::OutOfMemory | io::ErrorKind::WouldBlock => FAILED,
        _ => NOT_EXECUTABLE,
    };
    let name = program[0].display().to_string();
    output::error(&anyhow::Error::new(error).context(name));
    code
}
