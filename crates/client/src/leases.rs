//! Leases.

use std::time::Duration;

use futures::stream::{self, BoxStream, StreamExt as _};
use regent_types::event::Event;
use regent_types::lease::{AcquireLease, Lease, LeaseConfirmed, LeaseGrant, LeaseList, LeaseTokenBody};
use regent_types::{Code, LeaseName, Revision, Token};
use serde::Deserialize;

use crate::call::{Call, Repeat};
use crate::candidacy::{Candidacy, Wait};
use crate::follow::{Begins, follow};
use crate::page::{Page, fetch_all};
use crate::{Client, Error};

/// Before a watch that fell behind begins anew, so that one that always does is no flood.
const ANEW: Duration = Duration::from_millis(100);

impl Client {
    /// Takes a lease, waiting for it as long as `wait_ms` says: that is not bounded by the client's
    /// deadline, and may be more than one request may wait. `lease_held` when the wait is over.
    ///
    /// `ttl_ms` of the grant counts from before this was called if it did not wait. If `waited` is true, renew
    /// once before acting, within two seconds. [`LeaderElector`](crate::LeaderElector) does all of that.
    pub async fn acquire_lease(&self, name: &LeaseName, acquire: &AcquireLease) -> Result<LeaseGrant, Error> {
        match acquire.wait_ms.filter(|wait| *wait > 0) {
            None => {
                self.fetch(Call::post(["leases", name.as_str(), "acquire"]).body(acquire))
                    .await
            }
            Some(wait) => {
                let wait = Wait::AtMost(Duration::from_millis(wait));
                let candidacy = Candidacy::new(self, name, &acquire.holder, acquire.ttl_ms, wait);
                Ok(candidacy.acquire().await?.grant)
            }
        }
    }

    /// Keeps a lease. `ttlMs` counts from before this was called.
    pub async fn renew_lease(&self, name: &LeaseName, token: Token) -> Result<LeaseConfirmed, Error> {
        self.fetch(
            Call::post(["leases", name.as_str(), "renew"])
                .body(&LeaseTokenBody { token })
                .repeat(Repeat::Freely),
        )
        .await
    }

    /// Gives a lease up.
    pub async fn release_lease(&self, name: &LeaseName, token: Token) -> Result<(), Error> {
        self.send(Call::post(["leases", name.as_str(), "release"]).body(&LeaseTokenBody { token }))
            .await
            .map(drop)
    }

    /// Asks whether a lease is held under this token, on behalf of whoever was given the token.
    pub async fn verify_lease(&self, name: &LeaseName, token: Token) -> Result<LeaseConfirmed, Error> {
        self.fetch(
            Call::post(["leases", name.as_str(), "verify"])
                .body(&LeaseTokenBody { token })
                .repeat(Repeat::Freely),
        )
        .await
    }

    /// One page of the leases.
    pub async fn leases(&self, page: &Page) -> Result<LeaseList, Error> {
        self.fetch(Call::get(["leases"]).query(page.query())).await
    }

    /// All leases.
    pub async fn all_leases(&self) -> Result<Vec<Lease>, Error> {
        fetch_all(|page| async move {
            let list = self.leases(&page).await?;
            Ok((list.leases, list.next_cursor))
        })
        .await
    }

    /// One lease; `lease_not_found` when it is free.
    pub async fn lease(&self, name: &LeaseName) -> Result<Lease, Error> {
        self.fetch(Call::get(["leases", name.as_str()])).await
    }

    /// Takes a lease away from whoever holds it; the reason is shown in the event.
    pub async fn force_release_lease(&self, name: &LeaseName, reason: Option<&str>) -> Result<(), Error> {
        let reason = reason.map(|reason| ("reason", reason.to_owned()));
        self.send(Call::delete(["leases", name.as_str()]).query(reason))
            .await
            .map(drop)
    }

    /// Who holds a lease: now, and then each time that it changes. The stream reconnects by itself and ends
    /// after an error that waiting does not cure. Changes that came while it could not connect may be
    /// skipped when they are too many; what it shows last is what is.
    ///
    /// For showing, and for finding the leader. Not for acting as one: what it says was true a moment ago.
    pub fn watch_lease(&self, name: &LeaseName) -> BoxStream<'static, Result<LeaseState, Error>> {
        let watch = Watch {
            client: self.clone(),
            name: name.clone(),
            events: open(self, name),
            shown: None,
        };
        stream::unfold(
            watch,
            |mut watch| async move { Some((watch.next().await?, watch)) },
        )
        .boxed()
    }
}

/// Whose a lease is, as of a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseState {
    /// Who holds it; `None` when it is free.
    pub leader: Option<Leader>,
    /// The revision that made it so, or at which it was seen to be so.
    pub revision: Revision,
}

/// Who holds a lease.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Leader {
    /// Its name, for people.
    pub holder: String,
    /// The principal, such as `user:alice`.
    #[serde(default)]
    pub owner: String,
    /// The fencing token.
    pub token: Token,
}

struct Watch {
    client: Client,
    name: LeaseName,
    events: BoxStream<'static, Result<Event, Error>>,
    /// What was handed out last.
    shown: Option<LeaseState>,
}

fn open(client: &Client, name: &LeaseName) -> BoxStream<'static, Result<Event, Error>> {
    follow(
        client,
        Call::get(["leases", name.as_str(), "watch"]),
        Begins::WithTheState,
        None,
    )
}

impl Watch {
    async fn next(&mut self) -> Option<Result<LeaseState, Error>> {
        loop {
            let event = match self.events.next().await? {
                Ok(event) => event,
                // Only the state matters here, and a new stream begins with it.
                Err(error) if error.code() == Some(Code::Gone) => {
                    tokio::time::sleep(ANEW).await;
                    self.events = open(&self.client, &self.name);
                    continue;
                }
                Err(error) => return Some(Err(error)),
            };
            let leader = match leader_after(&event) {
                Some(Ok(leader)) => leader,
                Some(Err(source)) => {
                    return Some(Err(Error::BadAnswer {
                        server: self.client.servers()[self.client.preferred()].clone(),
                        source,
                    }));
                }
                None => continue,
            };
            if self.shown.as_ref().is_none_or(|shown| shown.leader != leader) {
                let state = LeaseState {
                    leader,
                    revision: event.revision,
                };
                self.shown = Some(state.clone());
                return Some(Ok(state));
            }
        }
    }
}

/// Who holds the lease after an event; `None` for events that say nothing about it (candidates that come and
/// go, and kinds of a newer version).
fn leader_after(event: &Event) -> Option<Result<Option<Leader>, serde_json::Error>> {
    match event.kind.as_str() {
        "lease.state" if event.record.is_null() => Some(Ok(None)),
        "lease.state" | "lease.granted" => Some(serde_json::from_value(event.record.clone()).map(Some)),
        "lease.released" | "lease.expired" | "lease.force_released" => Some(Ok(None)),
        _ => None,
    }
}
