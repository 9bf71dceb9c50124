//! What a program holds while it leads.
//!
//! Whether it is valid is one atomic that the keeper writes and anybody reads, at any time and from any
//! thread, against a clock that runs during suspend: a program that was frozen for an hour finds out by
//! asking, before anything in it had a chance to run. The notifications (`lost`, `changes`) come from a task
//! and may be late after a freeze; they are for ending work, not for deciding whether to begin some.
//!
//! A guard that ran out is not a lease that is lost: the renewals may just not have come through. Then
//! `is_valid` is false at once, renewing goes on, and an acknowledgement makes it valid again, which only
//! happens if nobody else had the lease in between: the token is still the same.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use regent_types::lease::LeaseTokenBody;
use regent_types::{Code, LeaseName, Problem, Token};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::keeper;
use crate::backoff::FullJitter;
use crate::call::{ATTEMPT, Call, FIRST_WAIT, LONGEST_WAIT, new_key};
use crate::candidacy::Granted;
use crate::guard::Guard;
use crate::{Client, Error, clock};

/// One server gets this part of the TTL to take the lease back, before the next one is asked.
const RELEASE_PART: u32 = 4;
/// But not less than this.
const SHORTEST_RELEASE: Duration = Duration::from_millis(250);

/// How a leadership stands.
#[derive(Debug, Clone, PartialEq)]
pub enum Standing {
    /// Its holder may act until this moment by [`clock::boot_ms`], if no renewal moves it further.
    Valid {
        /// The first moment at which it may not.
        until: u64,
    },
    /// Its holder may not act, as no renewal was acknowledged in time. It is renewed on, and may become valid
    /// again under the same token as long as nobody else got the lease.
    Lapsed,
    /// It is over.
    Lost(Loss),
}

/// Why a leadership is over.
#[derive(Debug, Clone, PartialEq)]
pub enum Loss {
    /// The lease is not held under this token any more: it expired, was released, or was taken away.
    NotHeld(Box<Problem>),
    /// The caller may not renew it any more, as when its API token was revoked.
    Refused(Box<Problem>),
    /// By [`Leadership::resign`], or as it was dropped.
    Resigned,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotHeld(problem) | Self::Refused(problem) => problem.fmt(f),
            Self::Resigned => f.write_str("it was resigned"),
        }
    }
}

/// A leadership: valid until its guard runs out, renewed in the background.
///
/// Dropping it gives the lease back in the background, as far as the runtime is still there to do it;
/// otherwise the lease ends by its TTL. [`Self::resign`] does so for certain.
#[derive(Debug)]
pub struct Leadership {
    client: Client,
    lease: LeaseName,
    token: Token,
    ttl: Duration,
    shared: Arc<Shared>,
    standing: watch::Receiver<Standing>,
    keeper: JoinHandle<()>,
    runtime: Handle,
    given_back: bool,
}

/// What the keeper writes and everybody reads.
#[derive(Debug)]
pub(super) struct Shared {
    /// The guard's end; 0 when it is over.
    valid_until: AtomicU64,
    standing: watch::Sender<Standing>,
}

impl Shared {
    /// A new end of the guard. Never after it is over.
    pub(super) fn valid_until(&self, until: u64) {
        // The atomic is written under the channel's lock, so that an end and a renewal cannot overtake each other.
        self.standing.send_if_modified(|standing| {
            if matches!(standing, Standing::Lost(_)) {
                return false;
            }
            self.valid_until.store(until, Ordering::SeqCst);
            *standing = Standing::Valid { until };
            true
        });
    }

    /// The guard has run out.
    pub(super) fn lapsed(&self) {
        self.standing.send_if_modified(|standing| {
            let was_valid = matches!(standing, Standing::Valid { .. });
            if was_valid {
                *standing = Standing::Lapsed;
            }
            was_valid
        });
    }

    /// It is over; the first reason stays.
    pub(super) fn over(&self, loss: Loss) {
        self.standing.send_if_modified(|standing| {
            self.valid_until.store(0, Ordering::SeqCst);
            let first = !matches!(standing, Standing::Lost(_));
            if first {
                *standing = Standing::Lost(loss);
            }
            first
        });
    }
}

impl Leadership {
    /// Begins to keep a grant. Valid at once only if the grant did not wait.
    pub(crate) fn begin(client: &Client, granted: &Granted) -> Self {
        let grant = &granted.grant;
        let mut guard = Guard::new(grant.ttl_ms);
        if !grant.waited {
            let seq = guard.sending(granted.sent_at);
            guard.acknowledged(seq, grant.ttl_ms);
        }
        let (sender, standing) = watch::channel(Standing::Lapsed);
        let shared = Arc::new(Shared {
            valid_until: AtomicU64::new(0),
            standing: sender,
        });
        if guard.is_valid(clock::boot_ms()) {
            shared.valid_until(guard.valid_until());
        }
        let keeper = keeper::Keeper::new(
            client.clone(),
            grant.name.clone(),
            grant.token,
            guard,
            shared.clone(),
        );
        Self {
            client: client.clone(),
            lease: grant.name.clone(),
            token: grant.token,
            ttl: Duration::from_millis(grant.ttl_ms),
            shared,
            standing,
            keeper: tokio::spawn(keeper.run()),
            runtime: Handle::current(),
            given_back: false,
        }
    }

    /// Waits until it is valid or over; `None` when neither came in time.
    pub(super) async fn established(&mut self, until: Option<Instant>) -> Option<Standing> {
        let settled = self.standing.wait_for(|standing| *standing != Standing::Lapsed);
        let settled = async { settled.await.map(|standing| standing.clone()).ok() };
        match until {
            None => settled.await,
            Some(until) => tokio::time::timeout_at(until.into(), settled)
                .await
                .ok()
                .flatten(),
        }
    }

    /// The lease.
    pub fn lease(&self) -> &LeaseName {
        &self.lease
    }

    /// The fencing token: goes along with everything that is done under this leadership.
    pub fn token(&self) -> Token {
        self.token
    }

    /// Whether its holder may act now.
    pub fn is_valid(&self) -> bool {
        clock::boot_ms() < self.valid_until()
    }

    /// The first moment at which its holder may not act any more, by [`clock::boot_ms`], as far as renewals
    /// were acknowledged by now; 0 once it is over.
    pub fn valid_until(&self) -> u64 {
        self.shared.valid_until.load(Ordering::SeqCst)
    }

    /// How it stands, and each change of that, every renewal included.
    pub fn changes(&self) -> watch::Receiver<Standing> {
        self.standing.clone()
    }

    /// Completes when its holder may not act any more: it has lapsed or is over. Most programs should then
    /// stop, resign, and campaign anew.
    pub async fn invalid(&self) -> Standing {
        self.wait_for(|standing| !matches!(standing, Standing::Valid { .. }))
            .await
    }

    /// Completes when it is over, and says why. While it has only lapsed, it is not.
    pub async fn lost(&self) -> Loss {
        match self
            .wait_for(|standing| matches!(standing, Standing::Lost(_)))
            .await
        {
            Standing::Lost(loss) => loss,
            Standing::Valid { .. } | Standing::Lapsed => unreachable!("waited for another"),
        }
    }

    async fn wait_for(&self, what: impl FnMut(&Standing) -> bool) -> Standing {
        let mut standing = self.standing.clone();
        standing
            .wait_for(what)
            .await
            .expect("`self.shared` holds the sender")
            .clone()
    }

    /// Gives the lease back: it is not valid from now on, and the next candidate is promoted. On an error the
    /// lease ends by its TTL.
    pub async fn resign(mut self) -> Result<(), Error> {
        match self.give_back() {
            Some(release) => release.await,
            None => Ok(()),
        }
    }

    /// Ends it here; the release that is left to do, if any.
    fn give_back(&mut self) -> Option<impl Future<Output = Result<(), Error>> + Send + 'static> {
        let held = !matches!(*self.standing.borrow(), Standing::Lost(_));
        self.shared.over(Loss::Resigned);
        self.keeper.abort();
        let first = !std::mem::replace(&mut self.given_back, true);
        let release = release(self.client.clone(), self.lease.clone(), self.token, self.ttl);
        (held && first).then_some(release)
    }
}

/// Releases over one server after the other: each gets a part of the TTL, after which there is nothing left
/// to give back.
async fn release(client: Client, lease: LeaseName, token: Token, ttl: Duration) -> Result<(), Error> {
    let began = Instant::now();
    let call = Call::post(["leases", lease.as_str(), "release"]).body(&LeaseTokenBody { token });
    let key = new_key();
    let mut backoff = FullJitter::new(FIRST_WAIT, LONGEST_WAIT);
    let (first, count) = (client.preferred(), client.server_count());
    let mut doubt = false;
    for attempt in 1.. {
        let within = (ttl / RELEASE_PART).clamp(SHORTEST_RELEASE, ATTEMPT);
        let Err(failure) = client
            .attempt(&call, first + attempt - 1, Some(&key), within)
            .await
        else {
            return Ok(());
        };
        // An earlier attempt whose answer was lost has done it.
        if doubt && failure.error.code() == Some(Code::LeaseLost) {
            return Ok(());
        }
        doubt |= failure.doubt;
        if !failure.again || began.elapsed() >= ttl {
            return Err(failure.error);
        }
        if attempt % count == 0 {
            tokio::time::sleep(backoff.next_delay()).await;
        }
    }
    unreachable!("the loop above has no end of its own")
}

impl Drop for Leadership {
    fn drop(&mut self) {
        if let Some(release) = self.give_back() {
            let lease = self.lease.clone();
            self.runtime.spawn(async move {
                if let Err(error) = release.await {
                    tracing::debug!(%lease, %error, "the lease was not given back, it ends by its TTL");
                }
            });
        }
    }
}
