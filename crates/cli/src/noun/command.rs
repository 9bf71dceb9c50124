//! `regent command`.

use clap::Subcommand;
use regent_client::{Client, CommandFilter};
use regent_types::command::{Command as Record, CommandStatus};
use regent_types::{AgentId, CommandId, SessionName};

use crate::output::{self, Format, or_dash};

/// See the variants.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List commands, oldest first.
    List {
        /// Only this agent's.
        #[arg(long)]
        agent: Option<AgentId>,
        /// Only those about this session.
        #[arg(long)]
        session: Option<SessionName>,
        /// Only those with this status.
        #[arg(long, value_parser = status)]
        status: Option<CommandStatus>,
    },
    /// Show a command.
    Get {
        /// Its id.
        id: CommandId,
    },
    /// Call a command off, before its agent has taken it.
    Cancel {
        /// Its id.
        id: CommandId,
    },
    /// Run a failed, cancelled or expired command again.
    Retry {
        /// Its id.
        id: CommandId,
    },
}

fn status(text: &str) -> Result<CommandStatus, String> {
    serde_json::from_value(serde_json::Value::from(text)).map_err(|_| {
        "there is no such status; there are pending, sent, acknowledged, completed, failed, cancelled, expired".to_owned()
    })
}

const COLUMNS: [&str; 8] = [
    "ID", "AGENT", "SESSION", "ACTION", "STATUS", "RUN", "ATTEMPTS", "ERROR",
];

fn row(c: &Record) -> Vec<String> {
    vec![
        c.command_id.to_string(),
        c.agent_id.to_string(),
        or_dash(c.session_id.as_ref()),
        c.action.clone(),
        c.status.as_str().to_owned(),
        c.run.to_string(),
        c.attempts.to_string(),
        or_dash(c.error.as_ref()),
    ]
}

/// Runs it.
pub(crate) async fn run(client: &Client, command: Command, format: Format) -> anyhow::Result<()> {
    let one = |record: Record| output::record(format, &record, &COLUMNS, row);
    match command {
        Command::List {
            agent,
            session,
            status,
        } => {
            let filter = CommandFilter {
                agent,
                session,
                status,
            };
            output::records(format, &client.all_commands(&filter).await?, &COLUMNS, row)
        }
        Command::Get { id } => one(client.command(&id).await?),
        Command::Cancel { id } => one(client.cancel_command(&id).await?),
        Command::Retry { id } => one(client.retry_command(&id).await?),
    }
}
