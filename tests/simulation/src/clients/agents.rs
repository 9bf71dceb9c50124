//! Agents: the shipped session machine (`regent_agent::session`) over the simulated network, and a target in memory.
//!
//! What is around that machine in the shipped agent (sockets, files, a runtime) is here once more and as small as it
//! can be; the order is the same: permit, fence, intent, permit, action, outcome. The [`Target`] is the host of the
//! sessions and the data folder of the agent in one: it outlives the process, and replicas share it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::stream::SplitStream;
use futures::{SinkExt, StreamExt};
use hyper::Method;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use regent_agent::action::{Action, result_of};
use regent_agent::journal::{Intent, Outcome, RunKey};
use regent_agent::reconcile;
use regent_agent::runtime::{Observed, ObservedState, SessionRef};
use regent_agent::session::{Candidacy, ControlSession, Effect, Fatal, Known, Membership, key_of};
use regent_history::effects;
use regent_raft::clocks::wall_ms;
use regent_raft::{Sockets, Stream};
use regent_types::frame::{CLOSE_SUPERSEDED, CommandFrame, PROTOCOL, Reason, ServerFrame};
use regent_types::{AgentId, LeaseName, ReplicaName, SessionName, Time, Token};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite, Join};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use super::http::{Ask, Client};
use super::{Place, World};
use crate::cluster::{HTTP, TOKEN};
use crate::machine::boot_ms;
use crate::network::address;

/// How long a node may take to take a connection.
const DIAL_WITHIN: Duration = Duration::from_secs(3);
/// Messages that wait to be written.
const OUTGOING: usize = 1_024;

/// Which agent, and which of its replicas.
#[derive(Debug, Clone)]
pub struct Who {
    /// The agent.
    pub agent: AgentId,
    /// The replica, if it has several.
    pub replica: Option<ReplicaName>,
    /// How long its lease lasts, in milliseconds.
    pub ttl_ms: u64,
}

impl Who {
    /// For people, and as the holder of its lease.
    pub fn name(&self) -> String {
        match &self.replica {
            Some(replica) => format!("agent {}/{replica}", self.agent),
            None => format!("agent {}", self.agent),
        }
    }
}

/// The host of an agent's sessions, and its records. Clones share it.
#[derive(Clone, Default)]
pub struct Target(Arc<Mutex<Host>>);

/// What a target holds.
#[derive(Default)]
pub struct Host {
    /// The sessions that are there.
    pub sessions: BTreeMap<SessionName, Observed>,
    /// What was begun there, in this order.
    pub begun: Vec<effects::Effect>,
    fence: Token,
    journal: BTreeMap<RunKey, (Intent, Option<Outcome>)>,
    membership: Option<Membership>,
}

impl Target {
    /// What it holds.
    pub fn host(&self) -> MutexGuard<'_, Host> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Host {
    fn admit(&mut self, token: Token) -> Result<(), Outcome> {
        if token < self.fence {
            return Err(failed(
                format!("token {token} is older than {}", self.fence),
                false,
            ));
        }
        self.fence = token;
        Ok(())
    }

    /// Records what was cut off but done, and gives all that is finished.
    fn recover(&mut self) -> Vec<(RunKey, Outcome)> {
        let found: Vec<Observed> = self.sessions.values().cloned().collect();
        let mut outcomes = Vec::new();
        for (key, (intent, outcome)) in &mut self.journal {
            if outcome.is_none() {
                *outcome = reconcile::resolve(intent, &found);
            }
            outcomes.extend(outcome.clone().map(|outcome| (key.clone(), outcome)));
        }
        outcomes
    }

    fn act(&mut self, action: &Action) -> Result<serde_json::Value, Outcome> {
        let target = action.target();
        self.admit(target.token)?;
        let here = self.sessions.get(&target.session);
        if let Some(here) = here
            && here.generation > target.generation
        {
            return Err(failed(format!("generation {} is here", here.generation), false));
        }
        let same = here.is_some_and(|here| here.generation == target.generation);
        let state = match action {
            Action::Start(_) if same => ObservedState::Running,
            Action::Start(_) => {
                self.begun.push(effects::Effect {
                    session: target.session.to_string(),
                    generation: target.generation,
                });
                let observed = Observed {
                    session: target.session.clone(),
                    generation: target.generation,
                    token: target.token,
                    state: ObservedState::Running,
                    pid: None,
                    port: None,
                    url: None,
                    started_at_ms: None,
                    metadata: BTreeMap::new(),
                };
                self.sessions.insert(target.session.clone(), observed);
                ObservedState::Running
            }
            Action::Stop(..) => {
                self.sessions.remove(&target.session);
                return Ok(serde_json::Value::Null);
            }
            Action::Hibernate(_) => ObservedState::Hibernated,
            Action::Wake(_) => ObservedState::Running,
        };
        match self.sessions.get_mut(&target.session) {
            Some(here) if here.generation == target.generation => {
                // A start that is repeated answers with what is there.
                if !matches!(action, Action::Start(_)) {
                    here.state = state;
                }
                Ok(result_of(here))
            }
            Some(_) | None => Err(failed("it is not here".to_owned(), false)),
        }
    }
}

fn failed(error: String, retryable: bool) -> Outcome {
    Outcome::Failed { error, retryable }
}

type Socket = WebSocketStream<Join<Box<dyn AsyncRead + Send + Unpin>, Box<dyn AsyncWrite + Send + Unpin>>>;

/// What a replica finds that takes over: what is there, and what is finished.
type Takeover = (Vec<Observed>, Vec<(RunKey, Outcome)>);

/// What tasks tell the loop.
enum Told {
    Dialled(Option<Box<Socket>>, Vec<Observed>),
    Finished(Box<CommandFrame>, Outcome),
    TookOver(Token, Result<Takeover, String>),
}

struct Agent {
    world: World,
    place: Place,
    who: Who,
    target: Target,
    rng: StdRng,
    session: ControlSession,
    permit: Arc<Mutex<Option<(Token, u64)>>>,
    /// Under which token it believes that it leads.
    leads: Option<u64>,
    tell: mpsc::Sender<Told>,
    socket: Option<SplitStream<Socket>>,
    outgoing: Option<mpsc::Sender<Message>>,
    dialling: bool,
    next_dial: Option<Instant>,
}

/// Is the agent until the machine is switched off, from one process to the next.
pub async fn run(world: World, place: Place, who: Who, target: Target, mut rng: StdRng) {
    loop {
        let process = StdRng::seed_from_u64(rng.random());
        let ended = live(&world, place, &who, &target, process).await;
        let now = world.now();
        world
            .trace
            .note(now, format_args!("{} ended: {ended}", who.name()));
        if let Fatal::OtherCluster { .. } = ended {
            let surprise = format!("{now}: {} met another cluster: {ended}", who.name());
            world.book().surprises.push(surprise);
        }
        sleep(Duration::from_secs(1)).await;
    }
}

async fn live(world: &World, place: Place, who: &Who, target: &Target, rng: StdRng) -> Fatal {
    let known = {
        let mut host = target.host();
        Known {
            replica: who.replica.clone().map(|replica| Candidacy {
                replica,
                lease: LeaseName::of_agent(&who.agent),
                ttl_ms: who.ttl_ms,
                release_on_disconnect: None,
            }),
            runtime_id: format!("the target of {}", who.agent),
            membership: host.membership.clone(),
            highest: host.fence,
            // A replica reads them when it takes over.
            outcomes: if who.replica.is_none() {
                host.recover()
            } else {
                Vec::new()
            },
            parallel: None,
        }
    };
    let (tell, mut told) = mpsc::channel(OUTGOING);
    let mut agent = Agent {
        world: world.clone(),
        place,
        who: who.clone(),
        target: target.clone(),
        rng,
        session: ControlSession::new(known),
        permit: Arc::default(),
        leads: None,
        tell,
        socket: None,
        outgoing: None,
        dialling: false,
        next_dial: Some(Instant::now()),
    };
    loop {
        if let Some(fatal) = agent.carry_out() {
            world.book().gone(&who.name(), world.now());
            return fatal;
        }
        let tick = agent.session.next_tick();
        let tick = tick.map(|at| Instant::now() + Duration::from_millis(at.saturating_sub(boot_ms())));
        tokio::select! {
            biased;
            () = until(tick) => agent.session.tick(boot_ms()),
            () = until(agent.next_dial) => agent.dial(),
            Some(told) = told.recv() => agent.told(told),
            message = next(&mut agent.socket) => agent.message(message),
        }
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn next(socket: &mut Option<SplitStream<Socket>>) -> Option<Message> {
    match socket {
        Some(socket) => socket.next().await.and_then(Result::ok),
        None => std::future::pending().await,
    }
}

impl Agent {
    fn dial(&mut self) {
        self.next_dial = None;
        if self.dialling {
            return;
        }
        self.dialling = true;
        let node = self.rng.random_range(0..self.world.nodes);
        let (world, place, who) = (self.world.clone(), self.place, self.who.clone());
        let (target, tell) = (self.target.clone(), self.tell.clone());
        tokio::spawn(async move {
            let found = target.host().sessions.values().cloned().collect();
            let socket = timeout(DIAL_WITHIN, connect(&world, place, &who, node)).await;
            let _ = tell
                .send(Told::Dialled(socket.ok().flatten().map(Box::new), found))
                .await;
        });
    }

    fn told(&mut self, told: Told) {
        match told {
            Told::Dialled(Some(socket), found) => {
                self.dialling = false;
                let (mut sink, stream) = (*socket).split();
                let (outgoing, mut waiting) = mpsc::channel::<Message>(OUTGOING);
                tokio::spawn(async move {
                    while let Some(message) = waiting.recv().await {
                        if !matches!(timeout(DIAL_WITHIN, sink.send(message)).await, Ok(Ok(()))) {
                            return;
                        }
                    }
                });
                self.socket = Some(stream);
                self.outgoing = Some(outgoing);
                self.session.connected(boot_ms(), &found);
            }
            Told::Dialled(None, _) => {
                self.dialling = false;
                self.retry();
            }
            Told::Finished(command, outcome) => self.session.finished(boot_ms(), &command, outcome),
            Told::TookOver(token, Ok((found, outcomes))) => {
                self.session.taken_over(boot_ms(), token, &found, outcomes);
            }
            Told::TookOver(token, Err(why)) => self.session.takeover_failed(boot_ms(), token, &why),
        }
    }

    fn message(&mut self, message: Option<Message>) {
        let now = boot_ms();
        match message {
            Some(Message::Text(text)) => match ServerFrame::parse(&text) {
                Ok(Some(frame)) => self.session.frame(now, frame),
                Ok(None) => self.session.heard(now),
                Err(error) => {
                    let surprise = format!("{} cannot read {text}: {error}", self.who.name());
                    self.world.book().surprises.push(surprise);
                }
            },
            Some(Message::Close(Some(close))) if u16::from(close.code) == CLOSE_SUPERSEDED => {
                let reason = close.reason.to_string();
                self.lose();
                self.session
                    .frame(now, ServerFrame::Superseded(Reason { reason }));
            }
            Some(Message::Close(_)) | None => {
                self.lose();
                self.session.disconnected();
                self.retry();
            }
            Some(_) => self.session.heard(now),
        }
    }

    fn lose(&mut self) {
        self.socket = None;
        self.outgoing = None;
    }

    fn retry(&mut self) {
        let pause = Duration::from_millis(self.rng.random_range(20..600));
        self.next_dial.get_or_insert(Instant::now() + pause);
    }

    fn carry_out(&mut self) -> Option<Fatal> {
        self.note_permit();
        while let Some(effect) = self.session.next_effect() {
            match effect {
                Effect::Send(frame) => self.send(Message::text(frame.to_text(Time(wall_ms())))),
                Effect::Ping => self.send(Message::Ping(bytes::Bytes::new())),
                Effect::Remember(membership) => self.target.host().membership = Some(membership),
                Effect::Begin(command) => self.begin(command),
                Effect::TakeOver(token) => self.take_over(token),
                Effect::Forget(key) => {
                    self.target.host().journal.remove(&key);
                }
                Effect::Remove(SessionRef { session, .. }) => {
                    self.target.host().sessions.remove(&session);
                }
                Effect::Reconnect(_) => {
                    self.lose();
                    self.retry();
                }
                Effect::End(fatal) => return Some(fatal),
            }
        }
        None
    }

    fn send(&mut self, message: Message) {
        let sent = self
            .outgoing
            .as_ref()
            .is_none_or(|outgoing| outgoing.try_send(message).is_ok());
        if !sent {
            self.lose();
            self.session.disconnected();
            self.retry();
        }
    }

    /// Hands the permit to what is being done, and writes down until when this replica believes that it leads.
    fn note_permit(&mut self) {
        let permit = self.session.permit();
        *self.permit.lock().unwrap_or_else(PoisonError::into_inner) = permit;
        let held = permit.map(|(token, _)| token.0);
        let (now, name) = (self.world.now(), self.who.name());
        let lease = LeaseName::of_agent(&self.who.agent).to_string();
        let mut book = self.world.book();
        if self.leads != held {
            if let Some(before) = self.leads {
                book.tenure(&lease, &name, before).ended = Some(now);
            }
            if let Some(token) = held {
                book.granted(&lease, &name, token, now);
            }
            self.leads = held;
        }
        let Some((token, until)) = permit.filter(|(_, until)| boot_ms() < *until) else {
            return;
        };
        let until = self.place.rate.when(until);
        let tenure = book.tenure(&lease, &name, token.0);
        tenure.ended = None;
        if tenure.valid.last().is_none_or(|(_, last)| *last < until) {
            tenure.valid.push((now, until));
        }
    }

    fn begin(&mut self, command: Box<CommandFrame>) {
        let (who, target, tell) = (self.who.clone(), self.target.clone(), self.tell.clone());
        let (record, act) = (self.rng.random_range(1..80), self.rng.random_range(1..600));
        let (permit, world) = (self.permit.clone(), self.world.clone());
        tokio::spawn(async move {
            let permitted = |token: Token| {
                let permit = *permit.lock().unwrap_or_else(PoisonError::into_inner);
                who.replica.is_none() || permit.is_some_and(|(own, until)| own == token && boot_ms() < until)
            };
            let outcome = execute(&world, &who, &target, &command, record, act, permitted).await;
            let _ = tell.send(Told::Finished(command, outcome)).await;
        });
    }

    fn take_over(&mut self, token: Token) {
        let (target, tell) = (self.target.clone(), self.tell.clone());
        let pause = Duration::from_millis(self.rng.random_range(1..200));
        tokio::spawn(async move {
            sleep(pause).await;
            let taken = {
                let mut host = target.host();
                match host.admit(token) {
                    Ok(()) => {
                        let outcomes = host.recover();
                        Ok((host.sessions.values().cloned().collect(), outcomes))
                    }
                    Err(_) => Err(format!("token {token} is older than the fence")),
                }
            };
            let _ = tell.send(Told::TookOver(token, taken)).await;
        });
    }
}

/// Permit, fence, intent, permit, action, outcome.
async fn execute(
    world: &World,
    who: &Who,
    target: &Target,
    command: &CommandFrame,
    record_ms: u64,
    act_ms: u64,
    permitted: impl Fn(Token) -> bool,
) -> Outcome {
    let not_permitted = || failed("the guard has ended".to_owned(), true);
    let action = match Action::parse(&who.agent, command) {
        Ok(action) => action,
        Err(error) => return failed(error, false),
    };
    let key = key_of(command);
    let session = action.target();
    sleep(Duration::from_millis(record_ms)).await;
    if !permitted(command.token) {
        return not_permitted();
    }
    {
        let mut host = target.host();
        if let Err(refused) = host.admit(command.token) {
            return refused;
        }
        let intent = Intent {
            session: Some(session.session),
            generation: session.generation,
            action: command.action.clone(),
            token: command.token,
            begun_at_ms: 0,
        };
        let (_, before) = host.journal.entry(key.clone()).or_insert((intent, None));
        if let Some(outcome) = before {
            return outcome.clone();
        }
    }
    sleep(Duration::from_millis(act_ms)).await;
    if !permitted(command.token) {
        return not_permitted();
    }
    let mut host = target.host();
    let outcome = match host.act(&action) {
        Ok(result) => {
            let lease = LeaseName::of_agent(&who.agent).to_string();
            let by = format!("{}: {} at the target", who.name(), command.action);
            let (token, now) = (command.token.0, world.now());
            world.book().accepted(&lease, by, token, now);
            Outcome::Completed { result }
        }
        Err(outcome) => outcome,
    };
    // A newer leader may be doing it, with the same record.
    if matches!(outcome, Outcome::Failed { .. }) && host.fence > command.token {
        return outcome;
    }
    match host.journal.get_mut(&key) {
        Some((_, recorded)) => recorded.get_or_insert(outcome).clone(),
        None => outcome,
    }
}

/// Registers the agent at a node and connects to it.
async fn connect(world: &World, place: Place, who: &Who, node: usize) -> Option<Socket> {
    let mut client = Client::new(world.clone(), place.host, who.name());
    let body = json!({
        "agentId": who.agent, "platform": "process",
        "capacity": {"maxSessions": 1_000, "cpu": "1000 cores", "memory": "4Ti"},
    });
    client
        .ask(node, Ask::new(Method::POST, "/agents/register", body))
        .await;
    let to = address(node, HTTP).to_string();
    let replica = match &who.replica {
        Some(replica) => format!("&replica={replica}"),
        None => String::new(),
    };
    let url = format!(
        "ws://{to}/api/v1/agents/connect?agent_id={}{replica}&protocol={PROTOCOL}",
        who.agent
    );
    let mut request = url.into_client_request().ok()?;
    request
        .headers_mut()
        .insert("X-Agent-API-Key", TOKEN.parse().ok()?);
    let sockets: Arc<dyn Sockets> = world.network.sockets(place.host);
    let Stream { reader, writer, .. } = sockets.connect(&to).await.ok()?;
    let (socket, _) = tokio_tungstenite::client_async(request, tokio::io::join(reader, writer))
        .await
        .ok()?;
    Some(socket)
}
