//! The log as openraft sees it: [`Log`] implements its storage and reader traits over any [`Engine`].
//!
//! Appended entries are readable from the tail in memory at once; the writer makes them durable behind that.
//! What is known in memory (`Known`) is always what the queue will lead to; the engine follows.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::Stream;
use openraft::OptionalSend;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tracing::{error, info, warn};

use super::tail::{Tail, weight};
use super::writer::{self, Answer, COMMITTED, PURGED, PanicGuard, Position, VOTE, Work};
use super::{Engine, LogError, MAX_METADATA, MemoryDisk, READ_BATCH_BYTES, record};
use crate::config::{Entry, LogId, TypeConfig, Vote};
use crate::offload::Offload;

/// Items that may wait for the writer.
const QUEUE_ITEMS: usize = 4_096;
/// Bytes of entries that may wait for the writer. They are in memory anyway; past this the core of openraft
/// waits for the disk, which is the back-pressure that proposals feel.
const QUEUE_BYTES: usize = 64 * 1024 * 1024;
/// How often a read that a truncation overtook is begun again before it is an error. Truncations are rare
/// (one per change of leader), so twice is already much.
const READ_ATTEMPTS: usize = 8;
/// Prefix that keeps metadata names apart from the log's own values.
const METADATA: &str = "meta/";

/// A handle to the log; clones are cheap and share everything.
#[derive(Clone)]
pub(crate) struct Log {
    // Before `shared`: the thread ends when the last sender is gone, and then lets go of `shared` too.
    queue: mpsc::Sender<Work>,
    shared: Arc<Shared>,
}

/// What handles and the writer thread share.
pub(super) struct Shared {
    pub(super) engine: Arc<dyn Engine>,
    known: Mutex<Known>,
    budget: Arc<Semaphore>,
    failed: watch::Sender<Option<String>>,
    offload: Offload,
    // Last: dropped after the engine, so that who sees it closed may open the engine again.
    ended: watch::Sender<()>,
}

/// What the log holds once the queue is done.
#[derive(Default)]
struct Known {
    purged: Option<LogId>,
    /// Index of the first entry that is there, or will be.
    first: u64,
    last: Option<LogId>,
    vote: Option<Vote>,
    committed: Option<LogId>,
    tail: Tail,
    /// Counts truncations, so that a reader notices one that overtook it.
    truncations: u64,
}

impl Log {
    /// Checks everything that `engine` holds and starts the writer thread. Blocks while it reads.
    ///
    /// # Errors
    /// A damaged log is refused: a record that is missing, misplaced, unreadable or out of order, or a log
    /// or vote that is older than what this node has promised.
    pub(crate) fn open(engine: Arc<dyn Engine>) -> Result<Self, LogError> {
        let (log, receiver, position) = Self::begin(engine, Offload::Threads)?;
        let for_writer = Arc::clone(&log.shared);
        std::thread::Builder::new()
            .name("raft-log".to_owned())
            .spawn(move || {
                let _guard = PanicGuard(Arc::clone(&for_writer));
                writer::run(&for_writer, receiver, position);
            })
            .map_err(|source| LogError::File {
                path: log.shared.engine.place().into(),
                what: "cannot start the writer thread",
                source,
            })?;
        Ok(log)
    }

    /// The same on the in-memory twin, with the writer as a task of the runtime that this is called in.
    ///
    /// # Errors
    /// As [`Log::open`].
    pub(crate) fn in_memory(disk: MemoryDisk) -> Result<Self, LogError> {
        let (log, receiver, position) = Self::begin(disk.engine(), Offload::InPlace)?;
        let for_writer = Arc::clone(&log.shared);
        tokio::spawn(async move {
            let _guard = PanicGuard(Arc::clone(&for_writer));
            writer::run_as_task(&for_writer, receiver, position, &disk).await;
        });
        Ok(log)
    }

    /// Checks everything that `engine` holds; the writer is the caller's to start.
    fn begin(
        engine: Arc<dyn Engine>,
        offload: Offload,
    ) -> Result<(Self, mpsc::Receiver<Work>, Position), LogError> {
        let known = recover(&*engine)?;
        info!(
            place = engine.place(),
            purged = known.purged.map(|id| id.index),
            last = known.last.map(|id| id.index),
            committed = known.committed.map(|id| id.index),
            "raft log opened",
        );
        let position = Position {
            last: known.last,
            purged: known.purged,
            vote: known.vote,
            committed: known.committed,
        };
        let shared = Arc::new(Shared {
            engine,
            known: Mutex::new(known),
            budget: Arc::new(Semaphore::new(QUEUE_BYTES)),
            failed: watch::Sender::new(None),
            offload,
            ended: watch::Sender::new(()),
        });
        let (queue, receiver) = mpsc::channel(QUEUE_ITEMS);
        Ok((Self { queue, shared }, receiver, position))
    }

    /// Where this node does what blocks.
    pub(crate) fn offload(&self) -> Offload {
        self.shared.offload
    }

    /// The first error, once there is one. The node must stop then: the log refuses everything.
    pub(crate) fn failed(&self) -> watch::Receiver<Option<String>> {
        self.shared.failed.subscribe()
    }

    /// Resolves (`changed` errs) when every handle is gone, the queue is done and the engine is closed, so
    /// that the folder can be opened again.
    pub(crate) fn ended(&self) -> watch::Receiver<()> {
        self.shared.ended.subscribe()
    }

    /// The last purged entry: a snapshot must cover it.
    pub(crate) fn purged(&self) -> Option<LogId> {
        self.shared.known().purged
    }

    /// Whether neither an entry nor a vote was ever stored here.
    pub(crate) fn is_pristine(&self) -> bool {
        let known = self.shared.known();
        known.last.is_none() && known.vote.is_none()
    }

    /// Reads a small value. Blocks for the time of one lookup.
    pub(crate) fn get_metadata(&self, name: &str) -> Result<Option<Vec<u8>>, LogError> {
        let engine = &self.shared.engine;
        let Some(bytes) = engine.get(&format!("{METADATA}{name}"))? else {
            return Ok(None);
        };
        record::decode_value(&bytes)
            .map(Some)
            .map_err(|error| LogError::Damaged {
                place: engine.place(),
                what: format!("metadata {name:?}: {error}"),
            })
    }

    /// Stores a small value of at most [`MAX_METADATA`] bytes; durable on return.
    pub(crate) async fn put_metadata(&self, name: &str, value: &[u8]) -> Result<(), LogError> {
        if value.len() > MAX_METADATA {
            return Err(LogError::MetadataTooLarge {
                name: name.to_owned(),
                len: value.len(),
            });
        }
        let name = format!("{METADATA}{name}");
        let value = record::encode_value(&value);
        self.ask(|answer| Work::Metadata { name, value, answer }).await
    }

    /// Queues work and waits until it is durable.
    async fn ask(&self, work: impl FnOnce(Answer) -> Work) -> Result<(), LogError> {
        let (answer, answered) = oneshot::channel();
        self.send(work(answer)).await?;
        answered.await.map_err(|_| LogError::Closed)?
    }

    async fn send(&self, work: Work) -> Result<(), LogError> {
        self.shared.check()?;
        self.queue.send(work).await.map_err(|_| LogError::Closed)
    }

    /// Reads the entries of `start..end` that exist, in order, until their weight passes `max_bytes`; at
    /// least one when there is one.
    async fn read(&self, start: u64, end: u64, max_bytes: usize) -> Result<Vec<Entry>, io::Error> {
        for _ in 0..READ_ATTEMPTS {
            let truncations = self.shared.known().truncations;
            let entries = self.read_once(start, end, max_bytes).await;
            if self.shared.known().truncations == truncations {
                return Ok(entries?);
            }
        }
        Err(io::Error::other(
            "the raft log was truncated during every attempt to read it",
        ))
    }

    async fn read_once(&self, start: u64, end: u64, max_bytes: usize) -> Result<Vec<Entry>, LogError> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut bytes = 0;
        let mut next = start;
        while bytes < max_bytes || entries.is_empty() {
            let (from, cold_end) = {
                let known = self.shared.known();
                let from = next.max(known.first);
                if !entries.is_empty() && from > next {
                    break; // purged under us: what was read so far is still a correct answer
                }
                let to = end.min(known.last.map_or(0, |last| last.index + 1));
                if from >= to {
                    break;
                }
                let tail_first = known.tail.first().unwrap_or(to);
                if from >= tail_first {
                    let warm = known.tail.read(from, to, max_bytes.saturating_sub(bytes));
                    // An entry over the budget is only right as the first one.
                    let fits = |warm: &[Entry]| bytes + warm.iter().map(weight).sum::<usize>() <= max_bytes;
                    if entries.is_empty() || fits(&warm) {
                        entries.extend(warm);
                    }
                    break;
                }
                (from, to.min(tail_first))
            };
            let cold = self
                .read_engine(from, cold_end, max_bytes.saturating_sub(bytes))
                .await?;
            let first = cold.front().map(|entry| entry.log_id.index);
            if first != Some(from) {
                if self.shared.known().first > from {
                    next = from;
                    continue; // purged between the look at `known` and the read
                }
                return Err(LogError::Damaged {
                    place: self.shared.engine.place(),
                    what: format!("index {from} is missing"),
                });
            }
            next = from + cold.len() as u64;
            bytes += cold.iter().map(weight).sum::<usize>();
            entries.extend(cold);
        }
        Ok(entries)
    }

    /// Reads consecutive entries that left memory.
    async fn read_engine(&self, start: u64, end: u64, max_bytes: usize) -> Result<VecDeque<Entry>, LogError> {
        let shared = Arc::clone(&self.shared);
        let read = self.shared.offload.run(move || {
            let mut entries = VecDeque::new();
            let mut bytes = 0;
            let mut expected = start;
            shared.engine.scan(start..end, &mut |index, record| {
                if index != expected {
                    return Ok(false);
                }
                let entry = decode(&*shared.engine, index, record)?;
                bytes += weight(&entry);
                if bytes > max_bytes && !entries.is_empty() {
                    return Ok(false);
                }
                entries.push_back(entry);
                expected += 1;
                Ok(true)
            })?;
            Ok(entries)
        });
        read.await.map_err(|_| LogError::Closed)?
    }
}

impl Shared {
    fn known(&self) -> MutexGuard<'_, Known> {
        // Nothing under the lock can stop half-way but by an assertion, and then the node is going down.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What openraft last said is committed.
    pub(super) fn committed(&self) -> Option<LogId> {
        self.known().committed
    }

    /// Err once the log has failed.
    pub(super) fn check(&self) -> Result<(), LogError> {
        match &*self.failed.borrow() {
            None => Ok(()),
            Some(cause) => Err(LogError::Poisoned(cause.clone())),
        }
    }

    /// Refuses everything from now on; the first cause stays.
    pub(super) fn poison(&self, cause: &LogError) {
        self.failed.send_if_modified(|failed| {
            if failed.is_some() {
                return false;
            }
            let text = cause.describe();
            error!(cause = text, "the raft log failed and accepts nothing more");
            *failed = Some(text);
            true
        });
    }

    pub(super) fn written_below(&self, next: u64) {
        self.known().tail.written_below(next);
    }
}

/// Reads and checks everything.
fn recover(engine: &dyn Engine) -> Result<Known, LogError> {
    let damaged = |what: String| LogError::Damaged {
        place: engine.place(),
        what,
    };
    let mut known = Known {
        purged: value(engine, PURGED)?,
        vote: value(engine, VOTE)?,
        committed: value::<Option<LogId>>(engine, COMMITTED)?.flatten(),
        ..Known::default()
    };
    known.last = known.purged;
    let first = known.purged.map_or(0, |purged| purged.index + 1);
    // A purge that a crash interrupted goes on.
    engine.purge(first, usize::MAX)?;
    known.first = first;
    let mut expected = first;
    engine.scan(first..u64::MAX, &mut |index, record| {
        if index != expected {
            return Err(damaged(format!(
                "index {expected} is missing, the next one is {index}"
            )));
        }
        let entry = decode(engine, index, record)?;
        if let Some(last) = known.last
            && entry.log_id.leader_id < last.leader_id
        {
            let (found, before) = (entry.log_id.leader_id, last.leader_id);
            return Err(damaged(format!(
                "index {index} is of leader {found}, after one of {before}"
            )));
        }
        known.last = Some(entry.log_id);
        expected += 1;
        known.tail.push(entry);
        known.tail.written_below(expected);
        Ok(true)
    })?;
    // Parts of a record that a crash cut short must not mix with those of its successor.
    engine.remove(expected)?;
    match engine.promised()? {
        Some(promise) => {
            if known.last < promise.last {
                let promised = promise.last.expect("it is greater than something");
                return Err(damaged(format!(
                    "it ends at index {}, but this node has acknowledged up to {promised}",
                    expected.saturating_sub(1),
                )));
            }
            if promise
                .vote
                .is_some_and(|promised| known.vote.is_none_or(|vote| vote < promised))
            {
                return Err(damaged(
                    "its vote is older than one that this node has given".to_owned(),
                ));
            }
        }
        None if known.last.is_some() || known.vote.is_some() => {
            warn!(
                place = engine.place(),
                "no watermark was found beside the raft log, one is begun"
            );
        }
        None => {}
    }
    Ok(known)
}

fn value<T: serde::de::DeserializeOwned>(engine: &dyn Engine, name: &str) -> Result<Option<T>, LogError> {
    let Some(bytes) = engine.get(name)? else {
        return Ok(None);
    };
    record::decode_value(&bytes)
        .map(Some)
        .map_err(|error| LogError::Damaged {
            place: engine.place(),
            what: format!("{name}: {error}"),
        })
}

fn decode(engine: &dyn Engine, index: u64, record: &[u8]) -> Result<Entry, LogError> {
    record::decode_entry(index, record).map_err(|error| LogError::Damaged {
        place: engine.place(),
        what: format!("the record of index {index}: {error}"),
    })
}

impl RaftLogReader<TypeConfig> for Log {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let (start, end) = bounds(&range);
        self.read(start, end, usize::MAX).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.shared.known().vote)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.read(start, end, READ_BATCH_BYTES).await
    }

    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = Result<Entry, io::Error>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        // In pieces: what is to be applied after a long absence must not be in memory all at once.
        let (start, end) = bounds(&range);
        let pieces = (self.clone(), start, VecDeque::new());
        futures::stream::try_unfold(pieces, move |(log, next, mut piece)| async move {
            if piece.is_empty() && next < end {
                piece = VecDeque::from(log.read(next, end, READ_BATCH_BYTES).await?);
            }
            let entry: Option<Entry> = piece.pop_front();
            Ok(entry.map(|entry| {
                let next = entry.log_id.index + 1;
                (entry, (log, next, piece))
            }))
        })
    }
}

fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(end) => end.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}

impl RaftLogStorage<TypeConfig> for Log {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let known = self.shared.known();
        Ok(LogState {
            last_purged_log_id: known.purged,
            last_log_id: known.last,
        })
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let vote = *vote;
        self.ask(|answer| Work::Vote { vote, answer }).await?;
        self.shared.known().vote = Some(vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.shared.known().committed = committed;
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.shared.known().committed)
    }

    async fn append<I>(&mut self, entries: I, flushed: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        self.shared.check()?;
        let entries: Vec<Entry> = entries.into_iter().collect();
        let bytes = entries.iter().map(weight).sum::<usize>().min(QUEUE_BYTES);
        let permits = u32::try_from(bytes).expect("the queue's budget fits 32 bits");
        let permit = Arc::clone(&self.shared.budget)
            .acquire_many_owned(permits)
            .await
            .map_err(|_| LogError::Closed)?;
        {
            let mut known = self.shared.known();
            for entry in &entries {
                let index = entry.log_id.index;
                match known.last {
                    Some(last) if last.index + 1 != index => {
                        return Err(io::Error::other(format!("append of index {index} after {last}")));
                    }
                    Some(_) => {}
                    None => known.first = index,
                }
                known.last = Some(entry.log_id);
                known.tail.push(entry.clone());
            }
        }
        Ok(self
            .send(Work::Append {
                entries,
                flushed,
                permit,
            })
            .await?)
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        {
            let mut known = self.shared.known();
            let from = last.map_or(0, |last| last.index + 1);
            if known.last.is_none_or(|known| known.index < from) {
                return Ok(());
            }
            known.truncations += 1;
            known.last = last.max(known.purged);
            known.tail.truncate(from);
        }
        Ok(self.ask(|answer| Work::Truncate { last, answer }).await?)
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        {
            let mut known = self.shared.known();
            if known.purged >= Some(upto) {
                return Ok(());
            }
            known.purged = Some(upto);
            known.first = upto.index + 1;
            known.last = known.last.max(Some(upto));
            known.tail.purge(upto.index);
        }
        Ok(self.send(Work::Purge(upto)).await?)
    }
}
