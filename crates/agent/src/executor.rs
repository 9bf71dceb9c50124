//! Does what commands ask for, and keeps the record of it.
//!
//! Each command is a task of its own, so nothing here makes the session with the control plane wait; how
//! many there are at a time, and in which order, is the session's decision (`session`). The order within a
//! task is the invariant: **permit, fence, intent, permit, action, outcome**. The permit ends with the guard of
//! the lease, so a replica that was frozen begins nothing when it wakes; the fence refuses an older leader
//! before anything is written, the intent is durable before anything is done, and the outcome is durable before
//! anybody is told. What was not done because of the permit or a newer leader is no outcome: nothing is
//! recorded, since the newer leader may be doing it, with the same record.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use regent_types::frame::CommandFrame;
use regent_types::{AgentId, Token};

use crate::action::{Action, Line, result_of};
use crate::fence::{Fence, FenceError};
use crate::journal::{Intent, Journal, Outcome, RunKey};
use crate::permit::{NotPermitted, Permit};
use crate::reconcile;
use crate::runtime::{Observed, Runtime, RuntimeError, SessionRef, Stop};
use crate::session::key_of;

/// How long an action may take where the control plane sets no deadline: a line must not be stuck for
/// ever behind an engine that never answers.
const LONGEST_ACTION: Duration = Duration::from_mins(10);

/// Why nothing is begun, or the record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ExecutorError {
    /// The lease.
    #[error(transparent)]
    NotPermitted(#[from] NotPermitted),
    /// The fence.
    #[error(transparent)]
    Fence(#[from] FenceError),
    /// The journal.
    #[error("the journal cannot be used")]
    Journal(#[source] std::io::Error),
}

/// Why a replica cannot take over.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// The fence or the journal.
    #[error(transparent)]
    Records(#[from] ExecutorError),
    /// The runtime.
    #[error("the runtime cannot say what it runs")]
    Runtime(#[from] RuntimeError),
}

/// What a replica finds that takes over.
#[derive(Debug, Default)]
pub struct Takeover {
    /// All that the runtime has, seen after the fence was raised.
    pub found: Vec<Observed>,
    /// What is finished, oldest first.
    pub outcomes: Vec<(RunKey, Outcome)>,
}

/// Does commands. Cheap to clone.
#[derive(Clone)]
pub struct Executor {
    agent: AgentId,
    runtime: Arc<dyn Runtime>,
    fence: Fence,
    journal: Journal,
    permit: Permit,
}

/// What an executor found on disk.
#[derive(Debug, Default)]
pub struct Recovered {
    /// The highest fencing token seen.
    pub highest: Token,
    /// What is finished, oldest first.
    pub outcomes: Vec<(RunKey, Outcome)>,
}

impl Executor {
    /// Opens the records in a data folder.
    pub fn open(
        agent: AgentId,
        runtime: Arc<dyn Runtime>,
        data: &Path,
        permit: Permit,
    ) -> Result<Self, ExecutorError> {
        let fence = Fence::open(data)?;
        let journal = Journal::open(data).map_err(ExecutorError::Journal)?;
        Ok(Self {
            agent,
            runtime,
            fence,
            journal,
            permit,
        })
    }

    /// The highest fencing token seen. Blocks.
    pub fn highest(&self) -> Result<Token, ExecutorError> {
        Ok(self.fence.highest()?)
    }

    /// Makes a replica the leader of this data folder. The fence comes first: from then on its predecessor
    /// begins nothing here, so the list and the journal say all that it has done, but for an action that
    /// passed the fence just before.
    pub async fn take_over(&self, token: Token) -> Result<Takeover, TakeoverError> {
        let fence = self.fence.clone();
        blocking(move || fence.admit(token))
            .await
            .map_err(ExecutorError::from)?;
        self.runtime.take_over(token).await?;
        let found = self.runtime.list().await?;
        let executor = self.clone();
        let (recovered, found) = blocking(move || (executor.recover(&found), found)).await;
        let outcomes = recovered?.outcomes;
        Ok(Takeover { found, outcomes })
    }

    /// Reads what is recorded, and records the outcome of what was cut off but done. Blocks.
    pub fn recover(&self, found: &[Observed]) -> Result<Recovered, ExecutorError> {
        let loaded = self.journal.load(unix_ms()).map_err(ExecutorError::Journal)?;
        let mut outcomes = Vec::new();
        for entry in loaded.entries {
            let outcome = match entry.outcome {
                Some(outcome) => outcome,
                None => match reconcile::resolve(&entry.intent, found) {
                    Some(outcome) => {
                        tracing::info!(command = %entry.key.command, run = entry.key.run, action = entry.intent.action, "was done before this agent was cut off");
                        self.journal
                            .finish(&entry.key, entry.intent, outcome)
                            .map_err(ExecutorError::Journal)?
                    }
                    None => continue,
                },
            };
            outcomes.push((entry.key, outcome));
        }
        Ok(Recovered {
            highest: self.fence.highest()?,
            outcomes,
        })
    }

    /// Does a command, or finds that it was done, and gives the outcome that is to be told.
    pub async fn execute(&self, command: &CommandFrame) -> Outcome {
        let key = key_of(command);
        let action = match Action::parse(&self.agent, command) {
            Ok(action) => action,
            Err(error) => {
                return Outcome::Failed {
                    error,
                    retryable: false,
                };
            }
        };
        let intent = Intent {
            session: match Line::of(command) {
                Line::Session(session) => Some(session),
                Line::Agent => None,
            },
            generation: action.target().generation,
            action: command.action.clone(),
            token: command.token,
            begun_at_ms: unix_ms(),
        };
        match self.begin(key.clone(), intent.clone()).await {
            Ok(None) => {}
            Ok(Some(outcome)) => return outcome,
            Err(ExecutorError::NotPermitted(error)) => return not_permitted(&error),
            Err(error) => {
                tracing::error!(command = %key.command, %error, "a command cannot be begun");
                let retryable = match &error {
                    ExecutorError::Fence(fence) => fence.is_retryable(),
                    ExecutorError::Journal(_) | ExecutorError::NotPermitted(_) => true,
                };
                return Outcome::Failed {
                    error: with_causes(&error),
                    retryable,
                };
            }
        }
        // The record was written, which may have taken long.
        if let Err(error) = self.permit.check(command.token) {
            return not_permitted(&error);
        }
        let within = command
            .deadline
            .map_or(LONGEST_ACTION, Duration::from_millis)
            .min(LONGEST_ACTION);
        let outcome = match tokio::time::timeout(within, self.act(&action)).await {
            Ok(Ok(result)) => Outcome::Completed { result },
            Ok(Err(error)) => Outcome::Failed {
                retryable: error.is_retryable(),
                error: with_causes(&error),
            },
            Err(_) => Outcome::Failed {
                error: format!("{} did not end within {} ms", command.action, within.as_millis()),
                retryable: true,
            },
        };
        self.finish(key, intent, outcome).await
    }

    /// Removes the record of a command that will not be asked for any more.
    pub fn forget(&self, key: RunKey) {
        let journal = self.journal.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = journal.forget(&key) {
                tracing::warn!(command = %key.command, %error, "a journal entry was not removed");
            }
        });
    }

    /// Removes what is left of a session that ended by itself.
    pub async fn remove(&self, session: &SessionRef) {
        if self.permit.check(session.token).is_err() {
            tracing::debug!(session = %session.session, "left to who leads");
            return;
        }
        match self.runtime.stop(session, Stop::within(Duration::ZERO)).await {
            Ok(()) => tracing::info!(session = %session.session, "removed what was left of an ended session"),
            Err(error) => {
                tracing::warn!(session = %session.session, error = with_causes(&error), "what is left of an ended session stays");
            }
        }
    }

    async fn begin(&self, key: RunKey, intent: Intent) -> Result<Option<Outcome>, ExecutorError> {
        let (fence, journal, permit) = (self.fence.clone(), self.journal.clone(), self.permit.clone());
        blocking(move || {
            permit.check(intent.token)?;
            fence.admit(intent.token)?;
            let before = journal.begin(&key, intent).map_err(ExecutorError::Journal)?;
            // Begun before and cut off: the runtime makes doing it again the same as doing it once.
            Ok(before.and_then(|entry| entry.outcome))
        })
        .await
    }

    async fn finish(&self, key: RunKey, intent: Intent, outcome: Outcome) -> Outcome {
        let (fence, journal) = (self.fence.clone(), self.journal.clone());
        let told = outcome.clone();
        let recorded = blocking(move || {
            let failed = matches!(outcome, Outcome::Failed { .. });
            // The first outcome stands, and that of the newer leader is the one that counts. A fence that cannot
            // be read says nothing.
            if failed && fence.highest().is_ok_and(|highest| highest > intent.token) {
                tracing::info!(command = %key.command, run = key.run, "left without an outcome to a newer leader");
                return Ok(outcome);
            }
            journal.finish(&key, intent, outcome)
        })
        .await;
        recorded.unwrap_or_else(|error| {
            // It is done all the same; a restarted agent finds out by what the runtime has.
            tracing::error!(%error, "an outcome was not recorded");
            told
        })
    }

    async fn act(&self, action: &Action) -> Result<serde_json::Value, RuntimeError> {
        match action {
            Action::Start(spec) => self.runtime.start(spec).await.map(|one| result_of(&one)),
            Action::Stop(session, how) => self
                .runtime
                .stop(session, *how)
                .await
                .map(|()| serde_json::Value::Null),
            Action::Hibernate(session) => self.runtime.hibernate(session).await.map(|one| result_of(&one)),
            Action::Wake(session) => self.runtime.wake(session).await.map(|one| result_of(&one)),
        }
    }
}

fn not_permitted(error: &NotPermitted) -> Outcome {
    Outcome::Failed {
        error: error.to_string(),
        retryable: true,
    }
}

/// Runs what blocks on a thread that may.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work)
        .await
        .expect("what runs here does not panic, and the runtime outlives it")
}

/// The error with its causes, where only a text goes on: to the control plane.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Milliseconds since the Unix epoch, for records and people; nothing is decided by them.
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
