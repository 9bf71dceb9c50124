//! `GET /cluster/backup`: the whole state at one revision, as a stream of bounded memory.
//!
//! The file ends with a checksum over all of it, and whoever takes it checks that; so a stream that breaks off can not
//! be taken for a whole backup, even where HTTP does not show it.

use std::io::{self, BufWriter, Write};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use regent_raft::Backup;
use regent_state::operation::Asked;
use regent_state::record::Role;
use regent_types::Code;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc};

use super::caller::Reading;
use super::openapi::WriteProblems;
use super::problem::{Failure, Result};
use super::query::{Consistency, Query, Read};
use super::reply;

/// Backups that one process streams at a time: each keeps a thread busy and an old state in memory.
const AT_ONCE: usize = 2;
static STREAMS: Semaphore = Semaphore::const_new(AT_ONCE);
/// Bytes of one piece of the stream.
const PIECE: usize = 256 << 10;
/// Pieces that may wait for a slow reader.
const WAITING: usize = 4;
/// A reader that takes no piece for so long is given up.
const STALLED: Duration = Duration::from_secs(30);
/// Seconds after which somebody may try again who found others at it.
const RETRY_AFTER: u64 = 10;

/// Streams a backup: everything that was acknowledged before the request, or, with `consistency=stale`, what this node
/// has, without a quorum too. It holds password hashes. That it was asked for is an event.
#[utoipa::path(get, path = "/api/v1/cluster/backup", tag = "cluster", params(Read),
    responses((status = 200, description = "The backup, for `regent cluster restore`", body = [u8],
        content_type = "application/octet-stream"), WriteProblems))]
pub(super) async fn get(reading: Reading, Query(read): Query<Read>) -> Result<Response> {
    let is_stale = read.consistency == Consistency::Stale;
    let snapshot = reading.view(read).await?;
    snapshot.caller.require(Role::Admin, "taking a backup")?;
    let Some(cluster) = snapshot.view.state.cluster_id() else {
        return Err(super::problem::not_serving("the cluster is not initialised yet"));
    };
    let Ok(permit) = STREAMS.try_acquire() else {
        return Err(Failure::busy(
            format!("this node streams {AT_ONCE} backups already"),
            RETRY_AFTER,
        ));
    };
    let backup = snapshot.view.backup();
    let name = format!("regent-{cluster}-{}.backup", backup.revision());
    if let Err(failure) = reading.note(Asked::Backup).await {
        // Without a quorum nothing can be written down, and that is what it is for. What the cluster refuses is refused.
        let is_cut_off = matches!(
            failure.code(),
            Code::NoLeader | Code::NoQuorum | Code::NotServing | Code::OutcomeUnknown
        );
        if !(is_stale && is_cut_off) {
            return Err(failure);
        }
    }

    let (sender, receiver) = mpsc::channel(WAITING);
    tokio::task::spawn_blocking(move || {
        let _permit = permit;
        stream(&backup, &sender);
    });
    let pieces = futures::stream::unfold(receiver, async |mut receiver| {
        let piece = receiver.recv().await?;
        Some((piece, receiver))
    });
    let mut response = Response::new(Body::from_stream(pieces));
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    let attachment = HeaderValue::try_from(format!("attachment; filename=\"{name}\""));
    headers.insert(
        header::CONTENT_DISPOSITION,
        attachment.expect("cluster ids and revisions are plain text"),
    );
    reply::set_index(&mut response, snapshot.revision());
    Ok(response)
}

/// Writes all of it, or an error at the end, which breaks the stream off.
fn stream(backup: &Backup, pieces: &mpsc::Sender<io::Result<Bytes>>) {
    let mut output = BufWriter::with_capacity(
        PIECE,
        Pieces {
            pieces,
            runtime: Handle::current(),
        },
    );
    let written = backup.write_to(&mut output).and_then(|()| output.flush());
    // What is left in it belongs to a file that is not whole.
    drop(output.into_parts());
    if let Err(error) = written {
        tracing::warn!(%error, "a backup was not taken to its end");
        // The reader may be gone.
        let _ = pieces.try_send(Err(error));
    }
}

/// Hands each write on as a piece, and waits while too many wait.
struct Pieces<'a> {
    pieces: &'a mpsc::Sender<io::Result<Bytes>>,
    runtime: Handle,
}

impl Write for Pieces<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = Bytes::copy_from_slice(bytes);
        let send = tokio::time::timeout(STALLED, self.pieces.send(Ok(piece)));
        match self.runtime.block_on(send) {
            Ok(Ok(())) => Ok(bytes.len()),
            Ok(Err(_)) => Err(io::Error::new(io::ErrorKind::BrokenPipe, "the reader is gone")),
            Err(_) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("the reader took nothing for {STALLED:?}"),
            )),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
