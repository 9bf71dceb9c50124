//! The folder of the segments and the names in it.
//!
//! ```text
//! 0000000007.seg     a segment; they follow each other without a gap, the highest is written to
//! 0000000003.spare   a segment that is no longer needed, to be written over
//! new                a segment that is being made
//! ```
//!
//! Every change of a name is made durable before anything builds on it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use super::LogError;

const SEGMENT: &str = "seg";
const SPARE: &str = "spare";
const NEW: &str = "new";

/// The open folder.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    handle: File,
}

/// What is in it, in ascending order.
#[derive(Debug, Default)]
pub(super) struct Listing {
    pub(super) segments: Vec<u32>,
    pub(super) spares: Vec<u32>,
}

impl Folder {
    /// Opens or creates it, durably.
    pub(super) fn open(path: PathBuf) -> Result<Self, LogError> {
        fs::create_dir_all(&path).map_err(failed(&path, "cannot create the folder of the raft log"))?;
        if let Some(parent) = path.parent() {
            File::open(parent)
                .and_then(|parent| parent.sync_all())
                .map_err(failed(parent, "cannot sync the folder"))?;
        }
        let handle = File::open(&path).map_err(failed(&path, "cannot open the folder of the raft log"))?;
        let folder = Self { path, handle };
        // A process that was killed may have changed a name and not synced it. From now on it counts.
        folder.sync()?;
        Ok(folder)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The path of a segment.
    pub(super) fn segment(&self, sequence: u32) -> PathBuf {
        self.named(sequence, SEGMENT)
    }

    fn named(&self, sequence: u32, kind: &str) -> PathBuf {
        self.path.join(format!("{sequence:010}.{kind}"))
    }

    /// Names what is there. Files of other names are left alone.
    pub(super) fn list(&self) -> Result<Listing, LogError> {
        let cannot = failed(&self.path, "cannot list the folder of the raft log");
        let mut listing = Listing::default();
        for item in fs::read_dir(&self.path).map_err(&cannot)? {
            let path = item.map_err(&cannot)?.path();
            let Some(sequence) = path.file_stem().and_then(|stem| stem.to_str()?.parse().ok()) else {
                continue;
            };
            if path == self.named(sequence, SEGMENT) {
                listing.segments.push(sequence);
            } else if path == self.named(sequence, SPARE) {
                listing.spares.push(sequence);
            }
        }
        listing.segments.sort_unstable();
        listing.spares.sort_unstable();
        Ok(listing)
    }

    /// Makes a file that is no segment yet, see [`Folder::finish`].
    pub(super) fn create(&self) -> Result<(PathBuf, File), LogError> {
        let path = self.path.join(NEW);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .map_err(failed(&path, "cannot create a segment of the raft log"))?;
        Ok((path, file))
    }

    /// Opens a spare file to be written over.
    pub(super) fn reuse(&self, spare: u32) -> Result<(PathBuf, File), LogError> {
        let path = self.named(spare, SPARE);
        let file = open(&path)?;
        Ok((path, file))
    }

    /// Opens a segment.
    pub(super) fn open_segment(&self, sequence: u32) -> Result<File, LogError> {
        open(&self.segment(sequence))
    }

    /// Gives a file that is written and synced the name of a segment.
    pub(super) fn finish(&self, path: &Path, sequence: u32) -> Result<(), LogError> {
        self.rename(path, &self.segment(sequence))
    }

    /// Makes a segment a spare file.
    pub(super) fn spare(&self, sequence: u32) -> Result<(), LogError> {
        self.rename(&self.segment(sequence), &self.named(sequence, SPARE))
    }

    /// Removes a segment.
    pub(super) fn remove(&self, sequence: u32) -> Result<(), LogError> {
        let path = self.segment(sequence);
        fs::remove_file(&path).map_err(failed(&path, "cannot remove a segment of the raft log"))?;
        self.sync()
    }

    /// Removes a spare file. Nothing depends on when that is durable.
    pub(super) fn remove_spare(&self, spare: u32) -> Result<(), LogError> {
        let path = self.named(spare, SPARE);
        fs::remove_file(&path).map_err(failed(&path, "cannot remove a spare file of the raft log"))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), LogError> {
        fs::rename(from, to).map_err(failed(from, "cannot rename a segment of the raft log"))?;
        self.sync()
    }

    fn sync(&self) -> Result<(), LogError> {
        self.handle
            .sync_all()
            .map_err(failed(&self.path, "cannot sync the folder of the raft log"))
    }
}

fn open(path: &Path) -> Result<File, LogError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(failed(path, "cannot open a segment of the raft log"))
}

/// Says what was attempted with which file.
pub(super) fn failed(path: &Path, what: &'static str) -> impl Fn(io::Error) -> LogError + use<> {
    let path = path.to_owned();
    move |source| LogError::File {
        path: path.clone(),
        what,
        source,
    }
}
