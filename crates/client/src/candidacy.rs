//! One candidacy for a lease: its place in the queue, over all servers.
//!
//! A request that waits is cut into slices: a node that freezes must not swallow the whole wait, and one
//! that dies is only noticed by whoever talks to it. Invariant: every slice of a candidacy carries the same
//! idempotency key and the same body, so that it keeps its place in the queue on whichever node it goes on,
//! and a grant whose answer was lost comes back. So what is asked for must be the same each time as well:
//! a wait with a bound is cut into equal parts.

use std::time::{Duration, Instant};

use regent_types::lease::{AcquireLease, LeaseGrant};
use regent_types::{Code, LeaseName};

use crate::backoff::FullJitter;
use crate::call::{ATTEMPT, Call, FIRST_WAIT, LONGEST_WAIT, new_key};
use crate::{Client, Error, clock};

/// The longest that one request waits at one node. Short, as a node that froze (its sockets stay open) is
/// only left after it and [`LAST_ANSWER`]; not shorter, as each candidate asks this often.
const SLICE: Duration = Duration::from_secs(5);
/// A node that says "still held" long before the slice is over does not wait: it is asked again no faster
/// than with the usual backoff. Having waited is half of a slice.
const WAITED: u32 = 2;
/// What is left of a wait counts as nothing below this part of a slice, as clocks round.
const END_OF_SLICE: u32 = 20;
/// How long after the end of a slice its answer may come. A node knows without asking anybody that the time is
/// over; one that does not say so is frozen, or looks for a leader as all others do.
const LAST_ANSWER: Duration = Duration::from_secs(2);

/// How long to stand in the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Until it is granted.
    ForEver,
    /// This long; zero asks once.
    AtMost(Duration),
}

/// A grant, and when the request that brought it was sent, by [`clock::boot_ms`].
#[derive(Debug)]
pub(crate) struct Granted {
    pub(crate) grant: LeaseGrant,
    pub(crate) sent_at: u64,
}

/// Somebody who wants a lease.
pub(crate) struct Candidacy<'a> {
    client: &'a Client,
    call: Call,
    /// The same without waiting: leaves the queue.
    leave: Call,
    key: String,
    slice: Duration,
    /// When the wait is over.
    until: Option<Instant>,
    /// Until when a cluster that does not answer is asked again.
    patience: Option<Instant>,
}

impl<'a> Candidacy<'a> {
    /// A new one; nothing is sent yet.
    pub(crate) fn new(client: &'a Client, name: &LeaseName, holder: &str, ttl_ms: u64, wait: Wait) -> Self {
        let now = Instant::now();
        let (slice, until, patience) = match wait {
            Wait::ForEver => (SLICE, None, None),
            Wait::AtMost(wait) => (
                equal_part(wait),
                Some(now + wait),
                Some(now + wait.max(client.deadline())),
            ),
        };
        let wait_ms = Some(slice.as_millis().try_into().expect("a slice is a few seconds"));
        let body = AcquireLease {
            holder: holder.to_owned(),
            ttl_ms,
            wait_ms: wait_ms.filter(|wait| *wait > 0),
        };
        let at_once = AcquireLease {
            wait_ms: None,
            ..body.clone()
        };
        Self {
            client,
            call: Call::post(["leases", name.as_str(), "acquire"]).body(&body),
            leave: Call::post(["leases", name.as_str(), "acquire"]).body(&at_once),
            key: new_key(),
            slice,
            until,
            patience,
        }
    }

    /// Stands in the queue. Dropped before it ends, the connection closes and the node takes it out again.
    pub(crate) async fn acquire(self) -> Result<Granted, Error> {
        let count = self.client.server_count();
        let mut server = self.client.preferred();
        let mut backoff = FullJitter::new(FIRST_WAIT, LONGEST_WAIT);
        let mut held: Option<Error> = None;
        let mut failed = 0;
        loop {
            let began = Instant::now();
            let sent_at = clock::boot_ms();
            let bound = self.bound(began, held.is_some());
            let failure = match self
                .client
                .attempt(&self.call, server, Some(&self.key), bound)
                .await
            {
                Ok(answer) => {
                    self.client.prefer(server);
                    return Ok(Granted {
                        grant: answer.json()?,
                        sent_at,
                    });
                }
                Err(failure) => failure,
            };
            let over = self.until.is_some_and(|until| {
                until.saturating_duration_since(Instant::now()) <= self.slice / END_OF_SLICE
            });
            // So is a cluster that was restored a moment ago, for a while.
            let queue_is_full = matches!(failure.error.code(), Some(Code::Busy | Code::LeasesHeldBack))
                && !self.slice.is_zero();
            if failure.error.code() == Some(Code::LeaseHeld) {
                if over {
                    return self.give_up(server, failure.error).await;
                }
                self.client.prefer(server);
                held = Some(failure.error);
                failed = 0;
                if began.elapsed() >= self.slice / WAITED {
                    backoff.reset();
                    continue;
                }
            } else if failure.again || queue_is_full {
                tracing::debug!(server, error = %failure.error, "asking the next server for the lease");
                server = (server + 1) % count;
                failed += 1;
                // Once the wait is over each server is asked once what it knows, if none said so before.
                let asked_all = failed >= count && !self.slice.is_zero();
                match held.take() {
                    Some(held) if over => return Err(held),
                    None if over && asked_all => return Err(failure.error),
                    before => held = before,
                }
                if self.patience.is_some_and(|end| Instant::now() >= end) {
                    return Err(failure.error);
                }
                if failed % count != 0 && !queue_is_full {
                    continue; // a place is only kept for a moment
                }
            } else {
                return Err(failure.error);
            }
            tokio::time::sleep(backoff.next_delay()).await;
        }
    }

    /// The wait is over. A node keeps the place for a moment, for a repetition; there will be none, so the next one
    /// is spared that. It may have been granted at the last moment: then it is theirs.
    async fn give_up(&self, server: usize, held: Error) -> Result<Granted, Error> {
        if self.slice.is_zero() {
            return Err(held);
        }
        let sent_at = clock::boot_ms();
        let left = self
            .client
            .attempt(&self.leave, server, Some(&self.key), LAST_ANSWER);
        match left.await {
            Ok(answer) => Ok(Granted {
                grant: answer.json()?,
                sent_at,
            }),
            Err(_) => Err(held),
        }
    }

    /// How long one attempt may take that begins now.
    fn bound(&self, now: Instant, known_to_be_held: bool) -> Duration {
        if self.slice.is_zero() {
            return ATTEMPT;
        }
        let whole = self.slice + LAST_ANSWER;
        match self.until {
            Some(until) => {
                let left = until.saturating_duration_since(now);
                let waits = if known_to_be_held {
                    left
                } else {
                    left.max(self.slice)
                };
                whole.min(waits + LAST_ANSWER)
            }
            None => whole,
        }
    }
}

/// The parts that a wait is cut into: equal, and none longer than a slice.
fn equal_part(wait: Duration) -> Duration {
    let parts = wait.as_millis().div_ceil(SLICE.as_millis()).max(1);
    let part = wait.as_millis().div_ceil(parts);
    Duration::from_millis(u64::try_from(part).expect("a part is at most a slice"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_cut_into_equal_parts_that_fill_it() {
        for (wait, part) in [
            (0, 0),
            (1, 1),
            (4_999, 4_999),
            (5_000, 5_000),
            (5_001, 2_501),
            (3_600_000, 5_000),
        ] {
            assert_eq!(
                equal_part(Duration::from_millis(wait)),
                Duration::from_millis(part),
                "{wait}"
            );
        }
    }
}
