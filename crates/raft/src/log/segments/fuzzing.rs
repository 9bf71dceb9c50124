//! Segment files, as [`crate::fuzzing`] offers them.

use super::frame::{self, ALIGN, FRAME, Header, PAGE};
use super::{Engine as _, FOLDER, Geometry, SegmentsEngine};
use crate::fuzzing::in_folder;

/// Small: what is opened writes zeros ahead of its end.
const SMALL: Geometry = Geometry {
    segment: 16 * 1024,
    ahead: 4 * 1024,
};

/// Opens the bytes as the only segment of a log: as a file, and as what the frames of one hold. What is opened must
/// be found the same when it is opened again.
pub(in crate::log) fn open(bytes: &[u8]) {
    for file in [bytes.to_vec(), with_frames(bytes)] {
        let name = format!("{FOLDER}/0000000001.seg");
        in_folder(&name, &file, |data| {
            if let Some(first) = content(data) {
                assert_eq!(content(data), Some(first), "a log changed by being opened");
            }
        });
    }
}

/// What the log holds, if it can be opened.
fn content(data: &std::path::Path) -> Option<Vec<(u64, Vec<u8>)>> {
    let engine = SegmentsEngine::open_with(data, SMALL).ok()?;
    let mut found = Vec::new();
    engine
        .scan(0..u64::MAX, &mut |index, record| {
            found.push((index, record.to_vec()));
            Ok(true)
        })
        .expect("what was recovered can be read");
    engine.get("vote").expect("what was recovered can be read");
    Some(found)
}

/// A file with a sound header and sound frames: the number of the first frame, then for each the length of its items
/// in two bytes, and the items.
fn with_frames(bytes: &[u8]) -> Vec<u8> {
    let (first_frame, mut rest) = bytes.split_first_chunk().unwrap_or((&[0; 8], &[]));
    let header = Header {
        sequence: 1,
        salt: 7,
        before: 0,
        first_frame: u64::from_le_bytes(*first_frame),
    };
    let mut file = header.encode();
    let mut number = header.first_frame;
    while let Some((len, items)) = rest.split_first_chunk() {
        let (items, after) = items.split_at(usize::from(u16::from_le_bytes(*len)).min(items.len()));
        rest = after;
        file.resize(file.len().next_multiple_of(ALIGN), 0);
        let start = file.len();
        file.resize(start + FRAME, 0);
        file.extend_from_slice(items);
        frame::seal(&mut file, start, header.salt, start as u64, number);
        number = number.wrapping_add(1);
    }
    file.resize(file.len().next_multiple_of(PAGE), 0);
    file
}

/// The items of sound files, in the form that [`open`] completes.
pub(in crate::log) fn samples(records: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut base = Vec::new();
    frame::push_base(&mut base, 5, 5);
    frame::push_put(&mut base, "vote", b"value");
    let mut entries = Vec::new();
    for (index, record) in (5..).zip(records) {
        frame::push_entry(&mut entries, index, record);
    }
    let mut ends = Vec::new();
    frame::push_truncate(&mut ends, 7);
    frame::push_purge(&mut ends, 6);
    let mut sample = 1_u64.to_le_bytes().to_vec();
    for items in [base, entries, ends] {
        let len = u16::try_from(items.len()).expect("samples are short");
        sample.extend_from_slice(&len.to_le_bytes());
        sample.extend_from_slice(&items);
    }
    vec![sample]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers at the edge of what a number can be made opening a log overflow instead of refusing it.
    #[test]
    fn numbers_that_no_log_reaches_are_refused() {
        let sample = samples(&[b"record".to_vec()]).remove(0);
        assert!(
            in_a_folder(&with_frames(&sample)).is_some(),
            "the sample is sound"
        );
        let mut far = sample.clone();
        far[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(in_a_folder(&with_frames(&far)), None);

        let with_items = |items: &[u8]| {
            let mut base = Vec::new();
            frame::push_base(&mut base, 0, 0);
            let mut bytes = 1_u64.to_le_bytes().to_vec();
            for items in [&base, items] {
                bytes.extend_from_slice(&u16::try_from(items.len()).unwrap().to_le_bytes());
                bytes.extend_from_slice(items);
            }
            bytes
        };
        let mut items = Vec::new();
        frame::push_purge(&mut items, u64::MAX);
        frame::push_entry(&mut items, u64::MAX, b"record");
        assert_eq!(in_a_folder(&with_frames(&with_items(&items))), None);
    }

    fn in_a_folder(file: &[u8]) -> Option<Vec<(u64, Vec<u8>)>> {
        in_folder(&format!("{FOLDER}/0000000001.seg"), file, content)
    }
}
