//! The segment that is written to.
//!
//! Writes gather in a buffer that begins with the last page of the file; a sync writes it in whole pages by
//! one call and then syncs the file's data. Ahead of the end the file is filled with zeros, some at a time:
//! the syncs in between change no metadata and cost the file system's journal nothing.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use super::files::{Folder, failed};
use super::frame::{self, ALIGN, FRAME, Header, PAGE};
use super::{Geometry, LogError};

/// What the buffer may keep of its memory after an unusually large sync.
const BUFFER_KEPT: usize = 1024 * 1024;
/// Zeros are written by this much.
static ZEROS: [u8; 16 * PAGE] = [0; 16 * PAGE];

/// A segment file. Who reads from it holds it, so that it is not written over meanwhile.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) sequence: u32,
    pub(super) salt: u64,
    pub(super) path: PathBuf,
    pub(super) file: File,
}

/// The last segment and what waits to be written to it.
#[derive(Debug)]
pub(super) struct Current {
    segment: Arc<Segment>,
    /// Where in the file the buffer begins: a multiple of a page.
    page: u64,
    /// What the file holds from there on, then the frame that is being made.
    buffer: Vec<u8>,
    /// Where in the buffer the frame that is being made begins, or the next one will.
    start: usize,
    /// How long the file is. Nothing that we need is behind the end, but it need not be zeros.
    allocated: u64,
    /// The number of the frame that is being made.
    number: u64,
    /// The frame ends with a truncation, whose index is here in the buffer.
    truncation: Option<usize>,
}

impl Current {
    /// Goes on behind the last frame of a segment; `end` is where that ends.
    pub(super) fn resume(
        segment: Arc<Segment>,
        end: u64,
        allocated: u64,
        number: u64,
    ) -> Result<Self, LogError> {
        let end = end.next_multiple_of(ALIGN as u64);
        let page = end - end % PAGE as u64;
        let start = usize::try_from(end - page).expect("less than a page");
        let mut buffer = vec![0; start];
        let have = usize::try_from(allocated.min(end).saturating_sub(page)).expect("less than a page");
        segment
            .file
            .read_exact_at(&mut buffer[..have], page)
            .map_err(failed(&segment.path, "cannot read a segment of the raft log"))?;
        Ok(Self {
            segment,
            page,
            buffer,
            start,
            allocated,
            number,
            truncation: None,
        })
    }

    /// Begins a segment with a frame of the items `base`. It is durable, with its name, on return.
    pub(super) fn create(
        folder: &Folder,
        spare: Option<u32>,
        header: Header,
        geometry: Geometry,
        base: &[u8],
    ) -> Result<Self, LogError> {
        let (path, file) = match spare {
            Some(spare) => folder.reuse(spare)?,
            None => folder.create()?,
        };
        let allocated = file
            .metadata()
            .map_err(failed(&path, "cannot read a segment of the raft log"))?
            .len();
        let mut buffer = header.encode();
        buffer.resize(PAGE + FRAME, 0);
        buffer.extend_from_slice(base);
        let mut current = Self {
            segment: Arc::new(Segment {
                sequence: header.sequence,
                salt: header.salt,
                path: path.clone(),
                file,
            }),
            page: 0,
            buffer,
            start: PAGE,
            allocated,
            number: header.first_frame,
            truncation: None,
        };
        current.commit(geometry)?;
        folder.finish(&path, header.sequence)?;
        let made = Arc::get_mut(&mut current.segment).expect("nobody else has it yet");
        made.path = folder.segment(header.sequence);
        Ok(current)
    }

    /// From now on every write fails.
    #[cfg(test)]
    pub(super) fn break_file(&mut self) {
        let Segment {
            sequence, salt, path, ..
        } = &*self.segment;
        self.segment = Arc::new(Segment {
            sequence: *sequence,
            salt: *salt,
            path: path.clone(),
            file: File::open(path).unwrap(),
        });
    }

    pub(super) fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    /// Where in the file the next frame begins, or the one that is being made.
    pub(super) fn position(&self) -> u64 {
        self.page + self.start as u64
    }

    /// The number of the frame that is being made, or the next one.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Whether something waits to be written.
    pub(super) fn waits(&self) -> bool {
        self.buffer.len() > self.start
    }

    /// Adds an entry; returns where in the file its record begins.
    pub(super) fn push_entry(&mut self, index: u64, record: &[u8]) -> u64 {
        let at = frame::push_entry(self.items(), index, record);
        self.page + at as u64
    }

    /// Adds a truncation, or moves the one that was added last.
    pub(super) fn push_truncate(&mut self, from: u64) {
        if let Some(at) = self.truncation {
            self.buffer[at..].copy_from_slice(&from.to_le_bytes());
            return;
        }
        frame::push_truncate(self.items(), from);
        self.truncation = Some(self.buffer.len() - size_of::<u64>());
    }

    /// Adds a purge.
    pub(super) fn push_purge(&mut self, below: u64) {
        frame::push_purge(self.items(), below);
    }

    /// Adds a value.
    pub(super) fn push_put(&mut self, name: &str, value: &[u8]) {
        frame::push_put(self.items(), name, value);
    }

    fn items(&mut self) -> &mut Vec<u8> {
        self.truncation = None;
        if self.buffer.len() == self.start {
            self.buffer.resize(self.start + FRAME, 0);
        }
        &mut self.buffer
    }

    /// What waits to be written to this part of the file, or was written last.
    pub(super) fn buffered(&self, part: Range<u64>) -> Option<&[u8]> {
        let at = |offset: u64| usize::try_from(offset.checked_sub(self.page)?).ok();
        self.buffer.get(at(part.start)?..at(part.end)?)
    }

    /// Makes what waits durable. After an error nobody knows what the file holds behind the last frame, and
    /// nothing may be written to it again.
    pub(super) fn commit(&mut self, geometry: Geometry) -> Result<(), LogError> {
        if !self.waits() {
            return Ok(());
        }
        let Segment { path, file, salt, .. } = &*self.segment;
        frame::seal(
            &mut self.buffer,
            self.start,
            *salt,
            self.page + self.start as u64,
            self.number,
        );
        let next = self.buffer.len().next_multiple_of(ALIGN);
        self.buffer.resize(next.next_multiple_of(PAGE), 0);
        file.write_all_at(&self.buffer, self.page)
            .map_err(failed(path, "cannot write to the raft log"))?;
        let end = self.page + self.buffer.len() as u64;
        if end > self.allocated {
            let target = (end + geometry.ahead).min(geometry.segment.max(end));
            self.allocated = fill(file, end, target)
                .map_err(failed(path, "cannot make room ahead of the raft log's end"))?;
        }
        file.sync_data()
            .map_err(failed(path, "cannot sync the raft log"))?;

        let kept = next - next % PAGE;
        self.page += kept as u64;
        self.start = next - kept;
        self.buffer.copy_within(kept..next, 0);
        self.buffer.truncate(self.start);
        if self.buffer.capacity() > 4 * BUFFER_KEPT {
            self.buffer.shrink_to(BUFFER_KEPT);
        }
        self.number += 1;
        self.truncation = None;
        Ok(())
    }
}

/// Writes zeros and returns where they end.
fn fill(file: &File, begin: u64, target: u64) -> std::io::Result<u64> {
    let mut at = begin;
    while at < target {
        let len = usize::try_from(target - at).map_or(ZEROS.len(), |rest| rest.min(ZEROS.len()));
        file.write_all_at(&ZEROS[..len], at)?;
        at += len as u64;
    }
    Ok(at)
}

/// Writes what the file holds from `begin` to `end` once more and syncs it.
pub(super) fn rewrite(segment: &Segment, begin: u64, end: u64) -> Result<(), LogError> {
    let Segment { path, file, .. } = segment;
    let len = usize::try_from(end - begin).expect("a frame fits into memory");
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, begin)
        .map_err(failed(path, "cannot read a segment of the raft log"))?;
    file.write_all_at(&bytes, begin)
        .map_err(failed(path, "cannot write to the raft log"))?;
    file.sync_data().map_err(failed(path, "cannot sync the raft log"))
}
