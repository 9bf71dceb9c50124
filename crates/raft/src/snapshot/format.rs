//! What is in a snapshot file.
//!
//! ```text
//! magic      8 bytes   "RGNTSNAP"
//! version    u16
//! length     u32       of the header's body
//! checksum   u32       crc32 of version, length and body
//! body       bincode   revision base, last log id, membership (version 1: and the content digest)
//! frame*     raw length u32, packed length u32, crc32 of the packed bytes u32, packed bytes (zstd)
//! trailer    a frame header of zero lengths, whose checksum is the crc32 of the whole file before it,
//!            and the number of frames, u64
//! ```
//!
//! Integers are little-endian. Every byte is under a checksum, and the trailer says that nothing is missing.
//! At most one frame is in memory on either side. The frames end with the state's content digest, which is
//! computed again from what was read ([`StateDecoder`]): the checksums guard the file, the digest guards the meaning.

use std::io::{self, Read, Write};
use std::path::Path;

use regent_state::{State, StateDecoder};
use serde::{Deserialize, Serialize};

use super::SnapshotError;
use crate::codec;
use crate::config::{LogId, SnapshotMeta, StoredMembership};

/// Version of this format. A new layout takes the next number; the old one stays readable.
pub(super) const VERSION: u16 = 2;
/// The first layout, still read.
const VERSION_1: u16 = 1;

pub(super) const MAGIC: &[u8; 8] = b"RGNTSNAP";
/// Largest body of the header: a membership of thousands of nodes is below it. Guards the reader.
const MAX_HEADER: u32 = 1024 * 1024;
/// Largest frame, packed or not, in bytes; the state gives pieces of 256 KiB. Guards the reader.
const MAX_FRAME: u32 = 1024 * 1024;
/// zstd's level: 1 packs a control plane's records to a fifth at disk speed; more buys little.
const LEVEL: i32 = 1;

/// What a snapshot says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Header {
    /// Base of the revisions in the state.
    pub(super) revision_base: u64,
    /// The last entry that the state contains.
    pub(super) last: Option<LogId>,
    /// The last membership that the state contains.
    pub(super) membership: StoredMembership,
}

/// The header of version 1. Its digest took encoding the whole state once more, before the frames, which end with it.
#[derive(Deserialize)]
struct HeaderV1 {
    header: Header,
    #[expect(dead_code)]
    content_digest: u64,
}

impl Header {
    /// The same as openraft wants it.
    pub(crate) fn meta(&self) -> SnapshotMeta {
        SnapshotMeta {
            last_log_id: self.last,
            last_membership: self.membership.clone(),
        }
    }
}

/// Writes a snapshot of `state`.
pub(crate) fn write(output: impl Write, state: &State, meta: &SnapshotMeta) -> io::Result<()> {
    let header = Header {
        revision_base: state.revision_base(),
        last: meta.last_log_id,
        membership: meta.last_membership.clone(),
    };
    let mut output = Summing {
        inner: output,
        sum: crc32fast::Hasher::new(),
    };
    output.write_all(MAGIC)?;
    let mut body = Vec::new();
    codec::encode_into(&mut body, &header);
    let length = u32::try_from(body.len())
        .ok()
        .filter(|length| *length <= MAX_HEADER);
    let length = length.ok_or_else(|| io::Error::other("the membership is too large for a snapshot"))?;
    output.write_all(&VERSION.to_le_bytes())?;
    output.write_all(&length.to_le_bytes())?;
    output.write_all(&header_checksum(VERSION, &body).to_le_bytes())?;
    output.write_all(&body)?;

    let mut frames: u64 = 0;
    let mut packer = zstd::bulk::Compressor::new(LEVEL)?;
    for chunk in state.encode_chunks() {
        let packed = packer.compress(&chunk)?;
        for length in [chunk.len(), packed.len()] {
            let length = u32::try_from(length).ok().filter(|length| *length <= MAX_FRAME);
            let length = length.ok_or_else(|| io::Error::other("a piece of the state is too large"))?;
            output.write_all(&length.to_le_bytes())?;
        }
        output.write_all(&crc32fast::hash(&packed).to_le_bytes())?;
        output.write_all(&packed)?;
        frames += 1;
    }
    output.write_all(&[0; 8])?;
    let sum = output.sum.clone().finalize();
    output.write_all(&sum.to_le_bytes())?;
    output.write_all(&frames.to_le_bytes())?;
    output.flush()
}

/// Reads and checks a whole snapshot.
pub(crate) fn read(path: &Path, input: &mut impl Read) -> Result<(Header, State), SnapshotError> {
    let mut input = Input::new(path, input);
    let header = input.header()?;
    let mut decoder = StateDecoder::new();
    let mut unpacker = zstd::bulk::Decompressor::new().map_err(|source| SnapshotError::Io {
        path: path.to_owned(),
        what: "cannot start unpacking",
        source,
    })?;
    let mut raw = Vec::new();
    input.frames(|input, number, raw_len, packed| {
        raw.resize(raw_len, 0);
        let unpacked = unpacker.decompress_to_buffer(packed, &mut raw);
        if unpacked.ok() != Some(raw_len) {
            return Err(input.damaged(format!("frame {number} does not unpack")));
        }
        decoder
            .push(&raw)
            .map_err(|error| input.damaged(format!("frame {number}: {error}")))
    })?;
    let state = decoder
        .finish()
        .map_err(|error| input.damaged(error.to_string()))?;
    if state.revision_base() != header.revision_base {
        return Err(input.damaged("the state has another revision base than the header".to_owned()));
    }
    Ok((header, state))
}

/// Checks that every byte of a snapshot is what was written, without making a state of it.
pub(crate) fn check(path: &Path, input: &mut impl Read) -> Result<(), SnapshotError> {
    let mut input = Input::new(path, input);
    input.header()?;
    input.frames(|_, _, _, _| Ok(()))
}

pub(super) fn header_checksum(version: u16, body: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&version.to_le_bytes());
    sum.update(&(body.len() as u64).to_le_bytes());
    sum.update(body);
    sum.finalize()
}

/// Counts what passes into the checksum of the trailer.
struct Summing<W> {
    inner: W,
    sum: crc32fast::Hasher,
}

impl<W: Write> Write for Summing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.sum.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

struct Input<'a, R> {
    path: &'a Path,
    inner: &'a mut R,
    sum: crc32fast::Hasher,
}

impl<'a, R: Read> Input<'a, R> {
    fn new(path: &'a Path, inner: &'a mut R) -> Self {
        Self {
            path,
            inner,
            sum: crc32fast::Hasher::new(),
        }
    }

    /// Reads all frames and the trailer; gives each frame's number, length and packed bytes.
    fn frames(
        &mut self,
        mut take: impl FnMut(&Self, u64, usize, &[u8]) -> Result<(), SnapshotError>,
    ) -> Result<(), SnapshotError> {
        let mut packed = Vec::new();
        let mut frames: u64 = 0;
        loop {
            let raw_len = self.u32()?;
            let packed_len = self.u32()?;
            if raw_len == 0 && packed_len == 0 {
                return self.trailer(frames);
            }
            if raw_len > MAX_FRAME || packed_len > MAX_FRAME {
                return Err(self.damaged(format!("frame {frames} claims {packed_len} bytes")));
            }
            let checksum = self.u32()?;
            packed.resize(packed_len as usize, 0);
            self.fill(&mut packed)?;
            if crc32fast::hash(&packed) != checksum {
                return Err(self.damaged(format!("checksum mismatch in frame {frames}")));
            }
            take(self, frames, raw_len as usize, &packed)?;
            frames += 1;
        }
    }

    fn header(&mut self) -> Result<Header, SnapshotError> {
        let mut magic = [0; MAGIC.len()];
        self.fill(&mut magic)?;
        if magic != *MAGIC {
            return Err(self.damaged("it does not begin like a snapshot".to_owned()));
        }
        let mut version = [0; 2];
        self.fill(&mut version)?;
        let version = u16::from_le_bytes(version);
        let length = self.u32()?;
        let checksum = self.u32()?;
        if ![VERSION_1, VERSION].contains(&version) {
            return Err(SnapshotError::Version {
                path: self.path.to_owned(),
                found: version,
            });
        }
        if length > MAX_HEADER {
            return Err(self.damaged(format!("the header claims {length} bytes")));
        }
        let mut body = vec![0; length as usize];
        self.fill(&mut body)?;
        if header_checksum(version, &body) != checksum {
            return Err(self.damaged("checksum mismatch in the header".to_owned()));
        }
        let header = if version == VERSION_1 {
            codec::decode_body(&body).map(|HeaderV1 { header, .. }| header)
        } else {
            codec::decode_body(&body)
        };
        header.map_err(|error| self.damaged(format!("the header: {error}")))
    }

    fn trailer(&mut self, frames: u64) -> Result<(), SnapshotError> {
        let expected = self.sum.clone().finalize();
        if self.u32()? != expected {
            return Err(self.damaged("checksum mismatch of the whole file".to_owned()));
        }
        let mut count = [0; 8];
        self.fill(&mut count)?;
        let count = u64::from_le_bytes(count);
        if count != frames {
            return Err(self.damaged(format!("it has {frames} frames and should have {count}")));
        }
        let mut beyond = [0];
        match self.inner.read(&mut beyond) {
            Ok(0) => Ok(()),
            Ok(_) => Err(self.damaged("something follows its end".to_owned())),
            Err(source) => Err(self.failed(source)),
        }
    }

    fn u32(&mut self) -> Result<u32, SnapshotError> {
        let mut bytes = [0; 4];
        self.fill(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), SnapshotError> {
        self.inner
            .read_exact(buffer)
            .map_err(|source| match source.kind() {
                io::ErrorKind::UnexpectedEof => self.damaged("it ends too early".to_owned()),
                _ => self.failed(source),
            })?;
        self.sum.update(buffer);
        Ok(())
    }

    fn failed(&self, source: io::Error) -> SnapshotError {
        SnapshotError::Io {
            path: self.path.to_owned(),
            what: "cannot read the snapshot",
            source,
        }
    }

    fn damaged(&self, what: String) -> SnapshotError {
        SnapshotError::Damaged {
            path: self.path.to_owned(),
            what,
        }
    }
}

/// The same snapshot as version 1 had it.
#[cfg(test)]
pub(super) fn in_version_1(snapshot: &[u8], content_digest: u64) -> Vec<u8> {
    let mut reader = snapshot;
    let mut input = Input::new(Path::new("in memory"), &mut reader);
    let header = input.header().unwrap();
    let frames = &reader[..reader.len() - 12];
    let mut body = Vec::new();
    codec::encode_into(&mut body, &(&header, content_digest));
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&VERSION_1.to_le_bytes());
    bytes.extend_from_slice(&u32::try_from(body.len()).unwrap().to_le_bytes());
    bytes.extend_from_slice(&header_checksum(VERSION_1, &body).to_le_bytes());
    bytes.extend_from_slice(&body);
    bytes.extend_from_slice(frames);
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    bytes.extend_from_slice(&snapshot[snapshot.len() - 8..]);
    bytes
}
