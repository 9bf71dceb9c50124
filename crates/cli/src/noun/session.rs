//! `regent session`.

use std::time::Duration;

use clap::Subcommand;
use futures::StreamExt as _;
use regent_client::{Client, EventFilter, SessionFilter};
use regent_types::duration::Span;
use regent_types::session::{
    CreateSession, PatchSession, Placement, Resources, Session, SessionAction, SessionState, WhenFull,
};
use regent_types::{AgentId, Cpu, Memory, SessionName, TemplateName, UserName};

use crate::output::{self, Format, or_dash};

/// How often `--wait` looks.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// See the variants.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a session.
    Create(Box<Create>),
    /// List sessions.
    List {
        /// Only this user's.
        #[arg(long)]
        user: Option<UserName>,
        /// Only those in this state.
        #[arg(long, value_parser = state)]
        state: Option<SessionState>,
        /// Only those of this agent.
        #[arg(long)]
        agent: Option<AgentId>,
        /// Only those with this tag.
        #[arg(long)]
        tag: Option<String>,
    },
    /// Show a session.
    Get {
        /// Its name.
        name: SessionName,
    },
    /// End a session.
    #[command(alias = "delete")]
    Stop {
        /// Its name.
        name: SessionName,
    },
    /// Put a session to sleep.
    Hibernate {
        /// Its name.
        name: SessionName,
    },
    /// Wake a session.
    Wake {
        /// Its name.
        name: SessionName,
    },
    /// Change tags and limits of a session.
    Set {
        /// Its name.
        name: SessionName,
        /// All tags, replacing the old ones; may be repeated.
        #[arg(long = "tag")]
        tags: Vec<String>,
        /// Hibernate after this long without activity.
        #[arg(long)]
        idle_timeout: Option<Span>,
        /// End after this long.
        #[arg(long)]
        max_duration: Option<Span>,
    },
    /// Follow what happens to a session, or to all.
    Watch {
        /// Its name.
        name: Option<SessionName>,
    },
}

/// Flags of `regent session create`.
#[derive(Debug, clap::Args)]
pub(crate) struct Create {
    /// What to run; `regent template list` shows what there is.
    template: TemplateName,
    /// Whose session; the caller's by default.
    #[arg(long)]
    user: Option<UserName>,
    /// Such as 500m or 2.
    #[arg(long)]
    cpu: Option<Cpu>,
    /// Such as 512Mi or 2Gi.
    #[arg(long)]
    memory: Option<Memory>,
    /// A word to find it by; may be repeated.
    #[arg(long = "tag")]
    tags: Vec<String>,
    /// Keep the home folder when the session ends.
    #[arg(long)]
    persistent_home: bool,
    /// Hibernate after this long without activity.
    #[arg(long)]
    idle_timeout: Option<Span>,
    /// End after this long.
    #[arg(long)]
    max_duration: Option<Span>,
    /// Only on agents of this platform.
    #[arg(long)]
    platform: Option<String>,
    /// Only on agents in this region.
    #[arg(long)]
    region: Option<String>,
    /// Only on agents with this label, K=V; may be repeated.
    #[arg(long = "label", value_parser = label)]
    labels: Vec<(String, String)>,
    /// Wait for room instead of being refused.
    #[arg(long)]
    queue: bool,
    /// Wait until it runs; fails when it cannot.
    #[arg(long)]
    wait: bool,
}

fn state(text: &str) -> Result<SessionState, String> {
    SessionState::ALL
        .into_iter()
        .find(|s| s.as_str() == text)
        .ok_or_else(|| {
            let all: Vec<&str> = SessionState::ALL.iter().map(|s| s.as_str()).collect();
            format!("there is no such state; there are {}", all.join(", "))
        })
}

fn label(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .ok_or_else(|| format!("{text:?} is not K=V"))
}

const COLUMNS: [&str; 7] = ["NAME", "USER", "TEMPLATE", "STATE", "AGENT", "URL", "REASON"];

fn row(s: &Session) -> Vec<String> {
    vec![
        s.name.to_string(),
        s.user.to_string(),
        s.template.to_string(),
        s.state.as_str().to_owned(),
        or_dash(s.agent_id.as_ref()),
        or_dash(s.status.url.as_ref()),
        s.reason.clone(),
    ]
}

/// Runs it.
pub(crate) async fn run(client: &Client, command: Command, format: Format) -> anyhow::Result<()> {
    match command {
        Command::Create(create) => {
            let wait = create.wait;
            let mut session = client.create_session(&body(*create)).await?;
            if wait {
                session = until_running(client, session).await?;
            }
            output::record(format, &session, &COLUMNS, row)
        }
        Command::List {
            user,
            state,
            agent,
            tag,
        } => {
            let filter = SessionFilter {
                user,
                state,
                agent,
                tag,
            };
            output::records(format, &client.all_sessions(&filter).await?, &COLUMNS, row)
        }
        Command::Get { name } => output::record(format, &client.session(&name).await?, &COLUMNS, row),
        Command::Stop { name } => action(format, &client.stop_session(&name).await?),
        Command::Hibernate { name } => action(format, &client.hibernate_session(&name).await?),
        Command::Wake { name } => action(format, &client.wake_session(&name).await?),
        Command::Set {
            name,
            tags,
            idle_timeout,
            max_duration,
        } => {
            let patch = PatchSession {
                tags: (!tags.is_empty()).then_some(tags),
                idle_timeout: idle_timeout.map(Some),
                max_session_duration: max_duration.map(Some),
            };
            output::record(
                format,
                &client.patch_session(&name, &patch, None).await?,
                &COLUMNS,
                row,
            )
        }
        Command::Watch { name } => watch(client, name, format).await,
    }
}

fn body(create: Create) -> CreateSession {
    CreateSession {
        user: create.user,
        template: create.template,
        resources: Resources {
            memory: create.memory,
            cpu: create.cpu,
        },
        persistent_home: create.persistent_home,
        idle_timeout: create.idle_timeout,
        max_session_duration: create.max_duration,
        tags: create.tags,
        placement: Placement {
            platform: create.platform,
            region: create.region,
            labels: create.labels.into_iter().collect(),
        },
        when_full: if create.queue {
            WhenFull::Queue
        } else {
            WhenFull::Reject
        },
    }
}

/// Transitional states have deadlines of their own, so this ends too.
async fn until_running(client: &Client, mut session: Session) -> anyhow::Result<Session> {
    loop {
        if session.state == SessionState::Running {
            return Ok(session);
        }
        anyhow::ensure!(
            !session.state.is_final() && session.state != SessionState::Terminating,
            "session {} is {}: {}",
            session.name,
            session.state.as_str(),
            session.reason
        );
        tokio::time::sleep(LOOK_EVERY).await;
        session = client.session(&session.name).await?;
    }
}

fn action(format: Format, action: &SessionAction) -> anyhow::Result<()> {
    output::record(format, action, &["NAME", "COMMAND", "MESSAGE"], |a| {
        vec![
            a.name.to_string(),
            or_dash(a.command_id.as_ref()),
            a.message.clone(),
        ]
    })
}

async fn watch(client: &Client, name: Option<SessionName>, format: Format) -> anyhow::Result<()> {
    if let Some(name) = &name {
        // Nothing would ever happen to a session that does not exist.
        client.session(name).await?;
    }
    let mut events = client.events(EventFilter::default());
    while let Some(event) = events.next().await {
        let event = event?;
        let wanted = name.as_ref().is_none_or(|n| n.as_str() == event.subject);
        if wanted && event.kind.starts_with("session.") {
            super::events::print(format, &event)?;
        }
    }
    Ok(())
}
