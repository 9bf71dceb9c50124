//! A program that wants to lead, as a user would write it with `LeaderElector`, which records when it may act.
//!
//! One line each to a file that only it writes, by the clock that all processes of the machine share:
//! `valid TOKEN AT UNTIL` whenever its guard lasts longer, `end TOKEN AT` before it gives the lease back,
//! `over TOKEN AT` when it learns that it is lost. It ends in good order on SIGTERM.
//!
//! It is a test of this binary that the others start as a process: so it is built whenever they are.

use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use regent_client::clock::boot_ms;
use regent_client::{Client, LeaderElector, Leadership, Standing};
use regent_types::LeaseName;
use tokio::signal::unix::{SignalKind, signal};

struct Record(std::fs::File);

impl Record {
    /// One write, so that a line is whole or not there.
    fn write(&mut self, line: &str) -> anyhow::Result<()> {
        self.0.write_all(format!("{line}\n").as_bytes())?;
        Ok(())
    }
}

/// The process of a candidate; whoever starts it adds `REGENT_URL` and `REGENT_TOKEN`.
pub(crate) fn command(name: &str, lease: &str, ttl_ms: u64, record: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this test has a program"));
    command
        .args(["--exact", "candidate::candidate", "--ignored", "--nocapture"])
        .env(
            "REGENT_CANDIDATE",
            format!("{name} {lease} {ttl_ms} {}", record.display()),
        );
    command
}

#[tokio::test]
#[ignore = "the program that the other tests start"]
async fn candidate() -> anyhow::Result<()> {
    let settings = std::env::var("REGENT_CANDIDATE").context("started by the other tests only")?;
    let settings: Vec<&str> = settings.splitn(4, ' ').collect();
    let [name, lease, ttl_ms, file] = settings[..] else {
        anyhow::bail!("REGENT_CANDIDATE is NAME LEASE TTL_MS FILE");
    };
    let client = Client::new(
        std::env::var("REGENT_URL")?.split(','),
        Some(std::env::var("REGENT_TOKEN")?),
    )?;
    let elector = LeaderElector::new(client, LeaseName::new(lease)?, name)
        .ttl(Duration::from_millis(ttl_ms.parse().context("the TTL")?));
    let mut record = Record(std::fs::OpenOptions::new().create(true).append(true).open(file)?);
    let mut stop = signal(SignalKind::terminate())?;
    loop {
        let leadership = tokio::select! {
            _ = stop.recv() => return Ok(()),
            leadership = elector.campaign() => match leadership {
                Ok(leadership) => leadership,
                Err(error) => {
                    eprintln!("{} the campaign failed: {error}", boot_ms());
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        tokio::select! {
            _ = stop.recv() => {
                record.write(&format!("end {} {}", leadership.token(), boot_ms()))?;
                leadership.resign().await?;
                return Ok(());
            }
            lost = lead(&leadership, &mut record) => lost?,
        }
    }
}

/// Until the lease is lost.
async fn lead(leadership: &Leadership, record: &mut Record) -> anyhow::Result<()> {
    let token = leadership.token();
    let mut changes = leadership.changes();
    loop {
        let standing = changes.borrow_and_update().clone();
        match standing {
            Standing::Valid { until } => record.write(&format!("valid {token} {} {until}", boot_ms()))?,
            Standing::Lapsed => {}
            Standing::Lost(why) => {
                eprintln!("{} token {token} is lost: {why}", boot_ms());
                return record.write(&format!("over {token} {}", boot_ms()));
            }
        }
        changes.changed().await?;
    }
}
