//! The in-memory twin of the sled engine: it forgets in a crash what was not synced.
//!
//! The disk outlives the node that uses it, so a test can crash a node and start it again on what was
//! durable. It also fails on demand, which a real disk does not.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{Engine, LogError, Promise, Visit};

/// A simulated disk for one node's log. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct MemoryDisk(Arc<Mutex<Disk>>);

#[derive(Debug, Default)]
struct Disk {
    /// What reads see.
    volatile: Image,
    /// What a crash leaves.
    durable: Image,
    /// The writes that `durable` still lacks, in order.
    unsynced: Vec<Write>,
    promise: Option<Promise>,
    /// Raised by a crash, so that a node that was not stopped cannot write into its successor's disk.
    generation: u64,
    failing: bool,
    sync_takes: Duration,
}

#[derive(Clone, Debug, Default)]
struct Image {
    records: BTreeMap<u64, Vec<u8>>,
    values: BTreeMap<String, Vec<u8>>,
}

#[derive(Debug)]
enum Write {
    Insert(u64, Vec<u8>),
    Remove(u64),
    Put(String, Vec<u8>),
}

impl Image {
    fn apply(&mut self, write: Write) {
        match write {
            Write::Insert(index, record) => {
                self.records.insert(index, record);
            }
            Write::Remove(index) => {
                self.records.remove(&index);
            }
            Write::Put(name, value) => {
                self.values.insert(name, value);
            }
        }
    }
}

impl MemoryDisk {
    /// Loses everything that was not synced. Engines opened before it fail from now on.
    pub fn crash(&self) {
        self.crash_keeping(|_| 0);
    }

    /// The same, but the first of the writes that were not synced had reached the disk by themselves: as many as
    /// `kept` chooses of so many that there are.
    pub fn crash_keeping(&self, kept: impl FnOnce(usize) -> usize) {
        let mut disk = self.lock();
        let unsynced = std::mem::take(&mut disk.unsynced);
        let kept = kept(unsynced.len());
        for write in unsynced.into_iter().take(kept) {
            disk.durable.apply(write);
        }
        disk.volatile = disk.durable.clone();
        disk.generation += 1;
    }

    /// Makes every write and sync fail from now on, or work again.
    pub fn set_failing(&self, failing: bool) {
        self.lock().failing = failing;
    }

    /// How long a sync takes from now on.
    pub fn set_sync_takes(&self, time: Duration) {
        self.lock().sync_takes = time;
    }

    /// Passes the time that a sync takes.
    pub(super) async fn take_time(&self) {
        let time = self.lock().sync_takes;
        if !time.is_zero() {
            tokio::time::sleep(time).await;
        }
    }

    /// Flips one bit of the durable record of `index`, counted from its first byte.
    #[cfg(test)]
    pub(super) fn flip_bit(&self, index: u64, bit: usize) {
        let mut disk = self.lock();
        let record = disk.durable.records.get_mut(&index).expect("the record exists");
        record[bit / 8] ^= 1 << (bit % 8);
        disk.volatile = disk.durable.clone();
    }

    /// Removes durable records, as no engine should.
    #[cfg(test)]
    pub(super) fn lose(&self, indexes: Range<u64>) {
        let mut disk = self.lock();
        disk.durable.records.retain(|index, _| !indexes.contains(index));
        disk.volatile = disk.durable.clone();
    }

    /// An engine on this disk.
    pub(crate) fn engine(&self) -> Arc<dyn Engine> {
        let generation = self.lock().generation;
        Arc::new(MemoryEngine {
            disk: self.clone(),
            generation,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Disk> {
        // Every change under the lock is complete or absent, so a panic elsewhere leaves it usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct MemoryEngine {
    disk: MemoryDisk,
    generation: u64,
}

impl MemoryEngine {
    fn writable(&self) -> Result<MutexGuard<'_, Disk>, LogError> {
        let disk = self.disk.lock();
        if disk.failing {
            return Err(LogError::Poisoned("the simulated disk fails".to_owned()));
        }
        if disk.generation != self.generation {
            return Err(LogError::Poisoned(
                "the simulated disk crashed under this engine".to_owned(),
            ));
        }
        Ok(disk)
    }

    fn write(&self, write: Write) -> Result<(), LogError> {
        let mut disk = self.writable()?;
        let again = match &write {
            Write::Insert(index, record) => Write::Insert(*index, record.clone()),
            Write::Remove(index) => Write::Remove(*index),
            Write::Put(name, value) => Write::Put(name.clone(), value.clone()),
        };
        disk.volatile.apply(again);
        disk.unsynced.push(write);
        Ok(())
    }
}

impl Engine for MemoryEngine {
    fn append(&self, first: u64, records: &[Vec<u8>]) -> Result<(), LogError> {
        (first..)
            .zip(records)
            .try_for_each(|(index, record)| self.write(Write::Insert(index, record.clone())))
    }

    fn remove(&self, index: u64) -> Result<(), LogError> {
        self.write(Write::Remove(index))
    }

    fn purge(&self, below: u64, at_most: usize) -> Result<bool, LogError> {
        let found: Vec<u64> = self
            .disk
            .lock()
            .volatile
            .records
            .range(..below)
            .take(at_most)
            .map(|(index, _)| *index)
            .collect();
        for index in &found {
            self.remove(*index)?;
        }
        Ok(found.len() == at_most)
    }

    fn scan(&self, range: Range<u64>, visit: &mut Visit<'_>) -> Result<(), LogError> {
        if range.is_empty() {
            return Ok(());
        }
        let found: Vec<(u64, Vec<u8>)> = self
            .disk
            .lock()
            .volatile
            .records
            .range(range)
            .map(|(index, r)| (*index, r.clone()))
            .collect();
        for (index, record) in found {
            if !visit(index, &record)? {
                break;
            }
        }
        Ok(())
    }

    fn put(&self, name: &str, value: &[u8]) -> Result<(), LogError> {
        self.write(Write::Put(name.to_owned(), value.to_vec()))
    }

    fn get(&self, name: &str) -> Result<Option<Vec<u8>>, LogError> {
        Ok(self.disk.lock().volatile.values.get(name).cloned())
    }

    fn sync(&self, promise: &Promise) -> Result<(), LogError> {
        let mut disk = self.writable()?;
        for write in std::mem::take(&mut disk.unsynced) {
            disk.durable.apply(write);
        }
        disk.promise = Some(*promise);
        Ok(())
    }

    fn lower(&self, promise: &Promise) -> Result<(), LogError> {
        self.writable()?.promise = Some(*promise);
        Ok(())
    }

    fn promised(&self) -> Result<Option<Promise>, LogError> {
        Ok(self.disk.lock().promise)
    }

    fn place(&self) -> String {
        "memory".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(engine: &dyn Engine) -> Vec<u64> {
        let mut found = Vec::new();
        engine
            .scan(0..u64::MAX, &mut |index, _| {
                found.push(index);
                Ok(true)
            })
            .unwrap();
        found
    }

    #[test]
    fn a_crash_loses_exactly_the_unsynced() {
        let disk = MemoryDisk::default();
        let engine = disk.engine();
        engine.append(1, &[b"a".to_vec(), b"b".to_vec()]).unwrap();
        engine.put("x", b"old").unwrap();
        engine.sync(&Promise::default()).unwrap();
        engine.append(3, &[b"c".to_vec()]).unwrap();
        engine.remove(1).unwrap();
        engine.put("x", b"new").unwrap();
        assert_eq!(records(&*engine), [2, 3]);

        disk.crash();
        let after = disk.engine();
        assert_eq!(records(&*after), [1, 2]);
        assert_eq!(after.get("x").unwrap().unwrap(), b"old");
        assert!(
            engine.append(4, &[b"d".to_vec()]).is_err(),
            "an engine from before the crash writes no more"
        );
    }
}
