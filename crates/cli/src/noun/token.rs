//! `regent token`.

use clap::Subcommand;
use regent_client::Client;
use regent_types::auth::{ApiToken, CreateToken};
use regent_types::duration::Span;
use regent_types::{TokenId, UserName};

use crate::output::{self, Format, or_dash};

/// How long a join token lasts when nothing else is said.
pub(super) const JOIN_FOR: Span = Span(60 * 60 * 1_000);

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
        /// A join token instead, spent by the one node or agent that comes with it: `node`, or `agent:ID`, where ID
        /// may end with *. It lasts an hour unless --expires-in says otherwise, and at most a day.
        #[arg(long, value_name = "WHAT", conflicts_with = "user")]
        join: Option<String>,
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
    let subject = subject.or_else(|| t.join.as_ref().map(|what| format!("join:{what}")));
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
            join,
        } => show_new(
            format,
            &client
                .create_token(&CreateToken {
                    user,
                    description,
                    expires_in: expires_in.or(join.is_some().then_some(JOIN_FOR)),
                    join,
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
