//! Leases over the agent's connection: its own, which the gateway holds for it, and others that it takes.

use regent_state::{Outcome, Rejection, State};
use regent_types::frame::{
    LeaseCampaignFrame, LeaseConfirmedFrame, LeaseKeepaliveFrame, LeaseObservedFrame, LeaseReasonFrame,
    LeaseRefusedFrame, LeaseRenewedFrame, ServerFrame,
};
use regent_types::{Code, LeaseName, Principal, Time, Token};

use super::{CLOSE_TRY_LATER, Connection, Effect, Phase};
use crate::keepalive::KeepaliveError;

impl Connection {
    pub(super) fn on_keepalive(
        &mut self,
        keepalive: LeaseKeepaliveFrame,
        own: Option<Token>,
        wall: Time,
        state: &State,
    ) {
        let LeaseKeepaliveFrame { name, token, seq } = keepalive;
        let is_own = Some(token) == own && name == LeaseName::of_agent(&self.identity.agent);
        if is_own || self.owns(&name, state) {
            self.effects.push(Effect::Renew {
                name,
                token,
                seq: Some(seq),
            });
        } else {
            self.lost(name, "it is not held under this token by this agent", wall);
        }
    }

    pub(super) fn on_campaign(&mut self, campaign: LeaseCampaignFrame, wall: Time) {
        let LeaseCampaignFrame {
            name,
            ttl_ms,
            token: _,
            release_on_disconnect: _,
        } = campaign;
        if name.agent().is_some() {
            // Without replicas the gateway holds it for the connection.
            let detail = "the node holds this lease for the agent's connection".to_owned();
            let refused = LeaseRefusedFrame {
                name,
                code: Code::WrongState,
                detail,
            };
            self.send(&ServerFrame::LeaseRefused(refused), wall);
        } else {
            self.effects.push(Effect::Acquire { name, ttl_ms });
        }
    }

    /// Once per heartbeat: an agent that sends many frames renews no more often.
    pub(super) fn renew_own(&mut self, token: Option<Token>, now: u64) {
        let Some(token) = token else { return };
        let soon = self
            .renewed_at
            .is_some_and(|at| now < at + self.identity.heartbeat_ms / 2);
        if self.renewing || soon {
            return;
        }
        self.renewing = true;
        self.renewed_at = Some(now);
        self.effects.push(Effect::Renew {
            name: LeaseName::of_agent(&self.identity.agent),
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
                if Some(token) == own && *name == LeaseName::of_agent(&self.identity.agent) =>
            {
                self.close_lost(
                    CLOSE_TRY_LATER,
                    format!("{name} is not held under token {token} any more"),
                );
            }
            Err(KeepaliveError::Lost) => self.lost(name.clone(), "it is not held under this token", wall),
            // The next one may be; a node for which none is for too long lets its agents go.
            Err(KeepaliveError::Unavailable(error)) => {
                tracing::debug!(agent = %self.identity.agent, lease = %name, %error, "a renewal was not confirmed");
            }
        }
    }

    /// A campaign was decided.
    pub(in crate::gateway) fn granted(
        &mut self,
        name: LeaseName,
        result: Result<Result<Outcome, Rejection>, String>,
        wall: Time,
    ) {
        let frame = match result {
            Ok(Ok(Outcome::Lease(lease))) => ServerFrame::LeaseGranted(LeaseConfirmedFrame {
                name,
                token: lease.token,
                ttl_ms: lease.ttl_ms,
            }),
            Ok(Err(Rejection::LeaseHeld { holder, token })) => {
                ServerFrame::LeaseObserved(LeaseObservedFrame { name, holder, token })
            }
            Ok(Ok(_)) => return,
            Ok(Err(rejection)) => ServerFrame::LeaseRefused(LeaseRefusedFrame {
                name,
                code: Code::Forbidden,
                detail: rejection.to_string(),
            }),
            Err(error) => ServerFrame::LeaseRefused(LeaseRefusedFrame {
                name,
                code: Code::OutcomeUnknown,
                detail: error,
            }),
        };
        self.send(&frame, wall);
    }

    pub(super) fn owns(&self, name: &LeaseName, state: &State) -> bool {
        let me = Principal::Agent(self.identity.agent.clone());
        name.agent().is_none() && state.lease(name).is_some_and(|lease| lease.owner == me)
    }

    pub(super) fn lost(&mut self, name: LeaseName, reason: &str, wall: Time) {
        let frame = ServerFrame::LeaseLost(LeaseReasonFrame {
            name,
            reason: reason.to_owned(),
        });
        self.send(&frame, wall);
    }
}
