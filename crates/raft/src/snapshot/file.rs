//! A snapshot file as openraft and the peer transport hand it about.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::AsyncWriteExt;

use super::store::PART;

/// A complete snapshot file: openraft's `SnapshotData`.
///
/// One that was received is still a part file until it is installed; it goes with its last handle if that
/// never happens.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotFile {
    path: PathBuf,
    part: Option<Arc<PartFile>>,
}

impl SnapshotFile {
    /// A file that the store keeps.
    pub(super) fn stored(path: PathBuf) -> Self {
        Self { path, part: None }
    }

    /// Opens the file for sending and gives its size in bytes. The open file stays readable even when newer
    /// snapshots make the store delete this one.
    pub(crate) async fn open(&self) -> io::Result<(tokio::fs::File, u64)> {
        let file = tokio::fs::File::open(&self.path).await?;
        let size = file.metadata().await?.len();
        Ok((file, size))
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it was received and is not in the store yet.
    pub(super) fn is_part(&self) -> bool {
        self.part.is_some()
    }
}

/// A snapshot that is being received, byte for byte as the sender has it.
#[derive(Debug)]
pub(crate) struct Incoming {
    file: tokio::fs::File,
    part: PartFile,
}

impl Incoming {
    /// Begins a part file in the snapshot folder of the data folder `data`.
    pub(crate) async fn create(data: &Path) -> io::Result<Self> {
        /// Two transfers may overlap when the first one's connection died unnoticed.
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = super::store::folder(data);
        tokio::fs::create_dir_all(&folder).await?;
        let path = folder.join(format!("received-{number}.{PART}"));
        let part = PartFile(path.clone());
        let file = tokio::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .await?;
        Ok(Self { file, part })
    }

    /// Appends the next bytes.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes).await
    }

    /// Ends it: synced, but neither checked nor named yet; installing does both.
    pub(crate) async fn finish(mut self) -> io::Result<SnapshotFile> {
        self.file.flush().await?;
        self.file.sync_all().await?;
        Ok(SnapshotFile {
            path: self.part.0.clone(),
            part: Some(Arc::new(self.part)),
        })
    }
}

/// Removes a part file that nobody installed. After installing there is nothing under that name any more.
#[derive(Debug)]
pub(super) struct PartFile(pub(super) PathBuf);

impl Drop for PartFile {
    fn drop(&mut self) {
        // What cannot be removed now is removed at the next start.
        let _ = std::fs::remove_file(&self.0);
    }
}
