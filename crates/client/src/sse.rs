//! Server-sent events as bytes arrive: the part of the WHATWG standard that Regent's nodes use.
//!
//! Pure: fed with pieces of any size, gives back whole messages.

/// A longer message than this is not one of ours: records are at most 1 MiB, JSON in one line.
const MAX_MESSAGE: usize = 4 << 20;

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    /// The id, if the message had one.
    pub(crate) id: Option<String>,
    /// Its type, if it is not the usual one.
    pub(crate) kind: Option<String>,
    /// The data, its lines joined.
    pub(crate) data: String,
}

/// The stream holds something that is longer than any message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooLong;

/// What has arrived and is not a whole message yet.
#[derive(Debug, Default)]
pub(crate) struct Parser {
    rest: Vec<u8>,
    /// So much of `rest` was looked through: there is no end of a line in it.
    seen: usize,
    id: Option<String>,
    kind: Option<String>,
    data: Option<String>,
}

impl Parser {
    /// Takes the next piece and gives the messages that it completes.
    pub(crate) fn feed(&mut self, piece: &[u8]) -> Result<Vec<Message>, TooLong> {
        self.rest.extend_from_slice(piece);
        let mut messages = Vec::new();
        let (mut from, mut seen) = (0, self.seen);
        while let Some(length) = self.rest[seen..].iter().position(|&byte| byte == b'\n') {
            let end = seen + length;
            let line = String::from_utf8_lossy(&self.rest[from..end]).into_owned();
            from = end + 1;
            seen = from;
            messages.extend(self.line(line.strip_suffix('\r').unwrap_or(&line)));
        }
        self.rest.drain(..from);
        self.seen = self.rest.len();
        if self.rest.len() + self.data.as_ref().map_or(0, String::len) > MAX_MESSAGE {
            return Err(TooLong);
        }
        Ok(messages)
    }

    fn line(&mut self, line: &str) -> Option<Message> {
        if line.is_empty() {
            let (id, kind) = (self.id.take(), self.kind.take());
            return self.data.take().map(|data| Message { id, kind, data });
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "data" => match &mut self.data {
                None => self.data = Some(value.to_owned()),
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
            },
            "event" => self.kind = Some(value.to_owned()),
            "id" if !value.contains('\0') => self.id = Some(value.to_owned()),
            // Comments (empty field name) keep the connection alive; when to come again is decided here.
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &[u8] =
        b": hello\n\nid: 5.0\ndata: {\"a\":1}\n\nid:5.1\r\nevent: odd\r\ndata:x\r\ndata: y\r\n\r\nid: 6.0\ndata: half";

    #[test]
    fn messages_come_whole_however_the_bytes_are_cut() {
        let expected = [("5.0", "{\"a\":1}"), ("5.1", "x\ny")].map(|(id, data)| Message {
            id: Some(id.to_owned()),
            kind: (id == "5.1").then(|| "odd".to_owned()),
            data: data.to_owned(),
        });
        for size in 1..STREAM.len() {
            let mut parser = Parser::default();
            let got: Vec<Message> = STREAM
                .chunks(size)
                .flat_map(|piece| parser.feed(piece).unwrap())
                .collect();
            assert_eq!(got, expected, "in pieces of {size}");
        }
    }

    /// Each piece of a long line was searched for its end together with all before it: four megabytes in the pieces
    /// of a network took seconds, in single bytes hours.
    #[test]
    fn a_long_line_in_small_pieces_is_looked_through_once() {
        let mut parser = Parser::default();
        for _ in 0..1 << 20 {
            assert!(parser.feed(b"x").unwrap().is_empty());
        }
    }

    #[test]
    fn a_message_without_end_is_refused() {
        let mut parser = Parser::default();
        let piece = vec![b'x'; 1 << 20];
        let fed: Vec<_> = (0..5).map(|_| parser.feed(&piece).is_ok()).collect();
        assert_eq!(fed, [true, true, true, true, false]);
    }
}
