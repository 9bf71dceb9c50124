//! A snapshot file as openraft and the peer transport hand it about.
//!
//! A file may have rotted since it was written, and openraft stops a node that cannot install what it was given.
//! So nothing is sent before it was checked here, and nothing that arrives is handed on before.

use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use regent_state::State;

use super::SnapshotError;
use super::format::{self, Header};
use super::store::{self, BUFFER, PART, load};
use crate::offload::Offload;

/// A complete snapshot file: openraft's `SnapshotData`.
///
/// One that was received is still a part file until it is installed; it goes with its last handle if that
/// never happens.
#[derive(Clone)]
pub(crate) struct SnapshotFile {
    path: PathBuf,
    part: Option<Arc<PartFile>>,
    /// What was read from it when it was received, so that installing need not read it again.
    content: Option<Arc<(Header, State)>>,
    /// It was found damaged after it had been stored.
    spoiled: Arc<AtomicBool>,
    offload: Offload,
}

impl fmt::Debug for SnapshotFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotFile")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl SnapshotFile {
    /// A file that the store keeps.
    pub(super) fn stored(path: PathBuf, offload: Offload) -> Self {
        Self {
            path,
            part: None,
            content: None,
            spoiled: Arc::default(),
            offload,
        }
    }

    /// Checks the file, opens it for sending and gives its size in bytes. The open file stays readable even when
    /// newer snapshots make the store delete this one. One that is damaged is never opened again: the store writes
    /// a new one when it is asked the next time.
    pub(crate) async fn open(&self) -> io::Result<(Outgoing, u64)> {
        let path = self.path.clone();
        let opened = self.offload.run(move || {
            let mut file = File::open(&path)?;
            let checked = format::check(&path, &mut BufReader::with_capacity(BUFFER, &file));
            file.rewind()?;
            let size = file.metadata()?.len();
            Ok::<_, io::Error>((file, size, checked))
        });
        let (file, size, checked) = opened.await??;
        if let Err(error) = checked {
            self.spoiled.store(true, Ordering::Relaxed);
            return Err(error.into());
        }
        let outgoing = Outgoing {
            file: Arc::new(file),
            offload: self.offload,
        };
        Ok((outgoing, size))
    }

    /// Whether it was found damaged after it had been stored.
    pub(super) fn is_spoiled(&self) -> bool {
        self.spoiled.load(Ordering::Relaxed)
    }

    /// What is in it: what was read when it arrived, or what is read and checked now.
    pub(super) fn content(&self) -> Result<(Header, State), SnapshotError> {
        match &self.content {
            Some(content) => Ok((content.0.clone(), content.1.clone())),
            None => load(&self.path),
        }
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

/// A snapshot that is being sent.
#[derive(Debug)]
pub(crate) struct Outgoing {
    file: Arc<File>,
    offload: Offload,
}

impl Outgoing {
    /// The next so many bytes.
    pub(crate) async fn read(&mut self, bytes: usize) -> io::Result<Vec<u8>> {
        let file = self.file.clone();
        let read = self.offload.run(move || {
            let mut chunk = vec![0; bytes];
            (&*file).read_exact(&mut chunk)?;
            Ok(chunk)
        });
        read.await?
    }
}

/// A snapshot that is being received, byte for byte as the sender has it.
#[derive(Debug)]
pub(crate) struct Incoming {
    file: Arc<File>,
    part: PartFile,
    offload: Offload,
}

impl Incoming {
    /// Begins a part file in the snapshot folder of the data folder `data`.
    pub(crate) async fn create(data: &Path, offload: Offload) -> io::Result<Self> {
        /// Two transfers may overlap when the first one's connection died unnoticed.
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = store::folder(data);
        let path = folder.join(format!("received-{number}.{PART}"));
        let created = offload.run(move || {
            std::fs::create_dir_all(&folder)?;
            let part = PartFile(path);
            let file = File::create(&part.0)?;
            Ok::<_, io::Error>((Arc::new(file), part))
        });
        let (file, part) = created.await??;
        Ok(Self { file, part, offload })
    }

    /// Appends the next bytes.
    pub(crate) async fn write(&mut self, bytes: Bytes) -> io::Result<()> {
        let file = self.file.clone();
        self.offload.run(move || (&*file).write_all(&bytes)).await?
    }

    /// Ends it: synced, read and checked, but not named yet; installing does that.
    pub(crate) async fn finish(self) -> io::Result<SnapshotFile> {
        let path = self.part.0.clone();
        let content = self.offload.run({
            let path = path.clone();
            move || {
                self.file.sync_all()?;
                Ok::<_, io::Error>(load(&path)?)
            }
        });
        let content = content.await??;
        Ok(SnapshotFile {
            path,
            part: Some(Arc::new(self.part)),
            content: Some(Arc::new(content)),
            spoiled: Arc::default(),
            offload: self.offload,
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
