//! The agent's loop: wires the session with the control plane to its connection, the executor, the
//! runtime's events and the clock.
//!
//! Invariant: nothing in this loop waits for a runtime, a node or another task, so heartbeats leave on
//! time whatever takes long. Connecting is a future that the loop polls beside the rest; commands are
//! tasks whose outcomes come back over a channel. Only the rare write of the cluster's identity is waited
//! for, since nothing may be begun before it is durable.

use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use regent_client::backoff::FullJitter;
use regent_client::{Client, Error as ClientError};
use regent_types::Token;
use regent_types::agent::RegisterAgent;
use regent_types::frame::{CommandFrame, Reason, ServerFrame};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connection::{Address, Connection, DialError, Incoming};
use crate::executor::{Executor, ExecutorError, blocking};
use crate::files;
use crate::journal::Outcome;
use crate::options::Options;
use crate::runtime::{Exit, Observed, ObservedState, Runtime, RuntimeError, RuntimeEvent, SessionRef};
use crate::session::{ControlSession, Effect, Fatal, Known, Membership, Millis, key_of};

/// The ceiling of the first wait before a reconnect.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// The ceiling of later waits.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// A connection that stood this long was a good one: the next attempt is made at once.
const GOOD_CONNECTION: Duration = LONGEST_WAIT;
/// Refusals of the token in a row, before anything else was ever answered, after which the configuration
/// is taken to be wrong. One is not enough: a node may not have applied a token that was just made.
const REFUSALS: u32 = 6;
/// Registration may take this long in all before the next attempt.
const REGISTER_WITHIN: Duration = Duration::from_secs(10);
/// What is being done when the agent ends gets this long to be recorded; the rest is found by the next start.
const FINISH_WITHIN: Duration = Duration::from_secs(2);
/// Sessions that end with the agent get this long before they are forced.
const EXIT_GRACE: Duration = Duration::from_secs(2);
/// And this long in all.
const EXIT_WITHIN: Duration = Duration::from_secs(8);
/// So many of them are ended side by side.
const EXIT_PARALLEL: usize = 64;
/// Outcomes that wait to be looked at; senders are tasks, which can wait.
const INTERNAL: usize = 64;

/// Why an agent ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The control plane or its identity does not allow it to go on.
    #[error(transparent)]
    Fatal(#[from] Fatal),
    /// The control plane does not know the token, or it is not this agent's.
    #[error("the control plane refuses this agent: {0}")]
    Refused(String),
    /// The servers or the token cannot be used.
    #[error(transparent)]
    Configuration(#[from] ClientError),
    /// The records in the data folder cannot be used.
    #[error(transparent)]
    Records(#[from] ExecutorError),
    /// The file that names the cluster cannot be used.
    #[error("the file {path} cannot be used")]
    Membership {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The runtime cannot say what it runs.
    #[error("the runtime cannot say what it runs")]
    Runtime(#[from] RuntimeError),
}

/// Runs an agent until `shutdown` is cancelled (then `Ok`) or it cannot go on.
pub async fn run(
    options: Options,
    runtime: Arc<dyn Runtime>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let mut service = Service::start(options, runtime).await?;
    let ended = service.serve(&shutdown).await;
    // Who was superseded must not end the sessions of who took over.
    let with_sessions = service.options.stop_sessions_on_exit && ended.is_ok();
    service.end(with_sessions).await;
    ended
}

/// What the tasks tell the loop.
enum Internal {
    Finished(Box<CommandFrame>, Outcome),
    Listed(Vec<Observed>),
}

type Attempt = BoxFuture<'static, Result<(Connection, Vec<Observed>), AttemptError>>;

/// Why an attempt to connect came to nothing.
#[derive(Debug, thiserror::Error)]
enum AttemptError {
    #[error("not registered: {0}")]
    Register(#[source] ClientError),
    #[error("the runtime does not answer: {0}")]
    Runtime(#[source] RuntimeError),
    #[error("not connected: {0}")]
    Dial(#[source] DialError),
}

impl AttemptError {
    /// Whether the control plane does not take the token.
    fn is_refusal(&self) -> bool {
        match self {
            Self::Register(error) => error.problem().is_some_and(|p| matches!(p.status, 401 | 403)),
            Self::Dial(DialError::Refused { status, .. }) => matches!(status.as_u16(), 401 | 403),
            Self::Dial(DialError::TimedOut | DialError::Failed(_) | DialError::Unusable(_))
            | Self::Runtime(_) => false,
        }
    }
}

struct Service {
    options: Options,
    client: Client,
    runtime: Arc<dyn Runtime>,
    executor: Executor,
    session: ControlSession,
    events: BoxStream<'static, RuntimeEvent>,
    clock: Instant,
    server: usize,
    registered: bool,
    refusals: u32,
    backoff: FullJitter,
    attempt: Option<Attempt>,
    connection: Option<Connection>,
    /// Since when the connection stands, or the last one stood.
    connected_at: Option<Instant>,
    internal: mpsc::Sender<Internal>,
    from_tasks: mpsc::Receiver<Internal>,
    tasks: TaskTracker,
}

impl Service {
    async fn start(options: Options, runtime: Arc<dyn Runtime>) -> Result<Self, Error> {
        let client =
            Client::new(&options.servers, Some(options.token.clone()))?.with_deadline(REGISTER_WITHIN);
        // Before the first list, so that no exit falls between the two.
        let events = runtime.watch();
        let found = runtime.list().await?;
        let opened = Executor::open(options.agent_id.clone(), runtime.clone(), &options.data);
        let executor = opened?;
        let recovered = {
            let executor = executor.clone();
            blocking(move || executor.recover(&found)).await?
        };
        let path = membership_path(&options);
        let membership = {
            let path = path.clone();
            blocking(move || files::read_json::<Membership>(&path)).await
        }
        .map_err(|source| Error::Membership { path, source })?;
        let session = ControlSession::new(Known {
            replica: options.replica.clone(),
            runtime_id: runtime.runtime_id().to_owned(),
            membership,
            highest: recovered.highest,
            outcomes: recovered.outcomes,
        });
        let (internal, from_tasks) = mpsc::channel(INTERNAL);
        Ok(Self {
            client,
            runtime,
            executor,
            session,
            events,
            clock: Instant::now(),
            // Agents spread over the nodes.
            server: rand::random_range(0..options.servers.len().max(1)),
            registered: false,
            refusals: 0,
            backoff: FullJitter::new(FIRST_WAIT, LONGEST_WAIT),
            attempt: None,
            connection: None,
            connected_at: None,
            internal,
            from_tasks,
            tasks: TaskTracker::new(),
            options,
        })
    }

    async fn serve(&mut self, shutdown: &CancellationToken) -> Result<(), Error> {
        self.attempt = Some(self.attempt_after(Duration::ZERO));
        loop {
            let tick = self
                .session
                .next_tick()
                .map(|at| self.clock + Duration::from_millis(at));
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(()),
                () = maybe(tick.map(tokio::time::sleep_until)) => {
                    let now = self.now();
                    self.session.tick(now);
                }
                attempted = maybe(self.attempt.as_mut()) => {
                    self.attempt = None;
                    self.attempted(attempted)?;
                }
                Some(told) = self.from_tasks.recv() => self.told(told),
                Some(event) = self.events.next() => self.event(event),
                incoming = maybe(self.connection.as_mut().map(|connection| connection.next().boxed())) => {
                    self.incoming(incoming);
                }
            }
            self.carry_out().await?;
        }
    }

    /// Says goodbye, lets what is under way be recorded, and in `dev` ends the sessions.
    async fn end(&mut self, with_sessions: bool) {
        self.attempt = None;
        self.session.disconnected();
        if let Some(connection) = self.connection.take() {
            connection.close().await;
        }
        self.tasks.close();
        // Nobody reads outcomes any more: they are on disk before they are told.
        self.from_tasks.close();
        if tokio::time::timeout(FINISH_WITHIN, self.tasks.wait())
            .await
            .is_err()
        {
            tracing::info!(
                left = self.tasks.len(),
                "ending with commands under way; the next start finds what came of them"
            );
        }
        if with_sessions
            && tokio::time::timeout(
                EXIT_WITHIN,
                stop_sessions(&*self.runtime, self.session.highest_token()),
            )
            .await
            .is_err()
        {
            tracing::warn!("not all sessions ended with the agent");
        }
    }

    fn now(&self) -> Millis {
        u64::try_from(self.clock.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Registers if that is due, asks the runtime what it has, and connects.
    fn attempt_after(&self, wait: Duration) -> Attempt {
        let register = (!self.registered).then(|| (self.client.clone(), self.registration()));
        let runtime = self.runtime.clone();
        let address = Address {
            server: self.options.servers[self.server % self.options.servers.len()].clone(),
            token: self.options.token.clone(),
            agent: self.options.agent_id.clone(),
            replica: self.options.replica.clone(),
        };
        async move {
            tokio::time::sleep(wait).await;
            if let Some((client, registration)) = register {
                client
                    .register_agent(&registration)
                    .await
                    .map_err(AttemptError::Register)?;
            }
            // Before dialing: a node waits only a short time for `hello`.
            let found = runtime.list().await.map_err(AttemptError::Runtime)?;
            let connection = Connection::dial(&address).await.map_err(AttemptError::Dial)?;
            Ok((connection, found))
        }
        .boxed()
    }

    fn registration(&self) -> RegisterAgent {
        let platform = if self.options.platform.is_empty() {
            self.runtime.kind().as_str().to_owned()
        } else {
            self.options.platform.clone()
        };
        RegisterAgent {
            agent_id: self.options.agent_id.clone(),
            platform,
            region: self.options.region.clone(),
            capacity: self.options.capacity,
            labels: self.options.labels.clone(),
            metadata: serde_json::json!({ "version": env!("CARGO_PKG_VERSION"), "runtime": self.runtime.kind() }),
        }
    }

    fn attempted(
        &mut self,
        attempted: Result<(Connection, Vec<Observed>), AttemptError>,
    ) -> Result<(), Error> {
        match attempted {
            Ok((connection, found)) => {
                self.registered = true;
                self.connection = Some(connection);
                self.connected_at = Some(Instant::now());
                let now = self.now();
                self.session.connected(now, &found);
            }
            Err(error) => {
                if let AttemptError::Dial(dial) = &error {
                    // A node that does not know the agent (any more) shall be told of it.
                    self.registered = !dial.is_not_found();
                }
                if error.is_refusal() {
                    self.refusals += 1;
                    if self.refusals >= REFUSALS && !self.session.was_welcomed() {
                        return Err(Error::Refused(error.to_string()));
                    }
                } else {
                    self.refusals = 0;
                }
                self.retry(&error.to_string());
            }
        }
        Ok(())
    }

    fn incoming(&mut self, incoming: Incoming) {
        let now = self.now();
        match incoming {
            Incoming::Frame(frame) => self.session.frame(now, frame),
            Incoming::Alive => self.session.heard(now),
            Incoming::Closed { superseded, reason } => {
                self.connection = None;
                // Before the welcome it may mean that the agent is not known any more.
                self.registered &= self.session.is_up();
                if superseded {
                    self.session
                        .frame(now, ServerFrame::Superseded(Reason { reason }));
                } else {
                    self.session.disconnected();
                    self.retry(&reason);
                }
            }
        }
    }

    fn told(&mut self, told: Internal) {
        match told {
            Internal::Finished(command, outcome) => self.session.finished(&command, outcome),
            Internal::Listed(found) => {
                for one in found {
                    if let ObservedState::Exited(exit) = one.state {
                        self.exited(&one.session, one.generation, exit);
                    }
                }
            }
        }
    }

    fn event(&mut self, event: RuntimeEvent) {
        match event {
            RuntimeEvent::Exited {
                session,
                generation,
                exit,
                token: _,
            } => {
                tracing::info!(%session, generation, %exit, "session ended by itself");
                self.exited(&session, generation, exit);
            }
            RuntimeEvent::Lagged => {
                let (runtime, internal) = (self.runtime.clone(), self.internal.clone());
                self.tasks.spawn(async move {
                    match runtime.list().await {
                        // Nobody listens only when the agent ends.
                        Ok(found) => drop(internal.send(Internal::Listed(found)).await),
                        Err(error) => tracing::warn!(%error, "exits were missed until the next connection"),
                    }
                });
            }
        }
    }

    fn exited(&mut self, session: &regent_types::SessionName, generation: u64, exit: Exit) {
        let now = self.now();
        self.session.exited(now, session, generation, exit);
    }

    async fn carry_out(&mut self) -> Result<(), Error> {
        while let Some(effect) = self.session.next_effect() {
            match effect {
                Effect::Send(frame) => {
                    let sent = self
                        .connection
                        .as_ref()
                        .is_none_or(|connection| connection.send(frame));
                    self.give_up_unless(sent);
                }
                Effect::Ping => {
                    let sent = self.connection.as_ref().is_none_or(Connection::ping);
                    self.give_up_unless(sent);
                }
                Effect::Remember(membership) => {
                    let path = membership_path(&self.options);
                    let write = {
                        let path = path.clone();
                        blocking(move || files::write_json(&path, &membership)).await
                    };
                    write.map_err(|source| Error::Membership { path, source })?;
                }
                Effect::Begin(command) => self.begin(command),
                Effect::Forget(key) => self.executor.forget(key),
                Effect::Remove(session) => {
                    let executor = self.executor.clone();
                    self.tasks.spawn(async move { executor.remove(&session).await });
                }
                Effect::Reconnect(reason) => {
                    self.connection = None;
                    self.retry(&reason);
                }
                Effect::End(fatal) => return Err(fatal.into()),
            }
        }
        Ok(())
    }

    fn begin(&mut self, command: Box<CommandFrame>) {
        let (executor, internal) = (self.executor.clone(), self.internal.clone());
        self.tasks.spawn(async move {
            let key = key_of(&command);
            tracing::info!(command = %key.command, run = key.run, action = command.action, "begun");
            // A panic in a runtime must not leave the session's other commands waiting for ever.
            let outcome = AssertUnwindSafe(executor.execute(&command)).catch_unwind().await;
            let outcome = outcome.unwrap_or_else(|_| Outcome::Failed {
                error: "a fault of the agent itself; its log says more".to_owned(),
                retryable: true,
            });
            match &outcome {
                Outcome::Completed { .. } => {
                    tracing::info!(command = %key.command, run = key.run, "completed");
                }
                Outcome::Failed { error, retryable } => {
                    tracing::warn!(command = %key.command, run = key.run, error, retryable, "failed");
                }
            }
            // Nobody listens only when the agent ends.
            let _ = internal.send(Internal::Finished(command, outcome)).await;
        });
    }

    fn give_up_unless(&mut self, sent: bool) {
        if !sent {
            self.connection = None;
            self.session.disconnected();
            self.retry("the node does not read what is written");
        }
    }

    /// Plans the next attempt, at the next node.
    fn retry(&mut self, reason: &str) {
        if self.attempt.is_some() {
            return;
        }
        if self
            .connected_at
            .take()
            .is_some_and(|at| at.elapsed() >= GOOD_CONNECTION)
        {
            self.backoff.reset();
        }
        let server = &self.options.servers[self.server % self.options.servers.len()];
        let wait = self.backoff.next_delay();
        tracing::warn!(%server, reason, wait_ms = wait.as_millis(), "not connected");
        self.server += 1;
        self.attempt = Some(self.attempt_after(wait));
    }
}

/// Ends all sessions, in `dev`, where they end with their agent.
async fn stop_sessions(runtime: &dyn Runtime, token: Token) {
    let found = match runtime.list().await {
        Ok(found) => found,
        Err(error) => {
            tracing::error!(%error, "the sessions are not known and stay");
            return;
        }
    };
    futures::stream::iter(found)
        .for_each_concurrent(EXIT_PARALLEL, |one| async move {
            let session = SessionRef {
                token: token.max(one.token),
                session: one.session,
                generation: one.generation,
            };
            if let Err(error) = runtime.stop(&session, EXIT_GRACE).await {
                tracing::warn!(session = %session.session, %error, "a session did not end with the agent");
            }
        })
        .await;
}

/// Waits for what is there, for ever when nothing is.
async fn maybe<F: Future>(future: Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

fn membership_path(options: &Options) -> PathBuf {
    options.data.join("cluster.json")
}
