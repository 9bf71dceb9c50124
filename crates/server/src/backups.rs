//! Backups on a schedule, into a folder.
//!
//! Every node that was given a folder makes them: one that only the leader kept would be lost with its machine. What is
//! there says what is due, by the names of the files: so a restart makes none too early, and nodes that share a folder
//! make one between them. What fails is tried again soon, logged, and counted.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use regent_raft::Backup;
use tokio_util::sync::CancellationToken;

use crate::options::{BackupSchedule, millis};
use crate::service::{Service, wall_now};

/// How often the folder is looked at; a backup is at most so much late.
const LOOK_EVERY: Duration = Duration::from_mins(1);
/// Extension of a backup.
const BACKUP: &str = "backup";
/// Extension of one that is being written.
const PART: &str = "part";

/// Runs until `stop`.
pub(crate) async fn run(service: Service, stop: CancellationToken) {
    let Some(schedule) = service.options().backups.clone() else {
        return;
    };
    let look_every = LOOK_EVERY.min(schedule.every);
    let mut looked = false;
    loop {
        if service.is_ready().is_ok() {
            // Where nodes share a folder, the others leave it to the leader for one look.
            let leads = service.node().leadership().borrow().mine.is_some();
            let grace = if leads { Duration::ZERO } else { look_every };
            let waits = !leads && !std::mem::replace(&mut looked, true);
            let looked = tokio::select! {
                () = stop.cancelled() => return,
                looked = look(&service, &schedule, grace, waits, &stop) => looked,
            };
            match looked {
                Ok(Look::NotDue) => {}
                Ok(Look::Made(path)) => {
                    metrics::counter!("regent_backups_total", "outcome" => "done").increment(1);
                    tracing::info!(path = %path.display(), "a backup is made");
                }
                Err(error) => {
                    metrics::counter!("regent_backups_total", "outcome" => "failed").increment(1);
                    tracing::error!(folder = %schedule.folder.display(), error, "a backup could not be made");
                }
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(look_every) => {}
        }
    }
}

enum Look {
    NotDue,
    Made(PathBuf),
}

/// Makes a backup if one is due, and forgets those that are too many.
async fn look(
    service: &Service,
    schedule: &BackupSchedule,
    grace: Duration,
    waits_for_the_first: bool,
    stop: &CancellationToken,
) -> Result<Look, String> {
    let view = service.node().view();
    let Some(cluster) = view.state.cluster_id().map(ToString::to_string) else {
        return Ok(Look::NotDue);
    };
    let now = wall_now().millis();
    let (folder, keep) = (schedule.folder.clone(), schedule.keep);
    let newest = {
        let (folder, cluster) = (folder.clone(), cluster.clone());
        blocking(move || Ok(list(&folder, &cluster)?.last().map(|found| found.at))).await?
    };
    if let Some(newest) = newest {
        #[expect(clippy::cast_precision_loss, reason = "seconds since 1970 are far below 2^53")]
        metrics::gauge!("regent_backup_last_success_timestamp_seconds").set((newest / 1_000) as f64);
        // One that is of the future was made before the clock was corrected.
        if newest <= now && now - newest < millis(schedule.every + grace) {
            return Ok(Look::NotDue);
        }
    } else if waits_for_the_first {
        return Ok(Look::NotDue);
    }
    let view = service.read().await.map_err(|error| error.to_string())?;
    let backup = view.backup();
    let node = service.id();
    let stop = stop.clone();
    let made = blocking(move || {
        let name = format!("regent-{cluster}-{now:013}-{:016}", backup.revision().0);
        let path = write(&folder, &name, &format!("node-{node}"), &backup, stop)?;
        let all = list(&folder, &cluster)?;
        for old in all.iter().rev().skip(keep) {
            match fs::remove_file(&old.path) {
                // Another node that shares the folder was first.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
        }
        Ok(path)
    });
    Ok(Look::Made(made.await?))
}

async fn blocking<T: Send + 'static>(
    act: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, String> {
    match tokio::task::spawn_blocking(act).await {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

struct Found {
    path: PathBuf,
    /// When it was made, by its name.
    at: u64,
}

/// The backups of a cluster, oldest first: their names sort by time.
fn list(folder: &Path, cluster: &str) -> io::Result<Vec<Found>> {
    let items = match fs::read_dir(folder) {
        Ok(items) => items,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for item in items {
        let path = item?.path();
        let at = path.file_name().and_then(|name| {
            let name = name.to_str()?.strip_suffix(BACKUP)?.strip_suffix('.')?;
            let rest = name
                .strip_prefix("regent-")?
                .strip_prefix(cluster)?
                .strip_prefix('-')?;
            let (at, revision) = rest.split_once('-')?;
            revision.parse::<u64>().ok()?;
            at.parse().ok()
        });
        if let Some(at) = at {
            found.push(Found { path, at });
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// Written aside, synced, named; readable by its owner only, for it holds password hashes.
fn write(
    folder: &Path,
    name: &str,
    writer: &str,
    backup: &Backup,
    stop: CancellationToken,
) -> io::Result<PathBuf> {
    fs::create_dir_all(folder)?;
    // Of this node alone, so that what a crash left goes away the next time.
    let part = folder.join(format!("regent-{writer}.{PART}"));
    match fs::remove_file(&part) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&part)?;
    let mut output = BufWriter::with_capacity(1 << 20, UntilStop { file, stop });
    let written = backup.write_to(&mut output).and_then(|()| output.flush());
    let synced = written.and_then(|()| output.get_ref().file.sync_all());
    let named = synced.and_then(|()| {
        let path = folder.join(format!("{name}.{BACKUP}"));
        fs::rename(&part, &path)?;
        File::open(folder)?.sync_all()?;
        Ok(path)
    });
    if named.is_err() {
        // Room for the next one, on a disk that may be full.
        let _ = fs::remove_file(&part);
    }
    named
}

/// A file that takes nothing more once the node is to stop, so that a large backup does not hold it.
struct UntilStop {
    file: File,
    stop: CancellationToken,
}

impl Write for UntilStop {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.stop.is_cancelled() {
            return Err(io::Error::other("the node is stopping"));
        }
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_clusters_own_backups_are_counted_and_they_sort_by_time() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "regent-aa-0000000000300-0000000000000009.backup",
            "regent-aa-0000000000200-0001099511627777.backup",
            "regent-aab-0000000000100-0000000000000001.backup",
            "regent-aa-0000000000100-0000000000000001.backup.bak",
            "regent-aa-x-1.backup",
            "regent-node-1.part",
            "notes.txt",
        ] {
            fs::write(folder.path().join(name), b"").unwrap();
        }
        let found = list(folder.path(), "aa").unwrap();
        assert_eq!(found.iter().map(|found| found.at).collect::<Vec<_>>(), [200, 300]);
        assert!(list(&folder.path().join("absent"), "aa").unwrap().is_empty());
    }
}
