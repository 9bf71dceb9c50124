//! Commands.

use regent_types::command::{Command, CommandList, CommandStatus};
use regent_types::{AgentId, CommandId, SessionName};

use crate::call::Call;
use crate::page::{Page, fetch_all};
use crate::{Client, Error};

/// Which commands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CommandFilter {
    /// Only this agent's.
    pub agent: Option<AgentId>,
    /// Only those about this session.
    pub session: Option<SessionName>,
    /// Only those in this status.
    pub status: Option<CommandStatus>,
}

impl CommandFilter {
    fn query(&self) -> Vec<(&'static str, String)> {
        [
            ("agent", self.agent.as_ref().map(ToString::to_string)),
            ("session", self.session.as_ref().map(ToString::to_string)),
            ("status", self.status.map(|status| status.as_str().to_owned())),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
        .collect()
    }
}

impl Client {
    /// One page of the commands that match, oldest first.
    pub async fn commands(&self, filter: &CommandFilter, page: &Page) -> Result<CommandList, Error> {
        self.fetch(Call::get(["commands"]).query(filter.query()).query(page.query()))
            .await
    }

    /// All commands that match, oldest first.
    pub async fn all_commands(&self, filter: &CommandFilter) -> Result<Vec<Command>, Error> {
        fetch_all(|page| async move {
            let list = self.commands(filter, &page).await?;
            Ok((list.commands, list.next_cursor))
        })
        .await
    }

    /// One command.
    pub async fn command(&self, id: &CommandId) -> Result<Command, Error> {
        self.fetch(Call::get(["commands", id.as_str()])).await
    }

    /// Calls a command off, if the agent has not taken it yet.
    pub async fn cancel_command(&self, id: &CommandId) -> Result<Command, Error> {
        self.fetch(Call::post(["commands", id.as_str(), "cancel"])).await
    }

    /// Has a command that failed, was cancelled or expired done again, as a new run.
    pub async fn retry_command(&self, id: &CommandId) -> Result<Command, Error> {
        self.fetch(Call::post(["commands", id.as_str(), "retry"])).await
    }
}
