//! Leases.

use regent_types::lease::{AcquireLease, Lease, LeaseConfirmed, LeaseGrant, LeaseList, LeaseTokenBody};
use regent_types::{LeaseName, Token};

use crate::call::{Call, Repeat};
use crate::page::{Page, fetch_all};
use crate::{Client, Error};

impl Client {
    /// Takes a lease. `ttlMs` of the grant counts from before this was called.
    pub async fn acquire_lease(&self, name: &LeaseName, acquire: &AcquireLease) -> Result<LeaseGrant, Error> {
        self.fetch(Call::post(["leases", name.as_str(), "acquire"]).body(acquire))
            .await
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

    /// Takes a lease away from whoever holds it.
    pub async fn force_release_lease(&self, name: &LeaseName) -> Result<(), Error> {
        self.send(Call::delete(["leases", name.as_str()])).await.map(drop)
    }
}
