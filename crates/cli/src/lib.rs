//! The command line of `regent`: one binary for nodes, agents, operators and users.
//!
//! A command either runs something ([`server`], [`agent`], [`dev`]) or asks a cluster through
//! `regent-client` and prints what it says ([`noun`]). It exits 0 on success, 1 on a refused or
//! failed request (the problem on stderr), 2 on wrong usage; `lease hold` exits as its program does ([`hold`]).

mod agent;
mod agent_config;
mod args;
mod certificates;
mod config;
mod debug;
mod dev;
#[doc(hidden)]
pub mod fuzzing;
mod hold;
mod internal;
mod join;
mod lifeline;
mod logging;
mod manual;
mod node_id;
mod noun;
mod output;
mod recovery;
mod runtimes;
mod secrets;
mod server;
mod supervisor;
mod traced;

use std::process::ExitCode;

use clap::Parser as _;

use args::{Args, Command};
use traced::Traced;

/// The request was refused or failed.
const FAILED: u8 = 1;
/// The command line or the configuration is wrong.
const USAGE: u8 = 2;

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    regent_tls::install_provider();
    match Args::try_parse() {
        Ok(args) => run(args).unwrap_or_else(|error| {
            output::error(&error);
            ExitCode::from(if error.is::<config::UsageError>() {
                USAGE
            } else {
                FAILED
            })
        }),
        Err(error) => {
            // clap prints help to stdout and succeeds, usage errors to stderr.
            let code = if error.use_stderr() { USAGE } else { 0 };
            ExitCode::from(if error.print().is_ok() { code } else { FAILED })
        }
    }
}

fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = args.global.config.as_deref();
    match args.command {
        // Synchronous: the shim of a session must cost next to nothing.
        Command::Internal { command } => Ok(internal::run(command)),
        Command::Server(flags) => {
            logging::start(args.global.log_format)?;
            let config = config::load(config, *flags)?;
            let traced = Traced::node(&config);
            threads()?.block_on(traced.around(server::run(config)))
        }
        Command::Agent(noun::agent::Command::Run(mut flags)) => {
            logging::start(args.global.log_format)?;
            flags.take_global(&args.global);
            let config = agent_config::AgentConfig::load(config, *flags)?;
            let traced = Traced::agent(&config);
            threads()?.block_on(traced.around(agent::run(config)))
        }
        Command::Ca(ca) => certificates::make_ca(&ca, args.global.output).map(|()| ExitCode::SUCCESS),
        Command::Cert(command) => certificates::make(command, args.global.output).map(|()| ExitCode::SUCCESS),
        Command::Completion(args) => manual::completion(&args).map(|()| ExitCode::SUCCESS),
        Command::Man(args) => manual::pages(&args).map(|()| ExitCode::SUCCESS),
        // It has exit codes of its own.
        Command::Lease(noun::lease::Command::Hold(hold)) => Ok(hold::run(hold, &args.global)),
        // `dev` only waits for others: one thread is enough.
        Command::Dev(flags) => one_thread()?.block_on(dev::run(flags)),
        Command::Debug(flags) => {
            one_thread()?.block_on(debug::run(flags, &args.global))?;
            Ok(ExitCode::SUCCESS)
        }
        command => {
            one_thread()?.block_on(noun::run(command, &args.global))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn threads() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()
}

fn one_thread() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}
