//! A session's log: what its program writes, in at most two files of half the bound each.
//!
//! The shim copies it from a pipe, because nothing else can bound what a program writes without ending it.
//! When `log` has reached half of the bound it becomes `log.1`, in place of the older `log.1`, so the
//! newest half at least is always there. Invariant: writing never fails towards the program; a full
//! disk costs log lines, not the session.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;

/// The smallest bound: below it the file would be turned over for every chunk.
const MIN_BYTES: u64 = 64 * 1024;

/// The writing end.
#[derive(Debug)]
pub(crate) struct BoundedLog {
    path: PathBuf,
    half: u64,
    file: Option<File>,
    written: u64,
}

impl BoundedLog {
    /// Opens it, continuing what is there. `bytes` bounds both files together.
    pub(crate) fn open(path: PathBuf, bytes: u64) -> Self {
        let mut log = Self {
            path,
            half: bytes.max(MIN_BYTES) / 2,
            file: None,
            written: 0,
        };
        // Not fatal: it is tried again with the next chunk.
        let _ = log.reopen();
        log
    }

    /// Appends; what cannot be written is dropped.
    pub(crate) fn append(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(usize::try_from(self.half).unwrap_or(usize::MAX)) {
            if self.try_append(chunk).is_err() {
                self.file = None;
            }
        }
    }

    fn try_append(&mut self, chunk: &[u8]) -> io::Result<()> {
        if self.written + chunk.len() as u64 > self.half {
            self.file = None;
            fs::rename(&self.path, self.path.with_extension("1"))?;
        }
        if self.file.is_none() {
            self.reopen()?;
        }
        let file = self.file.as_mut().expect("opened above");
        file.write_all(chunk)?;
        self.written += chunk.len() as u64;
        Ok(())
    }

    fn reopen(&mut self) -> io::Result<()> {
        let file = OpenOptions::new().append(true).create(true).open(&self.path)?;
        self.written = file.metadata()?.len();
        self.file = Some(file);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_files_stay_within_the_bound_and_keep_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut log = BoundedLog::open(path.clone(), MIN_BYTES);
        for line in 0..20_000 {
            log.append(format!("line {line}\n").as_bytes());
            if line == 10_000 {
                log = BoundedLog::open(path.clone(), MIN_BYTES);
            }
        }
        let (new, old) = (
            fs::read_to_string(&path).unwrap(),
            fs::read_to_string(path.with_extension("1")).unwrap(),
        );
        assert!((new.len() + old.len()) as u64 <= MIN_BYTES);
        assert!(new.ends_with("line 19999\n"));
        assert!(
            old.len() as u64 > MIN_BYTES / 2 - 20,
            "turned over too early: {}",
            old.len()
        );
    }
}
