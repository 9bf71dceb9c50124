//! What a script or an agent of another make sends: plain HTTP requests and WebSocket frames, without
//! Regent's own client, so that what is tested is what stands on the wire.

use std::time::Duration;

use futures::{SinkExt as _, StreamExt as _};
use reqwest::header::HeaderMap;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use crate::harness::{Dev, PATIENCE};

/// What a node answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
    /// Null when it is no JSON.
    pub(crate) body: Value,
}

impl Answer {
    /// A header's text; empty when it is absent.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    }

    /// The body of an answer that must have this status.
    #[track_caller]
    pub(crate) fn ok(self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.text);
        self.body
    }

    /// The body of a refusal, which must be a problem document of this status and code.
    #[track_caller]
    pub(crate) fn problem(self, status: u16, code: &str) -> Value {
        assert_eq!(
            (self.status, self.body["code"].as_str()),
            (status, Some(code)),
            "{}",
            self.text
        );
        self.is_a_problem();
        self.body
    }

    /// Checks that it is a whole problem document.
    #[track_caller]
    pub(crate) fn is_a_problem(&self) {
        assert_eq!(
            self.header("content-type"),
            "application/problem+json",
            "{}",
            self.text
        );
        assert_eq!(self.body["status"], self.status, "{}", self.text);
        for member in ["type", "title", "detail", "code", "requestId"] {
            assert!(
                self.body[member].as_str().is_some_and(|text| !text.is_empty()),
                "no {member}: {}",
                self.text
            );
        }
        assert_eq!(self.body["requestId"], self.header("x-request-id"));
    }

    /// The fields that a problem names.
    pub(crate) fn fields(&self) -> Vec<String> {
        let fields = self.body["fields"].as_array().cloned().unwrap_or_default();
        fields
            .iter()
            .filter_map(|field| Some(field["field"].as_str()?.to_owned()))
            .collect()
    }
}

/// One node's REST API as one caller.
#[derive(Debug, Clone)]
pub(crate) struct Api {
    http: reqwest::Client,
    base: String,
    token: String,
}

impl Dev {
    /// A node's REST API as the admin.
    pub(crate) fn api(&self, node: usize) -> Api {
        Api {
            http: reqwest::Client::builder().timeout(PATIENCE).build().unwrap(),
            base: self.file.nodes[node].http.clone(),
            token: self.file.admin_token.clone(),
        }
    }
}

impl Api {
    /// The same node as another caller; nobody for an empty token.
    pub(crate) fn with_token(&self, token: &str) -> Self {
        Self {
            token: token.to_owned(),
            ..self.clone()
        }
    }

    /// A request to a path under `/api/v1`, or to one that begins with another `/`.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, self.url(path));
        if self.token.is_empty() {
            request
        } else {
            request.bearer_auth(&self.token)
        }
    }

    /// The URL of a path: `sessions` is under `/api/v1`, `/health` is not.
    pub(crate) fn url(&self, path: &str) -> String {
        if path.starts_with('/') {
            format!("{}{path}", self.base)
        } else {
            format!("{}/api/v1/{path}", self.base)
        }
    }

    /// Sends a request.
    pub(crate) async fn send(&self, request: RequestBuilder) -> Answer {
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await.unwrap();
        let body = serde_json::from_str(&text).unwrap_or(Value::Null);
        Answer {
            status,
            headers,
            text,
            body,
        }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(self.request(Method::GET, path)).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        self.send(self.request(Method::POST, path).json(&body)).await
    }

    pub(crate) async fn put(&self, path: &str, body: Value) -> Answer {
        self.send(self.request(Method::PUT, path).json(&body)).await
    }

    pub(crate) async fn patch(&self, path: &str, body: Value) -> Answer {
        self.send(self.request(Method::PATCH, path).json(&body)).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        self.send(self.request(Method::DELETE, path)).await
    }

    /// A POST under an idempotency key.
    pub(crate) async fn post_once(&self, path: &str, key: &str, body: Value) -> Answer {
        self.send(
            self.request(Method::POST, path)
                .header("idempotency-key", key)
                .json(&body),
        )
        .await
    }

    /// Makes a user, as the admin, and gives the same API as that user.
    pub(crate) async fn user(&self, name: &str, role: &str) -> Self {
        let user = json!({ "username": name, "password": PASSWORD, "role": role });
        self.post("users", user).await.ok(201);
        let token = self.post("tokens", json!({ "user": name })).await.ok(201);
        self.with_token(token["token"].as_str().unwrap())
    }

    /// Registers an agent, as the admin, and gives a token of its own.
    pub(crate) async fn agent(&self, register: Value) -> String {
        let id = register["agentId"].as_str().unwrap().to_owned();
        self.post("agents/register", register).await.ok(201);
        self.post(&format!("agents/{id}/token"), json!({})).await.ok(201)["token"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    /// The value of a metric that counts in whole numbers, summed over all of its labels that contain a text.
    pub(crate) async fn metric(&self, name: &str, labels: &str) -> u64 {
        let text = self.get("/metrics").await.text;
        let lines = text
            .lines()
            .filter(|line| line.split(['{', ' ']).next() == Some(name) && line.contains(labels));
        lines
            .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
            .sum()
    }
}

/// Of every user that [`Api::user`] makes.
pub(crate) const PASSWORD: &str = "correct horse battery";

/// What came over a socket.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Came {
    Frame(Value),
    /// The close frame's code (1006 when there was none) and reason; nothing follows.
    Closed(u16, String),
}

/// The WebSocket of an agent, frame by frame.
pub(crate) struct Socket {
    stream: WebSocketStream<MaybeTlsStream<TcpStream>>,
}

impl Socket {
    /// Connects as agents do: `query` is `agent_id=ID` with what else there may be.
    pub(crate) async fn connect(api: &Api, query: &str, key: &str) -> Self {
        Self::try_connect(api, query, key).await.unwrap()
    }

    /// The same; a refusal's status.
    pub(crate) async fn try_connect(api: &Api, query: &str, key: &str) -> Result<Self, u16> {
        let url = api
            .url(&format!("agents/connect?{query}"))
            .replacen("http", "ws", 1);
        let mut request = url.into_client_request().unwrap();
        request
            .headers_mut()
            .insert("X-Agent-API-Key", key.parse().unwrap());
        match tokio_tungstenite::connect_async(request).await {
            Ok((stream, _)) => Ok(Self { stream }),
            Err(tokio_tungstenite::tungstenite::Error::Http(response)) => Err(response.status().as_u16()),
            Err(error) => panic!("no WebSocket: {error}"),
        }
    }

    /// Sends a frame.
    pub(crate) async fn send(&mut self, frame: Value) {
        self.send_message(Message::text(frame.to_string())).await;
    }

    /// Sends anything.
    pub(crate) async fn send_message(&mut self, message: Message) {
        self.stream.send(message).await.unwrap();
    }

    /// Sends anything over a socket that may be closed by then.
    pub(crate) async fn try_send(&mut self, message: Message) -> bool {
        self.stream.send(message).await.is_ok()
    }

    /// What comes next; WebSocket pings are answered and passed over.
    pub(crate) async fn next(&mut self) -> Came {
        self.next_within(PATIENCE).await.expect("nothing came")
    }

    /// What comes within a time, if anything.
    pub(crate) async fn next_within(&mut self, within: Duration) -> Option<Came> {
        let deadline = tokio::time::Instant::now() + within;
        loop {
            let message = tokio::time::timeout_at(deadline, self.stream.next()).await.ok()?;
            return Some(match message {
                Some(Ok(Message::Text(text))) => Came::Frame(serde_json::from_str(&text).unwrap()),
                Some(Ok(Message::Close(Some(frame)))) => {
                    Came::Closed(frame.code.into(), frame.reason.to_string())
                }
                Some(Ok(Message::Close(None)) | Err(_)) | None => Came::Closed(1006, String::new()),
                Some(Ok(_)) => continue,
            });
        }
    }

    /// The payload of the next frame of a type; others are passed over.
    pub(crate) async fn frame(&mut self, kind: &str) -> Value {
        loop {
            match self.next().await {
                Came::Frame(mut frame) if frame["type"] == kind => return frame["payload"].take(),
                Came::Frame(_) => {}
                Came::Closed(code, reason) => panic!("closed with {code} ({reason}) instead of {kind}"),
            }
        }
    }

    /// Reads until it is closed: code and reason.
    pub(crate) async fn closed(&mut self) -> (u16, String) {
        loop {
            if let Came::Closed(code, reason) = self.next().await {
                return (code, reason);
            }
        }
    }

    /// Closes it from this side.
    pub(crate) async fn close(mut self) {
        let _ = self.stream.close(None).await;
        while let Some(Ok(_)) = self.stream.next().await {}
    }
}
