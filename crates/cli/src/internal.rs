//! Programs that other commands start: the shim of a session and the demo's server.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use regent_agent::runtime::process;

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
}

/// Runs it.
pub(crate) fn run(command: Command) -> ExitCode {
    match command {
        Command::Shim { spec } => process::shim_main(&spec),
        Command::Demo => process::demo_main(),
    }
}
