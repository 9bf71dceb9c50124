//! A client of the REST API: plain HTTP over the simulated network.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use regent_raft::Sockets;
use serde_json::Value;
use std::sync::Arc;
use tokio::time::timeout;

use super::World;
use crate::cluster::{HTTP, TOKEN};
use crate::network::{Host, address};

/// How long a connection may take.
const CONNECT_WITHIN: Duration = Duration::from_millis(700);
/// How long an answer may take. A node's own deadline is 10 s; nobody waits for a dead one that long.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(4);

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The `ETag`, if there is one.
    pub etag: Option<String>,
    /// The body; null when it is not JSON.
    pub body: Value,
}

impl Answer {
    /// The code of a problem document.
    pub fn code(&self) -> &str {
        self.body["code"].as_str().unwrap_or_default()
    }
}

/// What became of a request.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// It was done, or what was asked for is here.
    Done(Answer),
    /// It was certainly not done.
    Refused(Answer),
    /// It never left this machine.
    NotSent,
    /// Nobody knows.
    Unknown,
}

/// A request.
#[derive(Debug, Clone)]
pub struct Ask {
    /// The method.
    pub method: Method,
    /// Path and query below `/api/v1`.
    pub path: String,
    /// Headers.
    pub headers: Vec<(&'static str, String)>,
    /// The body; null for none.
    pub body: Value,
}

impl Ask {
    /// Without headers.
    pub fn new(method: Method, path: impl Into<String>, body: Value) -> Self {
        Self {
            method,
            path: path.into(),
            headers: Vec::new(),
            body,
        }
    }

    /// With one more header.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

/// A client with at most one connection.
pub struct Client {
    world: World,
    sockets: Arc<dyn Sockets>,
    name: String,
    connection: Option<(Host, SendRequest<Full<Bytes>>)>,
}

impl Client {
    /// One on this machine.
    pub fn new(world: World, host: Host, name: String) -> Self {
        let sockets = world.network.sockets(host);
        Self {
            world,
            sockets,
            name,
            connection: None,
        }
    }

    /// Asks a node and waits for the answer.
    pub async fn ask(&mut self, node: Host, ask: Ask) -> Outcome {
        self.ask_within(node, ask, ANSWER_WITHIN).await
    }

    /// The same with a bound of one's own.
    pub async fn ask_within(&mut self, node: Host, ask: Ask, within: Duration) -> Outcome {
        let what = format!("{} {}", ask.method, ask.path);
        let outcome = self.send(node, ask, within).await;
        let said = match &outcome {
            Outcome::Done(answer) | Outcome::Refused(answer) => {
                format!("{} {}", answer.status, answer.code())
            }
            Outcome::NotSent => "not sent".to_owned(),
            Outcome::Unknown => "unknown".to_owned(),
        };
        let kind = match &outcome {
            Outcome::Done(_) => "done",
            Outcome::Refused(_) => "refused",
            Outcome::NotSent => "not sent",
            Outcome::Unknown => "unknown",
        };
        let now = self.world.now();
        *self.world.book().answers.entry(kind).or_default() += 1;
        let name = &self.name;
        self.world
            .trace
            .note(now, format_args!("{name} {what} at {node}: {said}"));
        outcome
    }

    /// Opens a stream at a node: its status, and its body as it comes. It has a connection of its own, which ends with
    /// the body. Gives nothing when there is no answer.
    pub async fn open(&mut self, node: Host, ask: Ask) -> Option<(u16, Incoming)> {
        let what = format!("{} {}", ask.method, ask.path);
        let opened = async {
            let mut connection = self.connect(node).await?;
            let sent = timeout(ANSWER_WITHIN, connection.send_request(request(node, ask)));
            let response = sent.await.ok()?.ok()?;
            Some((response.status().as_u16(), response.into_body()))
        };
        let opened = opened.await;
        let said = match &opened {
            Some((status, _)) => status.to_string(),
            None => "no answer".to_owned(),
        };
        let (now, name) = (self.world.now(), &self.name);
        self.world
            .trace
            .note(now, format_args!("{name} {what} at {node}: {said}"));
        opened
    }

    async fn send(&mut self, node: Host, ask: Ask, within: Duration) -> Outcome {
        let Some(mut connection) = self.connect(node).await else {
            return Outcome::NotSent;
        };
        let request = request(node, ask);
        let answer = timeout(within, async {
            let response = connection.send_request(request).await?;
            let status = response.status().as_u16();
            let etag = response.headers().get("etag");
            let etag = etag.and_then(|etag| etag.to_str().ok()).map(str::to_owned);
            let body = response.into_body().collect().await?.to_bytes();
            Ok::<_, hyper::Error>(Answer {
                status,
                etag,
                body: serde_json::from_slice(&body).unwrap_or(Value::Null),
            })
        });
        let Ok(Ok(answer)) = answer.await else {
            return Outcome::Unknown;
        };
        self.connection = Some((node, connection));
        match answer.status {
            200..300 => Outcome::Done(answer),
            // Certainly not done, as the API promises.
            400..500 | 503 => Outcome::Refused(answer),
            504 => Outcome::Unknown,
            _ => {
                let now = self.world.now();
                let surprise = format!("{now}: {} was told {answer:?}", self.name);
                self.world.book().surprises.push(surprise);
                Outcome::Unknown
            }
        }
    }

    async fn connect(&mut self, node: Host) -> Option<SendRequest<Full<Bytes>>> {
        if let Some((to, connection)) = self.connection.take()
            && to == node
            && connection.is_ready()
        {
            return Some(connection);
        }
        let to = address(node, HTTP).to_string();
        let stream = timeout(CONNECT_WITHIN, self.sockets.connect(&to))
            .await
            .ok()?
            .ok()?;
        let stream = TokioIo::new(tokio::io::join(stream.reader, stream.writer));
        let (connection, driver) = handshake(stream).await.ok()?;
        tokio::spawn(driver);
        Some(connection)
    }
}

fn request(node: Host, ask: Ask) -> Request<Full<Bytes>> {
    let mut request = Request::builder()
        .method(ask.method)
        .uri(format!("/api/v1{}", ask.path))
        .header("host", address(node, HTTP).to_string())
        .header("authorization", format!("Bearer {TOKEN}"));
    for (name, value) in ask.headers {
        request = request.header(name, value);
    }
    let body = if ask.body.is_null() {
        Bytes::new()
    } else {
        request = request.header("content-type", "application/json");
        Bytes::from(ask.body.to_string())
    };
    request
        .body(Full::new(body))
        .expect("the headers are plain words")
}
