//! The event stream behind a function that takes bytes, for the fuzz targets and the property tests
//! (`tests/decoders`). Not a part of what this crate offers.

use crate::sse::{Message, Parser};

/// A stream. The first byte says in pieces of which size it comes; the messages must be the same in any.
pub fn event_stream(bytes: &[u8]) {
    let Some((size, stream)) = bytes.split_first() else {
        return;
    };
    let whole = messages(stream, stream.len());
    let pieces = messages(stream, usize::from(*size));
    if let (Some(whole), Some(pieces)) = (whole, pieces) {
        assert_eq!(whole, pieces, "what a stream says depends on how it is cut");
    }
}

/// Streams to begin with.
#[must_use]
pub fn event_streams() -> Vec<Vec<u8>> {
    let one = ": hello\n\nid: 5.0\ndata: {\"a\":1}\n\nid:5.1\r\nevent: gone\r\ndata:x\r\ndata: y\r\n\r\n";
    vec![
        [b"\x03", one.as_bytes()].concat(),
        b"\x01data: \xff\xfe\n\nid\n\n".to_vec(),
    ]
}

/// What comes out, unless something is too long.
fn messages(stream: &[u8], size: usize) -> Option<Vec<Message>> {
    let mut parser = Parser::default();
    let mut found = Vec::new();
    for piece in stream.chunks(size.max(1)) {
        found.extend(parser.feed(piece).ok()?);
    }
    Some(found)
}
