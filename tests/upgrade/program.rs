//! Where the program of the commit named in `previous` is.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::lacks;

/// Builds it, once; `None` when it cannot be had and nobody demands it.
pub(crate) fn previous() -> Option<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/upgrade/build");
    let built = Command::new(script).output().unwrap();
    if lacks("previous", built.status.success()) {
        return None;
    }
    Some(PathBuf::from(String::from_utf8(built.stdout).unwrap().trim()))
}
