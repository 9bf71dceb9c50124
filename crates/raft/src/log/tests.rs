//! The log over both engines: what survives, what is refused, what is never lost.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage};
use openraft::type_config::TypeConfigExt;

use super::*;
use crate::config::{Entry, LeaderId, Payload, Proposal, TypeConfig};

fn id(term: u64, index: u64) -> LogId {
    LogId {
        leader_id: LeaderId { term, node_id: 1 },
        index,
    }
}

fn entry(term: u64, index: u64, len: usize) -> Entry {
    let fill = u8::try_from(index % 251).unwrap();
    let body = Bytes::from(vec![fill; len]);
    Entry {
        log_id: id(term, index),
        payload: Payload::Normal(Proposal { at: index, body }),
    }
}

/// Appends and waits until it is durable.
async fn append(log: &mut Log, entries: impl IntoIterator<Item = Entry>) -> Result<(), io::Error> {
    let (sender, flushed) = TypeConfig::oneshot();
    let entries: Vec<Entry> = entries.into_iter().collect();
    log.append(entries, IOFlushed::signal(sender)).await?;
    flushed.await.expect("the writer answers every append")
}

async fn indexes(log: &mut Log) -> Vec<u64> {
    log.try_get_log_entries(..)
        .await
        .unwrap()
        .iter()
        .map(|e| e.log_id.index)
        .collect()
}

/// Closes the log and waits until its engine may be opened again.
async fn close(log: Log) {
    let mut ended = log.ended();
    drop(log);
    while ended.changed().await.is_ok() {}
}

/// With every store that there is.
const STORES: [LogStore; 2] = [LogStore::Sled, LogStore::Segments];

fn on_disk(store: LogStore, data: &Path) -> Result<Log, LogError> {
    Log::open(engine_on_disk(store, data)?)
}

/// sled lets go of its file a moment after it was dropped, on a thread of its own.
pub(super) fn engine_on_disk(store: LogStore, data: &Path) -> Result<Arc<dyn Engine>, LogError> {
    for _ in 0..1_000 {
        match super::open(data, store) {
            Err(LogError::File { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            done => return done,
        }
    }
    panic!("sled does not let go of {}", data.display());
}

#[tokio::test]
async fn everything_is_there_after_a_reopen() {
    let _alone = ONE_SLED.lock().await;
    for store in STORES {
        let data = tempfile::tempdir().unwrap();
        let mut log = on_disk(store, data.path()).unwrap();
        assert!(log.is_pristine());
        let vote = Vote::new_committed(3, 1);
        log.save_vote(&vote).await.unwrap();
        // Larger than one part of the sled engine, exactly one, and small.
        let entries: Vec<Entry> = (0..40)
            .zip([64 * 1024, 7 * 1024 - 40, 10].into_iter().cycle())
            .map(|(i, len)| entry(1 + i / 20, i, len))
            .collect();
        append(&mut log, entries.clone()).await.unwrap();
        log.save_committed(Some(id(2, 30))).await.unwrap();
        log.purge(id(1, 4)).await.unwrap();
        log.put_metadata("incarnation", b"abc").await.unwrap();
        close(log).await;

        let mut log = on_disk(store, data.path()).unwrap();
        assert!(!log.is_pristine());
        assert_eq!(log.read_vote().await.unwrap(), Some(vote));
        assert_eq!(log.read_committed().await.unwrap(), Some(id(2, 30)));
        assert_eq!(log.get_metadata("incarnation").unwrap().unwrap(), b"abc");
        assert_eq!(log.get_metadata("other").unwrap(), None);
        let state = log.get_log_state().await.unwrap();
        assert_eq!(
            (state.last_purged_log_id, state.last_log_id),
            (Some(id(1, 4)), Some(id(2, 39)))
        );
        assert_eq!(log.try_get_log_entries(..).await.unwrap(), entries[5..]);
        close(log).await;

        let blobs = std::fs::read_dir(data.path().join("log/blobs")).map_or(0, Iterator::count);
        assert_eq!(blobs, 0, "sled never syncs blob files, so nothing may be in one");
    }
}

/// Records that are stored together are read, cut off and purged one by one: whatever is done, an engine
/// holds what its twin in memory holds.
#[tokio::test]
async fn groups_of_records_are_as_good_as_records() {
    use rand::{RngExt as _, SeedableRng as _};
    let _alone = ONE_SLED.lock().await;
    for (store, seed) in STORES
        .into_iter()
        .flat_map(|store| (0..12).map(move |seed| (store, seed)))
    {
        let mut random = rand::rngs::StdRng::seed_from_u64(seed);
        let data = tempfile::tempdir().unwrap();
        let mut disk = engine_on_disk(store, data.path()).unwrap();
        let twin = MemoryDisk::default().engine();
        let (mut first, mut next) = (0, 0);
        for _ in 0..150 {
            match random.random_range(0..10) {
                0..6 => {
                    let records: Vec<Vec<u8>> = (0..random.random_range(1..40))
                        .map(|_| {
                            let len = match random.random_range(0..20) {
                                0 => random.random_range(0..30_000),
                                1 => 7 * 1024 - random.random_range(0..6),
                                _ => random.random_range(0..600),
                            };
                            (0..len).map(|_| random.random()).collect()
                        })
                        .collect();
                    disk.append(next, &records).unwrap();
                    twin.append(next, &records).unwrap();
                    next += records.len() as u64;
                }
                6 => {
                    let from = random.random_range(first..=next);
                    for index in (from..=next).rev() {
                        disk.remove(index).unwrap();
                        twin.remove(index).unwrap();
                    }
                    next = from;
                }
                7 => {
                    first = random.random_range(first..=next);
                    while disk.purge(first, 7).unwrap() {}
                    while twin.purge(first, 7).unwrap() {}
                }
                8 => {
                    drop(disk);
                    disk = engine_on_disk(store, data.path()).unwrap();
                }
                _ => {
                    let from = random.random_range(first..=next);
                    let to = random.random_range(from..=next + 2);
                    assert_eq!(
                        scanned(&*disk, from..to),
                        scanned(&*twin, from..to),
                        "{store}, seed {seed}"
                    );
                }
            }
        }
        assert_eq!(
            scanned(&*disk, first..u64::MAX),
            scanned(&*twin, first..u64::MAX),
            "{store}, seed {seed}"
        );
    }
}

fn scanned(engine: &dyn Engine, range: Range<u64>) -> Vec<(u64, Vec<u8>)> {
    let mut found = Vec::new();
    engine
        .scan(range, &mut |index, record| {
            found.push((index, record.to_vec()));
            Ok(true)
        })
        .unwrap();
    found
}

#[tokio::test]
async fn truncated_entries_do_not_come_back() {
    let _alone = ONE_SLED.lock().await;
    for store in STORES {
        let data = tempfile::tempdir().unwrap();
        let mut log = on_disk(store, data.path()).unwrap();
        append(&mut log, (0..10).map(|i| entry(1, i, 20_000)))
            .await
            .unwrap();
        log.truncate_after(Some(id(1, 5))).await.unwrap();
        append(&mut log, (6..8).map(|i| entry(2, i, 10))).await.unwrap();
        assert_eq!(indexes(&mut log).await, (0..8).collect::<Vec<_>>());
        close(log).await;

        let mut log = on_disk(store, data.path()).unwrap();
        let entries = log.try_get_log_entries(5..).await.unwrap();
        assert_eq!(entries, [entry(1, 5, 20_000), entry(2, 6, 10), entry(2, 7, 10)]);
        log.truncate_after(None).await.unwrap();
        assert_eq!(log.get_log_state().await.unwrap().last_log_id, None);
        close(log).await;
        let mut log = on_disk(store, data.path()).unwrap();
        assert!(indexes(&mut log).await.is_empty());
        close(log).await;
    }
}

/// sled cuts a damaged log at the damage and opens; without the watermark the node would come back with
/// fewer entries than it has acknowledged.
#[tokio::test]
async fn a_flipped_bit_in_the_file_never_loses_an_acknowledged_entry() {
    let _alone = ONE_SLED.lock().await;
    let data = tempfile::tempdir().unwrap();
    let mut log = on_disk(LogStore::Sled, data.path()).unwrap();
    log.save_vote(&Vote::new_committed(1, 1)).await.unwrap();
    for i in 0..60 {
        append(&mut log, [entry(1, i, 600)]).await.unwrap();
    }
    close(log).await;
    let whole = std::fs::read(data.path().join("log/db")).unwrap();
    let used = whole.iter().rposition(|byte| *byte != 0).unwrap();

    let mut refused = 0;
    let positions: BTreeSet<usize> = (0..48).map(|step| step * used / 48 + step).collect();
    for position in positions {
        let copy = tempfile::tempdir().unwrap();
        copy_folder(data.path(), copy.path());
        let mut damaged = whole.clone();
        damaged[position] ^= 0x10;
        std::fs::write(copy.path().join("log/db"), &damaged).unwrap();
        match on_disk(LogStore::Sled, copy.path()) {
            Ok(mut log) => {
                let entries = log.try_get_log_entries(..).await.unwrap();
                let expected: Vec<Entry> = (0..60).map(|i| entry(1, i, 600)).collect();
                assert_eq!(
                    entries, expected,
                    "byte {position} was flipped and something is gone"
                );
                assert_eq!(log.read_vote().await.unwrap(), Some(Vote::new_committed(1, 1)));
                close(log).await;
            }
            Err(error) => {
                assert!(
                    matches!(error, LogError::Damaged { .. }),
                    "byte {position}: {error}"
                );
                assert!(
                    error
                        .to_string()
                        .contains("rejoin as a learner under a new node id"),
                    "{error}"
                );
                refused += 1;
            }
        }
    }
    assert!(refused > 10, "only {refused} of the damages were noticed at all");
}

#[tokio::test]
async fn a_torn_file_never_loses_an_acknowledged_entry() {
    let _alone = ONE_SLED.lock().await;
    let data = tempfile::tempdir().unwrap();
    let mut log = on_disk(LogStore::Sled, data.path()).unwrap();
    for i in 0..60 {
        append(&mut log, [entry(1, i, 600)]).await.unwrap();
    }
    close(log).await;
    let whole = std::fs::read(data.path().join("log/db")).unwrap();
    let used = whole.iter().rposition(|byte| *byte != 0).unwrap();
    let mut refused = 0;
    for eighth in 1..8 {
        let copy = tempfile::tempdir().unwrap();
        copy_folder(data.path(), copy.path());
        std::fs::write(copy.path().join("log/db"), &whole[..used * eighth / 8]).unwrap();
        match on_disk(LogStore::Sled, copy.path()) {
            Ok(mut log) => {
                assert_eq!(
                    indexes(&mut log).await,
                    (0..60).collect::<Vec<_>>(),
                    "{eighth}/8 of the file"
                );
                close(log).await;
            }
            Err(LogError::Damaged { .. }) => refused += 1,
            Err(other) => panic!("{eighth}/8 of the file: {other}"),
        }
    }
    assert!(refused > 0);
}

/// A write that a crash cut short was never acknowledged: the node starts without it, and its remains do
/// not mix with the next record of that index.
#[tokio::test]
async fn an_incomplete_last_record_is_left_out() {
    let _alone = ONE_SLED.lock().await;
    let data = tempfile::tempdir().unwrap();
    let mut log = on_disk(LogStore::Sled, data.path()).unwrap();
    append(&mut log, (0..3).map(|i| entry(1, i, 10))).await.unwrap();
    close(log).await;
    {
        let database = ::sled::open(data.path().join("log")).unwrap();
        let records = database.open_tree("records").unwrap();
        for part in 0..3_u16 {
            let key = [&3_u64.to_be_bytes()[..], &part.to_be_bytes()].concat();
            let value = if part == 0 {
                vec![5, 0, 1, 2, 3]
            } else {
                vec![9; 100]
            };
            records.insert(key, value).unwrap();
        }
        database.flush().unwrap();
    }
    let mut log = on_disk(LogStore::Sled, data.path()).unwrap();
    assert_eq!(indexes(&mut log).await, [0, 1, 2]);
    append(&mut log, [entry(2, 3, 10)]).await.unwrap();
    close(log).await;
    let mut log = on_disk(LogStore::Sled, data.path()).unwrap();
    assert_eq!(log.try_get_log_entries(3..).await.unwrap(), [entry(2, 3, 10)]);
    close(log).await;
}

/// The same test binary, killed while it writes as fast as it can; meanwhile nobody else gets the folder.
#[tokio::test]
async fn a_killed_process_loses_nothing_that_it_acknowledged() {
    const CHILD: &str = "REGENT_TEST_KILLED_CHILD";
    const CHILDS_STORE: &str = "REGENT_TEST_KILLED_CHILD_STORE";
    /// A failed assertion must not leave a process that writes for ever.
    struct Killed(std::process::Child);
    impl Drop for Killed {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    if let Some(data) = std::env::var_os(CHILD) {
        let name = std::env::var(CHILDS_STORE).unwrap();
        let store = STORES.into_iter().find(|store| store.as_str() == name).unwrap();
        let mut log = on_disk(store, Path::new(&data)).unwrap();
        for index in 0.. {
            append(&mut log, [entry(1, index, 300)]).await.unwrap();
            println!("\nacknowledged {index}");
        }
    }
    let _alone = ONE_SLED.lock().await;
    for store in STORES {
        let data = tempfile::tempdir().unwrap();
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "log::tests::a_killed_process_loses_nothing_that_it_acknowledged",
                "--nocapture",
            ])
            .env(CHILD, data.path())
            .env(CHILDS_STORE, store.as_str())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut child = Killed(child);
        let mut acknowledged = BufReader::new(child.0.stdout.take().unwrap())
            .lines()
            .map_while(Result::ok)
            .filter_map(|line| line.strip_prefix("acknowledged ")?.parse::<u64>().ok());
        assert!(
            acknowledged.by_ref().any(|index| index >= 300),
            "the child writes"
        );

        let refused = on_disk(store, data.path())
            .err()
            .expect("the child has the folder");
        let pid = child.0.id().to_string();
        assert!(matches!(&refused, LogError::Folder(FolderError::InUse { pid: Some(p), .. }) if *p == pid));

        drop(child);
        let last = acknowledged.last().unwrap_or(300);
        let mut log = on_disk(store, data.path()).unwrap();
        let entries = log.try_get_log_entries(0..=last).await.unwrap();
        assert_eq!(entries.len() as u64, last + 1);
        assert!(
            entries
                .iter()
                .zip(0..)
                .all(|(found, index)| *found == entry(1, index, 300))
        );
        close(log).await;
    }
}

#[tokio::test]
async fn a_damaged_record_is_refused_by_its_index() {
    for bit in [0, 13, 100, 300] {
        let disk = MemoryDisk::default();
        let mut log = Log::open(disk.engine()).unwrap();
        append(&mut log, (0..9).map(|i| entry(1, i, 50))).await.unwrap();
        close(log).await;
        disk.flip_bit(4, bit);
        let refused = Log::open(disk.engine()).err().expect("a flipped bit is refused");
        assert!(refused.to_string().contains("the record of index 4"), "{refused}");
    }
}

#[tokio::test]
async fn holes_and_a_lost_end_are_refused() {
    for (lost, says) in [
        (3..5, "index 3 is missing"),
        (0..2, "index 0 is missing"),
        (6..9, "acknowledged up to"),
    ] {
        let disk = MemoryDisk::default();
        let mut log = Log::open(disk.engine()).unwrap();
        append(&mut log, (0..9).map(|i| entry(1, i, 50))).await.unwrap();
        close(log).await;
        disk.lose(lost);
        let refused = Log::open(disk.engine()).err().expect("a hole is refused");
        assert!(refused.to_string().contains(says), "{refused}");
    }
}

#[tokio::test]
async fn the_first_error_stops_everything_and_tells_the_node() {
    let disk = MemoryDisk::default();
    let mut log = Log::open(disk.engine()).unwrap();
    append(&mut log, [entry(1, 0, 5)]).await.unwrap();
    let mut failed = log.failed();
    disk.set_failing(true);
    assert!(append(&mut log, [entry(1, 1, 5)]).await.is_err());
    failed.wait_for(Option::is_some).await.unwrap();

    // The disk works again, but nobody knows what it holds: never write, never sync again.
    disk.set_failing(false);
    assert!(log.save_vote(&Vote::new(9, 1)).await.is_err());
    assert!(append(&mut log, [entry(1, 2, 5)]).await.is_err());
    assert!(log.put_metadata("x", b"y").await.is_err());
    close(log).await;

    disk.crash();
    let mut log = Log::open(disk.engine()).unwrap();
    assert_eq!(indexes(&mut log).await, [0]);
    assert_eq!(log.read_vote().await.unwrap(), None);
}

#[tokio::test]
async fn a_vote_survives_a_crash() {
    let disk = MemoryDisk::default();
    let mut log = Log::open(disk.engine()).unwrap();
    log.save_vote(&Vote::new(7, 2)).await.unwrap();
    disk.crash();
    let mut log = Log::open(disk.engine()).unwrap();
    assert_eq!(log.read_vote().await.unwrap(), Some(Vote::new(7, 2)));
}

#[tokio::test]
async fn old_entries_are_read_from_the_engine_and_batches_are_capped() {
    let disk = MemoryDisk::default();
    let mut log = Log::open(disk.engine()).unwrap();
    let len = 64 * 1024;
    // More than the tail keeps in memory.
    for batch in 0..16 {
        append(&mut log, (batch * 50..batch * 50 + 50).map(|i| entry(1, i, len)))
            .await
            .unwrap();
    }
    let batch = log.limited_get_log_entries(0, 800).await.unwrap();
    assert!(
        batch.len() > 20 && batch.len() < 40,
        "{} entries of 64 KiB",
        batch.len()
    );
    assert_eq!(batch[0], entry(1, 0, len));
    let streamed: Vec<Entry> = log.entries_stream(0..800).await.try_collect().await.unwrap();
    assert_eq!(streamed.len(), 800);
    assert!(streamed.iter().zip(0..).all(|(e, i)| *e == entry(1, i, len)));
    assert_eq!(log.try_get_log_entries(10..790).await.unwrap().len(), 780);

    log.purge(id(1, 699)).await.unwrap();
    let left = log.try_get_log_entries(0..).await.unwrap();
    assert_eq!((left[0].log_id.index, left.len()), (700, 100));
}

#[tokio::test]
async fn a_purge_past_the_end_moves_the_end() {
    let _alone = ONE_SLED.lock().await;
    let data = STORES.map(|_| tempfile::tempdir().unwrap());
    let memory = MemoryDisk::default();
    let engines = || {
        let disks = STORES.iter().zip(&data);
        let disks = disks.map(|(store, data)| engine_on_disk(*store, data.path()).unwrap());
        disks.chain([memory.engine()])
    };
    for engine in engines() {
        let mut log = Log::open(engine).unwrap();
        append(&mut log, (0..5).map(|i| entry(1, i, 5))).await.unwrap();
        log.purge(id(3, 100)).await.unwrap();
        append(&mut log, [entry(3, 101, 5)]).await.unwrap();
        close(log).await;
    }
    memory.crash();
    for engine in engines() {
        let mut log = Log::open(engine).unwrap();
        assert_eq!(log.purged(), Some(id(3, 100)));
        assert_eq!(indexes(&mut log).await, [101]);
        close(log).await;
    }
}

fn copy_folder(from: &Path, to: &Path) {
    for item in std::fs::read_dir(from).unwrap() {
        let item = item.unwrap();
        let target = to.join(item.file_name());
        if item.file_type().unwrap().is_dir() {
            std::fs::create_dir(&target).unwrap();
            copy_folder(&item.path(), &target);
        } else {
            std::fs::copy(item.path(), &target).unwrap();
        }
    }
}
