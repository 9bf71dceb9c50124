//! The watermark: a lower bound of what was promised, in a small file beside the database.
//!
//! When sled opens a database whose log has a damaged message, it takes that for the torn end of a crash,
//! cuts everything behind it and goes on. A node would come back with fewer entries, or an older vote, than
//! it has acknowledged, and nobody would know. So after each sync the writer notes here what is durable, and
//! on start the log is refused when it holds less.
//!
//! Writing is one `pwrite` without a sync: a killed process loses nothing of it, and after a loss of power
//! the mark is at worst older, which is still a lower bound. Lowering it, before a truncation, is synced.
//! Two slots are written in turn, so a torn write leaves the other one.

use std::fs::{File, OpenOptions};
use std::io;
use std::marker::PhantomData;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{LogError, Promise, record};

/// Distance of the two slots: a disk sector, so that one torn write cannot touch both.
pub(super) const SLOT: usize = 512;

/// The open watermark file. `T` is what the engine notes in it: the promise, or a little more.
#[derive(Debug)]
pub(super) struct Mark<T = Promise> {
    path: PathBuf,
    file: File,
    /// Number of the next write; its parity chooses the slot. Only the writer thread writes.
    sequence: AtomicU64,
    noted: PhantomData<fn(T)>,
}

impl<T: Serialize + DeserializeOwned> Mark<T> {
    /// Opens or creates the file and reads what was noted last.
    pub(super) fn open(path: &Path) -> Result<(Self, Option<T>), LogError> {
        let failed = |what| {
            move |source| LogError::File {
                path: path.to_owned(),
                what,
                source,
            }
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(failed("cannot open the watermark"))?;
        let mut newest: Option<(u64, T)> = None;
        let mut written = false;
        for slot in 0..2_usize {
            let mut bytes = [0; SLOT];
            let len = read_up_to(&file, &mut bytes, (slot * SLOT) as u64)
                .map_err(failed("cannot read the watermark"))?;
            written |= bytes[..len].iter().any(|byte| *byte != 0);
            if let Some(found) = decode(&bytes)
                && newest.as_ref().is_none_or(|(sequence, _)| *sequence < found.0)
            {
                newest = Some(found);
            }
        }
        if written && newest.is_none() {
            return Err(LogError::Damaged {
                place: path.display().to_string(),
                what: "neither copy of the watermark is readable".to_owned(),
            });
        }
        let sequence = newest.as_ref().map_or(0, |(sequence, _)| sequence + 1);
        let mark = Self {
            path: path.to_owned(),
            file,
            sequence: AtomicU64::new(sequence),
            noted: PhantomData,
        };
        Ok((mark, newest.map(|(_, noted)| noted)))
    }

    /// Notes something; durable against a killed process only.
    pub(super) fn write(&self, noted: &T) -> Result<(), LogError> {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let value = record::encode_value(&(sequence, noted));
        let mut bytes = Vec::with_capacity(2 + value.len());
        let len = u16::try_from(value.len()).expect("what is noted is far smaller than a slot");
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&value);
        assert!(bytes.len() <= SLOT, "what is noted fits its slot");
        let offset = (sequence % 2) * SLOT as u64;
        self.file
            .write_all_at(&bytes, offset)
            .map_err(|source| self.failed("cannot write the watermark", source))
    }

    /// Notes something and makes it durable.
    pub(super) fn write_durably(&self, noted: &T) -> Result<(), LogError> {
        self.write(noted)?;
        self.file
            .sync_data()
            .map_err(|source| self.failed("cannot sync the watermark", source))
    }

    fn failed(&self, what: &'static str, source: io::Error) -> LogError {
        LogError::File {
            path: self.path.clone(),
            what,
            source,
        }
    }
}

fn decode<T: DeserializeOwned>(slot: &[u8]) -> Option<(u64, T)> {
    let (len, rest) = slot.split_first_chunk()?;
    let value = rest.get(..usize::from(u16::from_le_bytes(*len)))?;
    // After the last number none could follow: nothing ever wrote it.
    record::decode_value(value)
        .ok()
        .filter(|(sequence, _)| *sequence < u64::MAX)
}

fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{LeaderId, LogId};

    fn promise(index: u64) -> Promise {
        Promise {
            last: Some(LogId {
                leader_id: LeaderId { term: 1, node_id: 1 },
                index,
            }),
            vote: None,
        }
    }

    #[test]
    fn a_slot_with_the_last_of_all_numbers_is_not_ours() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mark");
        let value = record::encode_value(&(u64::MAX, promise(1)));
        let len = u16::try_from(value.len()).unwrap();
        std::fs::write(&path, [&len.to_le_bytes()[..], &value].concat()).unwrap();
        assert!(matches!(
            Mark::<Promise>::open(&path),
            Err(LogError::Damaged { .. })
        ));
    }

    #[test]
    fn the_last_promise_survives_and_a_torn_write_leaves_the_one_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mark");
        let (mark, found) = Mark::<Promise>::open(&path).unwrap();
        assert_eq!(found, None);
        mark.write(&promise(1)).unwrap();
        mark.write(&promise(2)).unwrap();
        let (mark, found) = Mark::<Promise>::open(&path).unwrap();
        assert_eq!(found, Some(promise(2)));
        mark.write_durably(&promise(3)).unwrap();

        // The third write is in the first slot.
        mark.file.write_all_at(&[0xff], 9).unwrap();
        assert_eq!(Mark::<Promise>::open(&path).unwrap().1, Some(promise(2)));
        mark.file.write_all_at(&[0xff], 9 + SLOT as u64).unwrap();
        assert!(matches!(
            Mark::<Promise>::open(&path),
            Err(LogError::Damaged { .. })
        ));
    }
}
