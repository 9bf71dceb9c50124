//! `regent agent`, apart from `run` ([`crate::agent`]).

use clap::Subcommand;
use regent_client::Client;
use regent_types::agent::{Agent, AgentStatus, Capacity, DrainAgent, RegisterAgent, SchedulingState};
use regent_types::duration::Span;
use regent_types::{AgentId, ReplicaName};

use crate::agent_config::AgentConfig;
use crate::output::{self, Format, or_dash};

/// See the variants.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run an agent on this machine.
    Run(Box<AgentConfig>),
    /// List agents.
    List,
    /// Show an agent.
    Get {
        /// Its id.
        id: AgentId,
    },
    /// Make an agent known, so that it can have a token; what it can carry it says itself when it connects.
    Register {
        /// Its id.
        id: AgentId,
        /// What placement calls it.
        #[arg(long, value_name = "P", default_value = "")]
        platform: String,
    },
    /// No new sessions; those that run stay.
    Cordon {
        /// Its id.
        id: AgentId,
    },
    /// New sessions again.
    Uncordon {
        /// Its id.
        id: AgentId,
    },
    /// No new sessions; those that run are waited for.
    Drain {
        /// Its id.
        id: AgentId,
        /// Stop what still runs after this long.
        #[arg(long)]
        deadline: Option<Span>,
    },
    /// Forget an agent.
    Delete {
        /// Its id.
        id: AgentId,
        /// Even with live sessions: they become lost.
        #[arg(long)]
        force: bool,
    },
    /// Make a token for an agent; shown once.
    Token {
        /// Its id.
        id: AgentId,
    },
}

const COLUMNS: [&str; 9] = [
    "ID",
    "PLATFORM",
    "REGION",
    "STATUS",
    "SCHEDULING",
    "SESSIONS",
    "LEADER",
    "NODE",
    "LAST HEARTBEAT",
];

fn row(a: &Agent) -> Vec<String> {
    let status = match a.status {
        AgentStatus::Online => "online",
        AgentStatus::Offline => "offline",
    };
    let scheduling = match a.scheduling {
        SchedulingState::Eligible => "eligible",
        SchedulingState::Cordoned => "cordoned",
        SchedulingState::Draining => "draining",
    };
    vec![
        a.agent_id.to_string(),
        a.platform.clone(),
        a.region.clone(),
        status.to_owned(),
        scheduling.to_owned(),
        format!(
            "{}/{}",
            a.allocated.sessions,
            or_dash(a.capacity.max_sessions.as_ref())
        ),
        leader(a),
        or_dash(a.node.as_ref()),
        or_dash(a.last_heartbeat.as_ref()),
    ]
}

/// The replica that leads; a dash for an agent without replicas.
fn leader(a: &Agent) -> String {
    let named = |name: &ReplicaName| !name.as_str().is_empty();
    match a.replicas.iter().find(|replica| replica.leader) {
        Some(leader) if named(&leader.name) => leader.name.to_string(),
        None if a.replicas.iter().any(|replica| named(&replica.name)) => "none".to_owned(),
        Some(_) | None => "-".to_owned(),
    }
}

/// Runs it.
pub(crate) async fn run(client: &Client, command: Command, format: Format) -> anyhow::Result<()> {
    let one = |agent: Agent| output::record(format, &agent, &COLUMNS, row);
    match command {
        Command::Run(_) => unreachable!("`agent run` does not ask a cluster and is taken before"),
        Command::List => output::records(format, &client.all_agents().await?, &COLUMNS, row),
        Command::Get { id } => one(client.agent(&id).await?),
        Command::Register { id, platform } => {
            let agent = RegisterAgent {
                agent_id: id,
                platform,
                region: String::new(),
                capacity: Capacity::default(),
                labels: std::collections::BTreeMap::new(),
                metadata: serde_json::Value::Null,
            };
            one(client.register_agent(&agent).await?)
        }
        Command::Cordon { id } => one(client.cordon_agent(&id).await?),
        Command::Uncordon { id } => one(client.uncordon_agent(&id).await?),
        Command::Drain { id, deadline } => one(client.drain_agent(&id, &DrainAgent { deadline }).await?),
        Command::Delete { id, force } => {
            client.delete_agent(&id, force).await?;
            Ok(())
        }
        Command::Token { id } => super::token::show_new(format, &client.create_agent_token(&id).await?),
    }
}
