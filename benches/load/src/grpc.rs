//! gRPC to etcd over one HTTP/2 connection, as lean as [`crate::http`] is to Regent: h2 itself, five bytes of
//! framing, and prost. What tonic would add (buffers, layers, tasks) would be taken from etcd's share of the CPU.

use std::marker::PhantomData;
use std::net::SocketAddr;

use anyhow::{Context as _, bail, ensure};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use http::{HeaderValue, Method, Request, Uri, Version, header};
use prost::Message;
use tokio::net::TcpStream;

/// The largest message of an answer, in bytes.
const MAX_MESSAGE: usize = 64 << 20;
/// Flow control is not what is measured: windows are wide, for a stream and for the connection.
const WINDOW: u32 = 4 << 20;

/// A kept connection to one member. A clone shares it.
#[derive(Clone)]
pub(crate) struct Channel {
    sender: SendRequest<Bytes>,
    address: SocketAddr,
}

impl Channel {
    pub(crate) async fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = h2::client::Builder::new()
            .initial_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .enable_push(false)
            .handshake(stream)
            .await?;
        // Ends when the last sender and stream are dropped; its error reaches those who wait on it.
        tokio::spawn(connection);
        Ok(Self { sender, address })
    }

    /// A new connection to the same member.
    pub(crate) async fn again(&self) -> anyhow::Result<Self> {
        Self::open(self.address).await
    }

    /// A method of one request and one answer, to be called many times.
    pub(crate) fn method<Q, A>(&self, path: &str) -> anyhow::Result<Call<Q, A>> {
        Ok(Call {
            sender: self.sender.clone(),
            uri: Uri::builder()
                .scheme("http")
                .authority(self.address.to_string())
                .path_and_query(path)
                .build()?,
            of: PhantomData,
        })
    }

    /// Calls a method once.
    pub(crate) async fn once<Q: Message, A: Message + Default>(
        &self,
        path: &str,
        question: &Q,
    ) -> anyhow::Result<A> {
        self.method(path)?.call(question).await
    }

    /// Begins a method of many requests and many answers; the first request goes with it, because etcd
    /// sends the head of its answer only once it has one.
    pub(crate) async fn stream<Q: Message, A: Message + Default>(
        &self,
        path: &str,
        first: &Q,
    ) -> anyhow::Result<(Sender<Q>, Receiver<A>)> {
        let mut call = self.method::<Q, A>(path)?;
        let (response, stream) = call.begin(false).await?;
        let mut sender = Sender {
            stream,
            buffer: BytesMut::new(),
            of: PhantomData,
        };
        sender.send(first)?;
        let response = response.await?;
        ensure!(response.status() == 200, "status {}", response.status());
        check(response.headers())?;
        let receiver = Receiver {
            stream: response.into_body(),
            read: BytesMut::new(),
            of: PhantomData,
        };
        Ok((sender, receiver))
    }
}

/// A method of one request and one answer.
pub(crate) struct Call<Q, A> {
    sender: SendRequest<Bytes>,
    uri: Uri,
    of: PhantomData<fn(Q) -> A>,
}

impl<Q, A> Call<Q, A> {
    async fn begin(&mut self, end: bool) -> anyhow::Result<(h2::client::ResponseFuture, SendStream<Bytes>)> {
        let mut request = Request::new(());
        *request.method_mut() = Method::POST;
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = self.uri.clone();
        let headers = request.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
        std::future::poll_fn(|cx| self.sender.poll_ready(cx)).await?;
        Ok(self.sender.send_request(request, end)?)
    }
}

impl<Q: Message, A: Message + Default> Call<Q, A> {
    pub(crate) async fn call(&mut self, question: &Q) -> anyhow::Result<A> {
        let (response, mut stream) = self.begin(false).await?;
        stream.send_data(framed(question, &mut BytesMut::new())?, true)?;
        let response = response.await?;
        ensure!(response.status() == 200, "status {}", response.status());
        check(response.headers())?;
        let mut body = response.into_body();
        let mut read = BytesMut::new();
        let mut answer = None;
        while let Some(data) = body.data().await {
            let data = data?;
            body.flow_control().release_capacity(data.len())?;
            // Nearly always the whole message is in one frame, and not copied.
            if read.is_empty()
                && answer.is_none()
                && let Some(size) = whole(&data)?
                && data.len() == 5 + size
            {
                answer = Some(A::decode(data.slice(5..))?);
                continue;
            }
            read.extend_from_slice(&data);
            if answer.is_none()
                && let Some(message) = unframed(&mut read)?
            {
                answer = Some(A::decode(message)?);
            }
        }
        check(&body.trailers().await?.unwrap_or_default())?;
        answer.context("an answer without a message")
    }
}

/// The side of a stream that is written.
pub(crate) struct Sender<Q> {
    stream: SendStream<Bytes>,
    buffer: BytesMut,
    of: PhantomData<fn(Q)>,
}

impl<Q: Message> Sender<Q> {
    /// Hands a request over to the connection.
    pub(crate) fn send(&mut self, question: &Q) -> anyhow::Result<()> {
        Ok(self
            .stream
            .send_data(framed(question, &mut self.buffer)?, false)?)
    }
}

/// The side of a stream that is read.
pub(crate) struct Receiver<A> {
    stream: RecvStream,
    read: BytesMut,
    of: PhantomData<fn() -> A>,
}

impl<A: Message + Default> Receiver<A> {
    /// The next answer; an error when the server ended the stream. May be dropped while it waits.
    pub(crate) async fn next(&mut self) -> anyhow::Result<A> {
        loop {
            if let Some(message) = unframed(&mut self.read)? {
                return Ok(A::decode(message)?);
            }
            let Some(data) = self.stream.data().await else {
                check(&self.stream.trailers().await?.unwrap_or_default())?;
                bail!("the stream was ended");
            };
            let data = data?;
            self.stream.flow_control().release_capacity(data.len())?;
            self.read.extend_from_slice(&data);
        }
    }
}

/// A message with its five bytes before it: not compressed, and the length.
fn framed<Q: Message>(question: &Q, buffer: &mut BytesMut) -> anyhow::Result<Bytes> {
    let length = question.encoded_len();
    buffer.reserve(5 + length);
    buffer.put_u8(0);
    buffer.put_u32(u32::try_from(length)?);
    question.encode(buffer)?;
    Ok(buffer.split().freeze())
}

/// The size of the message that begins here, once its frame is there.
fn whole(read: &[u8]) -> anyhow::Result<Option<usize>> {
    let Some((head, _)) = read.split_first_chunk::<5>() else {
        return Ok(None);
    };
    ensure!(head[0] == 0, "a compressed message");
    let size = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    ensure!(size <= MAX_MESSAGE, "a message of {size} bytes");
    Ok((read.len() >= 5 + size).then_some(size))
}

/// Takes the first message, once it is whole.
fn unframed(read: &mut BytesMut) -> anyhow::Result<Option<Bytes>> {
    let Some(size) = whole(read)? else {
        return Ok(None);
    };
    read.advance(5);
    Ok(Some(read.split_to(size).freeze()))
}

/// The status stands in the trailers, or in the head when there is nothing else.
fn check(headers: &http::HeaderMap) -> anyhow::Result<()> {
    let Some(status) = headers.get("grpc-status").filter(|status| *status != "0") else {
        return Ok(());
    };
    let message = headers
        .get("grpc-message")
        .map(|m| String::from_utf8_lossy(m.as_bytes()));
    bail!("grpc-status {:?}: {}", status, message.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::LeaseKeepAliveRequest;

    #[test]
    fn messages_come_out_as_they_went_in_wherever_they_are_cut() {
        let mut wire = BytesMut::new();
        let mut buffer = BytesMut::new();
        for id in [7, 0, 1 << 60] {
            wire.extend_from_slice(&framed(&LeaseKeepAliveRequest { id }, &mut buffer).unwrap());
        }
        for cut in 0..wire.len() {
            let mut read = BytesMut::from(&wire[..cut]);
            let mut ids = Vec::new();
            let mut drain = |read: &mut BytesMut| {
                while let Some(message) = unframed(read).unwrap() {
                    ids.push(LeaseKeepAliveRequest::decode(message).unwrap().id);
                }
            };
            drain(&mut read);
            read.extend_from_slice(&wire[cut..]);
            drain(&mut read);
            assert_eq!(ids, [7, 0, 1 << 60], "cut at {cut}");
        }
    }

    #[test]
    fn a_status_that_is_not_0_is_an_error() {
        let mut headers = http::HeaderMap::new();
        assert!(check(&headers).is_ok());
        headers.insert("grpc-status", HeaderValue::from_static("0"));
        assert!(check(&headers).is_ok());
        headers.insert("grpc-status", HeaderValue::from_static("14"));
        assert!(check(&headers).is_err());
        assert!(whole(&[1, 0, 0, 0, 0]).is_err(), "compressed");
    }
}
