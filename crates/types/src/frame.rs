//! Frames of the agent WebSocket: one JSON object per text frame, `{type, timestamp, payload}`.
//!
//! Unknown types and fields are ignored (the gateway counts them). Fields of StreamSpace's agents
//! may stand beside `type` in place of a payload.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::agent::Capacity;
use crate::problem::cut;
use crate::session::SessionState;
use crate::{ClusterId, CommandId, Epoch, LeaseName, NodeId, ReplicaName, SessionName, Time, Token};

/// The version of the protocol that this crate speaks.
pub const PROTOCOL: u32 = 3;
/// The largest frame that either side takes, in bytes.
pub const MAX_FRAME: usize = 1 << 20;
/// WebSocket close code: a newer connection of the same replica took over.
pub const CLOSE_SUPERSEDED: u16 = 4001;

/// From the control plane to an agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", content = "payload", rename_all = "snake_case")]
pub enum ServerFrame {
    /// First, in answer to `hello`.
    Welcome(Welcome),
    /// Something to do.
    Command(CommandFrame),
    /// A newer connection of the same replica took over.
    Superseded(Reason),
    /// The campaign won.
    LeaseGranted(LeaseConfirmedFrame),
    /// The lease is lost.
    LeaseLost(LeaseReasonFrame),
    /// The campaign is refused.
    LeaseRefused(LeaseRefusedFrame),
    /// Who holds it now.
    LeaseObserved(LeaseObservedFrame),
    /// The keepalive counts.
    LeaseRenewed(LeaseRenewedFrame),
    /// StreamSpace v2 only: answer with `pong`.
    Ping(Empty),
    /// StreamSpace v2 only: this node goes away.
    Shutdown(Reason),
}

/// From an agent to the control plane.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", content = "payload", rename_all = "snake_case")]
pub enum AgentFrame {
    /// First: who it is and what it runs.
    Hello(Hello),
    /// It lives.
    Heartbeat(Heartbeat),
    /// Answer to `ping`.
    Pong(Empty),
    /// It has the command.
    Ack(Ack),
    /// It is at it.
    Progress(Progress),
    /// It is done.
    Complete(Complete),
    /// It could not be done.
    Failed(FailedFrame),
    /// A session changed by itself.
    Status(StatusFrame),
    /// It wants a lease.
    LeaseCampaign(LeaseCampaignFrame),
    /// It still wants it.
    LeaseKeepalive(LeaseKeepaliveFrame),
    /// It gives it up.
    LeaseRelease(LeaseTokenFrame),
}

/// A frame without content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Empty {}

/// Words for people.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Reason {
    /// The words.
    #[serde(default)]
    pub reason: String,
}

/// `welcome`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Welcome {
    /// The cluster. An agent refuses an older `base` of the same cluster.
    pub cluster_id: ClusterId,
    /// The revision base.
    pub base: u64,
    /// This connection.
    pub epoch: Epoch,
    /// The token of `agent/{id}`, where the gateway holds the lease for this connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<Token>,
    /// How often to send a heartbeat.
    pub heartbeat_ms: u64,
    /// After how long without one the agent is offline.
    pub stale_ms: u64,
    /// The protocol that the node speaks.
    pub protocol: u32,
    /// The node.
    pub node: NodeId,
    /// What else it can.
    #[serde(default)]
    pub features: Vec<String>,
    /// The clusters that this one was restored or recovered from, the latest first. An agent of one of them follows
    /// to this one, whose base is larger.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former_cluster_ids: Vec<ClusterId>,
}

/// `hello`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Hello {
    /// The protocol that the agent speaks.
    pub protocol: u32,
    /// What else it can.
    #[serde(default)]
    pub features: Vec<String>,
    /// Which replica; absent for an agent that has only one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica: Option<ReplicaName>,
    /// What it runs sessions on: engine id, cluster uid, or machine and data folder.
    #[serde(default)]
    pub runtime_id: String,
    /// All that it runs.
    #[serde(default)]
    pub sessions: Vec<RunningSession>,
    /// All leases that it holds.
    #[serde(default)]
    pub leases: Vec<HeldLease>,
}

/// One session that an agent runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RunningSession {
    /// The session.
    pub session_id: SessionName,
    /// `running`, `hibernated`, or how it ended: `terminated` (by itself, with code 0) or `failed`.
    pub state: SessionState,
    /// Which start of it.
    #[serde(default)]
    pub generation: u64,
    /// Under which token it was started.
    #[serde(default)]
    pub token: Token,
    /// For people: the exit code, for example.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Where it can be opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
}

/// `heartbeat`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Heartbeat {
    /// For people.
    #[serde(default)]
    pub status: String,
    /// How many sessions run.
    #[serde(default)]
    pub active_sessions: u32,
    /// What it can carry, when that changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<Capacity>,
}

/// `command`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CommandFrame {
    /// Its id. With `run` the agent's dedupe key.
    pub command_id: CommandId,
    /// Which run.
    pub run: u32,
    /// What is to be done.
    pub action: String,
    /// For the action; with `sessionId` and `generation` when it is about a session.
    pub payload: Value,
    /// The fencing token: refuse when older than one seen.
    pub token: Token,
    /// How often it was sent, from 1.
    pub attempt: u32,
    /// How long it may take, in milliseconds, from when the agent acknowledges it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<u64>,
}

/// `ack`. Agents of StreamSpace give no run: it means the current one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ack {
    /// The command.
    pub command_id: CommandId,
    /// The run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<u32>,
}

/// `progress`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// The command.
    pub command_id: CommandId,
    /// For people.
    #[serde(default)]
    pub message: String,
    /// 0 to 100.
    #[serde(default)]
    pub percent: Option<f64>,
}

/// `complete`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Complete {
    /// The command.
    pub command_id: CommandId,
    /// The run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<u32>,
    /// What came of it; `url` and `metadata` of a started session.
    #[serde(default)]
    pub result: Value,
}

/// `failed`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FailedFrame {
    /// The command.
    pub command_id: CommandId,
    /// The run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<u32>,
    /// Why.
    #[serde(default)]
    pub error: String,
    /// Whether trying again may help.
    #[serde(default)]
    pub retryable: bool,
}

/// `status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusFrame {
    /// The session.
    pub session_id: SessionName,
    /// Its state, as text: agents of StreamSpace have words of their own.
    pub state: String,
    /// For people.
    #[serde(default)]
    pub reason: String,
    /// Which start of it; absent means the current one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// Where it can be opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// What else there is to tell.
    #[serde(default, alias = "platformMetadata")]
    pub metadata: Value,
}

/// `lease_campaign`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LeaseCampaignFrame {
    /// The lease.
    pub name: LeaseName,
    /// The TTL wanted.
    pub ttl_ms: u64,
    /// The token to resume, if it was held before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<Token>,
    /// Give the lease up early when this connection is lost; off when absent (docs/leases.md has the risk).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release_on_disconnect: Option<ReleaseOnDisconnect>,
}

/// How long a lost connection may take to come back before its lease is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReleaseOnDisconnect {
    /// In milliseconds.
    pub grace_ms: u64,
}

/// `lease_keepalive`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseKeepaliveFrame {
    /// The lease.
    pub name: LeaseName,
    /// Its token.
    pub token: Token,
    /// Comes back in `lease_renewed`.
    pub seq: u64,
}

/// `lease_release`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseTokenFrame {
    /// The lease.
    pub name: LeaseName,
    /// Its token.
    pub token: Token,
}

/// Each lease in `hello`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HeldLease {
    /// The lease.
    pub name: LeaseName,
    /// Its token.
    pub token: Token,
    /// As in `lease_campaign`: it is the connection's, so each new one says it anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release_on_disconnect: Option<ReleaseOnDisconnect>,
}

/// `lease_granted`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LeaseConfirmedFrame {
    /// The lease.
    pub name: LeaseName,
    /// Its token.
    pub token: Token,
    /// Its TTL.
    pub ttl_ms: u64,
}

/// `lease_renewed`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LeaseRenewedFrame {
    /// The lease.
    pub name: LeaseName,
    /// Its token.
    pub token: Token,
    /// Its TTL; counts from when the keepalive with this `seq` was sent.
    pub ttl_ms: u64,
    /// The keepalive's.
    pub seq: u64,
}

/// `lease_lost`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseReasonFrame {
    /// The lease.
    pub name: LeaseName,
    /// The token under which it is lost; a newer grant is not meant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<Token>,
    /// For people.
    pub reason: String,
}

/// `lease_refused`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRefusedFrame {
    /// The lease.
    pub name: LeaseName,
    /// As in problem documents.
    pub code: crate::Code,
    /// For people.
    pub detail: String,
}

/// `lease_observed`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseObservedFrame {
    /// The lease.
    pub name: LeaseName,
    /// Who holds it.
    pub holder: String,
    /// Under which token.
    pub token: Token,
}

/// What a frame from an agent turned out to be.
#[derive(Debug, Clone, PartialEq)]
pub enum Incoming {
    /// A frame that means something.
    Frame(AgentFrame),
    /// A type that this version does not know; ignored and counted.
    Unknown(String),
}

/// Why a frame cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not a JSON object with a `type`.
    #[error("a frame is one JSON object with a text \"type\": {0}")]
    NotAFrame(String),
    /// The payload does not fit the type.
    #[error("a frame of type {kind:?} cannot be read: {reason}")]
    Payload {
        /// The frame's type.
        kind: String,
        /// What is wrong.
        reason: String,
    },
}

/// Most bytes of what an error says: it quotes the frame, and ends up in logs and close frames.
const MAX_ERROR: usize = 1_000;

impl FrameError {
    fn not_a_frame(why: &dyn fmt::Display) -> Self {
        let mut why = why.to_string();
        cut(&mut why, MAX_ERROR);
        Self::NotAFrame(why)
    }

    fn payload(mut kind: String, why: &dyn fmt::Display) -> Self {
        let mut reason = why.to_string();
        cut(&mut kind, MAX_ERROR);
        cut(&mut reason, MAX_ERROR);
        Self::Payload { kind, reason }
    }
}

const KNOWN: [&str; 11] = [
    "hello",
    "heartbeat",
    "pong",
    "ack",
    "progress",
    "complete",
    "failed",
    "status",
    "lease_campaign",
    "lease_keepalive",
    "lease_release",
];

const KNOWN_OF_SERVER: [&str; 10] = [
    "welcome",
    "command",
    "superseded",
    "lease_granted",
    "lease_lost",
    "lease_refused",
    "lease_observed",
    "lease_renewed",
    "ping",
    "shutdown",
];

impl AgentFrame {
    /// Reads a text frame from an agent, StreamSpace's spellings included.
    pub fn parse(text: &str) -> Result<Incoming, FrameError> {
        let mut object: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| FrameError::not_a_frame(&error))?;
        let Some(Value::String(mut kind)) = object.remove("type") else {
            return Err(FrameError::not_a_frame(&"there is no \"type\""));
        };
        // The timestamp is read only to be lenient about it: nothing depends on an agent's clock.
        if let Some(timestamp) = object.remove("timestamp")
            && !timestamp.is_null()
            && let Err(error) = serde_json::from_value::<Time>(timestamp)
        {
            return Err(FrameError::payload(kind, &error));
        }
        if kind == "command_error" {
            "failed".clone_into(&mut kind);
        }
        if !KNOWN.contains(&kind.as_str()) {
            return Ok(Incoming::Unknown(kind));
        }
        let payload = match object.remove("payload") {
            None | Some(Value::Null) => Value::Object(object),
            // serde would take an array for the fields in their order.
            Some(payload @ Value::Object(_)) => payload,
            Some(_) => return Err(FrameError::payload(kind, &"the payload is no JSON object")),
        };
        let tagged = serde_json::json!({ "type": kind, "payload": payload });
        serde_json::from_value(tagged)
            .map(Incoming::Frame)
            .map_err(|error| FrameError::payload(kind, &error))
    }

    /// Writes the frame, with a timestamp.
    pub fn to_text(&self, now: Time) -> String {
        with_timestamp(self, Some(now))
    }
}

impl ServerFrame {
    /// Reads a text frame from the control plane; `None` for a type that is not known.
    pub fn parse(text: &str) -> Result<Option<Self>, FrameError> {
        let value: Value = serde_json::from_str(text).map_err(|error| FrameError::not_a_frame(&error))?;
        let Some(kind) = value.get("type").and_then(Value::as_str).map(str::to_owned) else {
            return Err(FrameError::not_a_frame(&"there is no \"type\""));
        };
        if !KNOWN_OF_SERVER.contains(&kind.as_str()) {
            return Ok(None);
        }
        serde_json::from_value(value)
            .map(Some)
            .map_err(|error| FrameError::payload(kind, &error))
    }

    /// Writes the frame; agents of StreamSpace get no timestamp (`None`).
    pub fn to_text(&self, now: Option<Time>) -> String {
        with_timestamp(self, now)
    }
}

fn with_timestamp(frame: &impl Serialize, now: Option<Time>) -> String {
    #[derive(Serialize)]
    struct Stamped<'a, F> {
        #[serde(flatten)]
        frame: &'a F,
        #[serde(skip_serializing_if = "Option::is_none")]
        timestamp: Option<Time>,
    }
    serde_json::to_string(&Stamped {
        frame,
        timestamp: now,
    })
    .expect("frames hold nothing that JSON cannot")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timestamp_may_be_text_a_number_or_absent() {
        for timestamp in ["\"2026-01-01T00:00:00Z\"", "1767225600", "1767225600000", "null"] {
            let text =
                format!(r#"{{"type":"heartbeat","timestamp":{timestamp},"payload":{{"activeSessions":2}}}}"#);
            assert!(
                matches!(AgentFrame::parse(&text), Ok(Incoming::Frame(AgentFrame::Heartbeat(h))) if h.active_sessions == 2)
            );
        }
        assert!(matches!(
            AgentFrame::parse(r#"{"type":"pong"}"#),
            Ok(Incoming::Frame(AgentFrame::Pong(_)))
        ));
    }

    #[test]
    fn fields_may_stand_beside_the_type_and_streamspace_words_are_read() {
        let ack = AgentFrame::parse(r#"{"type":"ack","commandId":"c1"}"#).unwrap();
        assert_eq!(
            ack,
            Incoming::Frame(AgentFrame::Ack(Ack {
                command_id: CommandId::new("c1").unwrap(),
                run: None
            }))
        );
        let failed =
            AgentFrame::parse(r#"{"type":"command_error","payload":{"commandId":"c1","error":"no"}}"#)
                .unwrap();
        assert!(matches!(failed, Incoming::Frame(AgentFrame::Failed(f)) if f.error == "no" && !f.retryable));
    }

    #[test]
    fn unknown_types_are_told_from_broken_frames() {
        assert_eq!(
            AgentFrame::parse(r#"{"type":"vnc_data","payload":{}}"#),
            Ok(Incoming::Unknown("vnc_data".to_owned()))
        );
        assert!(AgentFrame::parse("{\"type\":\"ack\"}").is_err());
        assert!(AgentFrame::parse("[]").is_err());
        assert!(AgentFrame::parse("{\"type\":\"ack\"}\n{\"type\":\"ack\"}").is_err());
        assert_eq!(ServerFrame::parse(r#"{"type":"later","payload":{}}"#), Ok(None));
    }

    /// An array was taken for the fields in their order, as in bodies.
    #[test]
    fn a_payload_is_an_object() {
        for payload in [r#"["c1",1]"#, "[]", "1", "\"c1\""] {
            let text = format!(r#"{{"type":"ack","payload":{payload}}}"#);
            assert!(AgentFrame::parse(&text).is_err(), "{payload}");
        }
    }

    /// A word that was not known deep in the payload made the whole frame one of an unknown type.
    #[test]
    fn a_refusal_with_an_unknown_code_is_broken_and_not_of_an_unknown_type() {
        let text = r#"{"type":"lease_refused","payload":{"name":"jobs","code":"later","detail":"d"}}"#;
        assert!(matches!(
            ServerFrame::parse(text),
            Err(FrameError::Payload { kind, .. }) if kind == "lease_refused"
        ));
    }

    /// The error quoted all of a frame of a megabyte, once in the log and once in the close frame.
    #[test]
    fn an_error_is_short_however_long_the_frame() {
        let long = "x".repeat(MAX_FRAME / 2);
        for text in [
            format!(r#"{{"type":"ack","payload":{{"commandId":"c","run":"{long}"}}}}"#),
            format!(r#"{{"type":"heartbeat","timestamp":"{long}"}}"#),
            format!(r#"{{"type":"heartbeat","payload":{{"capacity":{{"cpu":"{long}"}}}}}}"#),
        ] {
            let error = AgentFrame::parse(&text).unwrap_err().to_string();
            assert!(error.len() < 2_000, "{} bytes", error.len());
            assert!(error.contains("[...]"), "{error}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let frame = ServerFrame::Ping(Empty {});
        assert_eq!(
            ServerFrame::parse(&frame.to_text(Some(Time(5_000)))),
            Ok(Some(frame.clone()))
        );
        assert!(!frame.to_text(None).contains("timestamp"));
    }
}
