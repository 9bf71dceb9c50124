//! The cluster and the node that answers.

use bytes::Bytes;
use futures::stream::BoxStream;
use regent_types::cluster::{Cluster, Transfer, Version};
use regent_types::{NodeId, Revision};

use crate::call::Call;
use crate::{Client, Error};

impl Client {
    /// The cluster as the node that answers sees it.
    pub async fn cluster(&self) -> Result<Cluster, Error> {
        self.fetch(Call::get(["cluster"])).await
    }

    /// Hands the leadership over: to this node, or to any that has caught up. The cluster under its new leader.
    pub async fn transfer(&self, to: Option<NodeId>) -> Result<Cluster, Error> {
        self.fetch(Call::post(["cluster", "transfer"]).body(&Transfer { to }))
            .await
    }

    /// A backup as it comes: a file that must be checked when all of it is there, for a stream may break off.
    pub async fn backup(&self) -> Result<BoxStream<'static, Result<Bytes, Error>>, Error> {
        self.download(&Call::get(["cluster", "backup"])).await
    }

    /// The revision up to which the node that answers has applied.
    pub async fn index(&self) -> Result<Option<Revision>, Error> {
        Ok(self.send(Call::get(["cluster"])).await?.index())
    }

    /// What the node that answers runs.
    pub async fn version(&self) -> Result<Version, Error> {
        self.fetch(Call::get(["version"]).outside_api()).await
    }

    /// Succeeds when the node that answers serves; use [`Client::only`] to mean a certain one.
    pub async fn readyz(&self) -> Result<(), Error> {
        self.send(Call::get(["readyz"]).outside_api()).await.map(drop)
    }
}
