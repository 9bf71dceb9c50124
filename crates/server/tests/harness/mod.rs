//! Real nodes in this process, and an agent made of a bare WebSocket.
//!
//! Nodes keep their log in memory and listen on free ports. Every wait is for a condition, with one
//! generous bound that only a failing test reaches.

#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used)] // each test uses a part of it

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::time::Duration;

use futures::{SinkExt, StreamExt};
use regent_server::{Options, Server};
use regent_types::NodeId;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

/// Only a failing test waits this long.
pub const PATIENCE: Duration = Duration::from_secs(90);
pub const TOKEN: &str = "regent_the_first_token_of_this_test";

pub struct Node {
    pub server: Option<Server>,
    pub http: String,
    client: reqwest::Client,
    _data: tempfile::TempDir,
}

/// How the nodes of a test are set.
#[derive(Clone, Copy)]
pub struct Setting {
    pub heartbeat: Duration,
    pub stale_after: Duration,
}

impl Default for Setting {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(1),
            stale_after: Duration::from_secs(20),
        }
    }
}

impl Node {
    /// A node alone in its cluster, ready.
    pub async fn single(setting: Setting) -> Self {
        Self::cluster(1, setting).await.remove(0)
    }

    /// `size` nodes of one cluster, all ready.
    pub async fn cluster(size: u64, setting: Setting) -> Vec<Self> {
        let listeners: Vec<TcpListener> = (0..size)
            .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
            .collect();
        let members: BTreeMap<NodeId, String> = listeners
            .iter()
            .zip(1..)
            .map(|(listener, id)| (NodeId(id), listener.local_addr().unwrap().to_string()))
            .collect();
        let mut nodes = Vec::new();
        for (listener, id) in listeners.into_iter().zip(1..) {
            let data = tempfile::tempdir().unwrap();
            let mut options = Options::single(data.path().to_owned(), b"a secret of sixteen bytes".to_vec());
            options.node = NodeId(id);
            options.members = members.clone();
            options.heartbeat = setting.heartbeat;
            options.stale_after = setting.stale_after;
            options.bootstrap_token = (id == 1).then(|| TOKEN.to_owned());
            options.memory = Some(regent_server::MemoryDisk::default());
            options.dev = true;
            options.peer_listener = Some(listener);
            let server = Server::start(options).await.unwrap();
            let http = server.http_addr().to_string();
            nodes.push(Self {
                server: Some(server),
                http,
                client: reqwest::Client::new(),
                _data: data,
            });
        }
        for node in &nodes {
            eventually("the node is ready", async || {
                let response = node
                    .client
                    .get(format!("http://{}/readyz", node.http))
                    .send()
                    .await
                    .ok()?;
                response.status().is_success().then_some(())
            })
            .await;
        }
        nodes
    }

    pub async fn call(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        self.call_as(TOKEN, method, path, body).await
    }

    pub async fn call_as(&self, token: &str, method: &str, path: &str, body: Value) -> (u16, Value) {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let mut request = self
            .client
            .request(method, format!("http://{}/api/v1{path}", self.http))
            .bearer_auth(token);
        if !body.is_null() {
            request = request
                .header("content-type", "application/json")
                .body(body.to_string());
        }
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        let text = response.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    pub async fn get(&self, path: &str) -> Value {
        let (status, body) = self.call("GET", path, Value::Null).await;
        assert_eq!(status, 200, "GET {path}: {body}");
        body
    }

    pub async fn post(&self, path: &str, body: Value) -> Value {
        let (status, answer) = self.call("POST", path, body).await;
        assert!((200..300).contains(&status), "POST {path}: {status} {answer}");
        answer
    }

    /// Reads until the record is as wanted.
    pub async fn until(&self, path: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let found = tokio::time::timeout(PATIENCE, async {
            loop {
                last = self.call("GET", path, Value::Null).await.1;
                if wanted(&last) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        assert!(found.await.is_ok(), "{path}: {what}: {last}");
        last
    }

    pub async fn register(&self, agent: &str) -> Value {
        let capacity = json!({"maxSessions": 100, "cpu": "64 cores", "memory": "256Gi"});
        self.post(
            "/agents/register",
            json!({"agentId": agent, "platform": "process", "capacity": capacity}),
        )
        .await
    }

    pub async fn create_session(&self) -> String {
        self.create_session_with(json!({})).await
    }

    pub async fn create_session_with(&self, fields: Value) -> String {
        let mut body = json!({"template": "demo"});
        body.as_object_mut()
            .unwrap()
            .extend(fields.as_object().unwrap().clone());
        let session = self.post("/sessions", body).await;
        session["name"].as_str().unwrap().to_owned()
    }

    /// An agent that has said hello and was welcomed.
    pub async fn agent(&self, id: &str) -> Agent {
        self.agent_with(id, json!([])).await
    }

    pub async fn agent_with(&self, id: &str, sessions: Value) -> Agent {
        let mut agent = self.dial(id, TOKEN).await.unwrap();
        agent
            .send(
                "hello",
                json!({"protocol": 3, "runtimeId": format!("runtime of {id}"), "sessions": sessions}),
            )
            .await;
        agent.welcome = agent.expect("welcome").await;
        agent
    }

    /// A socket that has said nothing yet; or the HTTP status and body of the refusal.
    pub async fn dial(&self, id: &str, token: &str) -> Result<Agent, (u16, Value)> {
        let url = format!("ws://{}/api/v1/agents/connect?agent_id={id}", self.http);
        let mut request = url.into_client_request().unwrap();
        if !token.is_empty() {
            request
                .headers_mut()
                .insert("X-Agent-API-Key", token.parse().unwrap());
        }
        match connect_async(request).await {
            Ok((socket, _)) => Ok(Agent {
                socket,
                welcome: Value::Null,
            }),
            Err(Error::Http(response)) => {
                let body = response.body().as_deref().unwrap_or_default();
                Err((
                    response.status().as_u16(),
                    serde_json::from_slice(body).unwrap_or(Value::Null),
                ))
            }
            Err(other) => panic!("{other}"),
        }
    }

    /// Sends a heartbeat over and over until the node has heard one later than `before`; gives when.
    pub async fn hear(&self, agent: &mut Agent, id: &str, frame: &str, before: &Value) -> Value {
        eventually("a heartbeat is heard", async || {
            agent.send_text(frame.to_owned()).await;
            let heard = self.get(&format!("/agents/{id}")).await["lastHeartbeat"].clone();
            (heard.is_string() && heard != *before).then_some(heard)
        })
        .await
    }

    pub async fn stop(&mut self) {
        self.server.take().unwrap().shutdown().await;
    }
}

pub struct Agent {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    pub welcome: Value,
}

/// How a connection ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Closed {
    pub code: u16,
    pub reason: String,
}

impl Agent {
    pub async fn send(&mut self, kind: &str, payload: Value) {
        self.send_text(
            json!({"type": kind, "timestamp": "2026-01-01T00:00:00Z", "payload": payload}).to_string(),
        )
        .await;
    }

    pub async fn send_text(&mut self, text: String) {
        self.socket.send(Message::text(text)).await.unwrap();
    }

    pub async fn send_binary(&mut self, bytes: Vec<u8>) {
        self.socket.send(Message::binary(bytes)).await.unwrap();
    }

    /// The next text frame, or how the connection ended.
    pub async fn next(&mut self) -> Result<Value, Closed> {
        let next = async {
            loop {
                match self.socket.next().await {
                    Some(Ok(Message::Text(text))) => {
                        return Ok(serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}")));
                    }
                    Some(Ok(Message::Close(frame))) => {
                        return Err(frame.map_or(
                            Closed {
                                code: 0,
                                reason: String::new(),
                            },
                            |frame| Closed {
                                code: frame.code.into(),
                                reason: frame.reason.to_string(),
                            },
                        ));
                    }
                    Some(Ok(_)) => {}
                    Some(Err(error)) => {
                        return Err(Closed {
                            code: 0,
                            reason: error.to_string(),
                        });
                    }
                    None => {
                        return Err(Closed {
                            code: 0,
                            reason: "the stream ended".to_owned(),
                        });
                    }
                }
            }
        };
        tokio::time::timeout(PATIENCE, next)
            .await
            .expect("a frame or an end")
    }

    /// The payload of the next frame that is no `ping`; it must be of this type.
    pub async fn expect(&mut self, kind: &str) -> Value {
        loop {
            let mut frame = self
                .next()
                .await
                .unwrap_or_else(|closed| panic!("{kind} expected: {closed:?}"));
            if frame["type"] == "ping" && kind != "ping" {
                continue;
            }
            assert_eq!(frame["type"], kind, "{frame}");
            return frame["payload"].take();
        }
    }

    /// Reads until the connection ends.
    pub async fn closed(&mut self) -> Closed {
        loop {
            if let Err(closed) = self.next().await {
                return closed;
            }
        }
    }

    /// Takes the next command, acknowledges and completes it; gives it.
    pub async fn work(&mut self, result: Value) -> Value {
        let command = self.expect("command").await;
        let id = json!({"commandId": command["commandId"], "run": command["run"]});
        self.send("ack", id.clone()).await;
        let mut done = id;
        done["result"] = result;
        self.send("complete", done).await;
        command
    }

    pub async fn close(mut self) {
        self.socket.close(None).await.unwrap();
        while let Some(Ok(_)) = self.socket.next().await {}
    }
}

pub async fn eventually<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = probe().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, found)
        .await
        .unwrap_or_else(|_| panic!("never: {what}"))
}
