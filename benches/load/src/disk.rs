//! The file system that the data folders are on, and how often a second it syncs 4 KiB: the speed limit of
//! everything that is durable, which differs from machine to machine.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rustix::fs::fdatasync;
use serde::Serialize;

/// Bytes of each write.
const BLOCK: usize = 4096;
/// Blocks of the file that is overwritten in place.
const BLOCKS: u64 = 1024;

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Disk {
    /// Such as `ext4`.
    pub(crate) file_system: String,
    /// 4 KiB appended and synced, a second.
    pub(crate) appends: f64,
    /// 4 KiB overwritten in place and synced, a second.
    pub(crate) overwrites: f64,
}

impl Disk {
    /// Of a folder; takes twice `each`. Blocks.
    pub(crate) fn measure(folder: &Path, each: Duration) -> anyhow::Result<Self> {
        let file_system = file_system(folder)?;
        ensure!(
            !matches!(file_system.as_str(), "tmpfs" | "ramfs"),
            "{} is in memory ({file_system}): nothing is durable there; choose another with --data",
            folder.display()
        );
        let block = [0x5a; BLOCK];
        let mut file = tempfile::tempfile_in(folder).context("a file to sync")?;
        let appends = rate(each, || {
            file.write_all(&block)?;
            Ok(fdatasync(&file)?)
        })?;
        let file: File = tempfile::tempfile_in(folder)?;
        for n in 0..BLOCKS {
            file.write_all_at(&block, n * BLOCK as u64)?;
        }
        file.sync_all()?;
        let mut n = 0;
        let overwrites = rate(each, || {
            file.write_all_at(&block, n % BLOCKS * BLOCK as u64)?;
            n += 1;
            Ok(fdatasync(&file)?)
        })?;
        Ok(Self {
            file_system,
            appends,
            overwrites,
        })
    }
}

fn rate(time: Duration, mut once: impl FnMut() -> std::io::Result<()>) -> anyhow::Result<f64> {
    let begin = Instant::now();
    let mut count = 0_u64;
    while begin.elapsed() < time {
        once()?;
        count += 1;
    }
    Ok(count as f64 / begin.elapsed().as_secs_f64())
}

/// The type of the file system, from the longest mount point that the folder is under.
fn file_system(folder: &Path) -> anyhow::Result<String> {
    let folder = folder.canonicalize()?;
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("/proc/self/mounts")?;
    let fields = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        Some((fields.next()?, fields.next()?))
    });
    let under = fields.filter(|(point, _)| folder.starts_with(point.replace("\\040", " ")));
    // Of two that are mounted at the same point, the later one is seen.
    let found = under
        .max_by_key(|(point, _)| point.len())
        .context("no mount point")?;
    Ok(found.1.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_is_proc() {
        assert_eq!(file_system(Path::new("/proc/self/fd")).unwrap(), "proc");
    }
}
