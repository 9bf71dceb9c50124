//! Reading all segments at the start: what the log holds, or which place is damaged.
//!
//! Only one thing is forgiven: the last frame of the last segment may be incomplete, since a crash may have
//! cut its write short; nobody was told that it is durable. A frame is written only after all before it were
//! synced, so a bad one with a good one anywhere behind it is damage and not the end. (A loss of power may
//! keep a later page of one write and lose an earlier one; that is why a frame is all of one sync and has
//! one checksum.)

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use tracing::warn;

use super::current::{self, Current, Segment};
use super::files::{Folder, failed};
use super::frame::{self, ALIGN, FRAME, FrameHeader, Header, Item, PAGE};
use super::index::{Index, Location};
use super::{LogError, View};

/// No log gets as far with its indexes and frames, and sums stay far from overflowing. Beyond it a number is damage that
/// its checksum did not show.
const MAX_NUMBER: u64 = 1 << 62;
/// Bytes read at a time.
const CHUNK: usize = 256 * 1024;

/// Reads the segments `sequences`, of which there is at least one. The frame `synced` must be among theirs.
pub(super) fn recover(
    folder: &Folder,
    sequences: &[u32],
    synced: Option<u64>,
) -> Result<(View, Current), LogError> {
    let mut found = Found::default();
    let mut segments = VecDeque::new();
    let mut last: Option<(Arc<Segment>, u64)> = None;
    for (position, &sequence) in sequences.iter().enumerate() {
        let path = folder.segment(sequence);
        let damaged = |what: String| LogError::Damaged {
            place: path.display().to_string(),
            what,
        };
        let file = folder.open_segment(sequence)?;
        let header = read_header(&file, &damaged)?;
        if header.sequence != sequence {
            return Err(damaged(format!("it says that it is segment {}", header.sequence)));
        }
        if let Some((before, end)) = &last {
            found.follows(&header, before, *end, &damaged)?;
        } else {
            found.number = header.first_frame;
        }
        let end = read_frames(&file, &header, &mut found, &damaged)?;
        if found.number == header.first_frame {
            // Its first frame is synced before it gets its name.
            return Err(damaged(format!("the frame at offset {end} is damaged")));
        }
        if position + 1 == sequences.len() {
            check_end(&file, &header, end, &damaged)?;
            if let Some(synced) = synced
                && synced >= found.number
            {
                return Err(damaged(format!(
                    "it ends with frame {} at offset {end}, but frame {synced} was synced",
                    found.number - 1
                )));
            }
        }
        let segment = Arc::new(Segment {
            sequence,
            salt: header.salt,
            path,
            file,
        });
        segments.push_back(Arc::clone(&segment));
        last = Some((segment, end));
    }
    let (last, end) = last.expect("there is at least one segment");
    let unknown = found.index.unknown();
    if !unknown.is_empty() {
        return Err(LogError::Damaged {
            place: folder.path().display().to_string(),
            what: format!(
                "the entries {} to {} are in no segment; the first one that is there is {}",
                unknown.start,
                unknown.end - 1,
                sequences[0]
            ),
        });
    }
    // A process that was killed may have written what it did not sync, and after a sync that failed the page
    // cache may hold what the disk does not, with no need seen to write it. From now on it counts, so it is
    // written once more. Only the last frame can be such a one.
    current::rewrite(&last, found.last, end)?;
    let allocated = last
        .file
        .metadata()
        .map_err(failed(&last.path, "cannot read a segment of the raft log"))?
        .len();
    let current = Current::resume(last, end, allocated, found.number)?;
    let view = View {
        index: found.index,
        values: found.values,
        segments,
        written: current.position(),
    };
    Ok((view, current))
}

/// What was read so far.
#[derive(Default)]
struct Found {
    index: Index,
    values: BTreeMap<String, Vec<u8>>,
    /// The number that the next frame must have.
    number: u64,
    /// Where the last frame begins.
    last: u64,
    /// The first segment's base says what it builds on, the others' repeat what is known.
    based: bool,
}

impl Found {
    /// Checks that the segment with this header goes on where `before` ends.
    fn follows(
        &self,
        header: &Header,
        before: &Segment,
        end: u64,
        damaged: &impl Fn(String) -> LogError,
    ) -> Result<(), LogError> {
        if before.sequence.checked_add(1) != Some(header.sequence) {
            return Err(damaged(format!(
                "the segment before it is missing, the last one there is {}",
                before.sequence
            )));
        }
        if header.before != before.salt {
            return Err(damaged(format!(
                "it does not belong behind {}",
                before.path.display()
            )));
        }
        if header.first_frame != self.number {
            return Err(LogError::Damaged {
                place: before.path.display().to_string(),
                what: format!(
                    "frame {} at offset {end} is damaged, the next segment begins with frame {}",
                    self.number, header.first_frame
                ),
            });
        }
        Ok(())
    }

    /// Does what the items of a frame say; gives the place of an item that does not make sense.
    fn apply(&mut self, header: &Header, body_at: u64, body: &[u8], opens: bool) -> Result<(), usize> {
        let mut at = 0;
        while at < body.len() {
            let (item, next) = frame::item(body, at).ok_or(at)?;
            let sound = match item {
                Item::Base { first, next } if at == 0 && opens => {
                    first.max(next) <= MAX_NUMBER && self.base(first, next)
                }
                Item::Base { .. } => false,
                _ if at == 0 && opens => false,
                Item::Entry { index, record } => {
                    index == self.index.next() && self.entry(header, body_at, &record)
                }
                Item::Put { name, value } => {
                    self.values.insert(name.to_owned(), value.to_vec());
                    true
                }
                Item::Truncate { from } => {
                    self.index.truncate(from);
                    true
                }
                Item::Purge { below } => {
                    self.index.purge(below);
                    below <= MAX_NUMBER
                }
            };
            if !sound {
                return Err(at);
            }
            at = next;
        }
        Ok(())
    }

    fn base(&mut self, first: u64, next: u64) -> bool {
        if self.based {
            return (self.index.first(), self.index.next()) == (first, next);
        }
        self.based = true;
        self.index = Index::at_base(first, next);
        true
    }

    fn entry(&mut self, header: &Header, body_at: u64, record: &std::ops::Range<usize>) -> bool {
        let offset = u32::try_from(body_at + record.start as u64);
        let len = u32::try_from(record.len());
        let (Ok(offset), Ok(len)) = (offset, len) else {
            return false;
        };
        self.index.push(Location {
            segment: header.sequence,
            offset,
            len,
        });
        true
    }
}

fn read_header(file: &File, damaged: &impl Fn(String) -> LogError) -> Result<Header, LogError> {
    let mut page = [0; PAGE];
    file.read_exact_at(&mut page, 0)
        .map_err(|error| damaged(format!("its first page cannot be read: {error}")))?;
    let header = Header::decode(&page).map_err(|error| damaged(error.to_string()))?;
    if header.first_frame > MAX_NUMBER {
        let what = format!("it says that its first frame is number {}", header.first_frame);
        return Err(damaged(what));
    }
    Ok(header)
}

/// Takes every good frame from the first on and returns where the last of them ends.
fn read_frames(
    file: &File,
    header: &Header,
    found: &mut Found,
    damaged: &impl Fn(String) -> LogError,
) -> Result<u64, LogError> {
    let cannot = |error: std::io::Error| damaged(format!("it cannot be read: {error}"));
    let len = file.metadata().map_err(cannot)?.len();
    let mut at = PAGE as u64;
    let mut end = at;
    let mut reader = BufReader::with_capacity(CHUNK, file);
    reader.seek(SeekFrom::Start(at)).map_err(cannot)?;
    let mut body = Vec::new();
    while at + FRAME as u64 <= len {
        let mut bytes = [0; FRAME];
        reader.read_exact(&mut bytes).map_err(cannot)?;
        let frame = FrameHeader::parse(&bytes);
        let body_at = at + FRAME as u64;
        if !frame.has_tag(header.salt) || frame.number != found.number || body_at + u64::from(frame.len) > len
        {
            break;
        }
        body.resize(frame.len as usize, 0);
        reader.read_exact(&mut body).map_err(cannot)?;
        if !frame.fits(header.salt, at, &body) {
            break;
        }
        let opens = frame.number == header.first_frame;
        found
            .apply(header, body_at, &body, opens)
            .map_err(|item| damaged(format!("offset {} makes no sense", body_at + item as u64)))?;
        found.number += 1;
        found.last = at;
        end = body_at + u64::from(frame.len);
        at = end.next_multiple_of(ALIGN as u64);
        match reader.seek_relative(i64::try_from(at - end).unwrap_or(0)) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
            Err(error) => return Err(cannot(error)),
        }
    }
    Ok(end)
}

/// Makes sure that the last segment ends at `end`: nothing behind it was ever synced.
fn check_end(
    file: &File,
    header: &Header,
    end: u64,
    damaged: &impl Fn(String) -> LogError,
) -> Result<(), LogError> {
    let cannot = |error: std::io::Error| damaged(format!("it cannot be read: {error}"));
    let len = file.metadata().map_err(cannot)?.len();
    let begin = end.next_multiple_of(ALIGN as u64);
    let mut torn = false;
    let mut chunk = vec![0; CHUNK];
    let mut at = begin;
    while at + FRAME as u64 <= len {
        // Headers never lie across two chunks: both are multiples of the alignment, and `FRAME` bytes are
        // read again.
        let have = usize::try_from(len - at).map_or(CHUNK, |rest| rest.min(CHUNK));
        file.read_exact_at(&mut chunk[..have], at).map_err(cannot)?;
        let mut step = 0;
        while step + FRAME <= have {
            let bytes = chunk[step..step + FRAME].try_into().expect("just as long");
            let frame = FrameHeader::parse(bytes);
            if frame.has_tag(header.salt) {
                let place = at + step as u64;
                torn |= place == begin;
                let body_at = place + FRAME as u64;
                if body_at + u64::from(frame.len) <= len {
                    let mut body = vec![0; frame.len as usize];
                    file.read_exact_at(&mut body, body_at).map_err(cannot)?;
                    if frame.fits(header.salt, place, &body) {
                        return Err(damaged(format!(
                            "offset {begin} is no frame, but frame {} at offset {place} is whole",
                            frame.number
                        )));
                    }
                }
            }
            step += ALIGN;
        }
        at += step as u64;
    }
    if torn {
        warn!(
            segment = header.sequence,
            offset = begin,
            "the last write to the raft log was cut short by a crash, leaving it out"
        );
    }
    Ok(())
}
