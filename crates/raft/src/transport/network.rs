//! openraft's network on our connections.

use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use openraft::base::{BoxFuture, BoxStream};
use openraft::error::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable};
use openraft::network::{Backoff, RPCOption, RPCTypes, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{OptionalSend, Snapshot};
use regent_types::NodeId;
use tokio::time::Instant;

use super::channel::Failure;
use super::peers::{Peer, Peers};
use super::replicate::LogLink;
use super::wire::{Request, Response};
use crate::config::{LeaderId, Member, TypeConfig, Vote};
use crate::identity::Identity;
use crate::snapshot::SnapshotFile;

type RpcError = RPCError<TypeConfig>;

/// Pauses of replication to a peer that cannot be reached. The longest is what a peer that comes back may
/// wait for its first entries.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_millis(500);

/// Makes one [`Network`] per target and use.
pub(crate) struct Factory {
    pub(crate) identity: Arc<Identity>,
    pub(crate) peers: Arc<Peers>,
    /// How long a replication request may go unanswered before its connection is given up.
    pub(crate) patience: Duration,
}

impl Factory {
    fn client(&self, target: u64, node: &Member, heartbeat: bool) -> Network {
        let target = NodeId(target);
        let peers = self.peers.clone();
        let addrs = peers.ensure(target, &node.peer).addrs.clone();
        Network {
            identity: self.identity.clone(),
            peers,
            target,
            addr: node.peer.clone(),
            log: (!heartbeat).then(|| LogLink::new(self.identity.clone(), target, addrs, self.patience)),
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for Factory {
    type Network = Network;

    async fn new_client(&mut self, target: u64, node: &Member) -> Network {
        self.client(target, node, false)
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &Member) -> Network {
        self.client(target, node, true)
    }
}

/// What one task of openraft talks to one peer through.
pub(crate) struct Network {
    identity: Arc<Identity>,
    peers: Arc<Peers>,
    target: NodeId,
    /// As consensus has it.
    addr: String,
    /// Its own ordered connection for the log; a heartbeat goes over the control connection instead.
    log: Option<LogLink>,
}

pub(crate) fn unreachable(why: impl ToString) -> RpcError {
    RPCError::Unreachable(Unreachable::from_string(why))
}

impl Network {
    /// Consensus may name a member before anybody else here has heard of it.
    fn peer(&self) -> Arc<Peer> {
        self.peers.ensure(self.target, &self.addr)
    }

    async fn control(
        &self,
        request: Request,
        action: RPCTypes,
        option: &RPCOption,
    ) -> Result<Response, RpcError> {
        let peer = self.peer();
        let ttl = option.soft_ttl();
        match peer.control.call(request, Instant::now() + ttl).await {
            Ok(Response::Failed(why)) => Err(RPCError::Network(NetworkError::from_string(why))),
            Ok(Response::Busy) => Err(RPCError::Network(NetworkError::from_string("the peer is busy"))),
            Ok(response) => Ok(response),
            Err(Failure::NotSent) => Err(unreachable("not connected")),
            Err(Failure::Lost) if peer.control.is_up() => Err(RPCError::Timeout(Timeout {
                action,
                id: self.identity.node().0,
                target: self.target.0,
                timeout: ttl,
            })),
            Err(Failure::Lost) => Err(unreachable("disconnected")),
        }
    }
}

fn confused() -> RpcError {
    RPCError::Network(NetworkError::from_string("the peer answered something else"))
}

impl RaftNetworkV2<TypeConfig> for Network {
    type SnapshotData = SnapshotFile;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RpcError> {
        match self
            .control(Request::Append(rpc), RPCTypes::AppendEntries, &option)
            .await?
        {
            Response::Append(response) => Ok(response),
            _ => Err(confused()),
        }
    }

    fn stream_append<S>(
        &mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'_, Result<BoxStream<'_, Result<StreamAppendResult<TypeConfig>, RpcError>>, RpcError>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        if self.log.is_none() {
            // Heartbeats: one request, one answer, never behind the log.
            return openraft::network::stream_append_sequential(self, input, option);
        }
        let log = self.log.as_mut().expect("checked above");
        Box::pin(async move { Ok(log.stream(input).await) })
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RpcError> {
        match self.control(Request::Vote(rpc), RPCTypes::Vote, &option).await? {
            Response::Vote(response) => Ok(response),
            _ => Err(confused()),
        }
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RpcError> {
        match self
            .control(Request::PreVote(rpc), RPCTypes::Vote, &option)
            .await?
        {
            Response::Vote(response) => Ok(response),
            _ => Err(confused()),
        }
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot<LeaderId, u64, Member, SnapshotFile>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let addr = self.peer().addrs.current();
        let sending = super::snapshot::send(&self.identity, self.target, &addr, vote, snapshot, option);
        tokio::select! {
            result = sending => result,
            closed = cancel => Err(StreamingError::Closed(closed)),
        }
    }

    fn backoff(&self) -> Option<Backoff> {
        Some(Backoff::new(std::iter::successors(Some(BACKOFF_MIN), |pause| {
            Some((*pause * 2).min(BACKOFF_MAX))
        })))
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RpcError> {
        match self
            .control(Request::TransferLeader(req), RPCTypes::TransferLeader, &option)
            .await?
        {
            Response::TransferLeader(response) => Ok(response),
            _ => Err(confused()),
        }
    }
}
