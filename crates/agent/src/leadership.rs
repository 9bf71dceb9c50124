//! Who leads among the replicas of an agent, as one of them sees it. Pure: told the time and frames.
//!
//! A replica campaigns for the lease `agent/ID` and stands by until it is promoted. A grant alone gives no
//! right: it counts from a keepalive that was sent under the new token and acknowledged ([`Guard`]). Then the
//! replica takes over (fence, list, journal: [`Step::TakeOver`]), says `hello` again with the token, and leads
//! once it is welcomed with it. Invariants:
//!
//! - it acts only while it leads **and** its guard is valid; a guard that lapsed may be won back under the
//!   same token, a token that was lost never;
//! - a connection is only ever offered a token for which the takeover is complete. One that was granted and not
//!   taken over when the connection broke is resumed by a campaign instead, and taken over anew;
//! - a token older than the highest seen is given back: the node that granted it lags behind. The highest itself,
//!   if this process does not hold it, is an earlier process's, and nothing is done under it either.

use std::collections::VecDeque;
use std::time::Duration;

use regent_client::backoff::FullJitter;
use regent_client::guard::Guard;
use regent_types::frame::{
    AgentFrame, HeldLease, LeaseCampaignFrame, LeaseConfirmedFrame, LeaseKeepaliveFrame, LeaseObservedFrame,
    LeaseReasonFrame, LeaseRefusedFrame, LeaseRenewedFrame, LeaseTokenFrame, ReleaseOnDisconnect,
};
use regent_types::{LeaseName, ReplicaName, Token};

use crate::session::Millis;

/// A campaign that was answered by nothing is sent again after this long: a node's own deadline for a write.
const ANSWER_WITHIN: Millis = 10_000;
/// The ceiling of the first wait before a campaign that was refused is sent again.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// The ceiling of later waits: what refuses a replica is mended by people, or by a failover.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Which replica an agent is, and what it campaigns with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidacy {
    /// The replica.
    pub replica: ReplicaName,
    /// The lease of the agent.
    pub lease: LeaseName,
    /// The TTL that it asks for, in milliseconds.
    pub ttl_ms: u64,
    /// Whether and how soon the lease is given up when the connection is lost.
    pub release_on_disconnect: Option<ReleaseOnDisconnect>,
}

/// What the session is to do.
#[derive(Debug, PartialEq)]
pub(crate) enum Step {
    /// Send a frame.
    Send(AgentFrame),
    /// Raise the fence, list the runtime, recover the journal; then [`Leadership::taken_over`].
    TakeOver(Token),
    /// It leads and its guard is valid, which was not so before: what waited for that goes on.
    Act,
    /// The token is gone: whatever was to be done under it is not.
    StandBy,
}

/// How far a grant has got. The order counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// Granted over a connection that is lost; the next one must confirm it.
    Resuming,
    /// No keepalive of it is acknowledged yet.
    Granted,
    /// The shell takes over.
    TakingOver,
    /// `hello` offers the token, or will.
    TakenOver,
    /// Welcomed with the token.
    Leading,
}

#[derive(Debug)]
struct Holding {
    token: Token,
    guard: Guard,
    stage: Stage,
    /// Whether it was said that the guard is over, so that it is said once.
    lapsed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Campaign {
    /// None is needed.
    Idle,
    /// To be sent then.
    Due(Millis),
    /// Sent then, not answered.
    Sent(Millis),
    /// In the queue of candidates, which the node looks after.
    Queued,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    /// Nobody has welcomed it.
    Down,
    /// Welcomed.
    Up,
    /// Welcomed before, and the `hello` that offers the token is not answered.
    Greeting,
}

/// The leadership of one replica.
#[derive(Debug)]
pub(crate) struct Leadership {
    candidacy: Candidacy,
    holding: Option<Holding>,
    campaign: Campaign,
    link: Link,
    observed: Option<Token>,
    backoff: FullJitter,
    /// It is about to end and wants nothing any more.
    retired: bool,
    steps: VecDeque<Step>,
}

impl Leadership {
    /// One that stands by, without a connection.
    pub(crate) fn new(candidacy: Candidacy) -> Self {
        Self {
            candidacy,
            holding: None,
            campaign: Campaign::Idle,
            link: Link::Down,
            observed: None,
            backoff: FullJitter::new(FIRST_PAUSE, LONGEST_PAUSE),
            retired: false,
            steps: VecDeque::new(),
        }
    }

    /// The next thing to be done.
    pub(crate) fn next_step(&mut self) -> Option<Step> {
        self.steps.pop_front()
    }

    /// Which replica this is.
    pub(crate) fn replica(&self) -> &ReplicaName {
        &self.candidacy.replica
    }

    /// What `hello` says that it holds.
    pub(crate) fn offer(&self) -> Vec<HeldLease> {
        let held = self.taken().map(|token| HeldLease {
            name: self.candidacy.lease.clone(),
            token,
            release_on_disconnect: self.candidacy.release_on_disconnect,
        });
        held.into_iter().collect()
    }

    /// The token that it took over under and has not lost.
    pub(crate) fn taken(&self) -> Option<Token> {
        let holding = self.holding.as_ref();
        holding
            .filter(|one| one.stage >= Stage::TakenOver)
            .map(|one| one.token)
    }

    /// The token under which commands come.
    pub(crate) fn leads(&self) -> Option<Token> {
        let holding = self.holding.as_ref();
        holding
            .filter(|one| one.stage == Stage::Leading)
            .map(|one| one.token)
    }

    /// Whether it leads and may act.
    pub(crate) fn acts(&self, now: Millis) -> bool {
        let holding = self.holding.as_ref();
        holding.is_some_and(|one| one.stage == Stage::Leading && one.guard.is_valid(now))
    }

    /// Under which token actions may be begun, and until when. A connection that is lost takes nothing of it.
    pub(crate) fn permit(&self) -> Option<(Token, Millis)> {
        let holding = self.holding.as_ref();
        holding
            .filter(|one| one.stage >= Stage::TakenOver)
            .map(|one| (one.token, one.guard.valid_until()))
    }

    /// Whether a token is held, however far it has got.
    pub(crate) fn holds(&self) -> bool {
        self.holding.is_some()
    }

    /// A `welcome` came.
    pub(crate) fn welcomed(&mut self, now: Millis, token: Option<Token>) {
        self.link = Link::Up;
        match &mut self.holding {
            Some(holding) if holding.stage >= Stage::TakenOver && token == Some(holding.token) => {
                holding.stage = Stage::Leading;
                let valid = holding.guard.is_valid(now);
                tracing::info!(token = %holding.token, valid, "leads");
                self.keepalive(now);
                if valid {
                    self.steps.push_back(Step::Act);
                }
            }
            Some(holding) if holding.stage >= Stage::TakenOver => {
                self.lose("the control plane does not confirm it any more");
                self.campaign = Campaign::Due(now);
            }
            Some(holding) if holding.stage == Stage::Resuming => self.campaign = Campaign::Due(now),
            // Promoted while it waited for the answer to an earlier token's `hello`.
            Some(_) => self.advance(now),
            None => self.campaign = Campaign::Due(now),
        }
    }

    /// The connection is lost. Token and guard stay.
    pub(crate) fn disconnected(&mut self) {
        self.link = Link::Down;
        self.campaign = Campaign::Idle;
        if let Some(holding) = &mut self.holding {
            holding.stage = match holding.stage {
                Stage::Resuming | Stage::Granted | Stage::TakingOver => Stage::Resuming,
                Stage::TakenOver | Stage::Leading => Stage::TakenOver,
            };
        }
    }

    /// Promoted. `highest` is the highest token seen.
    pub(crate) fn granted(&mut self, now: Millis, grant: &LeaseConfirmedFrame, highest: Token) {
        if !self.is_mine(&grant.name) {
            return;
        }
        match &self.holding {
            Some(holding) if holding.token == grant.token => self.resumed(now),
            Some(holding) if holding.token > grant.token => {
                tracing::debug!(token = %grant.token, "ignored a grant that is older than the one held");
            }
            Some(_) | None if self.retired => self.give_back(grant.token),
            // Not given back: that process may be frozen, with a guard that is valid still.
            None if grant.token == highest => {
                let pause = self.campaign_after_a_pause(now);
                tracing::warn!(token = %grant.token, pause, "an earlier process of this replica leads under this token; its lease must end first");
            }
            Some(_) | None if grant.token < highest => {
                tracing::warn!(token = %grant.token, %highest, "gave back a grant that is older than a leadership seen here: the node lags behind");
                self.give_back(grant.token);
                if self.holding.is_none() {
                    self.campaign_after_a_pause(now);
                }
            }
            Some(_) | None => {
                if self.holding.is_some() {
                    self.lose("a newer grant came");
                }
                tracing::info!(token = %grant.token, ttl_ms = grant.ttl_ms, "promoted");
                self.holding = Some(Holding {
                    token: grant.token,
                    guard: Guard::new(grant.ttl_ms),
                    stage: Stage::Granted,
                    lapsed: false,
                });
                self.campaign = Campaign::Idle;
                self.backoff.reset();
                self.keepalive(now);
            }
        }
    }

    /// Somebody holds it.
    pub(crate) fn observed(&mut self, now: Millis, seen: &LeaseObservedFrame) {
        if !self.is_mine(&seen.name) {
            return;
        }
        match &self.holding {
            Some(holding) if holding.token == seen.token => return self.resumed(now),
            // What was true before this grant.
            Some(holding) if holding.token > seen.token => return,
            Some(_) => {
                self.lose("somebody else leads");
                self.campaign = Campaign::Due(now);
            }
            None => {
                if let Campaign::Sent(_) = self.campaign {
                    self.campaign = Campaign::Queued;
                    self.backoff.reset();
                }
            }
        }
        if self.observed.replace(seen.token) != Some(seen.token) {
            tracing::info!(holder = seen.holder, token = %seen.token, "stands by");
        }
    }

    /// The campaign is refused.
    pub(crate) fn refused(&mut self, now: Millis, refusal: &LeaseRefusedFrame) {
        if !self.is_mine(&refusal.name) {
            return;
        }
        match &self.holding {
            Some(holding) if holding.stage > Stage::Resuming => {
                tracing::debug!(code = ?refusal.code, "ignored the refusal of an earlier campaign");
                return;
            }
            // What a node cannot do now says nothing about the token.
            Some(_) if !matches!(refusal.code.status(), 429 | 500..) => self.lose("it cannot be resumed"),
            Some(_) | None => {}
        }
        let pause = self.campaign_after_a_pause(now);
        tracing::warn!(code = ?refusal.code, reason = refusal.detail, pause, "may not lead");
    }

    /// A keepalive counts.
    pub(crate) fn renewed(&mut self, now: Millis, renewal: &LeaseRenewedFrame) {
        if !self.is_mine(&renewal.name) {
            return;
        }
        let acted = self.acts(now);
        match &mut self.holding {
            Some(holding) if holding.token == renewal.token => {
                holding.guard.acknowledged(renewal.seq, renewal.ttl_ms);
                if holding.lapsed && holding.guard.is_valid(now) {
                    holding.lapsed = false;
                    tracing::info!(token = %holding.token, "the guard is valid again");
                }
            }
            Some(_) | None => {
                tracing::debug!(token = %renewal.token, "ignored the renewal of another token");
                return;
            }
        }
        if !acted && self.acts(now) {
            self.steps.push_back(Step::Act);
        }
        self.advance(now);
    }

    /// The lease is lost, or the place in the queue.
    pub(crate) fn lost(&mut self, now: Millis, loss: &LeaseReasonFrame) {
        if !self.is_mine(&loss.name) {
            return;
        }
        let newer = |holding: &Holding| loss.token.is_some_and(|lost| lost != holding.token);
        if self.holding.as_ref().is_some_and(newer) {
            tracing::debug!(reason = loss.reason, "ignored the loss of an earlier token");
            return;
        }
        if self.holding.is_some() {
            self.lose(&loss.reason);
            self.campaign = Campaign::Due(now);
        } else {
            self.campaign_after_a_pause(now);
        }
    }

    /// The takeover under this token is complete. Gives whether it is still wanted; then `hello` is to be said.
    pub(crate) fn taken_over(&mut self, token: Token) -> bool {
        match &mut self.holding {
            Some(holding) if holding.token == token && holding.stage == Stage::TakingOver => {
                holding.stage = Stage::TakenOver;
                self.link = Link::Greeting;
                true
            }
            Some(_) | None => false,
        }
    }

    /// The takeover under this token did not succeed: another replica may.
    pub(crate) fn takeover_failed(&mut self, now: Millis, token: Token, reason: &str) {
        match &self.holding {
            Some(holding) if holding.token == token && holding.stage == Stage::TakingOver => {
                tracing::error!(%token, reason, "cannot lead, and gives the lease back");
                self.release();
                self.steps.push_back(Step::StandBy);
                self.campaign_after_a_pause(now);
            }
            Some(_) | None => {}
        }
    }

    /// Time has passed; to be called after everything else too.
    pub(crate) fn tick(&mut self, now: Millis) {
        if let Some(holding) = &mut self.holding {
            if !holding.lapsed && holding.guard.valid_until() > 0 && !holding.guard.is_valid(now) {
                holding.lapsed = true;
                tracing::warn!(token = %holding.token, "the guard is over: nothing is begun until it is won back");
            }
            if holding.stage > Stage::Resuming
                && self.link != Link::Down
                && now >= holding.guard.next_keepalive()
            {
                self.keepalive(now);
            }
        }
        if self.may_campaign() && self.campaign_at().is_some_and(|at| now >= at) {
            self.campaign = Campaign::Sent(now);
            let token = self.holding.as_ref().map(|holding| holding.token);
            self.steps
                .push_back(Step::Send(AgentFrame::LeaseCampaign(LeaseCampaignFrame {
                    name: self.candidacy.lease.clone(),
                    ttl_ms: self.candidacy.ttl_ms,
                    token,
                    release_on_disconnect: self.candidacy.release_on_disconnect,
                })));
        }
    }

    /// When [`Leadership::tick`] must be called at the latest.
    pub(crate) fn next_tick(&self) -> Option<Millis> {
        let holding = self.holding.as_ref();
        let lapse = holding
            .filter(|one| !one.lapsed && one.guard.valid_until() > 0)
            .map(|one| one.guard.valid_until());
        let keepalive = holding
            .filter(|one| one.stage > Stage::Resuming && self.link != Link::Down)
            .map(|one| one.guard.next_keepalive());
        let campaign = self.campaign_at().filter(|_| self.may_campaign());
        [lapse, keepalive, campaign].into_iter().flatten().min()
    }

    /// It is about to end: it wants the lease no more, and keeps what it holds until [`Leadership::release`].
    pub(crate) fn retire(&mut self) {
        self.retired = true;
        self.campaign = Campaign::Idle;
    }

    /// Gives up what it holds, so that the next one leads at once.
    pub(crate) fn release(&mut self) {
        if let Some(holding) = self.holding.take()
            && self.link != Link::Down
        {
            tracing::info!(token = %holding.token, "gives the lease back");
            self.give_back(holding.token);
        }
    }

    fn give_back(&mut self, token: Token) {
        let frame = AgentFrame::LeaseRelease(self.named(token));
        self.steps.push_back(Step::Send(frame));
    }

    /// The control plane confirmed over this connection what was granted over an earlier one.
    fn resumed(&mut self, now: Millis) {
        if let Some(holding) = &mut self.holding
            && holding.stage == Stage::Resuming
        {
            holding.stage = Stage::Granted;
            self.campaign = Campaign::Idle;
            self.backoff.reset();
            self.keepalive(now);
        }
    }

    /// Takes over once that is allowed. Not while a `hello` is unanswered: its answer could not be told from
    /// that to the next one.
    fn advance(&mut self, now: Millis) {
        if let Some(holding) = &mut self.holding
            && holding.stage == Stage::Granted
            && holding.guard.is_valid(now)
            && self.link == Link::Up
        {
            holding.stage = Stage::TakingOver;
            self.steps.push_back(Step::TakeOver(holding.token));
        }
    }

    fn keepalive(&mut self, now: Millis) {
        let Some(holding) = &mut self.holding else { return };
        // Counted from here, which is before the frame leaves.
        let seq = holding.guard.sending(now);
        let frame = LeaseKeepaliveFrame {
            name: self.candidacy.lease.clone(),
            token: holding.token,
            seq,
        };
        self.steps
            .push_back(Step::Send(AgentFrame::LeaseKeepalive(frame)));
    }

    fn lose(&mut self, reason: &str) {
        if let Some(mut holding) = self.holding.take() {
            holding.guard.lost();
            tracing::warn!(token = %holding.token, reason, "leads no more");
            self.steps.push_back(Step::StandBy);
        }
    }

    /// Gives the wait, in milliseconds.
    fn campaign_after_a_pause(&mut self, now: Millis) -> Millis {
        // Full jitter may say none at all; a refusal is still not answered in the same moment.
        let pause = u64::try_from(self.backoff.next_delay().as_millis())
            .unwrap_or(u64::MAX)
            .max(1);
        self.campaign = Campaign::Due(now.saturating_add(pause));
        pause
    }

    fn campaign_at(&self) -> Option<Millis> {
        match self.campaign {
            Campaign::Idle | Campaign::Queued => None,
            Campaign::Due(at) => Some(at),
            Campaign::Sent(at) => Some(at + ANSWER_WITHIN),
        }
    }

    /// Not while a `hello` is unanswered: it makes another connection of this one, and the campaign belongs to
    /// the connection.
    fn may_campaign(&self) -> bool {
        self.link == Link::Up && !self.retired
    }

    fn is_mine(&self, name: &LeaseName) -> bool {
        if *name != self.candidacy.lease {
            tracing::debug!(lease = %name, "ignored a frame about another lease");
        }
        *name == self.candidacy.lease
    }

    fn named(&self, token: Token) -> LeaseTokenFrame {
        LeaseTokenFrame {
            name: self.candidacy.lease.clone(),
            token,
        }
    }
}
