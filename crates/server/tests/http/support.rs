//! A node under test, callers with tokens, and an agent that only says that it is there.

use std::time::Duration;

use futures::{SinkExt as _, StreamExt as _};
use regent_server::{Options, Server};
use reqwest::{Client, Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

/// How long anything may take before a test gives up; far more than it takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);
const ADMIN_TOKEN: &str = "admin-token-of-a-test";
/// The password of the first admin, where a test asked for one.
pub(crate) const ADMIN_PASSWORD: &str = "correct horse";

/// A node that serves.
pub(crate) struct TestNode {
    server: Server,
    client: Client,
    _data: tempfile::TempDir,
}

/// An answer, taken apart.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) body: Value,
}

impl Reply {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .unwrap_or_else(|| panic!("no header {name} in {self:?}"))
            .to_str()
            .unwrap()
    }

    /// Asserts that it is a problem document of this status and code.
    #[track_caller]
    pub(crate) fn is_problem(&self, status: u16, code: &str) {
        assert_eq!(
            (self.status.as_u16(), &self.body["code"]),
            (status, &json!(code)),
            "{self:#?}"
        );
        assert_eq!(self.header("content-type"), "application/problem+json");
        assert_eq!(self.body["status"], status);
        assert_eq!(self.body["type"], format!("urn:regent:problem:{code}"));
        assert_eq!(self.body["requestId"], self.header("x-request-id"));
        assert!(
            self.body["title"].is_string() && self.body["detail"].is_string(),
            "{self:#?}"
        );
    }

    #[track_caller]
    pub(crate) fn is(self, status: u16) -> Self {
        assert_eq!(self.status.as_u16(), status, "{self:#?}");
        self
    }

    /// The fields that a problem names.
    pub(crate) fn fields(&self) -> Vec<&str> {
        self.body["fields"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|field| field["field"].as_str())
            .collect()
    }
}

impl TestNode {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub(crate) async fn start_with(change: impl FnOnce(&mut Options)) -> Self {
        let data = tempfile::tempdir().unwrap();
        let mut options = Options::single(data.path().to_owned(), b"a secret of sixteen bytes".to_vec());
        options.memory = Some(regent_server::MemoryDisk::default());
        options.dev = true;
        options.bootstrap_token = Some(ADMIN_TOKEN.to_owned());
        change(&mut options);
        let server = Server::start(options).await.unwrap();
        let node = Self {
            server,
            client: Client::new(),
            _data: data,
        };
        let ready = async {
            while node.call(Method::GET, "/readyz", "", Value::Null).await.status != StatusCode::OK {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, ready)
            .await
            .expect("the node does not become ready");
        node
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.server.http_addr())
    }

    pub(crate) fn request(&self, method: Method, path: &str, token: &str) -> RequestBuilder {
        let request = self.client.request(method, self.url(path)).timeout(PATIENCE);
        if token.is_empty() {
            request
        } else {
            request.bearer_auth(token)
        }
    }

    pub(crate) async fn send(&self, request: RequestBuilder) -> Reply {
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status(), response.headers().clone());
        let text = response.text().await.unwrap();
        let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
        Reply {
            status,
            headers,
            body,
        }
    }

    pub(crate) async fn call(&self, method: Method, path: &str, token: &str, body: Value) -> Reply {
        let mut request = self.request(method, path, token);
        if !body.is_null() {
            request = request.json(&body);
        }
        self.send(request).await
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.call(Method::GET, path, ADMIN_TOKEN, Value::Null).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Reply {
        self.call(Method::POST, path, ADMIN_TOKEN, body).await
    }

    pub(crate) async fn put(&self, path: &str, body: Value) -> Reply {
        self.call(Method::PUT, path, ADMIN_TOKEN, body).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Reply {
        self.call(Method::DELETE, path, ADMIN_TOKEN, Value::Null).await
    }

    pub(crate) fn as_admin(&self, method: Method, path: &str) -> RequestBuilder {
        self.request(method, path, ADMIN_TOKEN)
    }

    /// Makes a user of this role and gives a token of theirs.
    pub(crate) async fn user(&self, name: &str, role: &str) -> String {
        let body = json!({ "username": name, "password": "a good password", "role": role });
        self.post("/api/v1/users", body).await.is(201);
        let token = self.post("/api/v1/tokens", json!({ "user": name })).await.is(201);
        token.body["token"].as_str().unwrap().to_owned()
    }

    /// Registers an agent and lets it connect, as StreamSpace's do; returns once it is online.
    pub(crate) async fn agent(&self, id: &str) -> TestAgent {
        let capacity = json!({ "maxSessions": 10, "cpu": "8", "memory": "16Gi" });
        let body = json!({ "agentId": id, "platform": "process", "region": "here", "capacity": capacity });
        self.post("/api/v1/agents/register", body).await.is(201);
        let token = self
            .post(&format!("/api/v1/agents/{id}/token"), Value::Null)
            .await
            .is(201);
        let url = format!(
            "ws://{}/api/v1/agents/connect?agent_id={id}",
            self.server.http_addr()
        );
        let mut request = url.into_client_request().unwrap();
        let key = token.body["token"].as_str().unwrap().parse().unwrap();
        request.headers_mut().insert("x-agent-api-key", key);
        let (mut socket, _) = tokio_tungstenite::connect_async(request).await.unwrap();
        let heartbeat =
            json!({ "type": "heartbeat", "payload": { "status": "online", "activeSessions": 0 } });
        socket.send(Message::text(heartbeat.to_string())).await.unwrap();
        let task =
            tokio::spawn(async move { while socket.next().await.is_some_and(|frame| frame.is_ok()) {} });
        let path = format!("/api/v1/agents/{id}");
        self.wait(&path, |agent| agent["status"] == "online").await;
        TestAgent { task }
    }

    /// Waits until the record at a path is as wanted.
    pub(crate) async fn wait(&self, path: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let waiting = async {
            loop {
                last = self.get(path).await.body;
                if wanted(&last) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let in_time = tokio::time::timeout(PATIENCE, waiting).await.is_ok();
        assert!(in_time, "{path} did not become as wanted: {last:#}");
        last
    }

    pub(crate) async fn stop(self) {
        self.server.shutdown().await;
    }
}

/// An agent that is there and does nothing.
pub(crate) struct TestAgent {
    task: JoinHandle<()>,
}

impl Drop for TestAgent {
    fn drop(&mut self) {
        self.task.abort();
    }
}
