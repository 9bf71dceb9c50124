//! The cluster and the node that answers.

use bytes::Bytes;
use futures::stream::BoxStream;
use regent_types::cluster::{Cluster, Join, Joined, Transfer, Version};
use regent_types::{NodeId, Revision};

use crate::call::{Call, Repeat};
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

    /// Asks to be admitted as a node; with a join token as this client's token. The same again is safe.
    pub async fn join(&self, node: &Join) -> Result<Joined, Error> {
        self.fetch(
            Call::post(["cluster", "members"])
                .body(node)
                .repeat(Repeat::Freely),
        )
        .await
    }

    /// Takes a member out, for good. The cluster; the member leaves consensus a moment later.
    pub async fn remove_member(&self, id: NodeId) -> Result<Cluster, Error> {
        self.fetch(Call::delete(["cluster", "members", &id.to_string()]).repeat(Repeat::NotInDoubt))
            .await
    }

    /// Gives a member a vote that has caught up, without waiting.
    pub async fn promote_member(&self, id: NodeId) -> Result<Cluster, Error> {
        self.fetch(Call::post(["cluster", "members", &id.to_string(), "promote"]).repeat(Repeat::Freely))
            .await
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
