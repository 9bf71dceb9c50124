//! The server end: accepts peers, proves them, and serves each connection by its purpose.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use futures::StreamExt;
use futures::future::BoxFuture;
use regent_types::NodeId;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::channel::write_frames;
use super::connection::{Connection, LinkError};
use super::handshake::accept;
use super::wire::{Purpose, Request, Response, decode, encode};
use super::{replicate, snapshot};
use crate::identity::{Identity, Refusal};
use crate::machine::Raft;
use crate::offload::Offload;
use crate::places::Places;
use crate::sockets::{Port, Stream};

/// Connections at once. A member holds five to each other member; the rest is room for strangers that
/// never get past the handshake.
const MAX_CONNECTIONS: usize = 256;

/// Connections at once from one address, so that a stranger cannot keep the members out. Twice what six other members
/// hold, who may all be behind one address.
const MAX_PER_ADDRESS: NonZeroUsize = const { NonZeroUsize::new(64).expect("not 0") };

/// Requests of one connection that are worked on at once; more are answered `Busy`.
const MAX_CONCURRENT: usize = 512;

/// How often it is looked whether a connected peer is still a member.
const RECHECK: std::time::Duration = std::time::Duration::from_millis(500);

/// Different refusals remembered so that each is logged once.
const MAX_REMEMBERED: usize = 64;

/// What the listener needs of the node behind it.
pub(crate) trait Host: Send + Sync + 'static {
    /// Answers one request of a proven peer.
    fn handle(self: Arc<Self>, from: NodeId, request: Request) -> BoxFuture<'static, Response>;
    /// openraft, once it runs.
    fn raft(&self) -> Option<Raft>;
    /// Where snapshots that arrive are written.
    fn data(&self) -> &Path;
    /// Where their files are written.
    fn offload(&self) -> Offload;
    /// A frame of this peer arrived.
    fn heard(&self, from: NodeId);
}

/// Accepts until `stop`. Every connection ends with `stop` too.
pub(crate) async fn run(
    mut listener: Box<dyn Port>,
    identity: Arc<Identity>,
    host: Arc<impl Host>,
    tasks: TaskTracker,
    stop: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let places = Places::new(MAX_PER_ADDRESS);
    let refused = Arc::new(Mutex::new(BTreeSet::new()));
    loop {
        let slot = tokio::select! {
            slot = slots.clone().acquire_owned() => slot.expect("the semaphore is never closed"),
            () = stop.cancelled() => return,
        };
        let (stream, addr) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, most likely: accepting again at once would spin.
                    tracing::warn!(%error, "cannot accept a peer");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = stop.cancelled() => return,
        };
        let Some(place) = places.enter(addr.ip()) else {
            metrics::counter!("regent_peer_connections_failed_total", "kind" => "too_many").increment(1);
            tracing::debug!(from = %addr, "refused a peer connection: its address has too many");
            continue;
        };
        let (identity, host, refused) = (identity.clone(), host.clone(), refused.clone());
        let stop = stop.clone();
        tasks.spawn(async move {
            let served = serve(stream, &identity, host);
            let error = tokio::select! {
                error = served => error,
                () = stop.cancelled() => return,
            };
            drop((slot, place));
            note(&error, addr.ip(), &refused);
        });
    }
}

/// Counts what went wrong and logs each kind once per address.
fn note(error: &LinkError, from: IpAddr, seen: &Mutex<BTreeSet<String>>) {
    let kind = match error {
        LinkError::Refused(Refusal::NotSettled) | LinkError::Closed => return,
        LinkError::Refused(_) => "refused",
        LinkError::Malformed(_) => "malformed",
        LinkError::Tls(_) => "tls",
        LinkError::Foreign => "foreign",
        LinkError::Io(_) => "io",
        LinkError::Silent => "silent",
    };
    metrics::counter!("regent_peer_connections_failed_total", "kind" => kind).increment(1);
    if !error.is_fault() {
        tracing::debug!(%from, %error, "a peer connection ended");
        return;
    }
    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    if seen.len() < MAX_REMEMBERED && seen.insert(format!("{from} {error}")) {
        tracing::error!(%from, %error, "refused a peer connection");
    }
}

async fn serve(stream: Stream, identity: &Identity, host: Arc<impl Host>) -> LinkError {
    let (connection, purpose) = match accept(identity, stream).await {
        Ok(accepted) => accepted,
        Err(error) => return error,
    };
    let peer = connection.peer;
    let served = serve_purpose(connection, purpose, host);
    tokio::select! {
        error = served => error,
        () = removed(identity, peer) => LinkError::Closed,
    }
}

/// Returns once the peer is no member any more: its connections were made before, and it is told when it makes new ones.
async fn removed(identity: &Identity, peer: NodeId) {
    while !identity.was_removed(peer) {
        tokio::time::sleep(RECHECK).await;
    }
}

async fn serve_purpose(connection: Connection, purpose: Purpose, host: Arc<impl Host>) -> LinkError {
    let peer = connection.peer;
    match purpose {
        Purpose::Identity | Purpose::Control | Purpose::Work => {
            serve_requests(connection, purpose, host).await
        }
        Purpose::Log => match host.raft() {
            Some(raft) => replicate::serve(connection, raft, move || host.heard(peer)).await,
            None => Refusal::NotSettled.into(),
        },
        Purpose::Snapshot => match host.raft() {
            Some(raft) => snapshot::receive(connection, &raft, host.data(), host.offload()).await,
            None => Refusal::NotSettled.into(),
        },
    }
}

async fn serve_requests(connection: Connection, purpose: Purpose, host: Arc<impl Host>) -> LinkError {
    let Connection {
        mut reader,
        writer,
        peer,
        ..
    } = connection;
    let (responses, outgoing) = mpsc::channel(MAX_CONCURRENT);
    let mut writing = tokio::spawn(write_frames(writer, outgoing));
    let slots = Arc::new(Semaphore::new(MAX_CONCURRENT));
    let error = loop {
        let frame = tokio::select! {
            frame = reader.next() => frame,
            _ = &mut writing => break LinkError::Closed,
        };
        let frame = match frame {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => break error.into(),
            None => break LinkError::Closed,
        };
        host.heard(peer);
        let (id, request): (u64, Request) = match decode(&frame) {
            Ok(request) => request,
            Err(error) => break error.into(),
        };
        if !allowed(purpose, &request) {
            let refusal = Response::Failed("not on this connection".to_owned());
            if responses.send(encode(&(id, refusal))).await.is_err() {
                break LinkError::Closed;
            }
            continue;
        }
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            if responses.send(encode(&(id, Response::Busy))).await.is_err() {
                break LinkError::Closed;
            }
            continue;
        };
        let (host, responses) = (host.clone(), responses.clone());
        tokio::spawn(async move {
            let response = host.handle(peer, request).await;
            let mut frame = encode(&(id, response));
            if frame.len() > purpose.max_frame() {
                tracing::error!(
                    bytes = frame.len(),
                    purpose = purpose.as_str(),
                    "an answer exceeds the frame cap"
                );
                frame = encode(&(id, Response::Failed("the answer is too large".to_owned())));
            }
            let _ = responses.send(frame).await;
            drop(slot);
        });
    };
    writing.abort();
    error
}

/// What may be asked on a connection: nothing of consensus before the identity is settled.
fn allowed(purpose: Purpose, request: &Request) -> bool {
    match request {
        Request::Ping => true,
        Request::Identify | Request::Settle(_) => purpose == Purpose::Identity,
        Request::Vote(_)
        | Request::PreVote(_)
        | Request::Append(_)
        | Request::TransferLeader(_)
        | Request::Status(_) => purpose == Purpose::Control,
        Request::Propose { .. } | Request::ReadIndex { .. } | Request::Call(_) => purpose == Purpose::Work,
    }
}
