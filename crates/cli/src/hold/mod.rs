//! `regent lease hold`: a program that runs only while a lease is held.

use std::ffi::OsString;
use std::process::ExitCode;

use regent_types::LeaseName;
use regent_types::duration::Span;

use crate::args::Global;

/// Flags of `regent lease hold`.
#[derive(Debug, clap::Args)]
pub(crate) struct HoldArgs {
    /// The name of the lease.
    name: LeaseName,
    /// How long the lease lasts without a renewal.
    #[arg(long, default_value = "5s")]
    ttl: Span,
    /// How long to wait for the lease; for ever without this.
    #[arg(long)]
    wait: Option<Span>,
    /// Who holds it, for people; by default HOSTNAME/PID.
    #[arg(long)]
    holder: Option<String>,
    /// The program and its arguments.
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

/// Runs it.
pub(crate) fn run(_args: HoldArgs, _global: &Global) -> anyhow::Result<ExitCode> {
    anyhow::bail!("not yet")
}
