//! The snapshot folder: writes, keeps, finds.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use regent_state::State;
use tracing::{error, info, warn};

use super::file::PartFile;
use super::{SnapshotError, SnapshotFile, format};
use crate::config::{LogId, SnapshotMeta};
use crate::offload::Offload;

/// Snapshots that are kept: the newest, and one to fall back to when it turns out damaged.
const KEPT: usize = 2;
/// Extension of complete snapshots.
const SNAPSHOT: &str = "snapshot";
/// Extension of snapshots that were found damaged; kept for people to look at.
const DAMAGED: &str = "damaged";
/// Extension of files that are being written or received.
pub(super) const PART: &str = "part";
/// Buffer of the sequential reader and writer: some frames.
pub(super) const BUFFER: usize = 1024 * 1024;

/// The snapshot folder of a data folder.
pub(super) fn folder(data: &Path) -> PathBuf {
    data.join("snapshots")
}

/// A handle to the snapshot folder; clones share it. Everything here blocks.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotStore(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    /// The newest complete snapshot. The lock also makes one commit at a time.
    current: Mutex<Option<(SnapshotMeta, SnapshotFile)>>,
    parts: AtomicU64,
    offload: Offload,
}

/// A snapshot that was read and checked.
#[derive(Debug)]
pub(crate) struct Restored {
    /// What it covers.
    pub(crate) meta: SnapshotMeta,
    /// The state.
    pub(crate) state: State,
}

impl SnapshotStore {
    /// Opens the folder, reads the newest usable snapshot, and removes what an earlier run left unfinished.
    ///
    /// A damaged newest snapshot is passed over only if an older one and the log together still reach the
    /// present: `purged` is the last entry that the log has forgotten.
    pub(crate) fn open(
        data: &Path,
        purged: Option<LogId>,
        offload: Offload,
    ) -> Result<(Self, Option<Restored>), SnapshotError> {
        let folder = folder(data);
        fs::create_dir_all(&folder).map_err(failed(&folder, "cannot create the snapshot folder"))?;
        let store = Self(Arc::new(Inner {
            folder,
            current: Mutex::new(None),
            parts: AtomicU64::new(0),
            offload,
        }));
        for part in store.list(PART)? {
            fs::remove_file(&part).map_err(failed(&part, "cannot remove an unfinished snapshot"))?;
        }
        let mut refused = Vec::new();
        let mut damaged = Vec::new();
        for path in store.list(SNAPSHOT)?.into_iter().rev() {
            match load(&path) {
                Ok((header, state)) => {
                    if header.last < purged {
                        let index = header.last.map_or(0, |last| last.index);
                        refused.push(format!("the snapshot {} ends at index {index}", path.display()));
                        break; // older ones end earlier still
                    }
                    let meta = header.meta();
                    info!(path = %path.display(), last = ?meta.last_log_id, "state restored from a snapshot");
                    *store.current() = Some((meta.clone(), SnapshotFile::stored(path, offload)));
                    store.set_aside(&damaged)?;
                    return Ok((store, Some(Restored { meta, state })));
                }
                Err(error) => {
                    warn!(%error, "a snapshot cannot be used, trying an older one");
                    refused.push(error.to_string());
                    damaged.push(path);
                }
            }
        }
        match purged {
            None if refused.is_empty() => Ok((store, None)),
            None => {
                warn!("no snapshot can be used, but the log is whole and is replayed from its beginning");
                store.set_aside(&damaged)?;
                Ok((store, None))
            }
            Some(purged) => {
                let found = if refused.is_empty() {
                    "there is no snapshot".to_owned()
                } else {
                    refused.join(", and ")
                };
                Err(SnapshotError::Unreachable {
                    purged: purged.index,
                    found,
                    folder: store.0.folder.clone(),
                })
            }
        }
    }

    /// Takes damaged snapshots out of the way, so that they do not count as the newest ones.
    fn set_aside(&self, damaged: &[PathBuf]) -> Result<(), SnapshotError> {
        for path in damaged {
            fs::rename(path, path.with_extension(DAMAGED))
                .map_err(failed(path, "cannot set the damaged snapshot aside"))?;
        }
        self.sync_folder()
    }

    /// The newest snapshot.
    pub(crate) fn newest(&self) -> Option<(SnapshotMeta, SnapshotFile)> {
        self.current().clone()
    }

    /// Sets the newest snapshot aside if it was found damaged when it was to be sent, and says whether it was. Another
    /// one must be written then, or nobody who needs one gets any.
    pub(crate) fn drop_spoiled(&self) -> Result<bool, SnapshotError> {
        let spoiled = self.current().take_if(|(_, file)| file.is_spoiled());
        let Some((_, file)) = spoiled else {
            return Ok(false);
        };
        error!(path = %file.path().display(), "a snapshot is damaged, it is set aside and a new one is written");
        self.set_aside(&[file.path().to_owned()])?;
        Ok(true)
    }

    /// Writes a snapshot of `state`; it is complete, named and durable on return.
    pub(crate) fn write(&self, state: &State, meta: &SnapshotMeta) -> Result<SnapshotFile, SnapshotError> {
        let number = self.0.parts.fetch_add(1, Ordering::Relaxed);
        let path = self.0.folder.join(format!("written-{number}.{PART}"));
        let part = PartFile(path.clone());
        let file = File::create(&path).map_err(failed(&path, "cannot create the snapshot"))?;
        let mut output = BufWriter::with_capacity(BUFFER, file);
        format::write(&mut output, state, meta).map_err(failed(&path, "cannot write the snapshot"))?;
        let file = output
            .into_inner()
            .map_err(|error| failed(&path, "cannot write the snapshot")(error.into_error()))?;
        file.sync_all()
            .map_err(failed(&path, "cannot sync the snapshot"))?;
        self.commit(&part.0, meta)
    }

    /// Checks a snapshot that openraft wants installed and makes it this store's newest; durable on return.
    pub(crate) fn install(
        &self,
        meta: &SnapshotMeta,
        file: &SnapshotFile,
    ) -> Result<Restored, SnapshotError> {
        let path = file.path();
        let (header, state) = file.content()?;
        let found = header.meta();
        if found != *meta {
            let what = format!("it covers {found}, but was announced to cover {meta}");
            return Err(SnapshotError::Damaged {
                path: path.to_owned(),
                what,
            });
        }
        if file.is_part() {
            self.commit(path, meta)?;
        } else if path.parent() != Some(&self.0.folder) {
            // Another store's file (two machines in one test process): take a copy, not the file.
            self.write(&state, meta)?;
        }
        Ok(Restored { meta: found, state })
    }

    /// Names a synced part file, syncs the folder and forgets what is too old.
    fn commit(&self, part: &Path, meta: &SnapshotMeta) -> Result<SnapshotFile, SnapshotError> {
        let mut current = self.current();
        let path = self.0.folder.join(name(meta.last_log_id));
        fs::rename(part, &path).map_err(failed(&path, "cannot name the snapshot"))?;
        self.sync_folder()?;
        let file = SnapshotFile::stored(path, self.0.offload);
        if current
            .as_ref()
            .is_none_or(|(newest, _)| newest.last_log_id <= meta.last_log_id)
        {
            *current = Some((meta.clone(), file.clone()));
        }
        let all = self.list(SNAPSHOT)?;
        for old in all.iter().rev().skip(KEPT) {
            fs::remove_file(old).map_err(failed(old, "cannot remove an old snapshot"))?;
        }
        Ok(file)
    }

    fn sync_folder(&self) -> Result<(), SnapshotError> {
        let folder = &self.0.folder;
        File::open(folder)
            .and_then(|handle| handle.sync_all())
            .map_err(failed(folder, "cannot sync the snapshot folder"))
    }

    /// The files with this extension, oldest first: their names sort as their indexes do.
    fn list(&self, extension: &str) -> Result<Vec<PathBuf>, SnapshotError> {
        let folder = &self.0.folder;
        let mut found = Vec::new();
        for item in fs::read_dir(folder).map_err(failed(folder, "cannot list the snapshot folder"))? {
            let path = item
                .map_err(failed(folder, "cannot list the snapshot folder"))?
                .path();
            if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
        found.sort();
        Ok(found)
    }

    fn current(&self) -> MutexGuard<'_, Option<(SnapshotMeta, SnapshotFile)>> {
        // The value is replaced as a whole, so a panic elsewhere leaves it usable.
        self.0.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads and checks a snapshot.
pub(super) fn load(path: &Path) -> Result<(format::Header, State), SnapshotError> {
    let file = File::open(path).map_err(failed(path, "cannot open the snapshot"))?;
    format::read(path, &mut BufReader::with_capacity(BUFFER, file))
}

/// The file's name; names sort as log ids do.
fn name(last: Option<LogId>) -> String {
    let (next, term, node) = last.map_or((0, 0, 0), |last| {
        (
            last.index.saturating_add(1),
            last.leader_id.term,
            last.leader_id.node_id,
        )
    });
    format!("{next:020}-{term:020}-{node:020}.{SNAPSHOT}")
}

fn failed(path: &Path, what: &'static str) -> impl FnOnce(std::io::Error) -> SnapshotError {
    move |source| SnapshotError::Io {
        path: path.to_owned(),
        what,
        source,
    }
}
