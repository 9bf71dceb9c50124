//! The network between the machines: connections that behave as TCP does.
//!
//! Bytes of one direction arrive in order, each after the delay of the link. What cannot pass (a partition, a machine
//! without power) is not lost but sent again and again with growing pauses, as TCP does, and arrives after the link is
//! whole; a connection therefore hangs in a partition and lives on after a short one. A program that ends closes its
//! connections; a machine that loses its power says nothing, and resets what still arrives once it is back.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::{Buf, Bytes};
use futures::future::BoxFuture;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use regent_raft::{Port, Sockets, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use xxhash_rust::xxh3::xxh3_64;

use crate::trace::Trace;

/// A machine, by its place in the list of all.
pub type Host = usize;

/// Bytes that may be under way or unread in one direction of a connection: what the windows of both ends hold.
const WINDOW: usize = 256 * 1024;
/// First and longest pause before something is sent again that did not pass, as Linux has them (but for the longest,
/// which is two minutes there).
const RESEND_MIN_MS: u64 = 200;
const RESEND_MAX_MS: u64 = 6_400;
/// Pause before a connection is asked for again.
const CONNECT_AGAIN_MS: u64 = 1_000;

/// One direction between two machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Nothing passes.
    pub cut: bool,
    /// Least delay in milliseconds; at least one.
    pub delay_ms: u64,
    /// Random delay on top, up to this.
    pub jitter_ms: u64,
}

impl Default for Link {
    fn default() -> Self {
        Self {
            cut: false,
            delay_ms: 1,
            jitter_ms: 1,
        }
    }
}

/// The network; clones share it.
#[derive(Clone)]
pub struct Network(Arc<Mutex<Inner>>);

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network").finish_non_exhaustive()
    }
}

struct Inner {
    now: u64,
    rng: StdRng,
    trace: Trace,
    links: BTreeMap<(Host, Host), Link>,
    ports: BTreeMap<(Host, u16), Listening>,
    /// Machines without power.
    dark: BTreeSet<Host>,
    connections: BTreeMap<u64, Connection>,
    next_connection: u64,
    due: BinaryHeap<Reverse<(u64, u64, Due)>>,
    next_due: u64,
    delivered: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    /// The request for a connection reaches the other machine.
    Ask(u64),
    /// The answer reaches who asked.
    Answered(u64, bool),
    /// Something arrives at this end.
    Arrive(u64, Side),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    Dialler,
    Accepter,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Dialler => Self::Accepter,
            Self::Accepter => Self::Dialler,
        }
    }
}

#[derive(Default)]
struct Listening {
    waiting: VecDeque<u64>,
    waker: Option<Waker>,
}

struct Connection {
    dialler: End,
    accepter: End,
    port: u16,
    state: Dialling,
    waker: Option<Waker>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialling {
    Asked,
    Refused,
    Made,
}

/// One end: what arrived there, and what is on its way to it.
struct End {
    host: Host,
    /// Its program has both halves, one, or none.
    reading: bool,
    writing: bool,
    /// The machine does not know it any more: it was without power.
    forgotten: bool,
    inbox: VecDeque<Bytes>,
    unread: usize,
    closed: bool,
    reset: bool,
    reader: Option<Waker>,
    /// Who waits to send to this end.
    sender: Option<Waker>,
    arriving: VecDeque<(u64, Parcel)>,
    under_way: usize,
    resend_ms: u64,
    scheduled: bool,
}

enum Parcel {
    Data(Bytes),
    Close,
    Reset,
}

impl End {
    fn new(host: Host) -> Self {
        Self {
            host,
            reading: true,
            writing: true,
            forgotten: false,
            inbox: VecDeque::new(),
            unread: 0,
            closed: false,
            reset: false,
            reader: None,
            sender: None,
            arriving: VecDeque::new(),
            under_way: 0,
            resend_ms: RESEND_MIN_MS,
            scheduled: false,
        }
    }

    fn is_gone(&self) -> bool {
        self.forgotten || !(self.reading || self.writing)
    }

    fn wake(&mut self) {
        for waker in [self.reader.take(), self.sender.take()].into_iter().flatten() {
            waker.wake();
        }
    }
}

impl Connection {
    fn end(&mut self, side: Side) -> &mut End {
        match side {
            Side::Dialler => &mut self.dialler,
            Side::Accepter => &mut self.accepter,
        }
    }
}

/// The address of a machine's port.
pub fn address(host: Host, port: u16) -> SocketAddr {
    let last = u8::try_from(host + 1).unwrap_or(u8::MAX);
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, last)), port)
}

fn host_of(address: SocketAddr) -> Option<Host> {
    match address.ip() {
        IpAddr::V4(ip) if ip.octets()[..3] == [10, 0, 0] => usize::from(ip.octets()[3]).checked_sub(1),
        IpAddr::V4(_) | IpAddr::V6(_) => None,
    }
}

impl Network {
    /// One on which everything passes.
    pub fn new(seed: u64, trace: Trace) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            now: 0,
            rng: StdRng::seed_from_u64(seed),
            trace,
            links: BTreeMap::new(),
            ports: BTreeMap::new(),
            dark: BTreeSet::new(),
            connections: BTreeMap::new(),
            next_connection: 0,
            due: BinaryHeap::new(),
            next_due: 0,
            delivered: 0,
        })))
    }

    /// The sockets of one machine.
    pub fn sockets(&self, host: Host) -> Arc<dyn Sockets> {
        Arc::new(HostSockets {
            network: self.clone(),
            host,
        })
    }

    /// Moves on to `now` and delivers what arrives until then.
    pub fn advance(&self, now: u64) {
        let mut inner = self.lock();
        inner.now = now;
        while let Some(Reverse((at, _, _))) = inner.due.peek()
            && *at <= now
        {
            if let Some(Reverse((_, _, due))) = inner.due.pop() {
                inner.happen(due);
            }
        }
    }

    /// What time it is.
    pub fn now(&self) -> u64 {
        self.lock().now
    }

    /// How many parcels were delivered.
    pub fn delivered(&self) -> u64 {
        self.lock().delivered
    }

    /// Changes the link from one machine to another.
    pub fn set(&self, from: Host, to: Host, change: impl FnOnce(&mut Link)) {
        change(self.lock().links.entry((from, to)).or_default());
    }

    /// Everything passes again, without delays.
    pub fn heal(&self) {
        self.lock().links.clear();
    }

    /// Breaks the connections between two machines, for both to see.
    pub fn reset(&self, a: Host, b: Host) {
        let mut inner = self.lock();
        let between: Vec<u64> = inner
            .connections
            .iter()
            .filter(|(_, connection)| {
                let ends = (connection.dialler.host, connection.accepter.host);
                ends == (a, b) || ends == (b, a)
            })
            .map(|(id, _)| *id)
            .collect();
        for id in between {
            inner.send(id, Side::Dialler, Parcel::Reset);
            inner.send(id, Side::Accepter, Parcel::Reset);
        }
    }

    /// The machine has no power: it says nothing any more, not even that its connections are closed.
    pub fn go_dark(&self, host: Host) {
        let mut inner = self.lock();
        inner.dark.insert(host);
        for connection in inner.connections.values_mut() {
            for side in [Side::Dialler, Side::Accepter] {
                let end = connection.end(side);
                if end.host == host {
                    end.forgotten = true;
                    end.inbox.clear();
                }
            }
        }
    }

    /// It has power again.
    pub fn light_up(&self, host: Host) {
        self.lock().dark.remove(&host);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // One thread; a panic under the lock ends the run.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn at(&mut self, at: u64, due: Due) {
        self.next_due += 1;
        self.due.push(Reverse((at, self.next_due, due)));
    }

    fn link(&self, from: Host, to: Host) -> Link {
        self.links.get(&(from, to)).copied().unwrap_or_default()
    }

    /// Whether something gets from one machine to the other now.
    fn passes(&self, from: Host, to: Host) -> bool {
        from == to || !(self.link(from, to).cut || self.dark.contains(&to))
    }

    fn delay(&mut self, from: Host, to: Host) -> u64 {
        let link = self.link(from, to);
        link.delay_ms.max(1) + self.rng.random_range(0..=link.jitter_ms)
    }

    fn happen(&mut self, due: Due) {
        match due {
            Due::Ask(id) => self.ask(id),
            Due::Answered(id, made) => self.answered(id, made),
            Due::Arrive(id, side) => self.arrive(id, side),
        }
    }

    fn ask(&mut self, id: u64) {
        let Some(connection) = self.connections.get(&id) else {
            return;
        };
        let (from, to, port) = (connection.dialler.host, connection.accepter.host, connection.port);
        if connection.dialler.is_gone() {
            self.connections.remove(&id);
            return;
        }
        if !self.passes(from, to) {
            return self.at(self.now + CONNECT_AGAIN_MS, Due::Ask(id));
        }
        let made = match self.ports.get_mut(&(to, port)) {
            None => false,
            Some(listening) => {
                listening.waiting.push_back(id);
                if let Some(waker) = listening.waker.take() {
                    waker.wake();
                }
                true
            }
        };
        self.trace.note(
            self.now,
            format_args!("connection {id} {from} to {to}:{port} {made}"),
        );
        let at = self.now + self.delay(to, from);
        self.at(at, Due::Answered(id, made));
    }

    fn answered(&mut self, id: u64, made: bool) {
        let Some(connection) = self.connections.get(&id) else {
            return;
        };
        let (from, to) = (connection.accepter.host, connection.dialler.host);
        if !self.passes(from, to) {
            return self.at(self.now + CONNECT_AGAIN_MS, Due::Answered(id, made));
        }
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        connection.state = if made { Dialling::Made } else { Dialling::Refused };
        if let Some(waker) = connection.waker.take() {
            waker.wake();
        }
        if !made {
            // Who asked finds that out and forgets it.
            return;
        }
        if connection.dialler.is_gone() {
            self.send(id, Side::Accepter, Parcel::Reset);
        }
    }

    /// Sends to `side`.
    fn send(&mut self, id: u64, side: Side, parcel: Parcel) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let from = connection.end(side.other()).host;
        let to = connection.end(side).host;
        let delay = self.delay(from, to);
        let now = self.now;
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let end = connection.end(side);
        let mut at = now + delay;
        if let Parcel::Data(bytes) = &parcel {
            end.under_way += bytes.len();
        }
        // In order, whatever the delays are.
        at = at.max(end.arriving.back().map_or(0, |(at, _)| *at));
        end.arriving.push_back((at, parcel));
        if !end.scheduled {
            end.scheduled = true;
            self.at(at, Due::Arrive(id, side));
        }
    }

    fn arrive(&mut self, id: u64, side: Side) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let (from, to) = (connection.end(side.other()).host, connection.end(side).host);
        connection.end(side).scheduled = false;
        if !self.passes(from, to) {
            let now = self.now;
            let Some(connection) = self.connections.get_mut(&id) else {
                return;
            };
            let end = connection.end(side);
            let again = now + end.resend_ms;
            end.resend_ms = (end.resend_ms * 2).min(RESEND_MAX_MS);
            end.scheduled = true;
            return self.at(again, Due::Arrive(id, side));
        }
        let now = self.now;
        let mut answer_reset = false;
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let end = connection.end(side);
        end.resend_ms = RESEND_MIN_MS;
        while let Some((at, _)) = end.arriving.front()
            && *at <= now
        {
            let Some((_, parcel)) = end.arriving.pop_front() else {
                break;
            };
            self.delivered += 1;
            match parcel {
                Parcel::Data(bytes) => {
                    let (length, sum) = (bytes.len(), xxh3_64(&bytes));
                    self.trace
                        .note(now, format_args!("{from} to {to} {id} {length} {sum:016x}"));
                    end.under_way -= length;
                    if end.forgotten || !end.reading {
                        answer_reset = true;
                    } else if !end.reset {
                        end.unread += length;
                        end.inbox.push_back(bytes);
                    }
                }
                Parcel::Close => {
                    self.trace.note(now, format_args!("{from} to {to} {id} closed"));
                    end.closed = true;
                }
                Parcel::Reset => {
                    self.trace.note(now, format_args!("{from} to {to} {id} reset"));
                    end.reset = true;
                    end.inbox.clear();
                }
            }
        }
        end.wake();
        let next = end.arriving.front().map(|(at, _)| *at);
        if let Some(next) = next {
            end.scheduled = true;
            self.at(next, Due::Arrive(id, side));
        }
        // Whoever waits to send to the end that was reset must hear of it as well.
        if let Some(connection) = self.connections.get_mut(&id)
            && connection.end(side).reset
        {
            connection.end(side.other()).wake();
        }
        if answer_reset {
            self.send(id, side.other(), Parcel::Reset);
        }
        self.forget(id);
    }

    /// Forgets a connection that neither end has any more and nothing is under way on.
    fn forget(&mut self, id: u64) {
        let over = |end: &End| end.is_gone() && end.arriving.is_empty();
        if self
            .connections
            .get(&id)
            .is_some_and(|connection| over(&connection.dialler) && over(&connection.accepter))
        {
            self.connections.remove(&id);
        }
    }

    /// The program lets go of one half, or both, of its end.
    fn let_go(&mut self, id: u64, side: Side, half: Half) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let end = connection.end(side);
        let (forgotten, was_writing) = (end.forgotten, end.writing);
        match half {
            Half::Reader => end.reading = false,
            Half::Writer => end.writing = false,
        }
        if half == Half::Writer && was_writing && !forgotten {
            self.send(id, side.other(), Parcel::Close);
        }
        self.forget(id);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Half {
    Reader,
    Writer,
}

#[derive(Debug)]
struct HostSockets {
    network: Network,
    host: Host,
}

impl Sockets for HostSockets {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>> {
        Box::pin(async move {
            let unknown = || io::Error::new(io::ErrorKind::NotFound, format!("{address} is nowhere"));
            let address: SocketAddr = address.parse().map_err(|_| unknown())?;
            let to = host_of(address).ok_or_else(unknown)?;
            let id = {
                let mut inner = self.network.lock();
                let id = inner.next_connection;
                inner.next_connection += 1;
                let connection = Connection {
                    dialler: End::new(self.host),
                    accepter: End::new(to),
                    port: address.port(),
                    state: Dialling::Asked,
                    waker: None,
                };
                inner.connections.insert(id, connection);
                let at = inner.now + inner.delay(self.host, to);
                inner.at(at, Due::Ask(id));
                id
            };
            // Lets go of the connection when the one who dials stops waiting.
            let stream = stream(&self.network, id, Side::Dialler);
            std::future::poll_fn(|context| {
                let mut inner = self.network.lock();
                let Some(connection) = inner.connections.get_mut(&id) else {
                    return Poll::Ready(Err(io::Error::from(io::ErrorKind::ConnectionAborted)));
                };
                match connection.state {
                    Dialling::Made => Poll::Ready(Ok(())),
                    Dialling::Refused => Poll::Ready(Err(io::ErrorKind::ConnectionRefused.into())),
                    Dialling::Asked => {
                        connection.waker = Some(context.waker().clone());
                        Poll::Pending
                    }
                }
            })
            .await
            .inspect_err(|_| {
                self.network.lock().connections.remove(&id);
            })?;
            Ok(stream)
        })
    }

    fn bind(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn Port>>> {
        Box::pin(async move {
            let key = (self.host, address.port());
            let mut inner = self.network.lock();
            if inner.ports.contains_key(&key) {
                return Err(io::ErrorKind::AddrInUse.into());
            }
            inner.ports.insert(key, Listening::default());
            let port: Box<dyn Port> = Box::new(HostPort {
                network: self.network.clone(),
                key,
            });
            Ok(port)
        })
    }
}

struct HostPort {
    network: Network,
    key: (Host, u16),
}

impl Port for HostPort {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<(Stream, SocketAddr)>> {
        Box::pin(std::future::poll_fn(|context| {
            let mut inner = self.network.lock();
            loop {
                let Some(listening) = inner.ports.get_mut(&self.key) else {
                    return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
                };
                let Some(id) = listening.waiting.pop_front() else {
                    listening.waker = Some(context.waker().clone());
                    return Poll::Pending;
                };
                // Who asked for it may have gone again.
                if let Some(connection) = inner.connections.get(&id) {
                    let from = address(connection.dialler.host, 0);
                    drop(inner);
                    return Poll::Ready(Ok((stream(&self.network, id, Side::Accepter), from)));
                }
            }
        }))
    }
}

impl Drop for HostPort {
    fn drop(&mut self) {
        let mut inner = self.network.lock();
        let Some(listening) = inner.ports.remove(&self.key) else {
            return;
        };
        for id in listening.waiting {
            // Accepted by the machine, but never by the program.
            if let Some(connection) = inner.connections.get_mut(&id) {
                let forgotten = connection.accepter.forgotten;
                connection.accepter.reading = false;
                connection.accepter.writing = false;
                if !forgotten {
                    inner.send(id, Side::Dialler, Parcel::Reset);
                }
            }
        }
    }
}

fn stream(network: &Network, id: u64, side: Side) -> Stream {
    Stream {
        reader: Box::new(Reader {
            network: network.clone(),
            id,
            side,
        }),
        writer: Box::new(Writer {
            network: network.clone(),
            id,
            side,
        }),
        proven: None,
    }
}

struct Reader {
    network: Network,
    id: u64,
    side: Side,
}

impl AsyncRead for Reader {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut inner = self.network.lock();
        let Some(connection) = inner.connections.get_mut(&self.id) else {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        };
        let end = connection.end(self.side);
        if end.reset {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let mut read = 0;
        while let Some(first) = end.inbox.front_mut()
            && buffer.remaining() > 0
        {
            let count = first.len().min(buffer.remaining());
            buffer.put_slice(&first[..count]);
            first.advance(count);
            read += count;
            if first.is_empty() {
                end.inbox.pop_front();
            }
        }
        if read > 0 {
            end.unread -= read;
            if let Some(sender) = end.sender.take() {
                sender.wake();
            }
            return Poll::Ready(Ok(()));
        }
        if end.closed {
            return Poll::Ready(Ok(()));
        }
        end.reader = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.network.lock().let_go(self.id, self.side, Half::Reader);
    }
}

struct Writer {
    network: Network,
    id: u64,
    side: Side,
}

impl AsyncWrite for Writer {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut inner = self.network.lock();
        let Some(connection) = inner.connections.get_mut(&self.id) else {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        };
        let own = connection.end(self.side);
        if own.reset || !own.writing {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let other = connection.end(self.side.other());
        let room = WINDOW.saturating_sub(other.under_way + other.unread);
        if room == 0 {
            other.sender = Some(context.waker().clone());
            return Poll::Pending;
        }
        let count = bytes.len().min(room);
        let data = Parcel::Data(Bytes::copy_from_slice(&bytes[..count]));
        inner.send(self.id, self.side.other(), data);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.network.lock().let_go(self.id, self.side, Half::Writer);
        Poll::Ready(Ok(()))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.network.lock().let_go(self.id, self.side, Half::Writer);
    }
}
