//! What shells and `man` know of the commands, made from the same definitions as the command line itself.

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::args::Args;

/// Flags of `regent completion`.
#[derive(Debug, clap::Args)]
pub(crate) struct CompletionArgs {
    /// For which shell.
    shell: Shell,
}

/// Flags of `regent man`.
#[derive(Debug, clap::Args)]
pub(crate) struct ManArgs {
    /// The folder for the pages, one for each command; it is made when it is not there.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Prints the script that a shell completes commands by.
pub(crate) fn completion(args: &CompletionArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Args::command(), "regent", &mut script);
    std::io::stdout()
        .write_all(&script)
        .context("the completion script cannot be printed")
}

/// Writes the manual.
pub(crate) fn pages(args: &ManArgs) -> anyhow::Result<()> {
    let write = || {
        std::fs::create_dir_all(&args.out)?;
        clap_mangen::generate_to(Args::command(), &args.out)
    };
    write().with_context(|| format!("the pages cannot be written to {}", args.out.display()))
}
