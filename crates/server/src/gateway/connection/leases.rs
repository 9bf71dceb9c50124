//! Leases over the agent's connection: its own, `agent/{id}`, and others that it takes.
//!
//! Of an agent without replicas the gateway holds `agent/{id}` for the connection and heartbeats renew it. A
//! replica campaigns for it, and for any other lease, by frames. What it has become of a campaign is read
//! from applied state alone: a place in the queue, a grant, an end. A grant is told as soon as it is seen; it
//! binds nobody until its first keepalive is acknowledged.

use regent_state::record::{Keeping, Lease};
use regent_state::{Applied, Outcome, Rejection, State};
use regent_types::frame::{
    LeaseCampaignFrame, LeaseConfirmedFrame, LeaseKeepaliveFrame, LeaseObservedFrame, LeaseReasonFrame,
    LeaseRefusedFrame, LeaseRenewedFrame, LeaseTokenFrame, ServerFrame,
};
use regent_types::{CandidateId, Code, Epoch, LeaseName, Revision, Time, Token};

use super::{CLOSE_TRY_LATER, Connection, Effect, Phase};
use crate::ids;
use crate::keepalive::KeepaliveError;

/// Leases that one connection may want and hold.
const MAX_LEASES: usize = 10_000;
/// Pause before a campaign that was not decided is asked for again.
const AGAIN_MS: u64 = 500;

/// A lease that is wanted; its own one also while it is held.
#[derive(Debug)]
pub(super) struct Campaign {
    ttl_ms: u64,
    resume: Option<Token>,
    early_ms: Option<u64>,
    /// Whether the proposal is under way.
    asking: bool,
    /// What was decided at which revision; this node may not have applied it yet.
    decided_at: Revision,
    /// When to ask again.
    again_at: Option<u64>,
    /// The grant that the agent was told.
    told: Option<Token>,
    /// The holder that it was told.
    observed: Option<Token>,
}

/// A lease that it holds.
#[derive(Debug)]
pub(super) struct Held {
    token: Token,
    early_ms: Option<u64>,
}

impl Connection {
    /// The lease that says which connection leads the agent.
    pub(super) fn own_lease(&self) -> LeaseName {
        LeaseName::of_agent(&self.identity.agent)
    }

    pub(super) fn is_replica(&self) -> bool {
        !self.identity.replica.as_str().is_empty()
    }

    pub(super) fn on_keepalive(
        &mut self,
        keepalive: LeaseKeepaliveFrame,
        own: Option<Token>,
        wall: Time,
        state: &State,
    ) {
        let LeaseKeepaliveFrame { name, token, seq } = keepalive;
        let told = self.campaigns.get(&name).and_then(|campaign| campaign.told);
        let is_own = name == self.own_lease() && (Some(token) == own || Some(token) == told);
        // What it was told this moment this node may not have applied yet.
        let is_held = self.held.get(&name).is_some_and(|held| held.token == token);
        if is_own || is_held || self.owns(&name, state) {
            self.effects.push(Effect::Renew {
                name,
                token,
                seq: Some(seq),
            });
        } else {
            let reason = "it is not held under this token by this agent";
            self.lost(name, token, reason, wall);
        }
    }

    pub(super) fn on_campaign(&mut self, frame: LeaseCampaignFrame, epoch: Epoch, now: u64, wall: Time) {
        let LeaseCampaignFrame {
            name,
            ttl_ms,
            token: resume,
            release_on_disconnect,
        } = frame;
        let refusal = match name.agent() {
            Some(_) if name != self.own_lease() => Some((Code::Forbidden, "it is another agent's")),
            // Without replicas the gateway holds it for the connection.
            Some(_) if !self.is_replica() => Some((
                Code::WrongState,
                "the node holds this lease for the agent's connection, as it has no replica name",
            )),
            Some(_) | None if self.campaigns.len() + self.held.len() >= MAX_LEASES => {
                Some((Code::Busy, "this connection has as many leases as one may have"))
            }
            Some(_) | None => None,
        };
        if let Some((code, why)) = refusal {
            return self.refuse(name, code, why.to_owned(), wall);
        }
        if self.campaigns.get(&name).is_some_and(|campaign| campaign.asking) {
            return; // it is on its way already
        }
        self.held.remove(&name);
        let early_ms = release_on_disconnect.map(|early| early.grace_ms);
        if name == self.own_lease() {
            self.early_own_ms = early_ms;
        }
        self.campaigns.insert(
            name.clone(),
            Campaign {
                ttl_ms,
                resume,
                early_ms,
                asking: false,
                // What the replica held before this connection is its former self's, whatever becomes of asking.
                decided_at: Revision(epoch.0),
                again_at: Some(now),
                told: None,
                observed: None,
            },
        );
        self.ask(&name, epoch);
    }

    fn ask(&mut self, name: &LeaseName, epoch: Epoch) {
        let candidate = self.candidate_id(name, epoch);
        let Some(campaign) = self.campaigns.get_mut(name) else {
            return;
        };
        campaign.asking = true;
        campaign.again_at = None;
        self.effects.push(Effect::Campaign {
            name: name.clone(),
            candidate,
            ttl_ms: campaign.ttl_ms,
            resume: campaign.resume,
            epoch: (*name == self.own_lease()).then_some(epoch),
        });
    }

    /// A replica keeps its place in the queue for its own lease over whatever connection. For others each
    /// connection stands for itself: a process that was started anew must not be given what its former self
    /// holds and may still act under.
    fn candidate_id(&self, name: &LeaseName, epoch: Epoch) -> CandidateId {
        match CandidateId::new(self.identity.replica.as_str()) {
            Ok(id) if *name == self.own_lease() => id,
            _ => {
                // Of the socket: a replica that takes over says hello again and has a new epoch.
                let epoch = self.first_epoch.unwrap_or(epoch);
                ids::connection_candidate_id(&self.identity.agent, &self.identity.replica, epoch)
            }
        }
    }

    /// A campaign was decided, or nobody could say.
    pub(in crate::gateway) fn campaigned(
        &mut self,
        name: LeaseName,
        result: Result<(Revision, Applied), String>,
        now: u64,
        wall: Time,
    ) {
        let Some(campaign) = self.campaigns.get_mut(&name) else {
            return;
        };
        campaign.asking = false;
        match result {
            Ok((revision, Ok(Outcome::Lease(lease)))) => {
                campaign.decided_at = revision;
                self.tell_grant(&lease, wall);
            }
            // It waits; or a newer connection of this replica is there, as the state says once it is as far.
            Ok((revision, Ok(_) | Err(Rejection::Superseded))) => campaign.decided_at = revision,
            Ok((_, Err(rejection))) => {
                self.campaigns.remove(&name);
                let code = match &rejection {
                    Rejection::Invalid { .. } => Code::InvalidRequest,
                    Rejection::Busy(_) => Code::Busy,
                    Rejection::LeasesHeldBack { .. } => Code::LeasesHeldBack,
                    Rejection::Unauthenticated => Code::Unauthenticated,
                    Rejection::IdempotencyKeyReused | Rejection::WrongState(_) => Code::WrongState,
                    _ => Code::Forbidden,
                };
                self.refuse(name, code, rejection.to_string(), wall);
            }
            Err(error) => {
                tracing::debug!(agent = %self.identity.agent, lease = %name, error, "a campaign was not decided; it is asked for again");
                campaign.again_at = Some(now + AGAIN_MS);
            }
        }
    }

    /// What has become of the campaigns.
    pub(super) fn on_leases(&mut self, state: &State, epoch: Epoch, now: u64, wall: Time) {
        let names: Vec<LeaseName> = self.campaigns.keys().cloned().collect();
        for name in names {
            let candidate = self.candidate_id(&name, epoch);
            let campaign = &self.campaigns[&name];
            if campaign.asking || state.revision() < campaign.decided_at {
                continue;
            }
            let lease = state.lease(&name).cloned();
            let mine = lease.clone().filter(|lease| self.is_mine(lease, &candidate));
            match (mine, campaign.told) {
                (Some(lease), told) if told != Some(lease.token) => self.tell_grant(&lease, wall),
                (Some(_), _) => {}
                (None, Some(token)) => {
                    self.campaigns.remove(&name);
                    let reason = format!("it is not held under token {token} any more");
                    self.lost(name, token, &reason, wall);
                }
                (None, None) => {
                    let due = campaign.again_at.is_some_and(|at| at <= now);
                    let waits = state.candidate(&name, &candidate).is_some();
                    if let Some(lease) = lease.filter(|lease| campaign.observed != Some(lease.token)) {
                        self.observe(&lease, wall);
                    }
                    // Dropped from the queue, or never decided: stand in it again.
                    if due || (!waits && self.campaigns[&name].again_at.is_none()) {
                        self.ask(&name, epoch);
                    }
                }
            }
        }
    }

    /// Whether the lease was granted to this campaign. What the replica held before it campaigned is its former
    /// self's: that may be another process, which still acts under it.
    fn is_mine(&self, lease: &Lease, candidate: &CandidateId) -> bool {
        let campaign = &self.campaigns[&lease.name];
        if campaign.told == Some(lease.token) {
            return true;
        }
        match &lease.kept {
            Keeping::Replica(replica) => {
                lease.name == self.own_lease()
                    && *replica == self.identity.replica
                    && lease.token.0 > campaign.decided_at.0
            }
            Keeping::Candidacy(id, _) => id == candidate,
            Keeping::Holder | Keeping::Gateway(..) => false,
        }
    }

    fn tell_grant(&mut self, lease: &Lease, wall: Time) {
        let name = lease.name.clone();
        let frame = ServerFrame::LeaseGranted(LeaseConfirmedFrame {
            name: name.clone(),
            token: lease.token,
            ttl_ms: lease.ttl_ms,
        });
        self.send(&frame, wall);
        if name == self.own_lease() {
            if let Some(campaign) = self.campaigns.get_mut(&name) {
                campaign.told = Some(lease.token);
            }
        } else if let Some(campaign) = self.campaigns.remove(&name) {
            // Its end is noticed by the next keepalive.
            let held = Held {
                token: lease.token,
                early_ms: campaign.early_ms,
            };
            self.held.insert(name.clone(), held);
        }
        self.effects.push(Effect::Taken(name));
    }

    fn observe(&mut self, lease: &Lease, wall: Time) {
        let frame = ServerFrame::LeaseObserved(LeaseObservedFrame {
            name: lease.name.clone(),
            holder: lease.holder.clone(),
            token: lease.token,
        });
        self.send(&frame, wall);
        if let Some(campaign) = self.campaigns.get_mut(&lease.name) {
            campaign.observed = Some(lease.token);
        }
    }

    /// The agent joined and leads under this token, which it held before.
    pub(super) fn leads_under(&mut self, token: Token) {
        let name = self.own_lease();
        let early_ms = self.early_own_ms;
        self.campaigns.insert(
            name,
            Campaign {
                ttl_ms: 0,
                resume: None,
                early_ms,
                asking: false,
                decided_at: Revision(0),
                again_at: None,
                told: Some(token),
                observed: None,
            },
        );
    }

    pub(super) fn on_release(&mut self, frame: LeaseTokenFrame) {
        let LeaseTokenFrame { name, token } = frame;
        let own = name == self.own_lease()
            && self
                .campaigns
                .get(&name)
                .is_some_and(|campaign| campaign.told == Some(token));
        if own || self.held.get(&name).is_some_and(|held| held.token == token) {
            self.campaigns.remove(&name);
            self.held.remove(&name);
        }
        self.effects.push(Effect::Release { name, token, own });
    }

    /// When a campaign is to be asked for again.
    pub(super) fn next_campaign(&self) -> Option<u64> {
        self.campaigns
            .values()
            .filter(|campaign| !campaign.asking)
            .filter_map(|campaign| campaign.again_at)
            .min()
    }

    /// The leases that are to be given up early once the connection is lost: with their tokens and how long it
    /// may take to come back, in milliseconds.
    pub(in crate::gateway) fn early_releases(&self) -> Vec<(LeaseName, Token, u64)> {
        let own = self
            .campaigns
            .iter()
            .filter_map(|(name, campaign)| Some((name.clone(), campaign.told?, campaign.early_ms?)));
        let held = self
            .held
            .iter()
            .filter_map(|(name, held)| Some((name.clone(), held.token, held.early_ms?)));
        own.chain(held).collect()
    }

    /// Whatever the agent says shows that it lives; once per heartbeat, however many frames it sends.
    pub(super) fn renew_own(&mut self, token: Option<Token>, now: u64) {
        // A replica keeps its lease by frames of their own: a heartbeat does not say that it still leads.
        let Some(token) = token.filter(|_| !self.is_replica()) else {
            return;
        };
        let soon = self
            .renewed_at
            .is_some_and(|at| now < at + self.identity.heartbeat_ms / 2);
        if self.renewing || soon {
            return;
        }
        self.renewing = true;
        self.renewed_at = Some(now);
        self.effects.push(Effect::Renew {
            name: self.own_lease(),
            token,
            seq: None,
        });
    }

    /// A renewal was answered.
    pub(in crate::gateway) fn renewed(
        &mut self,
        name: &LeaseName,
        token: Token,
        seq: Option<u64>,
        result: Result<u64, KeepaliveError>,
        wall: Time,
    ) {
        if seq.is_none() {
            self.renewing = false;
        }
        let Phase::Joined { token: own, .. } = self.phase else {
            return;
        };
        match result {
            Ok(ttl_ms) => {
                if let Some(seq) = seq {
                    let renewed = LeaseRenewedFrame {
                        name: name.clone(),
                        token,
                        ttl_ms,
                        seq,
                    };
                    self.send(&ServerFrame::LeaseRenewed(renewed), wall);
                }
            }
            Err(KeepaliveError::Lost)
                if !self.is_replica() && Some(token) == own && *name == self.own_lease() =>
            {
                self.close_lost(
                    CLOSE_TRY_LATER,
                    format!("{name} is not held under token {token} any more"),
                );
            }
            Err(KeepaliveError::Lost) => {
                self.forget(name, token);
                self.lost(name.clone(), token, "it is not held under this token", wall);
            }
            // The next one may be; a node for which none is for too long lets its agents go.
            Err(KeepaliveError::Unavailable(error)) => {
                tracing::debug!(agent = %self.identity.agent, lease = %name, %error, "a renewal was not confirmed");
            }
        }
    }

    /// A lease that is lost under this token is not held any more, nor wanted.
    fn forget(&mut self, name: &LeaseName, token: Token) {
        if self.held.get(name).is_some_and(|held| held.token == token) {
            self.held.remove(name);
        }
        if self
            .campaigns
            .get(name)
            .is_some_and(|campaign| campaign.told == Some(token))
        {
            self.campaigns.remove(name);
        }
    }

    pub(super) fn owns(&self, name: &LeaseName, state: &State) -> bool {
        let me = state.principal_of(&self.identity.token, state.now());
        name.agent().is_none()
            && state
                .lease(name)
                .is_some_and(|lease| me.is_some_and(|(me, _)| lease.owner == me))
    }

    fn lost(&mut self, name: LeaseName, token: Token, reason: &str, wall: Time) {
        let frame = ServerFrame::LeaseLost(LeaseReasonFrame {
            name,
            token: Some(token),
            reason: reason.to_owned(),
        });
        self.send(&frame, wall);
    }

    fn refuse(&mut self, name: LeaseName, code: Code, detail: String, wall: Time) {
        self.effects.push(Effect::Taken(name.clone()));
        self.send(
            &ServerFrame::LeaseRefused(LeaseRefusedFrame { name, code, detail }),
            wall,
        );
    }
}
