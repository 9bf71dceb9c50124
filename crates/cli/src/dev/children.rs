//! The children of `regent dev`: started, watched, ended. Invariant: nothing that they started is
//! left when `end` returns, and nothing for long when this process is killed.

use std::fs::OpenOptions;
use std::path::Path;
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

/// How long session processes may take to end after the keeper: their shims give them 2 s.
const SESSIONS_END_WITHIN: Duration = Duration::from_secs(6);

/// The keeper, and all children that were started, in order.
pub(super) struct Children {
    keeper: Child,
    lifeline: ProcessId,
    all: Vec<(String, Child, Option<ExitStatus>)>,
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
        let log = OpenOptions::new().create(true).append(true).open(log)?;
        let (program, args) = command.split_first().expect("a command has a program");
        let child = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C is for `dev`, which ends its children in order.
            .process_group(0)
            .env_remove("REGENT_URL")
            .env_remove("REGENT_TOKEN")
            .spawn()
            .with_context(|| format!("{name} cannot be started"))?;
        let pid = child.id().context("the child ended at once")?;
        self.all.push((name.to_owned(), child, None));
        Ok(pid)
    }

    /// What ended, in words, if anything did.
    pub(super) fn first_that_ended(&mut self) -> Option<String> {
        self.all.iter_mut().find_map(|(name, child, ended)| {
            if ended.is_none() {
                *ended = child.try_wait().ok().flatten();
            }
            ended.map(|status| format!("{name} ended ({status})"))
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
            for (name, child, ended) in &mut self.all {
                if ended.is_none()
                    && let Some(status) = child.try_wait().ok().flatten()
                {
                    *ended = Some(status);
                    let told = anyhow::anyhow!(
                        "{name} ended ({status}); dev.json has the command that starts it again"
                    );
                    crate::output::error(&told);
                }
            }
        }
    }

    /// Ends all: the newest first, so that the agent takes its leave before the nodes go; then the
    /// keeper, and with it the session processes, which are those that live in `folder`.
    pub(super) async fn end(&mut self, folder: &Path) {
        let deadline = Instant::now() + END_WITHIN;
        for (_, child, ended) in self.all.iter_mut().rev() {
            if ended.is_some() {
                continue;
            }
            if let Some(pid) = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)) {
                let _ = kill_process(pid, Signal::TERM);
            }
        }
        for (_, child, _) in self.all.iter_mut().rev() {
            if tokio::time::timeout_at(deadline, child.wait()).await.is_err() {
                let _ = child.kill().await;
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
