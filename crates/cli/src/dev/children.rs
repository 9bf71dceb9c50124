//! The children of `regent dev`: started, watched, ended. Invariant: nothing that they started is
//! left when `end` returns, and nothing for long when this process is killed.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use regent_agent::lifeline::ProcessId;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::time::Instant;

/// How long a child may take to end after SIGTERM before it is killed: a node ends within 5 s.
const END_WITHIN: Duration = Duration::from_secs(8);
/// How often ended children are looked for.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What a shell has for its own cluster, and what is not for the children.
const OTHERS: [&str; 8] = [
    "REGENT_URL",
    "REGENT_TOKEN",
    "REGENT_CA_FILE",
    "REGENT_CERT_FILE",
    "REGENT_KEY_FILE",
    "REGENT_TLS_CERT",
    "REGENT_TLS_KEY",
    "REGENT_TLS_CA",
];
/// The most of a log's end that is shown, in bytes.
const LAST_WORDS: u64 = 1_000;

/// How long session processes may take to end after the keeper: their shims give them 2 s.
const SESSIONS_END_WITHIN: Duration = Duration::from_secs(6);

/// The keeper, and all children that were started, in order.
pub(super) struct Children {
    keeper: Child,
    lifeline: ProcessId,
    all: Vec<Started>,
}

struct Started {
    name: String,
    process: Child,
    log: PathBuf,
    ended: Option<ExitStatus>,
}

impl Started {
    /// Looks whether it has ended; says so once.
    fn ended_now(&mut self) -> Option<ExitStatus> {
        if self.ended.is_some() {
            return None;
        }
        self.ended = self.process.try_wait().ok().flatten();
        self.ended
    }

    /// The last line of its log: a process that gives up says why there.
    fn last_words(&self) -> String {
        let read = || {
            let mut log = File::open(&self.log)?;
            let length = log.metadata()?.len();
            log.seek(SeekFrom::Start(length.saturating_sub(LAST_WORDS)))?;
            let mut tail = Vec::new();
            log.read_to_end(&mut tail)?;
            std::io::Result::Ok(String::from_utf8_lossy(&tail).into_owned())
        };
        let tail = read().unwrap_or_default();
        tail.lines()
            .next_back()
            .unwrap_or("nothing in its log")
            .to_owned()
    }
}

impl Children {
    /// Starts the keeper: the process that all others watch. It ends with this one however that
    /// ends; and ended first, it lets this one see that nothing is left.
    pub(super) fn new() -> anyhow::Result<Self> {
        let dev = ProcessId::current().context("cannot read this process's own start time")?;
        let keeper = Command::new(std::env::current_exe()?)
            .args(["internal", "keeper", "--lifeline", &dev.to_string()])
            .stdin(Stdio::null())
            .process_group(0)
            .spawn()
            .context("the keeper cannot be started")?;
        let lifeline = ProcessId::of(keeper.id().context("the keeper ended at once")?)?;
        Ok(Self {
            keeper,
            lifeline,
            all: Vec::new(),
        })
    }

    /// What every process of this `dev` watches.
    pub(super) fn lifeline(&self) -> ProcessId {
        self.lifeline
    }

    /// Starts one, its output appended to a log file; gives its pid.
    pub(super) fn spawn(&mut self, name: &str, command: &[String], log: &Path) -> anyhow::Result<u32> {
        let output = OpenOptions::new().create(true).append(true).open(log)?;
        let (program, args) = command.split_first().expect("a command has a program");
        let mut command = Command::new(program);
        // Of another cluster, perhaps.
        for other in OTHERS {
            command.env_remove(other);
        }
        let child = command
            .args(args)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            // Ctrl-C is for `dev`, which ends its children in order.
            .process_group(0)
            .spawn()
            .with_context(|| format!("{name} cannot be started"))?;
        let pid = child.id().context("the child ended at once")?;
        self.all.push(Started {
            name: name.to_owned(),
            process: child,
            log: log.to_owned(),
            ended: None,
        });
        Ok(pid)
    }

    /// What ended since it was last asked, and its last words, if anything did.
    pub(super) fn first_that_ended(&mut self) -> Option<String> {
        self.all.iter_mut().find_map(|child| {
            let status = child.ended_now()?;
            Some(format!("{} ended ({status}): {}", child.name, child.last_words()))
        })
    }

    /// Says on stderr when one ends, until `end` is through.
    pub(super) async fn watch_until(&mut self, end: impl Future<Output = ()>) {
        let mut end = std::pin::pin!(end);
        loop {
            tokio::select! {
                () = &mut end => return,
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            while let Some(ended) = self.first_that_ended() {
                let told = anyhow::anyhow!("{ended}\ndev.json has the command that starts it again");
                crate::output::error(&told);
            }
        }
    }

    /// Ends all: the newest first, so that the agent takes its leave before the nodes go; then the
    /// keeper, and with it the session processes, which are those that live in `folder`.
    pub(super) async fn end(&mut self, folder: &Path) {
        let deadline = Instant::now() + END_WITHIN;
        for child in self.all.iter_mut().rev() {
            if child.ended.is_some() {
                continue;
            }
            if let Some(pid) = child
                .process
                .id()
                .and_then(|id| Pid::from_raw(i32::try_from(id).ok()?))
            {
                let _ = kill_process(pid, Signal::TERM);
            }
        }
        for child in self.all.iter_mut().rev() {
            let wait = tokio::time::timeout_at(deadline, child.process.wait());
            if wait.await.is_err() {
                let _ = child.process.kill().await;
            }
        }
        let _ = self.keeper.kill().await;
        let deadline = Instant::now() + SESSIONS_END_WITHIN;
        while anything_lives_in(folder) && Instant::now() < deadline {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// Whether a process of ours other than this one (by its arguments) or a session's (by its
/// environment) lives in the folder.
fn anything_lives_in(folder: &Path) -> bool {
    let has = |bytes: &[u8], needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
    let folder = folder.as_os_str().as_encoded_bytes();
    let own = std::env::current_exe().ok();
    let lives = |pid: u32| {
        let read = |file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let ours = own.is_some() && std::fs::read_link(format!("/proc/{pid}/exe")).ok() == own;
        let environment = read("environ");
        (ours && has(&read("cmdline"), folder))
            || (has(&environment, b"REGENT_SESSION=") && has(&environment, folder))
    };
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return false;
    };
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .any(|pid| pid != std::process::id() && ProcessId::of(pid).is_ok() && lives(pid))
}
