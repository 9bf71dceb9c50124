//! An agent that speaks only StreamSpace's frames, as its Kubernetes agent does (docs/agent-protocol.md):
//! registers first, dials without a replica, says no `hello`, stamps its heartbeats but not its status
//! frames, and knows `command`, `ping` and `shutdown`. What it does with a command is the test's choice.

use regent_types::AgentId;
use serde_json::{Value, json};

use crate::wire::{Api, Came, Socket};

pub(crate) struct Streamspace {
    pub(crate) id: AgentId,
    pub(crate) key: String,
    socket: Socket,
    /// Pings that were answered on the way.
    pub(crate) pings: u32,
}

/// A command as it reads it.
#[derive(Debug, Clone)]
pub(crate) struct Told {
    pub(crate) id: String,
    pub(crate) action: String,
    pub(crate) payload: Value,
}

impl Told {
    /// The session that it is about.
    pub(crate) fn session(&self) -> &str {
        self.payload["sessionId"]
            .as_str()
            .expect("StreamSpace's agents need the sessionId in the payload")
    }
}

impl Streamspace {
    /// Gets a key from the admin, registers with it, connects and says its first heartbeat.
    pub(crate) async fn start(api: &Api, id: &str) -> Self {
        let key = Self::key(api, id).await;
        Self::register(api, id, &key).await;
        Self::connect(api, id, &key).await
    }

    /// A key for an agent that is not known yet.
    pub(crate) async fn key(api: &Api, id: &str) -> String {
        let token = api.post(&format!("agents/{id}/token"), json!({})).await.ok(201);
        token["token"].as_str().unwrap().to_owned()
    }

    /// Registers as it does: by its own key in its own header, with capacity as text.
    pub(crate) async fn register(api: &Api, id: &str, key: &str) -> Value {
        let capacity = json!({ "maxSessions": 100, "cpu": "64 cores", "memory": "256Gi", "storage": "1Ti" });
        let register = json!({
            "agentId": id, "platform": "kubernetes", "region": "us-east-1", "capacity": capacity,
            "metadata": { "namespace": "streamspace" },
        });
        let request = api
            .with_token("")
            .request(reqwest::Method::POST, "agents/register");
        let answer = api
            .send(request.header("X-Agent-API-Key", key).json(&register))
            .await;
        assert!([200, 201, 202].contains(&answer.status), "{}", answer.text);
        // It reads both from the top level.
        assert_eq!(answer.body["agentId"], id);
        assert!(answer.body["status"].is_string(), "{}", answer.text);
        answer.body
    }

    /// Dials.
    pub(crate) async fn connect(api: &Api, id: &str, key: &str) -> Self {
        let socket = Socket::connect(api, &format!("agent_id={id}"), key).await;
        let mut agent = Self {
            id: AgentId::new(id).unwrap(),
            key: key.to_owned(),
            socket,
            pings: 0,
        };
        agent.heartbeat(json!("2026-01-01T00:00:00Z"), 0).await;
        agent
    }

    /// Sends a frame.
    pub(crate) async fn say(&mut self, frame: Value) {
        self.socket.send(frame).await;
    }

    /// A heartbeat with a timestamp of some kind.
    pub(crate) async fn heartbeat(&mut self, timestamp: Value, active: u32) {
        let payload =
            json!({ "status": "online", "activeSessions": active, "capacity": { "cpu": "64 cores" } });
        self.say(json!({ "type": "heartbeat", "timestamp": timestamp, "payload": payload }))
            .await;
    }

    pub(crate) async fn ack(&mut self, told: &Told) {
        self.say(json!({ "type": "ack", "timestamp": "2026-01-01T00:00:00Z", "payload": { "commandId": told.id } })).await;
    }

    pub(crate) async fn complete(&mut self, told: &Told) {
        let result =
            json!({ "podName": format!("{}-0", told.payload["sessionId"].as_str().unwrap_or("none")) });
        self.say(json!({ "type": "complete", "payload": { "commandId": told.id, "result": result } }))
            .await;
    }

    pub(crate) async fn fail(&mut self, told: &Told, error: &str) {
        self.say(json!({ "type": "failed", "payload": { "commandId": told.id, "error": error } }))
            .await;
    }

    /// A status frame, which has no timestamp.
    pub(crate) async fn status(&mut self, session: &str, state: &str) {
        let metadata = json!({ "podName": "pod-1", "podIP": "10.0.0.1" });
        let payload = json!({
            "sessionId": session, "state": state, "vncReady": true, "vncPort": 3000, "platformMetadata": metadata,
        });
        self.say(json!({ "type": "status", "payload": payload })).await;
    }

    /// The next thing that comes, pings answered. Everything must be as StreamSpace's agents read it.
    pub(crate) async fn next(&mut self) -> Came {
        loop {
            let came = self.socket.next().await;
            let Came::Frame(frame) = &came else { return came };
            assert!(
                frame.get("timestamp").is_none(),
                "its Docker agent cannot read this timestamp: {frame}"
            );
            match frame["type"].as_str() {
                Some("ping") => {
                    self.pings += 1;
                    self.say(json!({ "type": "pong", "timestamp": 1_767_225_600 }))
                        .await;
                }
                Some("command" | "shutdown") => return came,
                _ => panic!("a v2 agent was sent {frame}"),
            }
        }
    }

    /// The next command.
    pub(crate) async fn told(&mut self) -> Told {
        match self.next().await {
            Came::Frame(frame) if frame["type"] == "command" => {
                let payload = &frame["payload"];
                let text = |name: &str| payload[name].as_str().unwrap().to_owned();
                Told {
                    id: text("commandId"),
                    action: text("action"),
                    payload: payload["payload"].clone(),
                }
            }
            other => panic!("instead of a command came {other:?}"),
        }
    }

    /// The next command, which must be this one; acknowledged.
    pub(crate) async fn told_to(&mut self, action: &str) -> Told {
        let told = self.told().await;
        assert_eq!(told.action, action, "{told:?}");
        self.ack(&told).await;
        told
    }

    /// Answers pings until a condition holds.
    pub(crate) async fn until(&mut self, done: impl Future<Output = ()>) {
        tokio::pin!(done);
        loop {
            tokio::select! {
                () = &mut done => return,
                came = self.socket.next() => match came {
                    Came::Frame(frame) if frame["type"] == "ping" => {
                        self.pings += 1;
                        self.say(json!({ "type": "pong" })).await;
                    }
                    other => panic!("nothing was to come, but {other:?} did"),
                }
            }
        }
    }

    /// The socket itself.
    pub(crate) fn socket(&mut self) -> &mut Socket {
        &mut self.socket
    }

    /// Closes the connection from its side.
    pub(crate) async fn hang_up(self) {
        self.socket.close().await;
    }
}
