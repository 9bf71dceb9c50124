//! Files that only their owner may read, and what is random in them.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use anyhow::Context as _;
use rand::RngExt as _;
use rand::distr::Alphanumeric;

use crate::config::UsageError;

/// Characters of a generated secret: 43 of 62 are 256 bits.
const LEN: usize = 43;

/// A secret that cannot be guessed.
pub(crate) fn random(prefix: &str) -> String {
    let random: String = rand::rng()
        .sample_iter(Alphanumeric)
        .take(LEN)
        .map(char::from)
        .collect();
    format!("{prefix}{random}")
}

/// Writes a file that only its owner may read, whole or not at all.
pub(crate) fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    write_as(path, text, 0o600)
}

/// Writes a file that everybody may read, whole or not at all.
pub(crate) fn write_public(path: &Path, text: &str) -> anyhow::Result<()> {
    write_as(path, text, 0o644)
}

/// Refuses a folder that others may enter. One that is not there yet is made by who uses it.
pub(crate) fn check_folder(path: &Path) -> Result<(), UsageError> {
    let Ok(metadata) = fs::metadata(path) else {
        return Ok(());
    };
    let mode = metadata.permissions().mode() & 0o777;
    if regent_tls::owner_only(mode) {
        Ok(())
    } else {
        Err(UsageError(format!(
            "the data folder {} may be entered by others (mode {mode:03o}): run chmod 700 on it",
            path.display()
        )))
    }
}

/// Makes a folder that only its owner may enter, with those above it.
pub(crate) fn folder(path: &Path) -> anyhow::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("the folder {} cannot be made", path.display()))
}

fn write_as(path: &Path, text: &str, mode: u32) -> anyhow::Result<()> {
    let write = || {
        let mut aside = path.as_os_str().to_owned();
        aside.push(".new");
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(mode)
            .open(&aside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&aside, path)
    };
    write().with_context(|| format!("{} cannot be written", path.display()))
}
