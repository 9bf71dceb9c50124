//! Everything that happened, as one number.
//!
//! Two runs of a seed are the same run if their traces are: every delivery of the network with all its bytes, every
//! answer that a client got, every trouble. With a file the lines are kept too, to find where two runs part.

use std::fmt;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use xxhash_rust::xxh3::Xxh3;

/// The trace of one run; clones share it.
#[derive(Clone, Default)]
pub struct Trace(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    hash: Xxh3,
    lines: u64,
    kept: Option<Box<dyn Write + Send>>,
}

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trace").finish_non_exhaustive()
    }
}

impl Trace {
    /// One whose lines are written to `kept` as well.
    pub fn kept(kept: Option<Box<dyn Write + Send>>) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            kept,
            ..Inner::default()
        })))
    }

    /// Notes what happened at `now`, in milliseconds of the simulation.
    pub fn note(&self, now: u64, what: fmt::Arguments<'_>) {
        let line = format!("{now} {what}\n");
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.hash.update(line.as_bytes());
        inner.lines += 1;
        if let Some(kept) = &mut inner.kept {
            // Only for people who look for a difference; a full disk must not change the run.
            let _ = kept.write_all(line.as_bytes());
        }
    }

    /// The number, and how many lines it is of.
    pub fn sum(&self) -> (u64, u64) {
        let inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (inner.hash.digest(), inner.lines)
    }
}
