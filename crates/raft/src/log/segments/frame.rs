//! How a segment looks on disk. Integers are little-endian.
//!
//! ```text
//! header   magic 8, version u32, sequence u32, salt u64, salt of the segment before u64,
//!          number of its first frame u64, crc32 u32; alone in the first page of the file
//! frame    tag u32, crc32 u32, number u64, length u32, zero u32, then `length` bytes of items;
//!          begins at a multiple of 8
//! item     a kind (one byte) and what belongs to it, see `Item`
//! ```
//!
//! A frame is all that one sync made durable, so it counts whole or not at all. Its number is one more than
//! that of the frame before, across segments. Its checksum covers the salt of the segment and its own place
//! too: bytes that are left from an earlier life of the file, or that the disk wrote to the wrong place,
//! never pass. The tag is a part of the salt; it lets the search for frames skip everything else quickly.

use std::ops::Range;

/// The unit that the file is written in: what is written never begins or ends within a page, so that no
/// page must be read for it, and the header, in a page of its own, is never written again.
pub(super) const PAGE: usize = 4096;
/// Frames begin at multiples of this.
pub(super) const ALIGN: usize = 8;
/// Bytes of a frame before its items.
pub(super) const FRAME: usize = 24;

const MAGIC: [u8; 8] = *b"regentlg";
const VERSION: u32 = 1;
/// Bytes of the header.
const HEADER: usize = 44;

const ENTRY: u8 = 1;
const PUT: u8 = 2;
const TRUNCATE: u8 = 3;
const PURGE: u8 = 4;
const BASE: u8 = 5;

/// The beginning of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Counts the segments of a log, from 1.
    pub(super) sequence: u32,
    /// Random, different for each life of a file.
    pub(super) salt: u64,
    /// The salt of the segment before, 0 in the first one.
    pub(super) before: u64,
    /// The number of its first frame.
    pub(super) first_frame: u64,
}

/// Why the beginning of a file is no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum HeaderError {
    #[error("it does not begin like a segment")]
    Magic,
    #[error("format version {0} is unknown to this build")]
    Version(u32),
    #[error("the checksum of its header does not fit")]
    Checksum,
}

impl Header {
    /// The first page of the file.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut page = Vec::with_capacity(PAGE);
        page.extend_from_slice(&MAGIC);
        page.extend_from_slice(&VERSION.to_le_bytes());
        page.extend_from_slice(&self.sequence.to_le_bytes());
        page.extend_from_slice(&self.salt.to_le_bytes());
        page.extend_from_slice(&self.before.to_le_bytes());
        page.extend_from_slice(&self.first_frame.to_le_bytes());
        let checksum = crc32fast::hash(&page);
        page.extend_from_slice(&checksum.to_le_bytes());
        debug_assert_eq!(page.len(), HEADER);
        page.resize(PAGE, 0);
        page
    }

    /// Reads what [`Header::encode`] wrote.
    pub(super) fn decode(page: &[u8]) -> Result<Self, HeaderError> {
        let bytes = page.get(..HEADER).ok_or(HeaderError::Magic)?;
        if bytes[..8] != MAGIC {
            return Err(HeaderError::Magic);
        }
        // A later version may be longer and have its checksum elsewhere.
        match u32_at(bytes, 8) {
            VERSION => {}
            other => return Err(HeaderError::Version(other)),
        }
        if crc32fast::hash(&bytes[..HEADER - 4]) != u32_at(bytes, HEADER - 4) {
            return Err(HeaderError::Checksum);
        }
        Ok(Self {
            sequence: u32_at(bytes, 12),
            salt: u64_at(bytes, 16),
            before: u64_at(bytes, 24),
            first_frame: u64_at(bytes, 32),
        })
    }
}

/// What stands before the items of a frame.
#[derive(Clone, Copy, Debug)]
pub(super) struct FrameHeader {
    tag: u32,
    checksum: u32,
    /// Its number.
    pub(super) number: u64,
    /// Bytes of its items.
    pub(super) len: u32,
}

impl FrameHeader {
    /// Reads it, right or wrong.
    pub(super) fn parse(bytes: &[u8; FRAME]) -> Self {
        Self {
            tag: u32_at(bytes, 0),
            checksum: u32_at(bytes, 4),
            number: u64_at(bytes, 8),
            len: u32_at(bytes, 16),
        }
    }

    /// Whether it may belong to the segment of this salt.
    pub(super) fn has_tag(&self, salt: u64) -> bool {
        self.tag == tag(salt)
    }

    /// Whether this is the frame that was written at `offset` of the segment of this salt.
    pub(super) fn fits(&self, salt: u64, offset: u64, body: &[u8]) -> bool {
        self.has_tag(salt) && self.checksum == checksum(salt, offset, self.number, body)
    }
}

/// Completes the frame that begins at `start` of `buffer` and ends with it; `offset` is where it begins in
/// the file.
pub(super) fn seal(buffer: &mut [u8], start: usize, salt: u64, offset: u64, number: u64) {
    let (header, body) = buffer[start..].split_at_mut(FRAME);
    let len = u32::try_from(body.len()).expect("the writer's queue bounds what one sync takes");
    header[..4].copy_from_slice(&tag(salt).to_le_bytes());
    header[4..8].copy_from_slice(&checksum(salt, offset, number, body).to_le_bytes());
    header[8..16].copy_from_slice(&number.to_le_bytes());
    header[16..20].copy_from_slice(&len.to_le_bytes());
    header[20..].fill(0);
}

/// Never 0, so that zeros are no frame.
fn tag(salt: u64) -> u32 {
    let [a, b, c, d, ..] = salt.to_le_bytes();
    u32::from_le_bytes([a, b, c, d]) | 1
}

fn checksum(salt: u64, offset: u64, number: u64, body: &[u8]) -> u32 {
    let mut place = [0; 32];
    place[..8].copy_from_slice(&salt.to_le_bytes());
    place[8..16].copy_from_slice(&offset.to_le_bytes());
    place[16..24].copy_from_slice(&number.to_le_bytes());
    place[24..].copy_from_slice(&(body.len() as u64).to_le_bytes());
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&place);
    hasher.update(body);
    hasher.finalize()
}

/// One thing that happened to the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Item<'a> {
    /// The record of `index`, in this part of the body.
    Entry { index: u64, record: Range<usize> },
    /// A small value by name.
    Put { name: &'a str, value: &'a [u8] },
    /// The records from here on are gone.
    Truncate { from: u64 },
    /// The records below are gone.
    Purge { below: u64 },
    /// The first item of every segment: what the log holds when it begins. The values follow.
    Base { first: u64, next: u64 },
}

/// Adds an entry and returns where in `buffer` its record begins.
pub(super) fn push_entry(buffer: &mut Vec<u8>, index: u64, record: &[u8]) -> usize {
    let len = u32::try_from(record.len()).expect("an operation is bounded far below");
    buffer.push(ENTRY);
    buffer.extend_from_slice(&index.to_le_bytes());
    buffer.extend_from_slice(&len.to_le_bytes());
    let begin = buffer.len();
    buffer.extend_from_slice(record);
    begin
}

/// Adds a value.
pub(super) fn push_put(buffer: &mut Vec<u8>, name: &str, value: &[u8]) {
    let name_len = u8::try_from(name.len()).expect("names are short words of our own");
    let len = u32::try_from(value.len()).expect("values are small");
    buffer.push(PUT);
    buffer.push(name_len);
    buffer.extend_from_slice(&len.to_le_bytes());
    buffer.extend_from_slice(name.as_bytes());
    buffer.extend_from_slice(value);
}

/// Adds a truncation; `buffer` then ends with its index, see [`truncates_at_end`].
pub(super) fn push_truncate(buffer: &mut Vec<u8>, from: u64) {
    buffer.push(TRUNCATE);
    buffer.extend_from_slice(&from.to_le_bytes());
}

/// Adds a purge.
pub(super) fn push_purge(buffer: &mut Vec<u8>, below: u64) {
    buffer.push(PURGE);
    buffer.extend_from_slice(&below.to_le_bytes());
}

/// Adds what a segment begins with.
pub(super) fn push_base(buffer: &mut Vec<u8>, first: u64, next: u64) {
    buffer.push(BASE);
    buffer.extend_from_slice(&first.to_le_bytes());
    buffer.extend_from_slice(&next.to_le_bytes());
}

/// Reads the item at `at` of the body and returns where the next one begins; nothing when it is none.
pub(super) fn item(body: &[u8], at: usize) -> Option<(Item<'_>, usize)> {
    let mut rest = Rest { body, at };
    let item = match rest.take(1)?[0] {
        ENTRY => {
            let index = rest.u64()?;
            let len = rest.u32()?;
            let begin = rest.at;
            rest.take(len)?;
            Item::Entry {
                index,
                record: begin..rest.at,
            }
        }
        PUT => {
            let name_len = usize::from(rest.take(1)?[0]);
            let len = rest.u32()?;
            Item::Put {
                name: std::str::from_utf8(rest.take(name_len)?).ok()?,
                value: rest.take(len)?,
            }
        }
        TRUNCATE => Item::Truncate { from: rest.u64()? },
        PURGE => Item::Purge { below: rest.u64()? },
        BASE => Item::Base {
            first: rest.u64()?,
            next: rest.u64()?,
        },
        _ => return None,
    };
    Some((item, rest.at))
}

struct Rest<'a> {
    body: &'a [u8],
    at: usize,
}

impl<'a> Rest<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let taken = self.body.get(self.at..self.at.checked_add(len)?)?;
        self.at += len;
        Some(taken)
    }

    fn u32(&mut self) -> Option<usize> {
        usize::try_from(u32_at(self.take(4)?, 0)).ok()
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64_at(self.take(8)?, 0))
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes are four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes are eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_round_trips_and_every_flipped_bit_is_found() {
        let header = Header {
            sequence: 3,
            salt: 0x0123_4567_89ab_cdef,
            before: 7,
            first_frame: 99,
        };
        let page = header.encode();
        assert_eq!((page.len(), Header::decode(&page)), (PAGE, Ok(header)));
        for bit in 0..HEADER * 8 {
            let mut flipped = page.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&flipped).is_err(), "bit {bit}");
        }
        assert!(Header::decode(&page[..HEADER - 1]).is_err());
    }

    #[test]
    fn a_frame_fits_only_its_own_place() {
        let mut buffer = vec![0xaa; 8 + FRAME];
        push_entry(&mut buffer, 5, b"record");
        push_put(&mut buffer, "vote", b"value");
        push_truncate(&mut buffer, 4);
        push_purge(&mut buffer, 2);
        push_base(&mut buffer, 1, 2);
        seal(&mut buffer, 8, 77, 4096, 12);
        let header = FrameHeader::parse(buffer[8..8 + FRAME].try_into().unwrap());
        let body = &buffer[8 + FRAME..];
        assert_eq!((header.number, header.len as usize), (12, body.len()));
        assert!(header.fits(77, 4096, body));
        assert!(!header.fits(78, 4096, body), "another life of the file");
        assert!(!header.fits(77, 4104, body), "another place");
        assert!(!header.fits(77, 4096, &body[1..]));

        let mut found = Vec::new();
        let mut at = 0;
        while at < body.len() {
            let (item, next) = item(body, at).unwrap();
            found.push(item);
            at = next;
        }
        let expected = [
            Item::Entry {
                index: 5,
                record: 13..19,
            },
            Item::Put {
                name: "vote",
                value: b"value",
            },
            Item::Truncate { from: 4 },
            Item::Purge { below: 2 },
            Item::Base { first: 1, next: 2 },
        ];
        assert_eq!(found, expected);
        assert_eq!(&body[13..19], b"record");
    }
}
