//! The one thread that writes; over the in-memory twin it is a task.
//!
//! It takes all work that waits, hands it to the engine in order, syncs once and then completes everything
//! in order. While a sync runs the next batch gathers by itself, so nothing ever lingers for company. Votes
//! and truncations travel in the same queue as entries, because a vote is part of the log's order.
//!
//! The first error poisons the log: whatever waits and whatever comes is refused, and no sync is ever tried
//! again, because after a failed one nobody knows what the disk holds (the kernel drops the dirty pages).

use std::sync::Arc;

use openraft::storage::IOFlushed;
use regent_state::faults::{self, Fault};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tracing::{error, info};

use super::store::Shared;
use super::{LogError, MemoryDisk, Promise, record};
use crate::config::{Entry, LogId, TypeConfig, Vote};

/// Most items that share one sync. Their bytes are bounded by the queue's budget; this bounds how long the
/// first of them can wait for the others to be written.
const MAX_BATCH: usize = 1_024;
/// Records removed between two batches of writes: a purge of a snapshot's worth of entries must not stop
/// the log for as long as that takes.
const PURGE_STEP: usize = 256;

/// Names of the small values.
pub(super) const VOTE: &str = "vote";
pub(super) const COMMITTED: &str = "committed";
pub(super) const PURGED: &str = "purged";

/// Answers the caller of a write.
pub(super) type Answer = oneshot::Sender<Result<(), LogError>>;

/// One item of the queue.
pub(super) enum Work {
    /// Append entries; the permit is their share of the queue's budget.
    Append {
        entries: Vec<Entry>,
        flushed: IOFlushed<TypeConfig>,
        permit: OwnedSemaphorePermit,
    },
    /// Save a vote.
    Vote { vote: Vote, answer: Answer },
    /// Remove the entries after `last`.
    Truncate { last: Option<LogId>, answer: Answer },
    /// Forget the entries up to this one. Nobody waits.
    Purge(LogId),
    /// Store a metadata value under its full name.
    Metadata {
        name: String,
        value: Vec<u8>,
        answer: Answer,
    },
}

/// Whom to tell, after the sync.
enum Done {
    /// The permit gives its share of the queue's budget back when it is dropped.
    Flushed(IOFlushed<TypeConfig>, OwnedSemaphorePermit),
    Answer(Answer),
}

/// What the thread knows of the engine's content.
pub(super) struct Position {
    /// The last entry, or the last purged one.
    pub(super) last: Option<LogId>,
    /// The last purged entry.
    pub(super) purged: Option<LogId>,
    /// The vote.
    pub(super) vote: Option<Vote>,
    /// What was last noted as committed.
    pub(super) committed: Option<LogId>,
}

impl Position {
    fn next(&self) -> u64 {
        self.last.map_or(0, |last| last.index + 1)
    }

    fn promise(&self) -> Promise {
        Promise {
            last: self.last,
            vote: self.vote,
        }
    }
}

/// Runs until every sender of `queue` is gone and its items are done.
pub(super) fn run(shared: &Arc<Shared>, mut queue: mpsc::Receiver<Work>, mut position: Position) {
    let mut purging = false;
    loop {
        let first = if purging {
            match queue.try_recv() {
                Ok(work) => Some(work),
                Err(TryRecvError::Empty) => None,
                Err(TryRecvError::Disconnected) => break,
            }
        } else {
            match queue.blocking_recv() {
                Some(work) => Some(work),
                None => break,
            }
        };
        let batch = gather(first, &mut queue);
        purging |= batch.iter().any(|work| matches!(work, Work::Purge(_)));
        if !batch.is_empty() {
            let written = write(shared, &mut position, batch);
            if faults::seeded(Fault::AcknowledgedBeforeSynced) {
                // A disk of microseconds would hide it from all but the luckiest of crashes.
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            finish(shared, &mut position, written);
        }
        if purging {
            let first = position.purged.map_or(0, |purged| purged.index + 1);
            purging = purge_step(shared, first);
        }
    }
    end(shared, &mut position);
}

/// The same as a task, on a disk that takes its time to sync: in between a crash loses what was written.
pub(super) async fn run_as_task(
    shared: &Arc<Shared>,
    mut queue: mpsc::Receiver<Work>,
    mut position: Position,
    disk: &MemoryDisk,
) {
    while let Some(first) = queue.recv().await {
        let batch = gather(Some(first), &mut queue);
        let mut purging = batch.iter().any(|work| matches!(work, Work::Purge(_)));
        let written = write(shared, &mut position, batch);
        if written.must_sync {
            disk.take_time().await;
        }
        finish(shared, &mut position, written);
        while purging {
            let first = position.purged.map_or(0, |purged| purged.index + 1);
            purging = purge_step(shared, first);
        }
    }
    end(shared, &mut position);
}

/// `first` and what waits behind it.
fn gather(first: Option<Work>, queue: &mut mpsc::Receiver<Work>) -> Vec<Work> {
    let mut batch = Vec::from_iter(first);
    while !batch.is_empty() && batch.len() < MAX_BATCH {
        match queue.try_recv() {
            Ok(work) => batch.push(work),
            Err(_) => break,
        }
    }
    batch
}

/// A batch that the engine has, but that is not durable yet.
struct Written {
    done: Vec<Done>,
    must_sync: bool,
    outcome: Result<(), LogError>,
}

fn write(shared: &Shared, position: &mut Position, batch: Vec<Work>) -> Written {
    let mut done = Vec::new();
    let mut must_sync = false;
    let mut outcome = shared.check();
    let mut run = Run::default();
    for work in batch {
        let waits = work.waits();
        if outcome.is_ok() {
            outcome = write_one(shared, position, &mut run, &work);
            must_sync |= waits;
        }
        done.extend(work.done());
    }
    if faults::seeded(Fault::AcknowledgedBeforeSynced) {
        for waiter in done.drain(..) {
            waiter.complete(Ok(()));
        }
    }
    if outcome.is_ok() {
        outcome = run.store(shared);
    }
    Written {
        done,
        must_sync,
        outcome,
    }
}

/// Makes the batch durable and answers those who wait for it.
fn finish(shared: &Shared, position: &mut Position, written: Written) {
    let Written {
        done,
        must_sync,
        mut outcome,
    } = written;
    if outcome.is_ok() && must_sync {
        let begun = std::time::Instant::now();
        outcome = note_committed(shared, position).and_then(|()| shared.engine.sync(&position.promise()));
        metrics::histogram!("regent_log_sync_seconds").record(begun.elapsed());
    }
    match outcome {
        Ok(()) => {
            shared.written_below(position.next());
            for waiter in done {
                waiter.complete(Ok(()));
            }
        }
        Err(cause) => {
            shared.poison(&cause);
            for waiter in done {
                waiter.complete(shared.check());
            }
        }
    }
}

fn end(shared: &Shared, position: &mut Position) {
    // Nobody waits for it: it goes with what is synced when the engine is closed.
    if shared.check().is_ok()
        && let Err(cause) = note_committed(shared, position)
    {
        shared.poison(&cause);
    }
    info!("the raft log is closed");
}

/// Stores what is committed, if that is news. It only says how far a restarted node may apply before it has heard of
/// a leader, so it travels with the next sync that is made anyway.
fn note_committed(shared: &Shared, position: &mut Position) -> Result<(), LogError> {
    let committed = shared.committed();
    // It may be of entries that are still in the queue.
    if committed == position.committed || committed > position.last {
        return Ok(());
    }
    shared.engine.put(COMMITTED, &record::encode_value(&committed))?;
    position.committed = committed;
    Ok(())
}

/// Entries of consecutive appends, for the engine to take together.
#[derive(Default)]
struct Run {
    first: u64,
    records: Vec<Vec<u8>>,
}

impl Run {
    fn push(&mut self, entry: &Entry) {
        if self.records.is_empty() {
            self.first = entry.log_id.index;
        }
        self.records.push(record::encode_entry(entry));
    }

    fn store(&mut self, shared: &Shared) -> Result<(), LogError> {
        if self.records.is_empty() {
            return Ok(());
        }
        let bytes: usize = self.records.iter().map(Vec::len).sum();
        metrics::counter!("regent_log_appended_entries_total").increment(self.records.len() as u64);
        metrics::counter!("regent_log_appended_bytes_total").increment(bytes as u64);
        let stored = shared.engine.append(self.first, &self.records);
        self.records.clear();
        stored
    }
}

fn write_one(shared: &Shared, position: &mut Position, run: &mut Run, work: &Work) -> Result<(), LogError> {
    let engine = &shared.engine;
    if let Work::Append { entries, .. } = work {
        for entry in entries {
            run.push(entry);
            position.last = Some(entry.log_id);
        }
        return Ok(());
    }
    // Everything else comes after what was appended before it.
    run.store(shared)?;
    match work {
        Work::Append { .. } => Ok(()),
        Work::Vote { vote, .. } => {
            if faults::seeded(Fault::VoteNotPersisted) {
                return Ok(());
            }
            engine.put(VOTE, &record::encode_value(vote))?;
            position.vote = Some(*vote);
            Ok(())
        }
        Work::Truncate { last, .. } => {
            let next = position.next();
            let from = last.map_or(0, |last| last.index + 1);
            if from >= next {
                return Ok(());
            }
            position.last = (*last).max(position.purged);
            engine.lower(&position.promise())?;
            for index in (from..next).rev() {
                engine.remove(index)?;
            }
            Ok(())
        }
        Work::Purge(upto) => {
            engine.put(PURGED, &record::encode_value(upto))?;
            position.purged = Some(*upto);
            position.last = position.last.max(Some(*upto));
            Ok(())
        }
        Work::Metadata { name, value, .. } => engine.put(name, value),
    }
}

/// Removes some purged records and says whether there may be more.
fn purge_step(shared: &Shared, below: u64) -> bool {
    if shared.check().is_err() {
        return false;
    }
    match shared.engine.purge(below, PURGE_STEP) {
        Ok(more) => more,
        Err(cause) => {
            shared.poison(&cause);
            false
        }
    }
}

impl Work {
    /// Whether somebody waits for it to be durable.
    fn waits(&self) -> bool {
        match self {
            Self::Append { .. } | Self::Vote { .. } | Self::Truncate { .. } | Self::Metadata { .. } => true,
            Self::Purge(_) => false,
        }
    }

    fn done(self) -> Option<Done> {
        match self {
            Self::Append { flushed, permit, .. } => Some(Done::Flushed(flushed, permit)),
            Self::Vote { answer, .. } | Self::Truncate { answer, .. } | Self::Metadata { answer, .. } => {
                Some(Done::Answer(answer))
            }
            Self::Purge(_) => None,
        }
    }
}

impl Done {
    fn complete(self, outcome: Result<(), LogError>) {
        match self {
            Self::Flushed(flushed, _permit) => flushed.io_completed(outcome.map_err(Into::into)),
            Self::Answer(answer) => {
                // A caller that stopped waiting does not need to know.
                let _ = answer.send(outcome);
            }
        }
    }
}

/// Turns a panic of the thread into a poisoned log, so that the node stops instead of waiting for ever.
pub(super) struct PanicGuard(pub(super) Arc<Shared>);

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            error!("the log writer panicked");
            self.0.poison(&LogError::Closed);
        }
    }
}
