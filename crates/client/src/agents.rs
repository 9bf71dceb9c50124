//! Agents.

use regent_types::AgentId;
use regent_types::agent::{Agent, AgentList, DrainAgent, RegisterAgent};
use regent_types::auth::ApiToken;
use regent_types::command::{Command, CreateCommand};

use crate::call::{Call, Repeat};
use crate::page::{Page, fetch_all};
use crate::{Client, Error};

impl Client {
    /// Fetches a token for an agent; with a join token as this client's token, which is spent by it.
    pub async fn enrol_agent(&self, id: &AgentId) -> Result<ApiToken, Error> {
        self.fetch(Call::post(["agents", id.as_str(), "token"]).repeat(Repeat::NotInDoubt))
            .await
    }

    /// Makes an agent known, or tells what changed about it.
    pub async fn register_agent(&self, agent: &RegisterAgent) -> Result<Agent, Error> {
        // No key: agents register at each reconnect, and doing it twice is doing it once.
        self.fetch(
            Call::post(["agents", "register"])
                .body(agent)
                .repeat(Repeat::Freely),
        )
        .await
    }

    /// One page of the agents.
    pub async fn agents(&self, page: &Page) -> Result<AgentList, Error> {
        self.fetch(Call::get(["agents"]).query(page.query())).await
    }

    /// All agents.
    pub async fn all_agents(&self) -> Result<Vec<Agent>, Error> {
        fetch_all(|page| async move {
            let list = self.agents(&page).await?;
            Ok((list.agents, list.next_cursor))
        })
        .await
    }

    /// One agent.
    pub async fn agent(&self, id: &AgentId) -> Result<Agent, Error> {
        self.fetch(Call::get(["agents", id.as_str()])).await
    }

    /// Removes an agent. With live sessions only by `force`, which marks them lost.
    pub async fn delete_agent(&self, id: &AgentId, force: bool) -> Result<(), Error> {
        let force = force.then(|| ("force", "true".to_owned()));
        self.send(Call::delete(["agents", id.as_str()]).query(force))
            .await
            .map(drop)
    }

    /// No new sessions; those that run stay.
    pub async fn cordon_agent(&self, id: &AgentId) -> Result<Agent, Error> {
        self.fetch(Call::post(["agents", id.as_str(), "cordon"])).await
    }

    /// New sessions again.
    pub async fn uncordon_agent(&self, id: &AgentId) -> Result<Agent, Error> {
        self.fetch(Call::post(["agents", id.as_str(), "uncordon"])).await
    }

    /// No new sessions; those that run are waited for, or stopped at the deadline.
    pub async fn drain_agent(&self, id: &AgentId, drain: &DrainAgent) -> Result<Agent, Error> {
        self.fetch(Call::post(["agents", id.as_str(), "drain"]).body(drain))
            .await
    }

    /// Gives an agent something to do.
    pub async fn create_command(&self, id: &AgentId, command: &CreateCommand) -> Result<Command, Error> {
        self.fetch(Call::post(["agents", id.as_str(), "commands"]).body(command))
            .await
    }
}
