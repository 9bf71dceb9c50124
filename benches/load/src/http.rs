//! HTTP/1.1 over one kept connection, as little as a load generator needs: its CPU is taken from the servers
//! that it measures. Requests are written from prepared parts, answers are read by their length or their
//! chunks, and nothing else is understood.

use std::net::SocketAddr;

use anyhow::{Context as _, bail, ensure};
use bytes::{Buf as _, BytesMut};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// The largest head of an answer, in bytes; a larger one is not from Regent.
const MAX_HEAD: usize = 16 << 10;
/// The largest body of an answer, in bytes: above every page of a list.
const MAX_BODY: usize = 64 << 20;

/// A kept connection to one node.
pub(crate) struct Connection {
    stream: TcpStream,
    address: SocketAddr,
    /// ` HTTP/1.1`, and the headers that every request has.
    common: Vec<u8>,
    out: Vec<u8>,
    read: BytesMut,
    body: Vec<u8>,
}

/// An answer that was read whole.
#[derive(Debug)]
pub(crate) struct Answer<'a> {
    pub(crate) status: u16,
    pub(crate) body: &'a [u8],
}

impl Answer<'_> {
    /// The answer, if the request was done.
    pub(crate) fn ok(self) -> anyhow::Result<Self> {
        ensure!(
            (200..300).contains(&self.status),
            "status {}: {}",
            self.status,
            String::from_utf8_lossy(self.body)
        );
        Ok(self)
    }

    /// The body, which must be JSON.
    pub(crate) fn json(self) -> anyhow::Result<Value> {
        serde_json::from_slice(self.ok()?.body).context("an answer that is not JSON")
    }
}

impl Connection {
    pub(crate) async fn open(address: SocketAddr, token: &str) -> anyhow::Result<Self> {
        let common = format!(
            " HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {token}\r\ncontent-type: application/json\r\n"
        );
        Ok(Self {
            stream: connect(address).await?,
            address,
            common: common.into_bytes(),
            out: Vec::with_capacity(1024),
            read: BytesMut::with_capacity(4096),
            body: Vec::new(),
        })
    }

    /// A new connection in place of one that failed: what was left on it is gone.
    pub(crate) async fn reopen(&mut self) -> anyhow::Result<()> {
        self.stream = connect(self.address).await?;
        self.read.clear();
        Ok(())
    }

    /// Sends a request and reads the answer whole.
    pub(crate) async fn request(
        &mut self,
        method: &str,
        path: &str,
        body: &[u8],
    ) -> anyhow::Result<Answer<'_>> {
        self.send(method, path, body).await?;
        let head = self.head().await?;
        self.body.clear();
        match head.length {
            Length::Fixed(length) => {
                while self.read.len() < length {
                    self.fill().await?;
                }
                self.body.extend_from_slice(&self.read[..length]);
                self.read.advance(length);
            }
            Length::Chunked => {
                let mut chunks = Chunks::default();
                while !chunks.take(&mut self.read, &mut self.body)? {
                    ensure!(self.body.len() <= MAX_BODY, "a body without end");
                    self.fill().await?;
                }
            }
        }
        Ok(Answer {
            status: head.status,
            body: &self.body,
        })
    }

    /// Sends a request whose answer has no end, such as server-sent events.
    pub(crate) async fn stream(mut self, path: &str) -> anyhow::Result<Stream> {
        self.send("GET", path, b"").await?;
        let head = self.head().await?;
        self.body.clear();
        ensure!(head.status == 200, "status {} instead of a stream", head.status);
        ensure!(head.length == Length::Chunked, "a stream that is not chunked");
        Ok(Stream {
            connection: self,
            chunks: Chunks::default(),
            given: 0,
            ended: false,
        })
    }

    async fn send(&mut self, method: &str, path: &str, body: &[u8]) -> anyhow::Result<()> {
        self.out.clear();
        self.out.extend_from_slice(method.as_bytes());
        self.out.push(b' ');
        self.out.extend_from_slice(path.as_bytes());
        self.out.extend_from_slice(&self.common);
        if method != "GET" {
            self.out.extend_from_slice(b"content-length: ");
            self.out.extend_from_slice(body.len().to_string().as_bytes());
            self.out.extend_from_slice(b"\r\n");
        }
        self.out.extend_from_slice(b"\r\n");
        self.out.extend_from_slice(body);
        Ok(self.stream.write_all(&self.out).await?)
    }

    async fn head(&mut self) -> anyhow::Result<Head> {
        loop {
            if let Some(head) = Head::parse(&self.read)? {
                self.read.advance(head.bytes);
                return Ok(head);
            }
            ensure!(self.read.len() < MAX_HEAD, "a head without end");
            self.fill().await?;
        }
    }

    async fn fill(&mut self) -> anyhow::Result<()> {
        self.read.reserve(4096);
        ensure!(
            self.stream.read_buf(&mut self.read).await? > 0,
            "the node closed the connection"
        );
        Ok(())
    }
}

async fn connect(address: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// An answer without end.
pub(crate) struct Stream {
    connection: Connection,
    chunks: Chunks,
    /// What was given out of the connection's `body`.
    given: usize,
    /// Whether the last chunk was seen.
    ended: bool,
}

impl Stream {
    /// The next line, without its end; `None` once the answer has ended. May be dropped while it waits.
    pub(crate) async fn line(&mut self) -> anyhow::Result<Option<&[u8]>> {
        let mut searched = self.given;
        let end = loop {
            let body = &mut self.connection.body;
            if let Some(found) = memchr::memchr(b'\n', &body[searched..]) {
                break searched + found;
            }
            ensure!(body.len() <= MAX_BODY, "a line without end");
            body.drain(..self.given);
            self.given = 0;
            searched = body.len();
            if self.ended {
                return Ok(None);
            }
            self.ended = self.chunks.take(&mut self.connection.read, body)?;
            if body.len() == searched && !self.ended {
                self.connection.fill().await?;
            }
        };
        let line = &self.connection.body[self.given..end];
        self.given = end + 1;
        Ok(Some(line))
    }
}

/// How long a body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Length {
    Fixed(usize),
    Chunked,
}

/// What is needed of the head of an answer.
#[derive(Debug, PartialEq, Eq)]
struct Head {
    status: u16,
    length: Length,
    /// Its own size.
    bytes: usize,
}

impl Head {
    /// `None` while there is more to come.
    fn parse(read: &[u8]) -> anyhow::Result<Option<Self>> {
        let Some(end) = memchr::memmem::find(read, b"\r\n\r\n") else {
            return Ok(None);
        };
        let mut lines = read[..end]
            .split(|byte| *byte == b'\n')
            .map(<[u8]>::trim_ascii_end);
        let first = lines.next().unwrap_or_default();
        let status = first
            .strip_prefix(b"HTTP/1.1 ")
            .and_then(|rest| std::str::from_utf8(rest.get(..3)?).ok()?.parse().ok())
            .with_context(|| format!("not an answer: {}", String::from_utf8_lossy(first)))?;
        let mut length = None;
        for line in lines {
            let Some(colon) = memchr::memchr(b':', line) else {
                bail!("not a header: {}", String::from_utf8_lossy(line));
            };
            let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
            if name.eq_ignore_ascii_case(b"content-length") {
                let value = std::str::from_utf8(value)?.parse().context("content-length")?;
                ensure!(value <= MAX_BODY, "a body of {value} bytes");
                length = Some(Length::Fixed(value));
            } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
                ensure!(
                    value.eq_ignore_ascii_case(b"chunked"),
                    "an encoding that is not known"
                );
                length = Some(Length::Chunked);
            }
        }
        let length = match length {
            _ if status == 204 || status == 304 => Length::Fixed(0),
            Some(length) => length,
            None => bail!("an answer of unknown length"),
        };
        Ok(Some(Self {
            status,
            length,
            bytes: end + 4,
        }))
    }
}

/// Takes the chunks of a body apart, as they come.
#[derive(Debug, Default)]
struct Chunks {
    /// Of the present chunk, with the line end that follows it.
    left: usize,
    last: bool,
}

impl Chunks {
    /// Moves what is there from `read` to `body`; true once the last chunk was seen.
    fn take(&mut self, read: &mut BytesMut, body: &mut Vec<u8>) -> anyhow::Result<bool> {
        loop {
            if self.left > 0 {
                let data = self.left.saturating_sub(2).min(read.len());
                body.extend_from_slice(&read[..data]);
                let ends = (self.left - data).min(2).min(read.len() - data);
                // The line end is skipped only after the data is whole.
                let skipped = if self.left - data <= 2 { ends } else { 0 };
                read.advance(data + skipped);
                self.left -= data + skipped;
                if self.left > 0 {
                    return Ok(false);
                }
                if self.last {
                    return Ok(true);
                }
            }
            let Some(end) = memchr::memmem::find(read, b"\r\n") else {
                ensure!(read.len() < 64, "a chunk's size without end");
                return Ok(false);
            };
            let text = std::str::from_utf8(&read[..end])?;
            let text = text.split(';').next().unwrap_or_default().trim();
            let size = usize::from_str_radix(text, 16).context("a chunk's size")?;
            ensure!(size <= MAX_BODY, "a chunk of {size} bytes");
            read.advance(end + 2);
            self.last = size == 0;
            self.left = size + 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_gives_status_and_length() {
        let head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n{}";
        let parsed = Head::parse(head).unwrap().unwrap();
        assert_eq!(
            (parsed.status, parsed.length, parsed.bytes),
            (200, Length::Fixed(12), head.len() - 2)
        );
        let head = b"HTTP/1.1 200 OK\r\ntransfer-encoding:chunked\r\n\r\n";
        assert_eq!(Head::parse(head).unwrap().unwrap().length, Length::Chunked);
        let head = b"HTTP/1.1 204 No Content\r\nx-request-id: 1\r\n\r\n";
        assert_eq!(Head::parse(head).unwrap().unwrap().length, Length::Fixed(0));
    }

    #[test]
    fn a_head_that_is_cut_anywhere_waits_for_more() {
        let head = b"HTTP/1.1 409 Conflict\r\ncontent-length: 2\r\n\r\n";
        for cut in 0..head.len() {
            assert_eq!(Head::parse(&head[..cut]).unwrap(), None, "at {cut}");
        }
        assert_eq!(Head::parse(head).unwrap().unwrap().status, 409);
    }

    #[test]
    fn what_is_not_an_answer_is_refused() {
        for head in [
            "SSH-2.0\r\n\r\n",
            "HTTP/1.1 abc\r\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n",
            "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
            "HTTP/1.1 200 OK\r\nserver: x\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n",
        ] {
            assert!(Head::parse(head.as_bytes()).is_err(), "{head:?}");
        }
    }

    #[test]
    fn chunks_are_joined_wherever_they_are_cut() {
        let wire = b"5\r\nhello\r\n1;x=y\r\n \r\nA\r\n0123\r\n6789\r\n0\r\n\r\n";
        for cut in 0..=wire.len() {
            let (mut chunks, mut read, mut body) = (Chunks::default(), BytesMut::new(), Vec::new());
            read.extend_from_slice(&wire[..cut]);
            let early = chunks.take(&mut read, &mut body).unwrap();
            assert_eq!(early, cut == wire.len(), "at {cut}");
            read.extend_from_slice(&wire[cut..]);
            if !early {
                assert!(chunks.take(&mut read, &mut body).unwrap(), "at {cut}");
            }
            assert_eq!(body, b"hello 0123\r\n6789", "at {cut}");
            assert!(read.is_empty());
        }
    }

    /// A server that reads one request and answers with these pieces, one write each.
    async fn server(pieces: &'static [&'static [u8]]) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            let mut request = vec![0; 4096];
            let size = stream.read(&mut request).await.unwrap();
            assert!(request[..size].starts_with(b"GET /x HTTP/1.1\r\nhost: 127.0.0.1:"));
            for piece in pieces {
                stream.write_all(piece).await.unwrap();
                tokio::task::yield_now().await;
            }
        });
        address
    }

    #[tokio::test]
    async fn two_answers_that_come_at_once_are_told_apart() {
        let ok = "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\none\
                  HTTP/1.1 404 Not Found\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n";
        let address = server(Box::leak(Box::new([ok.as_bytes()]))).await;
        let mut connection = Connection::open(address, "t").await.unwrap();
        let answer = connection.request("GET", "/x", b"").await.unwrap();
        assert_eq!((answer.status, answer.body), (200, &b"one"[..]));
        let answer = connection.request("GET", "/x", b"").await.unwrap();
        assert_eq!((answer.status, answer.body), (404, &b"{}"[..]));
    }

    #[tokio::test]
    async fn lines_of_a_stream_are_whole_and_then_it_ends() {
        let address = server(&[
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\ndata: a\n\n",
            b"\r\n4\r\ndata\r\n",
            b"6\r\n: b\nc\n\r\n0\r\n\r\n",
        ])
        .await;
        let mut stream = Connection::open(address, "t")
            .await
            .unwrap()
            .stream("/x")
            .await
            .unwrap();
        let mut lines = Vec::new();
        while let Some(line) = stream.line().await.unwrap() {
            lines.push(String::from_utf8(line.to_vec()).unwrap());
        }
        assert_eq!(lines, ["data: a", "", "data: b", "c"]);
    }

    #[test]
    fn a_chunk_without_a_size_is_refused() {
        let mut read = BytesMut::from(&b"xyz\r\n"[..]);
        assert!(Chunks::default().take(&mut read, &mut Vec::new()).is_err());
    }
}
