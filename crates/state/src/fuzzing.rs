//! The records of a snapshot behind a function that takes bytes, for the fuzz targets and the property tests
//! (`tests/decoders`). Not a part of what this crate offers.

use crate::codec::{self, FORMAT};
use crate::snapshot::{Item, ItemRef, StateDecoder, frame};
use crate::state::State;

/// Records as they stand in a snapshot, each behind its length. Those that do not decode are left out, and the trailer
/// is made to fit, so that what comes after the digest is reached too. Gives the state if there is one.
pub fn records(bytes: &[u8]) -> Option<State> {
    let mut decoder = StateDecoder::new();
    // As they are: this is the way of the bytes of a damaged file.
    let _ = decoder.push(bytes);
    let _ = decoder.finish();

    let mut whole = vec![FORMAT];
    let mut rest = bytes;
    while let Some((length, items)) = rest.split_first_chunk() {
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let (item, after) = items.split_at(length.min(items.len()));
        rest = after;
        if let Ok(read) = codec::read::<Item>(item)
            && !matches!(read, Item::Trailer { .. })
        {
            whole.extend_from_slice(&u32::try_from(item.len()).ok()?.to_le_bytes());
            whole.extend_from_slice(item);
        }
    }
    let mut decoder = StateDecoder::new();
    decoder.push(&whole).ok()?;
    let (records, content) = decoder.trailer_that_fits();
    let mut trailer = Vec::new();
    frame(&mut trailer, &ItemRef::Trailer { records, content });
    decoder.push(&trailer).ok()?;
    let state = decoder.finish().ok()?;

    let mut again = StateDecoder::new();
    for chunk in state.encode_chunks() {
        again.push(&chunk).expect("what was encoded decodes");
    }
    let again = again.finish().expect("what was encoded is whole");
    assert_eq!(
        state.content_digest(),
        again.content_digest(),
        "a state changed on its way"
    );
    Some(state)
}
