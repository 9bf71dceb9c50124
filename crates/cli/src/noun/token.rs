//! `regent token`.

use clap::Subcommand;
use regent_client::Client;
use regent_types::auth::{ApiToken, CreateToken};
use regent_types::duration::Span;
use regent_types::{TokenId, UserName};

use crate::output::{self, Format, or_dash};

/// See the variants.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a token; shown once.
    Create {
        /// Whose; one's own by default.
        #[arg(long)]
        user: Option<UserName>,
        /// For people.
        #[arg(long, default_value = "")]
        description: String,
        /// How long it lasts; for ever by default.
        #[arg(long)]
        expires_in: Option<Span>,
    },
    /// List tokens; without their secrets.
    List,
    /// Revoke a token.
    Revoke {
        /// Its id.
        id: TokenId,
    },
}

const COLUMNS: [&str; 5] = ["ID", "FOR", "ROLE", "EXPIRES AT", "DESCRIPTION"];

fn row(t: &ApiToken) -> Vec<String> {
    let user = t.user.as_ref().map(|u| format!("user:{u}"));
    let subject = user.or_else(|| t.agent_id.as_ref().map(|a| format!("agent:{a}")));
    vec![
        t.id.to_string(),
        or_dash(subject.as_ref()),
        t.role.as_str().to_owned(),
        or_dash(t.expires_at.as_ref()),
        t.description.clone(),
    ]
}

/// Runs it.
pub(crate) async fn run(client: &Client, command: Command, format: Format) -> anyhow::Result<()> {
    match command {
        Command::Create {
            user,
            description,
            expires_in,
        } => show_new(
            format,
            &client
                .create_token(&CreateToken {
                    user,
                    description,
                    expires_in,
                })
                .await?,
        ),
        Command::List => output::records(format, &client.all_tokens().await?, &COLUMNS, row),
        Command::Revoke { id } => Ok(client.delete_token(&id).await?),
    }
}

/// Prints a new token: in a table's place only the secret, so that it can be taken up by a script.
pub(super) fn show_new(format: Format, token: &ApiToken) -> anyhow::Result<()> {
    match format {
        Format::Json => output::json(token),
        Format::Table => {
            output::line(
                token
                    .token
                    .as_deref()
                    .unwrap_or("(the secret was shown when the token was first made)"),
            );
            Ok(())
        }
    }
}
