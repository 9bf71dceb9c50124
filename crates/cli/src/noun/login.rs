//! `regent login`.

use std::path::PathBuf;

use regent_client::Client;

use crate::output::{self, Format};

/// Flags of `regent login`.
#[derive(Debug, clap::Args)]
pub(crate) struct LoginArgs {
    /// The user's name.
    user: String,
    /// File with the password, readable by its owner only; asked for without it.
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
}

/// Runs it.
pub(crate) async fn run(client: &Client, args: LoginArgs, format: Format) -> anyhow::Result<()> {
    let password = super::password(args.password_file.as_deref(), "Password: ")?;
    let answer = client.login(&args.user, &password).await?;
    match format {
        Format::Json => output::json(&answer),
        Format::Table => {
            output::line(format!("export REGENT_TOKEN={}", answer.token));
            Ok(())
        }
    }
}
