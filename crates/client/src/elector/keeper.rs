//! Renews one lease until it is over: the shell around [`Guard`] and [`Rounds`].
//!
//! Invariant: the guard is told of a renewal before it is sent, and of an answer only by the number of the
//! renewal that it answers; so late, doubled and reordered answers count from their own sending. Who runs
//! this ends it by dropping it, which closes what is open.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt as _};
use regent_types::lease::{LeaseConfirmed, LeaseTokenBody};
use regent_types::{Code, LeaseName, Token};

use super::leadership::{Loss, Shared};
use super::rounds::Rounds;
use crate::call::{Call, Repeat};
use crate::guard::Guard;
use crate::{Client, Error, clock};

/// Renewals that may be open at the same time. With the pauses between them and the bound on each, a cluster
/// that answers nothing reaches about twenty; beyond it none is sent before one has ended.
const MAX_OPEN: usize = 32;
/// How long one renewal may be open at most: a node answers or refuses within 10 s.
const LONGEST_ATTEMPT: Duration = Duration::from_secs(10);
/// How long one may be open at least, however short the TTL: the answer of a busy node may still win the lease
/// back.
const SHORTEST_ATTEMPT: Duration = Duration::from_secs(1);

/// One renewal's end.
struct Answered {
    server: usize,
    seq: u64,
    outcome: Result<LeaseConfirmed, Error>,
}

/// The keeper of one lease.
pub(super) struct Keeper {
    client: Client,
    lease: LeaseName,
    token: Token,
    guard: Guard,
    rounds: Rounds,
    shared: Arc<Shared>,
    open: FuturesUnordered<BoxFuture<'static, Answered>>,
}

impl Keeper {
    pub(super) fn new(
        client: Client,
        lease: LeaseName,
        token: Token,
        guard: Guard,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            rounds: Rounds::new(client.server_count(), client.preferred()),
            client,
            lease,
            token,
            guard,
            shared,
            open: FuturesUnordered::new(),
        }
    }

    /// Renews until the lease is lost for certain.
    pub(super) async fn run(mut self) {
        loop {
            let now = clock::boot_ms();
            let valid = self.guard.is_valid(now);
            if !valid {
                self.shared.lapsed();
            }
            let due = self.rounds.due(&self.guard);
            let may_send = self.open.len() < MAX_OPEN;
            if due <= now && may_send {
                self.send(now);
                continue;
            }
            let wake = match (may_send, valid) {
                (true, true) => Some(due.min(self.guard.valid_until())),
                (true, false) => Some(due),
                (false, true) => Some(self.guard.valid_until()),
                (false, false) => None,
            };
            let sleep = async {
                match wake {
                    Some(wake) => tokio::time::sleep(Duration::from_millis(wake.saturating_sub(now))).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some(answered) = self.open.next(), if !self.open.is_empty() => {
                    if let Some(loss) = self.answered(answered) {
                        tracing::debug!(lease = %self.lease, token = %self.token, %loss, "the lease is lost");
                        self.guard.lost();
                        self.shared.over(loss);
                        return;
                    }
                }
                () = sleep => {}
            }
        }
    }

    fn send(&mut self, now: u64) {
        let seq = self.guard.sending(now);
        let server = self.rounds.next(now, seq, &self.guard);
        let within = Duration::from_millis(self.guard.ttl_ms()).clamp(SHORTEST_ATTEMPT, LONGEST_ATTEMPT);
        let client = self.client.clone();
        let call = Call::post(["leases", self.lease.as_str(), "renew"])
            .body(&LeaseTokenBody { token: self.token })
            .repeat(Repeat::Freely);
        self.open.push(Box::pin(async move {
            let outcome = match client.attempt(&call, server, None, within).await {
                Ok(answer) => answer.json(),
                Err(failure) => Err(failure.error),
            };
            Answered { server, seq, outcome }
        }));
    }

    /// Takes an answer; gives the loss if it is one.
    fn answered(&mut self, answered: Answered) -> Option<Loss> {
        let Answered { server, seq, outcome } = answered;
        let error = match outcome {
            Ok(confirmed) => {
                if self.guard.acknowledged(seq, confirmed.ttl_ms) {
                    self.rounds.acknowledged(server, seq);
                    self.client.prefer(server);
                    self.shared.valid_until(self.guard.valid_until());
                }
                return None;
            }
            Err(error) => error,
        };
        match error {
            Error::Problem(problem) if matches!(problem.code, Code::LeaseLost | Code::LeaseNotFound) => {
                Some(Loss::NotHeld(problem))
            }
            Error::Problem(problem) if matches!(problem.code, Code::Forbidden | Code::Unauthenticated) => {
                Some(Loss::Refused(problem))
            }
            error => {
                tracing::debug!(lease = %self.lease, server, %error, "a renewal failed, asking the next server");
                self.rounds.failed(server, clock::boot_ms());
                None
            }
        }
    }
}
