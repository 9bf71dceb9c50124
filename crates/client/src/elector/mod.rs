//! Elections for Rust programs: campaign, lead while the guard is valid, resign.
//!
//! - [`LeaderElector`] says for which lease, and campaigns: it stands in the queue (first come, first served,
//!   one candidacy over all nodes) and gives a [`Leadership`] once its guard is valid.
//! - [`Leadership`] is what a program holds while it leads. Asking it costs an atomic load.
//! - `keeper` renews in the background; `rounds` says which server is asked next, and when: pure.
//!
//! Invariant: a `Leadership` that says it is valid is the only one of its lease, anywhere, as long as the rates
//! of clocks differ by no more than the clock model allows ([`crate::guard`]). Whatever a program does
//! between asking and acting is not covered by that; what may not happen twice carries the token and is
//! refused by its target when the token is older than one seen before (docs/elections.md).

mod keeper;
mod leadership;
mod rounds;

use std::time::{Duration, Instant};

use futures::stream::BoxStream;
use regent_types::{Code, LeaseName, Problem};

pub use leadership::{Leadership, Loss, Standing};

use crate::candidacy::{Candidacy, Wait};
use crate::leases::LeaseState;
use crate::{Client, Error};

/// The TTL unless another is set: longer than the loss of a node and two intervals of renewal.
pub const DEFAULT_TTL: Duration = Duration::from_secs(5);

/// A candidate for a lease.
#[derive(Debug, Clone)]
pub struct LeaderElector {
    client: Client,
    lease: LeaseName,
    holder: String,
    ttl: Duration,
    wait: Option<Duration>,
}

impl LeaderElector {
    /// A candidate that calls itself `holder`, with a TTL of 5 s, that waits its turn for as long as it
    /// takes. Give the client all nodes of the cluster: with one of them only, losing it is losing the lease.
    pub fn new(client: Client, lease: LeaseName, holder: impl Into<String>) -> Self {
        Self {
            client,
            lease,
            holder: holder.into(),
            ttl: DEFAULT_TTL,
            wait: None,
        }
    }

    /// How long the lease lasts without a renewal, in whole milliseconds. Below 3 s, the loss of a node of the
    /// cluster may make the guard lapse.
    #[must_use]
    pub fn ttl(self, ttl: Duration) -> Self {
        Self { ttl, ..self }
    }

    /// How long to wait at most; zero asks once.
    #[must_use]
    pub fn wait(self, wait: Duration) -> Self {
        Self {
            wait: Some(wait),
            ..self
        }
    }

    /// Stands in the queue until the lease is granted and its guard is valid. Dropping the future leaves the
    /// queue.
    ///
    /// `lease_held` when the wait is over; other refusals as they come. A cluster that does not answer is asked
    /// again for as long as the wait lasts.
    pub async fn campaign(&self) -> Result<Leadership, Error> {
        let until = self.wait.map(|wait| Instant::now() + wait);
        let ttl_ms = u64::try_from(self.ttl.as_millis()).unwrap_or(u64::MAX);
        loop {
            let wait = match until {
                None => Wait::ForEver,
                Some(until) => Wait::AtMost(until.saturating_duration_since(Instant::now())),
            };
            let candidacy = Candidacy::new(&self.client, &self.lease, &self.holder, ttl_ms, wait);
            let granted = candidacy.acquire().await?;
            let mut leadership = Leadership::begin(&self.client, &granted);
            // The grant took no notice of how long its answer was under way: it gets a TTL at least.
            let patience = until.map(|until| until.max(Instant::now() + self.ttl));
            match leadership.established(patience).await {
                Some(Standing::Valid { .. }) => return Ok(leadership),
                // Taken back before it was renewed once: back into the queue, as somebody new.
                Some(Standing::Lost(Loss::NotHeld(_)))
                    if until.is_none_or(|until| Instant::now() < until) =>
                {
                    tracing::debug!(lease = %self.lease, "the grant was taken back before it was renewed");
                }
                Some(Standing::Lost(Loss::NotHeld(problem) | Loss::Refused(problem))) => {
                    return Err(Error::Problem(problem));
                }
                Some(Standing::Lapsed | Standing::Lost(Loss::Resigned)) | None => {
                    return Err(Error::Problem(Box::new(Problem::new(
                        Code::OutcomeUnknown,
                        "the lease was granted, but no renewal was acknowledged before the wait was over",
                    ))));
                }
            }
        }
    }

    /// Who leads, as it changes; see [`Client::watch_lease`].
    pub fn observe(&self) -> BoxStream<'static, Result<LeaseState, Error>> {
        self.client.watch_lease(&self.lease)
    }

    /// The lease.
    pub fn lease(&self) -> &LeaseName {
        &self.lease
    }
}
