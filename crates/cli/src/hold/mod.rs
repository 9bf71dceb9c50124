//! `regent lease hold`: a program that runs only while a lease is held.
//!
//! - `holder` is `hold` itself: campaigns, keeps the lease, tells the watchdog until when its guard lasts.
//! - `watchdog` is a process of its own and the parent of the program: it ends the program in time, also when
//!   `hold` was killed or is frozen. `plan` says when: pure. `wire` is what the two tell each other.
//! - `group` is the program's process group, `terminal` its place before the terminal.
//!
//! Invariant: the program's process group has ended before the guard of the lease is over, whatever happens to
//! `hold`, to the watchdog, or to any one node of the cluster. What leaves the group (`setsid`), what the program
//! asked others to do, and a watchdog and a `hold` that are frozen together are not covered: that is what
//! the token is for (docs/elections.md).

pub(crate) mod fuzzing;
mod group;
mod holder;
mod plan;
pub(crate) mod terminal;
pub(crate) mod watchdog;
mod wire;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use regent_client::LeaderElector;
use regent_types::LeaseName;
use regent_types::duration::Span;

use crate::args::Global;
use crate::{noun, output};

/// The lease was lost, and the program was ended for it.
const LOST: u8 = 124;
/// The lease was not acquired in time, or something of `hold` itself failed.
const FAILED: u8 = 125;
/// The program was found and cannot be executed.
const NOT_EXECUTABLE: u8 = 126;
/// The program was not found.
const NOT_FOUND: u8 = 127;
/// A process that a signal has ended: this and its number.
const SIGNALLED: i32 = 128;

/// How long it waits for the lease before it says so.
const ANNOUNCE_AFTER: Duration = Duration::from_secs(1);

/// What `--help` says beside the flags.
const ABOUT: &str = "\
The program is ended (TERM, then KILL, its whole process group) before the lease can be another's: also when the lease
is lost, and when `hold` itself is killed or frozen, by a watchdog of its own. TERM, INT, HUP, QUIT, USR1 and USR2 are
passed on to it. The API token comes from the variable REGENT_TOKEN.

Exit codes:
  the program's own, or 128 + N when signal N ended it
  124  the lease was lost, and the program was ended for it
  125  the lease was not acquired within --wait (0 asks once), or `hold` itself failed
  126  the program cannot be executed
  127  the program was not found
  2    wrong usage";

/// Flags of `regent lease hold`.
#[derive(Debug, clap::Args)]
#[command(after_help = ABOUT)]
pub(crate) struct HoldArgs {
    /// The name of the lease.
    name: LeaseName,
    /// How long the lease lasts without a renewal. Below 3 s, the loss of a node may end the program.
    #[arg(long, default_value = "5s")]
    ttl: Span,
    /// How long to wait for the lease; for ever without this.
    #[arg(long)]
    wait: Option<Span>,
    /// Who holds it, for people; by default HOSTNAME/PID.
    #[arg(long)]
    holder: Option<String>,
    /// The program and its arguments. It finds `REGENT_LEASE_NAME` and `REGENT_LEASE_TOKEN` in its environment.
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

/// Runs it; what fails here is not the program's code.
pub(crate) fn run(args: HoldArgs, global: &Global) -> ExitCode {
    let code = crate::one_thread()
        .context("cannot start")
        .and_then(|runtime| runtime.block_on(hold(args, global)));
    ExitCode::from(code.unwrap_or_else(|error| {
        output::error(&error);
        FAILED
    }))
}

async fn hold(args: HoldArgs, global: &Global) -> anyhow::Result<u8> {
    let mut signals = holder::Signals::new().context("cannot take signals")?;
    let holder = args.holder.unwrap_or_else(default_holder);
    let ttl = Duration::from_millis(args.ttl.millis());
    let name = args.name.clone();
    let mut elector = LeaderElector::new(noun::client(global)?, args.name, holder).ttl(ttl);
    if let Some(wait) = args.wait {
        elector = elector.wait(wait.duration());
    }
    // Silence for ever would look the same for a lease that is held and a URL that is wrong.
    let announce = async {
        tokio::time::sleep(ANNOUNCE_AFTER).await;
        output::note(&format!(
            "waiting for lease {name}; `regent lease get {name}` shows who holds it"
        ));
        std::future::pending::<std::convert::Infallible>().await
    };
    let leadership = tokio::select! {
        campaigned = elector.campaign() => campaigned.map_err(|error| noun::with_hint(error.into()))?,
        never = announce => match never {},
        // The campaign ends with its connection.
        signal = signals.next() => return Ok(u8::try_from(SIGNALLED + signal).unwrap_or(FAILED)),
    };
    let (code, leadership) = holder::run(leadership, ttl, &args.program, &mut signals).await;
    // After the end of the program. On an error the lease ends by its TTL.
    if let Err(error) = leadership.resign().await {
        output::error(&anyhow::Error::new(error).context("the lease was not given back"));
    }
    code
}

fn default_holder() -> String {
    let name = rustix::system::uname();
    format!("{}/{}", name.nodename().to_string_lossy(), std::process::id())
}
