//! The agent's loop: wires the session with the control plane to its connection, the executor, the
//! runtime's events and the clock.
//!
//! Invariant: nothing in this loop waits for a runtime, a node or another task, so heartbeats leave on
//! time whatever takes long. Connecting is a future that the loop polls beside the rest; commands are
//! tasks whose outcomes come back over a channel. Only the rare write of the cluster's identity is waited
//! for, since nothing may be begun before it is durable.

use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use regent_client::backoff::FullJitter;
use regent_client::clock::boot_ms;
use regent_client::{Client, Error as ClientError};
use regent_trace::Span;
use regent_types::agent::RegisterAgent;
use regent_types::frame::{CommandFrame, Reason, ReleaseOnDisconnect, ServerFrame};
use regent_types::{ClusterId, LeaseName, Token};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::attempt::{Attempt, AttemptError, Attempted};
use crate::connection::{Address, Connection, Incoming};
use crate::executor::{Executor, ExecutorError, Recovered, Takeover, blocking, with_causes};
use crate::farewell;
use crate::files;
use crate::journal::Outcome;
use crate::options::Options;
use crate::permit::Permit;
use crate::runtime::{Exit, Observed, ObservedState, Runtime, RuntimeError, RuntimeEvent};
use crate::session::{Candidacy, ControlSession, Effect, Fatal, Known, Membership, key_of};

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
/// A takeover that takes longer makes room for another replica: an engine that does not answer here may answer
/// there.
const TAKE_OVER_WITHIN: Duration = Duration::from_secs(10);
/// A TTL below this does not bridge a failover of the control plane (docs/leases.md).
const SHORT_TTL: Duration = Duration::from_secs(3);
/// Says which cluster a data folder belongs to.
const MEMBERSHIP: &str = "cluster.json";
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
    // Who was superseded, or stands by, must not end the sessions of who leads.
    let with_sessions = service.options.stop_sessions_on_exit
        && ended.is_ok()
        && (service.session.leads() || !service.session.is_replica());
    // Who was superseded has nothing to say any more.
    if ended.is_ok() {
        service.release().await;
    }
    service.end(with_sessions).await;
    ended
}

/// What the tasks tell the loop.
enum Internal {
    Finished(Box<CommandFrame>, Outcome),
    Listed(Vec<Observed>),
    TookOver(Token, Result<Takeover, String>),
}

struct Service {
    options: Options,
    client: Client,
    runtime: Arc<dyn Runtime>,
    executor: Executor,
    session: ControlSession,
    permit: Permit,
    events: BoxStream<'static, RuntimeEvent>,
    /// Until when what is under way may be recorded, once the agent is to end.
    finish_by: Option<Instant>,
    server: usize,
    registered: bool,
    /// The cluster whose sessions the runtime is asked for, once it is known.
    cluster: Option<ClusterId>,
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
        let client = Client::with_trust(&options.servers, Some(options.token.clone()), &options.trust)?
            .with_deadline(REGISTER_WITHIN);
        let path = membership_path(&options);
        let membership = {
            let path = path.clone();
            blocking(move || files::read_json::<Membership>(&path)).await
        }
        .map_err(|source| Error::Membership { path, source })?;
        if let Some(known) = &membership {
            runtime.joined(known.origin());
        }
        // Before the first list, so that no exit falls between the two.
        let events = runtime.watch();
        let found = runtime.list().await?;
        let replica = candidacy(&options);
        let permit = match replica {
            Some(_) => Permit::of_replica(),
            None => Permit::unlimited(),
        };
        let opened = Executor::open(
            options.agent_id.clone(),
            runtime.clone(),
            &options.data,
            permit.clone(),
        );
        let executor = opened?;
        let recovered = {
            let executor = executor.clone();
            let alone = replica.is_none();
            let recover = move || {
                if alone {
                    return executor.recover(&found);
                }
                // The leader may be doing just now what the journal says was begun; the takeover recovers it.
                let highest = executor.highest()?;
                Ok(Recovered {
                    highest,
                    outcomes: Vec::new(),
                })
            };
            blocking(recover).await?
        };
        let cluster = membership.as_ref().map(|known| known.origin().clone());
        let session = ControlSession::new(Known {
            replica,
            runtime_id: runtime.runtime_id().to_owned(),
            membership,
            highest: recovered.highest,
            outcomes: recovered.outcomes,
            parallel: options.parallel,
        });
        let (internal, from_tasks) = mpsc::channel(INTERNAL);
        Ok(Self {
            client,
            runtime,
            executor,
            session,
            permit,
            events,
            finish_by: None,
            // Agents spread over the nodes.
            server: rand::random_range(0..options.servers.len().max(1)),
            registered: false,
            cluster,
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
            // Tokio's timers stand still during suspend and the session's clock does not: what is due after a
            // wake comes late by as much as it was ahead before, and every check reads the clock itself.
            let tick = self.session.next_tick().map(|at| {
                let wait = at.saturating_sub(boot_ms());
                tokio::time::sleep(Duration::from_millis(wait))
            });
            tokio::select! {
                biased;
                () = shutdown.cancelled(), if self.finish_by.is_none() => {
                    self.finish_by = Some(Instant::now() + FINISH_WITHIN);
                    self.session.retire();
                }
                () = maybe(self.finish_by.map(tokio::time::sleep_until)) => return Ok(()),
                () = maybe(tick) => {
                    self.session.tick(boot_ms());
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
            // A replica keeps its lease until what it does is done and told: the next one begins where it ends.
            // Without replicas nobody waits for that, and outcomes are told by the next start.
            if self.finish_by.is_some() && (self.session.is_idle() || !self.session.is_replica()) {
                return Ok(());
            }
        }
    }

    /// Gives the lease back, so that the next replica need not wait for its end.
    async fn release(&mut self) {
        self.session.retire();
        self.session.release(boot_ms());
        if let Err(error) = self.carry_out().await {
            tracing::warn!(%error, "the lease was perhaps not given back; it ends with its TTL");
        }
    }

    /// Says goodbye, lets what is under way be recorded, and in `dev` ends the sessions.
    async fn end(&mut self, with_sessions: bool) {
        let finish_by = self.finish_by.unwrap_or_else(|| Instant::now() + FINISH_WITHIN);
        self.attempt = None;
        self.session.disconnected();
        if let Some(connection) = self.connection.take() {
            connection.close().await;
        }
        self.tasks.close();
        // Nobody reads outcomes any more: they are on disk before they are told.
        self.from_tasks.close();
        if tokio::time::timeout_at(finish_by, self.tasks.wait())
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
                farewell::WITHIN,
                farewell::stop_sessions(&*self.runtime, self.session.highest_token()),
            )
            .await
            .is_err()
        {
            tracing::warn!("not all sessions ended with the agent");
        }
    }

    /// Registers if that is due, asks the runtime what it has, and connects.
    fn attempt_after(&self, wait: Duration) -> Attempt {
        let register = (!self.registered).then(|| (self.client.clone(), self.registration()));
        let runtime = self.runtime.clone();
        // A file of an earlier start says it otherwise, or the welcome, which comes after the first list.
        let ask = (self.cluster.is_none() && runtime.is_shared()).then(|| self.client.clone());
        let address = Address {
            server: self.options.servers[self.server % self.options.servers.len()].clone(),
            tls: self.client.tls(),
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
            let mut cluster = None;
            if let Some(client) = ask {
                let seen = client.cluster().await.map_err(AttemptError::Cluster)?;
                let origin = seen.former_cluster_ids.last().cloned();
                let found = origin.or(seen.cluster_id).ok_or(AttemptError::Forming)?;
                runtime.joined(&found);
                cluster = Some(found);
            }
            // Before dialing: a node waits only a short time for `hello`.
            let found = runtime.list().await.map_err(AttemptError::Runtime)?;
            let connection = Connection::dial(&address).await.map_err(AttemptError::Dial)?;
            Ok(Attempted {
                connection,
                found,
                cluster,
            })
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
            metadata: serde_json::json!({
                "version": env!("CARGO_PKG_VERSION"),
                "runtime": self.runtime.kind(),
                "runs": self.runtime.runs(),
            }),
        }
    }

    fn attempted(&mut self, attempted: Result<Attempted, AttemptError>) -> Result<(), Error> {
        match attempted {
            Ok(Attempted {
                connection,
                found,
                cluster,
            }) => {
                self.registered = true;
                self.cluster = self.cluster.take().or(cluster);
                self.connection = Some(connection);
                self.connected_at = Some(Instant::now());
                self.session.connected(boot_ms(), &found);
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
        let now = boot_ms();
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
            Internal::Finished(command, outcome) => {
                self.session.finished(boot_ms(), &command, outcome);
            }
            Internal::TookOver(token, Ok(Takeover { found, outcomes })) => {
                self.session.taken_over(boot_ms(), token, &found, outcomes);
            }
            Internal::TookOver(token, Err(reason)) => {
                self.session.takeover_failed(boot_ms(), token, &reason);
            }
            Internal::Listed(found) => {
                for one in found {
                    match one.state {
                        // Taken along by something: to be compared anew, not told as an end of its own.
                        ObservedState::Exited(Exit::Unknown) => {
                            self.engine_restarted("sessions are gone and nobody saw how");
                        }
                        ObservedState::Exited(exit) => self.exited(&one.session, one.generation, exit),
                        ObservedState::Running | ObservedState::Hibernated => {}
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
            RuntimeEvent::Changed { observed, reason } => {
                tracing::info!(session = %observed.session, reason, "session has changed");
                self.session.changed(boot_ms(), *observed, reason);
            }
            RuntimeEvent::Progress {
                session,
                message,
                percent,
            } => self.session.progressed(boot_ms(), &session, message, percent),
            RuntimeEvent::Restarted { reason } => {
                tracing::warn!(reason, "the engine was away");
                self.engine_restarted(&reason);
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

    fn engine_restarted(&mut self, reason: &str) {
        // An attempt under way may have looked before.
        if self.attempt.is_some() {
            self.attempt = Some(self.attempt_after(Duration::ZERO));
        }
        self.session.engine_restarted(reason);
    }

    fn exited(&mut self, session: &regent_types::SessionName, generation: u64, exit: Exit) {
        let now = boot_ms();
        self.session.exited(now, session, generation, exit);
    }

    async fn carry_out(&mut self) -> Result<(), Error> {
        self.permit.set(self.session.permit());
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
                    let found = membership.origin();
                    match &self.cluster {
                        Some(ours) if ours != found => {
                            let (ours, found) = (ours.clone(), found.clone());
                            return Err(Fatal::OtherCluster { ours, found }.into());
                        }
                        Some(_) => {}
                        None => {
                            self.runtime.joined(found);
                            self.cluster = Some(found.clone());
                        }
                    }
                    let path = membership_path(&self.options);
                    let write = {
                        let path = path.clone();
                        blocking(move || files::write_json(&path, &membership)).await
                    };
                    write.map_err(|source| Error::Membership { path, source })?;
                }
                Effect::Begin(command) => self.begin(command),
                Effect::TakeOver(token) => self.take_over(token),
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
        let span = self.cluster.as_ref().map_or_else(Span::none, |cluster| {
            regent_trace::execute(cluster, &command.command_id, command.run, &command.action)
        });
        self.tasks.spawn(async move {
            let key = key_of(&command);
            tracing::info!(command = %key.command, run = key.run, action = command.action, "begun");
            // A panic in a runtime must not leave the session's other commands waiting for ever.
            let outcome = span
                .around(AssertUnwindSafe(executor.execute(&command)).catch_unwind())
                .await;
            let outcome = outcome.unwrap_or_else(|_| Outcome::Failed {
                error: "a fault of the agent itself; its log says more".to_owned(),
                retryable: true,
            });
            match &outcome {
                Outcome::Completed { .. } => {
                    tracing::info!(command = %key.command, run = key.run, "completed");
                }
                Outcome::Failed { error, retryable } => {
                    span.failed(error);
                    tracing::warn!(command = %key.command, run = key.run, error, retryable, "failed");
                }
            }
            drop(span);
            // Nobody listens only when the agent ends.
            let _ = internal.send(Internal::Finished(command, outcome)).await;
        });
    }

    fn take_over(&mut self, token: Token) {
        let (executor, internal) = (self.executor.clone(), self.internal.clone());
        self.tasks.spawn(async move {
            let taken = tokio::time::timeout(TAKE_OVER_WITHIN, executor.take_over(token)).await;
            let taken = match taken {
                Ok(taken) => taken.map_err(|error| with_causes(&error)),
                Err(_) => Err(format!(
                    "the takeover did not end within {} ms",
                    TAKE_OVER_WITHIN.as_millis()
                )),
            };
            // Nobody listens only when the agent ends.
            let _ = internal.send(Internal::TookOver(token, taken)).await;
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
        let stood = self.connected_at.take();
        // A leader hurries while its guard lasts: its lease can be kept only over a new connection.
        let leads = self.session.permit().is_some_and(|(_, until)| boot_ms() < until);
        if stood.is_some_and(|at| leads || at.elapsed() >= GOOD_CONNECTION) {
            self.backoff.reset();
        }
        let server = &self.options.servers[self.server % self.options.servers.len()];
        let wait = self.backoff.next_delay();
        tracing::warn!(%server, reason, wait_ms = wait.as_millis(), "not connected");
        self.server += 1;
        self.attempt = Some(self.attempt_after(wait));
    }
}

/// Waits for what is there, for ever when nothing is.
async fn maybe<F: Future>(future: Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

/// What a replica campaigns with; none without a replica name.
fn candidacy(options: &Options) -> Option<Candidacy> {
    let replica = options.replica.clone()?;
    let ttl = options.lease_ttl;
    if ttl < SHORT_TTL {
        tracing::warn!(
            ttl_ms = ttl.as_millis(),
            "a lease this short may be lost when the control plane changes its leader"
        );
    }
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    Some(Candidacy {
        replica,
        lease: LeaseName::of_agent(&options.agent_id),
        ttl_ms: millis(ttl),
        release_on_disconnect: options.release_on_disconnect.map(|grace| ReleaseOnDisconnect {
            grace_ms: millis(grace),
        }),
    })
}

/// The cluster that what the agent of a data folder runs is named after, if it ever connected. Blocks.
pub fn cluster_of(data: &Path) -> std::io::Result<Option<ClusterId>> {
    let membership = files::read_json::<Membership>(&data.join(MEMBERSHIP))?;
    Ok(membership.map(|membership| membership.origin().clone()))
}

fn membership_path(options: &Options) -> PathBuf {
    options.data.join(MEMBERSHIP)
}
