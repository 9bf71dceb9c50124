//! The children of `regent dev`: started, watched, ended.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::time::Instant;

/// How long a child may take to end after SIGTERM before it is killed: a node ends within 5 s.
const END_WITHIN: Duration = Duration::from_secs(8);
/// How often ended children are looked for.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// All children that were started, in order.
#[derive(Default)]
pub(super) struct Children(Vec<(String, Child, Option<ExitStatus>)>);

impl Children {
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
        self.0.push((name.to_owned(), child, None));
        Ok(pid)
    }

    /// What ended, in words, if anything did.
    pub(super) fn first_that_ended(&mut self) -> Option<String> {
        self.0.iter_mut().find_map(|(name, child, ended)| {
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
            for (name, child, ended) in &mut self.0 {
                if ended.is_none()
                    && let Some(status) = child.try_wait().ok().flatten()
                {
                    *ended = Some(status);
                    let told = anyhow::anyhow!("{name} ended ({status}); dev.json has the command that starts it again");
                    crate::output::error(&told);
                }
            }
        }
    }

    /// Ends all: the newest first, so that the agent takes its leave before the nodes go.
    pub(super) async fn end(&mut self) {
        let deadline = Instant::now() + END_WITHIN;
        for (_, child, ended) in self.0.iter_mut().rev() {
            if ended.is_some() {
                continue;
            }
            if let Some(pid) = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)) {
                let _ = kill_process(pid, Signal::TERM);
            }
        }
        for (_, child, _) in self.0.iter_mut().rev() {
            if tokio::time::timeout_at(deadline, child.wait()).await.is_err() {
                let _ = child.kill().await;
            }
        }
    }
}
