//! The client end of a request connection: many requests under way at once, answered in any order, over
//! one connection that is kept and made again.
//!
//! The one promise that writes depend on: [`Failure::NotSent`] means that no byte of the request left this
//! process. Everything after that point is [`Failure::Lost`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use regent_types::NodeId;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::connection::{Connection, LinkError};
use super::handshake::dial;
use super::peers::Addresses;
use super::wire::{Purpose, Request, Response, decode, encode};
use crate::gather::gather;
use crate::identity::{Identity, Refusal};

/// Requests that may wait for the connection's task; more are refused with `NotSent`.
const QUEUE: usize = 256;

/// Requests under way on one connection; more wait in the queue.
const MAX_PENDING: usize = 512;

/// Frames gathered for one flush.
const WRITE_BATCH: usize = 64;

/// First and longest pause between attempts to connect. Short, because a restarted peer should be back in
/// the quorum at once, and an attempt on a closed port costs next to nothing.
const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_millis(250);

/// A connection with requests under way that is silent for so long is given up: the machine is gone
/// without a word, and TCP alone would take minutes to notice. A living peer answers pings.
const SILENCE: Duration = Duration::from_secs(4);
const PING_EVERY: Duration = Duration::from_secs(1);

/// How long the peer may refuse to read before the connection is given up.
const WRITE_STALL: Duration = Duration::from_secs(10);

/// Why a request has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Failure {
    /// Certainly never sent.
    #[error("not sent")]
    NotSent,
    /// Sent, or partly; the connection broke or the deadline passed.
    #[error("sent, but not answered")]
    Lost,
}

/// What the connection is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Link {
    /// Not connected.
    Down {
        /// Since when.
        since: Instant,
        /// Why the last attempt failed.
        why: String,
    },
    /// Refused for good: see [`Identity::is_final`].
    Refused(Refusal),
    /// Connected.
    Up,
}

struct Job {
    request: Request,
    reply: oneshot::Sender<Result<Response, Failure>>,
    expires: Instant,
}

/// A handle to the connection's task; the task ends with the last handle or the token.
#[derive(Clone)]
pub(crate) struct Channel {
    jobs: mpsc::Sender<Job>,
    link: watch::Receiver<Link>,
}

impl Channel {
    /// Starts the task that connects to `peer` and keeps connected.
    pub(crate) fn spawn(
        identity: Arc<Identity>,
        peer: NodeId,
        addrs: Arc<Addresses>,
        purpose: Purpose,
        heard: Arc<dyn Fn() + Send + Sync>,
        stop: CancellationToken,
    ) -> Self {
        let (jobs, queue) = mpsc::channel(QUEUE);
        let (link_tx, link) = watch::channel(Link::Down {
            since: Instant::now(),
            why: "not connected yet".to_owned(),
        });
        let task = Task {
            identity,
            peer,
            addrs,
            purpose,
            heard,
            queue,
            link: link_tx,
        };
        tokio::spawn(async move {
            tokio::select! {
                () = task.run() => {}
                () = stop.cancelled() => {}
            }
        });
        Self { jobs, link }
    }

    /// Whether the connection stands.
    pub(crate) fn is_up(&self) -> bool {
        *self.link.borrow() == Link::Up
    }

    /// What the connection is doing, as it changes.
    pub(crate) fn link(&self) -> watch::Receiver<Link> {
        self.link.clone()
    }

    /// Sends `request` and waits for the answer until `deadline`.
    pub(crate) async fn call(&self, request: Request, deadline: Instant) -> Result<Response, Failure> {
        let (reply, answer) = oneshot::channel();
        // A full queue means a peer that does not read; waiting for it would only add to it.
        if self
            .jobs
            .try_send(Job {
                request,
                reply,
                expires: deadline,
            })
            .is_err()
        {
            return Err(Failure::NotSent);
        }
        match timeout_at(deadline, answer).await {
            Ok(Ok(result)) => result,
            // The task is gone, or time is up: it may have been sent.
            Ok(Err(_)) | Err(_) => Err(Failure::Lost),
        }
    }
}

struct Task {
    identity: Arc<Identity>,
    peer: NodeId,
    addrs: Arc<Addresses>,
    purpose: Purpose,
    heard: Arc<dyn Fn() + Send + Sync>,
    queue: mpsc::Receiver<Job>,
    link: watch::Sender<Link>,
}

impl Task {
    async fn run(mut self) {
        let mut backoff = BACKOFF_MIN;
        let mut last_error = String::new();
        loop {
            let Some(attempt) = self.connect().await else {
                return;
            };
            match attempt {
                Ok(connection) => {
                    tracing::debug!(peer = %self.peer, purpose = self.purpose.as_str(), "connected");
                    backoff = BACKOFF_MIN;
                    last_error.clear();
                    self.link.send_replace(Link::Up);
                    let error = self.serve(connection).await;
                    tracing::debug!(peer = %self.peer, purpose = self.purpose.as_str(), %error, "disconnected");
                    self.link.send_replace(Link::Down {
                        since: Instant::now(),
                        why: error.to_string(),
                    });
                    if matches!(error, LinkError::Closed) && self.queue.is_closed() {
                        return;
                    }
                }
                Err(error) => {
                    if let LinkError::Refused(Refusal::NotSettled) = error {
                        // It is there and about to start: ask again soon.
                        backoff = BACKOFF_MIN;
                    }
                    let text = error.to_string();
                    // The same error again is not news.
                    if text != last_error {
                        if error.is_fault() {
                            tracing::error!(peer = %self.peer, purpose = self.purpose.as_str(), error = %text, "cannot join the peer");
                        } else {
                            tracing::debug!(peer = %self.peer, purpose = self.purpose.as_str(), error = %text, "cannot connect");
                        }
                        last_error.clone_from(&text);
                    }
                    let since = match &*self.link.borrow() {
                        Link::Down { since, .. } => *since,
                        Link::Up | Link::Refused(_) => Instant::now(),
                    };
                    self.link.send_replace(match error {
                        LinkError::Refused(refusal) if self.identity.is_final(&refusal) => {
                            Link::Refused(refusal)
                        }
                        _ => Link::Down { since, why: text },
                    });
                }
            }
            let pause = backoff.mul_f64(0.5 + rand::random::<f64>() / 2.0);
            backoff = (backoff * 2).min(BACKOFF_MAX);
            if self.refuse_while(sleep(pause)).await.is_none() {
                return;
            }
        }
    }

    /// One attempt; `None` when nobody holds the channel any more.
    async fn connect(&mut self) -> Option<Result<Connection, LinkError>> {
        let (identity, peer, purpose) = (self.identity.clone(), self.peer, self.purpose);
        let addrs = self.addrs.clone();
        self.refuse_while(async move {
            let addr = addrs.current();
            let dialled = dial(&identity, peer, &addr, purpose).await;
            if dialled.is_err() {
                addrs.failed(&addr);
            }
            dialled
        })
        .await
    }

    /// Runs `work` and meanwhile answers what is asked: not now.
    async fn refuse_while<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Some(done),
                job = self.queue.recv() => match job {
                    Some(job) => { let _ = job.reply.send(Err(Failure::NotSent)); }
                    None => return None,
                },
            }
        }
    }

    /// Serves requests over `connection` until it breaks.
    async fn serve(&mut self, connection: Connection) -> LinkError {
        let Connection {
            mut reader, writer, ..
        } = connection;
        let (frames, outgoing) = mpsc::channel::<Bytes>(MAX_PENDING + 1);
        let mut writing = tokio::spawn(write_frames(writer, outgoing));
        let mut pending: BTreeMap<u64, oneshot::Sender<Result<Response, Failure>>> = BTreeMap::new();
        let mut next_id = 0_u64;
        let mut last_heard = Instant::now();
        let mut ping = interval(PING_EVERY);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);

        let error = loop {
            tokio::select! {
                job = self.queue.recv(), if pending.len() < MAX_PENDING => {
                    let Some(job) = job else { break LinkError::Closed };
                    if job.reply.is_closed() || job.expires <= Instant::now() {
                        let _ = job.reply.send(Err(Failure::NotSent));
                        continue;
                    }
                    next_id += 1;
                    let frame = encode(&(next_id, job.request));
                    if frame.len() > self.purpose.max_frame() {
                        tracing::error!(bytes = frame.len(), purpose = self.purpose.as_str(), "a request exceeds the frame cap");
                        let _ = job.reply.send(Err(Failure::NotSent));
                        continue;
                    }
                    pending.insert(next_id, job.reply);
                    // The channel holds as many frames as may be pending, so it is never full.
                    if frames.try_send(frame).is_err() {
                        break LinkError::Closed;
                    }
                }
                frame = reader.next() => {
                    let frame = match frame {
                        Some(Ok(frame)) => frame,
                        Some(Err(error)) => break error.into(),
                        None => break LinkError::Closed,
                    };
                    last_heard = Instant::now();
                    (self.heard)();
                    match decode::<(u64, Response)>(&frame) {
                        // An unknown id is the answer to a call that stopped waiting.
                        Ok((id, response)) => if let Some(reply) = pending.remove(&id) {
                            let _ = reply.send(Ok(response));
                        },
                        Err(error) => break error.into(),
                    }
                }
                _ = ping.tick() => {
                    pending.retain(|_, reply| !reply.is_closed());
                    if pending.is_empty() {
                        last_heard = Instant::now();
                    } else if last_heard.elapsed() > SILENCE {
                        break LinkError::Silent;
                    } else {
                        next_id += 1;
                        let _ = frames.try_send(encode(&(next_id, Request::Ping)));
                    }
                }
                _ = &mut writing => break LinkError::Closed,
            }
        };
        writing.abort();
        for (_, reply) in pending {
            let _ = reply.send(Err(Failure::Lost));
        }
        error
    }
}

/// Writes frames as they come, those that wait together with one flush. Ends with the connection.
pub(crate) async fn write_frames<W>(mut writer: W, mut frames: mpsc::Receiver<Bytes>)
where
    W: futures::Sink<Bytes, Error = std::io::Error> + Unpin,
{
    let mut batch = Vec::with_capacity(WRITE_BATCH);
    while gather(&mut frames, &mut batch, WRITE_BATCH).await > 0 {
        let written = timeout(WRITE_STALL, async {
            for frame in batch.drain(..) {
                writer.feed(frame).await?;
            }
            writer.flush().await
        });
        match written.await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}
