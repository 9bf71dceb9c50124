//! A snapshot on its way: one connection, chunks in order, one answer at the end.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use openraft::Snapshot;
use openraft::error::{NetworkError, StreamingError, Unreachable};

use openraft::network::RPCOption;
use openraft::raft::SnapshotResponse;
use regent_types::NodeId;
use tokio::time::timeout;

use super::connection::{Connection, LinkError};
use super::handshake::dial;
use super::wire::{Purpose, SnapshotAck, SnapshotFrame};
use crate::config::{LeaderId, Member, TypeConfig, Vote};
use crate::identity::Identity;
use crate::machine::Raft;
use crate::offload::Offload;
use crate::snapshot::{Incoming, SnapshotFile};

/// Bytes of one chunk: what either side buffers of a snapshot.
const CHUNK: usize = 512 * 1024;

/// How long the other side may take for one chunk. It writes it to disk, and may sync behind.
const CHUNK_WITHIN: Duration = Duration::from_secs(20);

type Error = StreamingError<TypeConfig>;

/// Sends `snapshot` and waits until it is installed.
pub(crate) async fn send(
    identity: &Identity,
    to: NodeId,
    addr: &str,
    vote: Vote,
    snapshot: Snapshot<LeaderId, u64, Member, SnapshotFile>,
    option: RPCOption,
) -> Result<SnapshotResponse<TypeConfig>, Error> {
    let network = |error: LinkError| Error::Network(NetworkError::from_string(error));
    let mut link = dial(identity, to, addr, Purpose::Snapshot)
        .await
        .map_err(|error| Error::Unreachable(Unreachable::from_string(error)))?;
    // Not a storage error, which would stop the leader: a newer snapshot may have replaced the file.
    let storage = |error: std::io::Error| {
        Error::Network(NetworkError::from_string(format!(
            "cannot read the snapshot: {error}"
        )))
    };
    let (mut file, size) = snapshot.snapshot.open().await.map_err(storage)?;
    tracing::info!(peer = %to, size, last = ?snapshot.meta.last_log_id, "sending a snapshot");
    put(
        &mut link,
        &SnapshotFrame::Begin {
            vote,
            meta: snapshot.meta,
            size,
        },
    )
    .await
    .map_err(network)?;

    let mut crc = crc32fast::Hasher::new();
    let mut left = size;
    while left > 0 {
        let want = CHUNK.min(usize::try_from(left).unwrap_or(CHUNK));
        let bytes = Bytes::from(file.read(want).await.map_err(storage)?);
        crc.update(&bytes);
        put(&mut link, &SnapshotFrame::Chunk(bytes))
            .await
            .map_err(network)?;
        left -= want as u64;
    }
    put(&mut link, &SnapshotFrame::End { crc: crc.finalize() })
        .await
        .map_err(network)?;

    // Installing a large state takes its time; the timeout of the whole transfer bounds it.
    match timeout(option.soft_ttl(), link.receive::<SnapshotAck>()).await {
        Ok(Ok(SnapshotAck::Done(vote))) => Ok(SnapshotResponse::new(vote)),
        Ok(Ok(SnapshotAck::Failed(why))) => Err(Error::Network(NetworkError::from_string(why))),
        Ok(Err(error)) => Err(network(error)),
        Err(_) => Err(network(LinkError::Silent)),
    }
}

async fn put(link: &mut Connection, frame: &SnapshotFrame) -> Result<(), LinkError> {
    timeout(CHUNK_WITHIN, link.send(frame))
        .await
        .map_err(|_| LinkError::Silent)?
}

/// Receives one snapshot into `folder` and has openraft install it.
pub(crate) async fn receive(mut link: Connection, raft: &Raft, folder: &Path, offload: Offload) -> LinkError {
    let ack = match take(&mut link, raft, folder, offload).await {
        Ok(vote) => SnapshotAck::Done(vote),
        Err(Broken::Link(error)) => return error,
        Err(Broken::Here(why)) => {
            tracing::warn!(peer = %link.peer, %why, "a snapshot was not installed");
            SnapshotAck::Failed(why)
        }
    };
    match link.send(&ack).await {
        Ok(()) => LinkError::Closed,
        Err(error) => error,
    }
}

enum Broken {
    Link(LinkError),
    Here(String),
}

impl From<LinkError> for Broken {
    fn from(error: LinkError) -> Self {
        Self::Link(error)
    }
}

impl From<std::io::Error> for Broken {
    fn from(error: std::io::Error) -> Self {
        Self::Here(error.to_string())
    }
}

async fn take(link: &mut Connection, raft: &Raft, folder: &Path, offload: Offload) -> Result<Vote, Broken> {
    let SnapshotFrame::Begin { vote, meta, size } = get(link).await? else {
        return Err(Broken::Here(
            "a snapshot must begin with what it covers".to_owned(),
        ));
    };
    tracing::info!(peer = %link.peer, size, last = ?meta.last_log_id, "receiving a snapshot");
    let mut incoming = Incoming::create(folder, offload).await?;
    let mut crc = crc32fast::Hasher::new();
    let mut left = size;
    loop {
        match get(link).await? {
            SnapshotFrame::Begin { .. } => return Err(Broken::Here("a snapshot begins once".to_owned())),
            SnapshotFrame::Chunk(bytes) => {
                left = left
                    .checked_sub(bytes.len() as u64)
                    .ok_or_else(|| Broken::Here("more bytes than were announced".to_owned()))?;
                crc.update(&bytes);
                incoming.write(bytes).await?;
            }
            SnapshotFrame::End { crc: theirs } if left == 0 && theirs == crc.clone().finalize() => break,
            SnapshotFrame::End { .. } => {
                return Err(Broken::Here(
                    "the snapshot arrived incomplete or damaged".to_owned(),
                ));
            }
        }
    }
    let file = incoming.finish().await?;
    let snapshot = Snapshot { meta, snapshot: file };
    let response = raft
        .install_full_snapshot(vote, snapshot)
        .await
        .map_err(|error| Broken::Here(error.to_string()))?;
    Ok(response.vote)
}

async fn get(link: &mut Connection) -> Result<SnapshotFrame, LinkError> {
    timeout(CHUNK_WITHIN, link.receive())
        .await
        .map_err(|_| LinkError::Silent)?
}
