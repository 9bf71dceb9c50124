//! Programs that other commands start: the shim of a session, the demo's server, the keeper of `dev`, the
//! watchdog of `lease hold`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use regent_agent::lifeline::{Lifeline, ProcessId};
use regent_agent::runtime::process::{demo, shim};

use crate::hold::{terminal, watchdog};

/// See the variants.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Stands over one session's process group: starts it, waits, records how it ended.
    Shim {
        /// What to start.
        #[arg(long)]
        spec: PathBuf,
    },
    /// The program of the built-in template `demo`.
    Demo,
    /// What every process of `regent dev` watches: it ends with `dev`, or a moment before it.
    Keeper {
        /// The `regent dev` (`PID:STARTTIME`).
        #[arg(long)]
        lifeline: ProcessId,
    },
    /// The parent of the program of `regent lease hold`: ends it before the guard of the lease is over.
    Watchdog(watchdog::WatchdogArgs),
    /// Gives the place before the terminal from this process's group to another.
    Terminal {
        /// The number of that group.
        #[arg(long)]
        group: i32,
    },
}

/// Runs it.
pub(crate) fn run(command: Command) -> ExitCode {
    match command {
        Command::Shim { spec } => shim::shim_main(&spec),
        Command::Demo => demo::demo_main(),
        Command::Keeper { lifeline } => {
            let ended = Lifeline::open(lifeline).and_then(|dev| dev.wait());
            if ended.is_ok() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Command::Watchdog(args) => watchdog::main(&args),
        Command::Terminal { group } => terminal::give_back(group),
    }
}
