//! What an agent reads: frames of the control plane, and the manifests in them.

use std::collections::VecDeque;
use std::num::NonZeroUsize;

use regent_agent::action::Action;
use regent_agent::journal::Outcome;
use regent_agent::session::{Candidacy, ControlSession, Effect, Known};
use regent_types::frame::{CommandFrame, ServerFrame};
use regent_types::{AgentId, CommandId, LeaseName, Token};
use serde_json::{Value, json};

/// Frames of one conversation, and effects of one frame.
const MAX_FRAMES: usize = 64;
const MAX_EFFECTS: usize = 10_000;

/// Frames by lines, told to the agent's session; a byte before the first says whether it is a replica's.
pub(crate) fn frames(bytes: &[u8]) {
    let Some((kind, rest)) = bytes.split_first() else {
        return;
    };
    let mut now = 1_000_000;
    let mut session = ControlSession::new(Known {
        replica: (kind % 2 == 1).then(candidacy),
        runtime_id: "r".to_owned(),
        parallel: NonZeroUsize::new(2),
        ..Known::default()
    });
    session.connected(now, &[]);
    for line in rest.split(|byte| *byte == b'\n').take(MAX_FRAMES) {
        let Ok(text) = std::str::from_utf8(line) else {
            continue;
        };
        match ServerFrame::parse(text) {
            Ok(Some(frame)) => {
                survives(&frame);
                session.frame(now, frame);
            }
            Ok(None) => {}
            Err(error) => {
                let error = error.to_string();
                assert!(error.len() < 4_000, "a refusal has {} bytes", error.len());
            }
        }
        perform(&mut session, now);
        now += 500;
        session.tick(now);
        perform(&mut session, now);
        // Whoever waits for the next thing to do must not be told that it is over already, for ever.
        assert!(
            session.next_tick().is_none_or(|at| at + 500 >= now),
            "the session wants to be called in the past"
        );
    }
}

fn candidacy() -> Candidacy {
    Candidacy {
        replica: "r1".parse().expect("it is one"),
        lease: LeaseName::of_agent(&agent()),
        ttl_ms: 4_000,
        release_on_disconnect: None,
    }
}

/// Carries out what is asked for, as if everything went well.
fn perform(session: &mut ControlSession, now: u64) {
    for _ in 0..MAX_EFFECTS {
        let Some(effect) = session.next_effect() else {
            return;
        };
        match effect {
            Effect::Send(frame) => {
                let text = frame.to_text(regent_types::Time(now));
                let read = regent_types::frame::AgentFrame::parse(&text);
                assert!(
                    matches!(read, Ok(regent_types::frame::Incoming::Frame(_))),
                    "the gateway cannot read {text}: {read:?}"
                );
            }
            Effect::Begin(command) => {
                let outcome = match Action::parse(&agent(), &command) {
                    Ok(action) => {
                        plans(&action);
                        Outcome::Completed { result: json!({}) }
                    }
                    Err(error) => Outcome::Failed {
                        error,
                        retryable: false,
                    },
                };
                session.finished(now, &command, outcome);
            }
            Effect::TakeOver(token) => session.taken_over(now, token, &[], Vec::new()),
            Effect::Reconnect(_) => {
                session.disconnected();
                session.connected(now, &[]);
            }
            Effect::Ping | Effect::Remember(_) | Effect::Forget(_) | Effect::Remove(_) => {}
            Effect::End(_) => return,
        }
    }
    panic!("the session asks for ever");
}

fn survives(frame: &ServerFrame) {
    let text = frame.to_text(None);
    let again = ServerFrame::parse(&text);
    match again {
        // A fraction may differ in its last digit.
        Ok(Some(again)) if text.contains(['.', 'e']) || again == *frame => {}
        again => panic!("a frame changed on its way: {frame:?} became {again:?}"),
    }
}

fn plans(action: &Action) {
    if let Action::Start(spec) = action {
        regent_agent_docker::fuzzing::container(spec);
        regent_agent_kubernetes::fuzzing::pod_of(spec);
    }
}

/// A template's manifest: as REST takes it, and what agents make of it.
pub(crate) fn manifest(bytes: &[u8]) {
    let Some(manifest) = regent_server::fuzzing::manifest(bytes) else {
        return;
    };
    let frame = CommandFrame {
        command_id: CommandId::new("c-1").expect("it is one"),
        run: 1,
        action: "start_session".to_owned(),
        payload: json!({
            "sessionId": "alice-demo-1", "generation": 1, "user": "alice", "template": manifest.metadata.name,
            "templateManifest": manifest, "memory": "1Gi", "cpu": "500m", "persistentHome": true,
        }),
        token: Token(7),
        attempt: 1,
        deadline: None,
    };
    match Action::parse(&agent(), &frame) {
        Ok(action) => plans(&action),
        Err(error) => panic!("no agent reads the start of an accepted manifest: {error}"),
    }
}

pub(crate) fn manifests() -> Vec<Vec<u8>> {
    let process = json!({ "metadata": { "name": "t" }, "spec": { "command": ["sleep"], "args": ["1"] } });
    let manifests = [full_manifest(), process];
    manifests
        .iter()
        .map(|manifest| manifest.to_string().into_bytes())
        .collect()
}

fn full_manifest() -> Value {
    json!({
        "apiVersion": "stream.space/v1alpha1", "kind": "Template",
        "metadata": { "name": "firefox", "labels": { "a": "b" }, "annotations": { "c": "d" } },
        "spec": {
            "displayName": "Firefox", "description": "d", "category": "c", "baseImage": "firefox:1",
            "command": ["a"], "args": ["$(A)"],
            "ports": [{ "name": "vnc", "containerPort": 3000, "protocol": "TCP" }, { "containerPort": 53, "protocol": "UDP" }],
            "env": [{ "name": "A", "value": "b" }, { "name": "REGENT_USER", "value": "liar" }],
            "volumeMounts": [{ "name": "user-home", "mountPath": "/config" }, { "name": "v", "mountPath": "/v", "readOnly": true }],
            "defaultResources": { "memory": "2Gi", "cpu": "1000m" },
            "vnc": { "enabled": true, "port": 3000, "protocol": "http" }, "hibernate": "pause",
            "security": { "readOnlyRootFilesystem": true, "runAsUser": 1000, "capabilities": [] },
            "nodeSelector": { "a": "b" }, "tolerations": [{ "key": "a", "operator": "Exists", "effect": "NoSchedule" }],
            "imagePullSecrets": ["s"],
        },
    })
}

pub(crate) fn conversations() -> Vec<Vec<u8>> {
    let start = json!({
        "commandId": "c-1", "run": 1, "action": "start_session", "token": 7, "attempt": 1, "deadline": 1000,
        "payload": {
            "sessionId": "alice-demo-1", "generation": 1, "user": "alice", "template": "t",
            "templateManifest": full_manifest(), "memory": "1Gi", "cpu": "500m", "persistentHome": true, "tags": [],
        },
    });
    let about = |id: &str, action: &str| {
        json!({
            "commandId": id, "run": 1, "action": action, "token": 7, "attempt": 1,
            "payload": { "sessionId": "alice-demo-1", "generation": 1, "graceMs": 5, "deletePVC": true },
        })
    };
    let welcome = json!({
        "clusterId": "c", "base": 0, "epoch": 5, "token": 7, "heartbeatMs": 1000, "staleMs": 4000, "protocol": 3,
        "node": 1, "features": [],
    });
    let frames: VecDeque<(&str, Value)> = [
        ("welcome", welcome),
        (
            "lease_granted",
            json!({ "name": "agent/a", "token": 7, "ttlMs": 4000 }),
        ),
        ("command", start),
        ("command", about("c-2", "hibernate_session")),
        ("command", about("c-3", "wake_session")),
        ("command", about("c-4", "stop_session")),
        ("command", about("c-5", "note")),
        (
            "lease_renewed",
            json!({ "name": "agent/a", "token": 7, "ttlMs": 4000, "seq": 1 }),
        ),
        (
            "lease_observed",
            json!({ "name": "agent/a", "holder": "r2", "token": 9 }),
        ),
        (
            "lease_lost",
            json!({ "name": "agent/a", "token": 7, "reason": "r" }),
        ),
        (
            "lease_refused",
            json!({ "name": "agent/a", "code": "busy", "detail": "d" }),
        ),
        ("ping", json!({})),
        ("superseded", json!({ "reason": "r" })),
        ("shutdown", json!({ "reason": "r" })),
    ]
    .into();
    let text: Vec<String> = frames
        .iter()
        .map(|(kind, payload)| json!({ "type": kind, "payload": payload, "timestamp": 1 }).to_string())
        .collect();
    let text = text.join("\n");
    vec![
        [b"\0", text.as_bytes()].concat(),
        [b"\x01", text.as_bytes()].concat(),
    ]
}

fn agent() -> AgentId {
    AgentId::new("a").expect("it is one")
}
