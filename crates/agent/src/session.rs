//! The agent's session with the control plane, as a pure state machine.
//!
//! It is told the time and what happened (a frame, a result, a lost connection) and hands back
//! [`Effect`]s, in the order in which they are to be carried out; sockets, disks and timers are around it
//! (`connection`, `executor`). Invariants:
//!
//! - each (command, run) is begun at most once while its outcome is known or being worked out: a
//!   redelivery is acknowledged or answered with the recorded outcome, never done again;
//! - commands for one session are done one after the other, for different sessions side by side;
//! - nothing is begun under a fencing token older than the highest seen, nor without a connection;
//! - a replica begins and reports only while it leads (`leadership`), and only what its own token asks for;
//! - an older revision base of the cluster that this data folder belongs to is refused, and so is any
//!   other cluster: its word on what shall run here counts for nothing.

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroUsize;

use regent_types::frame::{
    Ack, AgentFrame, CommandFrame, Empty, Heartbeat, HeldLease, Hello, PROTOCOL, ServerFrame, Welcome,
};
use regent_types::{ClusterId, SessionName, Token};

use crate::action::Line;
pub use crate::effect::{Effect, Fatal};
pub use crate::ended::ENDED_KEPT;
use crate::journal::{Outcome, RunKey};
pub use crate::leadership::Candidacy;
use crate::leadership::{Leadership, Step};
pub use crate::membership::Membership;
use crate::membership::{self, Verdict};
use crate::present::Present;
use crate::report;
pub use crate::runs::{MAX_PARALLEL, MAX_QUEUED, MAX_REMEMBERED, key_of};
use crate::runs::{Runs, Seen};
use crate::runtime::{Exit, Generation, Observed, SessionRef};

/// Milliseconds of [`regent_client::clock::boot_ms`] or a clock like it; only differences mean anything.
pub type Millis = u64;

/// How long a node may take to answer `hello`: its own deadline for a write.
const WELCOME_WITHIN: Millis = 10_000;
/// After so many tenths of a heartbeat interval without any traffic the node is gone: two of the pings
/// that go with heartbeats were not answered.
const SILENCE_TENTHS: u64 = 25;
/// But not before this long: a busy machine is not a dead one.
const MIN_SILENCE: Millis = 2_000;
/// Heartbeats are at least this far apart, whatever a node says.
const MIN_HEARTBEAT: Millis = 100;
/// And at most this far: beyond it a node that is gone would never be missed.
const MAX_HEARTBEAT: Millis = 3_600_000;
/// How often the progress of one command is told at most.
const PROGRESS_EVERY: Millis = 1_000;

/// What an agent knows when it starts.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// Which replica it is; none for an agent that has only one, which leads whenever it is connected.
    pub replica: Option<Candidacy>,
    /// Names what it runs sessions on.
    pub runtime_id: String,
    /// The cluster it was in.
    pub membership: Option<Membership>,
    /// The fence.
    pub highest: Token,
    /// Outcomes that are recorded, oldest first.
    pub outcomes: Vec<(RunKey, Outcome)>,
    /// So many commands are worked on side by side; none is [`MAX_PARALLEL`].
    pub parallel: Option<NonZeroUsize>,
}

#[derive(Debug)]
enum Link {
    Down,
    /// `hello` is sent.
    Greeting {
        since: Millis,
    },
    Up(Up),
}

#[derive(Debug)]
struct Up {
    heartbeat: Millis,
    next_heartbeat: Millis,
    heard: Millis,
    /// Since when the second `hello`, that of a replica which took over, waits for its welcome.
    greeting: Option<Millis>,
}

/// The state machine.
#[derive(Debug)]
pub struct ControlSession {
    leadership: Option<Leadership>,
    runtime_id: String,
    membership: Option<Membership>,
    highest: Token,
    link: Link,
    welcomed: bool,
    /// It is about to end and begins nothing any more.
    retired: bool,
    runs: Runs,
    present: Present,
    /// When the progress of a command about a session was last told.
    progress: BTreeMap<SessionName, Millis>,
    effects: VecDeque<Effect>,
}

impl ControlSession {
    /// A machine without a connection.
    pub fn new(known: Known) -> Self {
        let mut session = Self {
            leadership: known.replica.map(Leadership::new),
            runtime_id: known.runtime_id,
            membership: known.membership,
            highest: known.highest,
            link: Link::Down,
            welcomed: false,
            retired: false,
            runs: Runs::new(known.parallel.map_or(MAX_PARALLEL, NonZeroUsize::get)),
            present: Present::default(),
            progress: BTreeMap::new(),
            effects: VecDeque::new(),
        };
        for (key, outcome) in known.outcomes {
            session.remember(key, outcome);
        }
        session
    }

    /// The next thing to be carried out.
    pub fn next_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// Whether the control plane has welcomed this agent on the connection that stands.
    pub fn is_up(&self) -> bool {
        matches!(self.link, Link::Up(_))
    }

    /// A connection stands; `found` is all that the runtime has, seen since the last connection was lost.
    pub fn connected(&mut self, now: Millis, found: &[Observed]) {
        self.link = Link::Greeting { since: now };
        self.greet(now, found);
    }

    /// The connection is gone. Sessions and what is being done go on; what was not begun will come again.
    pub fn disconnected(&mut self) {
        self.link = Link::Down;
        self.runs.drop_queued();
        self.runs.drop_owed();
        self.present.ended.connection_lost();
        if let Some(leadership) = &mut self.leadership {
            leadership.disconnected();
        }
    }

    /// Anything came over the connection, be it a pong.
    pub fn heard(&mut self, now: Millis) {
        if let Link::Up(up) = &mut self.link {
            up.heard = now;
        }
    }

    /// A frame came.
    pub fn frame(&mut self, now: Millis, frame: ServerFrame) {
        self.heard(now);
        match frame {
            ServerFrame::Welcome(welcome) => self.welcome(now, welcome),
            ServerFrame::Command(command) => self.command(now, command),
            ServerFrame::Superseded(reason) => self.effects.push_back(Effect::End(Fatal::Superseded {
                reason: reason.reason,
            })),
            ServerFrame::Ping(_) => self.send(AgentFrame::Pong(Empty {})),
            ServerFrame::Shutdown(reason) => self.reconnect(format!("the node goes away: {}", reason.reason)),
            ServerFrame::LeaseGranted(_)
            | ServerFrame::LeaseLost(_)
            | ServerFrame::LeaseRefused(_)
            | ServerFrame::LeaseObserved(_)
            | ServerFrame::LeaseRenewed(_) => self.lease(now, &frame),
        }
    }

    /// What was begun came to its end, and that is recorded.
    pub fn finished(&mut self, now: Millis, command: &CommandFrame, outcome: Outcome) {
        let key = key_of(command);
        let again = self.runs.ended(&key);
        if let Line::Session(session) = Line::of(command) {
            self.progress.remove(&session);
        }
        if let Outcome::Completed { .. } = outcome {
            self.present.done(command);
        }
        let again = again.filter(|again| self.is_asked_by(again.token));
        if matches!(outcome, Outcome::Failed { .. }) && !self.is_own(command.token) {
            // It failed under a leadership that is over, perhaps for that reason. It is for the next one, which
            // may be this replica's, to do it.
            self.runs.forget(&key);
            if let Some(again) = again {
                self.runs.enqueue_first(again);
            }
        } else {
            let asked = again.is_some() || self.is_asked_by(command.token);
            self.remember(key.clone(), outcome.clone());
            if asked {
                self.report(now, key, outcome);
            }
        }
        self.begin_more(now);
    }

    /// The takeover under this token is complete: `found` is all that the runtime has, seen after the fence was
    /// raised, and `outcomes` what the former leader has done.
    pub fn taken_over(
        &mut self,
        now: Millis,
        token: Token,
        found: &[Observed],
        outcomes: Vec<(RunKey, Outcome)>,
    ) {
        let wanted = self
            .leadership
            .as_mut()
            .is_some_and(|leadership| leadership.taken_over(token));
        if !wanted {
            tracing::debug!(%token, "a takeover is not wanted any more");
            return;
        }
        self.highest = self.highest.max(token);
        for (key, outcome) in outcomes {
            // What this replica is still doing tells its own outcome.
            if !self.runs.is_working(&key) {
                self.remember(key, outcome);
            }
        }
        if let Link::Up(up) = &mut self.link {
            up.greeting = Some(now);
        }
        self.greet(now, found);
        self.settle(now);
    }

    /// The takeover under this token did not succeed.
    pub fn takeover_failed(&mut self, now: Millis, token: Token, reason: &str) {
        if let Some(leadership) = &mut self.leadership {
            leadership.takeover_failed(now, token, reason);
        }
        self.settle(now);
    }

    /// A session's program ended by itself.
    pub fn exited(&mut self, now: Millis, session: &SessionName, generation: Generation, exit: Exit) {
        let keep = self.keeps_exits();
        self.present.exited(session, generation, exit, keep);
        if self.acts(now) {
            self.report_exits(now);
        }
    }

    /// It runs on, and something about it is worth telling.
    pub fn changed(&mut self, now: Millis, observed: Observed, reason: String) {
        if self.acts(now) && self.present.has(&observed.session, observed.generation) {
            self.send(report::changed(observed, reason));
        }
    }

    /// A command about this session takes long, and has come further.
    pub fn progressed(&mut self, now: Millis, session: &SessionName, message: String, percent: Option<u32>) {
        // Each goes through the log of the cluster.
        let soon = self
            .progress
            .get(session)
            .is_some_and(|last| now < last + PROGRESS_EVERY);
        if soon || !self.acts(now) {
            return;
        }
        if let Some(key) = self.runs.working_on(session) {
            self.progress.insert(session.clone(), now);
            self.send(report::progress(key, message, percent));
        }
    }

    /// What the engine had may be gone: both sides compare what runs anew.
    pub fn engine_restarted(&mut self, reason: &str) {
        if !matches!(self.link, Link::Down) {
            self.reconnect(format!("what runs is to be compared anew: {reason}"));
        }
    }

    /// The cluster that the data folder belongs to, once it is known.
    pub fn cluster(&self) -> Option<&ClusterId> {
        self.membership.as_ref().map(|membership| &membership.cluster_id)
    }

    /// Time has passed: call this no later than [`ControlSession::next_tick`] says.
    pub fn tick(&mut self, now: Millis) {
        match &mut self.link {
            Link::Down => {}
            Link::Greeting { since } => {
                if now >= *since + WELCOME_WITHIN {
                    self.reconnect("no welcome in time".to_owned());
                }
            }
            Link::Up(up) => {
                let silent = now.saturating_sub(up.heard);
                if now >= up.silence_at() {
                    self.reconnect(format!("nothing was heard for {silent} ms"));
                } else if up.greeting.is_some_and(|since| now >= since + WELCOME_WITHIN) {
                    self.reconnect("no welcome in time after the takeover".to_owned());
                } else if now >= up.next_heartbeat {
                    // From now, not from when it was due: an agent that was frozen owes no burst.
                    up.next_heartbeat = now + up.heartbeat;
                    self.heartbeat();
                    if self.acts(now) {
                        self.remove_ended(now);
                    }
                }
            }
        }
        self.settle(now);
    }

    /// When [`ControlSession::tick`] must be called at the latest.
    pub fn next_tick(&self) -> Option<Millis> {
        let link = match &self.link {
            Link::Down => None,
            Link::Greeting { since } => Some(since + WELCOME_WITHIN),
            Link::Up(up) => {
                let welcome = up.greeting.map_or(Millis::MAX, |since| since + WELCOME_WITHIN);
                Some(up.next_heartbeat.min(up.silence_at()).min(welcome))
            }
        };
        let leadership = self.leadership.as_ref().and_then(Leadership::next_tick);
        link.into_iter().chain(leadership).min()
    }

    /// Begins nothing any more, since the agent is about to end; what waits will come again.
    pub fn retire(&mut self) {
        self.retired = true;
        self.runs.drop_queued();
        if let Some(leadership) = &mut self.leadership {
            leadership.retire();
        }
    }

    /// Gives the leadership up, so that the next replica leads at once.
    pub fn release(&mut self, now: Millis) {
        if let Some(leadership) = &mut self.leadership {
            leadership.release();
        }
        self.settle(now);
    }

    /// Whether nothing is being done.
    pub fn is_idle(&self) -> bool {
        self.runs.is_idle()
    }

    /// Whether it is one of several replicas.
    pub fn is_replica(&self) -> bool {
        self.leadership.is_some()
    }

    /// Whether the commands of this agent come to this process.
    pub fn leads(&self) -> bool {
        self.is_up()
            && self
                .leadership
                .as_ref()
                .is_none_or(|leadership| leadership.leads().is_some())
    }

    /// Under which token a replica may begin actions, and until when.
    pub fn permit(&self) -> Option<(Token, Millis)> {
        self.leadership.as_ref().and_then(Leadership::permit)
    }

    /// The highest fencing token seen.
    pub fn highest_token(&self) -> Token {
        self.highest
    }

    /// Whether any node has welcomed this agent since it started.
    pub fn was_welcomed(&self) -> bool {
        self.welcomed
    }

    fn welcome(&mut self, now: Millis, welcome: Welcome) {
        match &self.link {
            Link::Greeting { .. } => {}
            Link::Up(up) if up.greeting.is_some() => {}
            Link::Up(_) | Link::Down => return,
        }
        match membership::judge(self.membership.as_ref(), &welcome) {
            Verdict::Known => {}
            Verdict::Remember(found) => {
                self.effects.push_back(Effect::Remember(found.clone()));
                self.membership = Some(found);
            }
            Verdict::Older(ours) => {
                let Welcome { node, base, .. } = welcome;
                self.reconnect(format!("node {node} has revision base {base}, older than {ours}"));
                return;
            }
            Verdict::Other(ours) => {
                let found = welcome.cluster_id;
                self.effects
                    .push_back(Effect::End(Fatal::OtherCluster { ours, found }));
                return;
            }
        }
        self.welcomed = true;
        let heartbeat = welcome.heartbeat_ms.clamp(MIN_HEARTBEAT, MAX_HEARTBEAT);
        tracing::info!(node = %welcome.node, epoch = %welcome.epoch, heartbeat, "connected");
        self.link = Link::Up(Up {
            heartbeat,
            next_heartbeat: now + heartbeat,
            heard: now,
            greeting: None,
        });
        self.heartbeat();
        match &mut self.leadership {
            Some(leadership) => {
                leadership.welcomed(now, welcome.token);
                self.settle(now);
            }
            None => self.report_exits(now),
        }
    }

    /// Says what is here, and which lease it holds. `found` may be older than exits that were told since.
    fn greet(&mut self, now: Millis, found: &[Observed]) {
        let sessions = self.present.listed(now, found, self.keeps_exits());
        let leadership = self.leadership.as_ref();
        let replica = leadership.map(|leadership| leadership.replica().clone());
        let leases: Vec<HeldLease> = leadership.map(Leadership::offer).unwrap_or_default();
        self.send(AgentFrame::Hello(Hello {
            protocol: PROTOCOL,
            features: Vec::new(),
            replica,
            runtime_id: self.runtime_id.clone(),
            sessions,
            leases,
        }));
    }

    fn lease(&mut self, now: Millis, frame: &ServerFrame) {
        // A loss counts at once; all else is about what only a connection that was welcomed has asked for.
        let early = !self.is_up() && !matches!(frame, ServerFrame::LeaseLost(_));
        let Some(leadership) = self.leadership.as_mut().filter(|_| !early) else {
            tracing::debug!("ignored a frame about a lease");
            return;
        };
        match frame {
            ServerFrame::LeaseGranted(grant) => leadership.granted(now, grant, self.highest),
            ServerFrame::LeaseObserved(seen) => leadership.observed(now, seen),
            ServerFrame::LeaseRefused(refusal) => leadership.refused(now, refusal),
            ServerFrame::LeaseRenewed(renewal) => leadership.renewed(now, renewal),
            ServerFrame::LeaseLost(loss) => leadership.lost(now, loss),
            ServerFrame::Welcome(_)
            | ServerFrame::Command(_)
            | ServerFrame::Superseded(_)
            | ServerFrame::Ping(_)
            | ServerFrame::Shutdown(_) => {}
        }
        self.settle(now);
    }

    /// Does what the leadership has decided.
    fn settle(&mut self, now: Millis) {
        if let Some(leadership) = &mut self.leadership {
            leadership.tick(now);
        }
        while let Some(step) = self.leadership.as_mut().and_then(Leadership::next_step) {
            match step {
                Step::Send(frame) => self.send(frame),
                Step::TakeOver(token) => self.effects.push_back(Effect::TakeOver(token)),
                Step::Act => {
                    for (key, outcome) in self.runs.take_owed() {
                        self.report(now, key, outcome);
                    }
                    self.report_exits(now);
                    self.begin_more(now);
                }
                Step::StandBy => {
                    self.runs.drop_queued();
                    self.runs.drop_owed();
                    self.present.hand_over();
                }
            }
        }
    }

    /// Whether it may begin something and report.
    fn acts(&self, now: Millis) -> bool {
        let leadership = self.leadership.as_ref();
        self.is_up() && leadership.is_none_or(|leadership| leadership.acts(now))
    }

    /// Whether commands under this token are those of the connection that stands.
    fn is_asked_by(&self, token: Token) -> bool {
        let leadership = self.leadership.as_ref();
        self.is_up() && leadership.is_none_or(|leadership| leadership.leads() == Some(token))
    }

    /// Whether what is done under this token is done under a leadership that is not over.
    fn is_own(&self, token: Token) -> bool {
        let leadership = self.leadership.as_ref();
        leadership.is_none_or(|leadership| leadership.taken() == Some(token))
    }

    fn command(&mut self, now: Millis, command: CommandFrame) {
        if !self.leads() || self.retired {
            tracing::debug!(command = %command.command_id, "ignored a command without leading");
            return;
        }
        let key = key_of(&command);
        if command.token > self.highest && self.is_replica() {
            let refusal = Outcome::Failed {
                error: format!(
                    "fencing token {} is newer than {}, under which this replica leads",
                    command.token, self.highest
                ),
                retryable: true,
            };
            self.send(report::outcome(key, refusal));
            return;
        }
        match self.runs.seen(&command) {
            Seen::Done(outcome) => {
                tracing::debug!(command = %key.command, run = key.run, "answered a redelivery from the record");
                self.report(now, key, outcome);
                return;
            }
            Seen::UnderWay => {
                self.acknowledge(key);
                return;
            }
            Seen::New => {}
        }
        let token = command.token;
        if token < self.highest {
            self.send(report::outcome(key, too_old(token, self.highest)));
        } else if self.runs.enqueue(command) {
            self.highest = token;
            self.acknowledge(key);
            self.begin_more(now);
        } else {
            tracing::warn!(command = %key.command, queued = MAX_QUEUED, "queue is full, left a command to be redelivered");
        }
    }

    /// Begins what waits and whose line is free, oldest first.
    fn begin_more(&mut self, now: Millis) {
        if !self.acts(now) || self.retired {
            return;
        }
        while let Some(command) = self.runs.next() {
            // A newer leader may have spoken while it waited.
            if command.token < self.highest {
                let key = key_of(&command);
                self.runs.forget(&key);
                self.send(report::outcome(key, too_old(command.token, self.highest)));
            } else {
                self.effects.push_back(Effect::Begin(Box::new(command)));
            }
        }
    }

    fn remember(&mut self, key: RunKey, outcome: Outcome) {
        for forgotten in self.runs.remember(key, outcome) {
            self.effects.push_back(Effect::Forget(forgotten));
        }
    }

    /// Who stands by is told of exits by the list of its takeover; until then they are the leader's affair.
    fn keeps_exits(&self) -> bool {
        self.leadership.as_ref().is_none_or(Leadership::holds)
    }

    fn report_exits(&mut self, now: Millis) {
        for (session, generation, exit) in self.present.ended.tell(now) {
            self.send(report::exit(session, generation, exit));
        }
    }

    fn remove_ended(&mut self, now: Millis) {
        for (session, generation) in self.present.ended.take_due(now) {
            let token = self.highest;
            self.effects.push_back(Effect::Remove(SessionRef {
                session,
                generation,
                token,
            }));
        }
    }

    fn heartbeat(&mut self) {
        self.send(AgentFrame::Heartbeat(Heartbeat {
            status: "online".to_owned(),
            active_sessions: u32::try_from(self.present.count()).unwrap_or(u32::MAX),
            capacity: None,
        }));
        self.effects.push_back(Effect::Ping);
    }

    fn acknowledge(&mut self, key: RunKey) {
        self.send(AgentFrame::Ack(Ack {
            command_id: key.command,
            run: Some(key.run),
        }));
    }

    /// Reports what came of a run, now or as soon as the guard is valid again.
    fn report(&mut self, now: Millis, key: RunKey, outcome: Outcome) {
        if self.acts(now) {
            self.send(report::outcome(key, outcome));
        } else {
            self.runs.owe(key);
        }
    }

    fn send(&mut self, frame: AgentFrame) {
        self.effects.push_back(Effect::Send(Box::new(frame)));
    }

    fn reconnect(&mut self, reason: String) {
        self.disconnected();
        self.effects.push_back(Effect::Reconnect(reason));
    }
}

impl Up {
    fn silence_at(&self) -> Millis {
        self.heard + (self.heartbeat * SILENCE_TENTHS / 10).max(MIN_SILENCE)
    }
}

/// The refusal of a token that a newer leader has made old.
fn too_old(asked: Token, highest: Token) -> Outcome {
    Outcome::Failed {
        error: crate::fence::FenceError::Fenced { asked, highest }.to_string(),
        retryable: false,
    }
}
