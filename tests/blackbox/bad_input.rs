//! Bad input: every body, query, header and frame that makes no sense is answered by a clear refusal, or
//! counted and ignored. Nothing panics, and nobody else notices.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use crate::harness::{Dev, session_state};
use crate::streamspace::Streamspace;
use crate::wire::{Came, Socket};

/// No node says that it panicked, and the cluster still does its job.
async fn unharmed(dev: &Dev) {
    for node in &dev.file.nodes {
        assert!(crate::harness::is_alive(node.pid), "node {} is gone", node.id);
        let log = std::fs::read_to_string(dev.path().join(format!("node-{}.log", node.id))).unwrap();
        let bad: Vec<&str> = log
            .lines()
            .filter(|line| line.contains("panicked") || line.contains(" ERROR "))
            .collect();
        assert!(bad.is_empty(), "node {}: {bad:#?}", node.id);
    }
    let client = dev.client();
    let session = client.create_session(&on_dev()).await.unwrap();
    session_state(
        &client,
        &session.name,
        regent_types::session::SessionState::Running,
    )
    .await;
}

/// A session for the agent that runs real programs, whatever others are registered.
fn on_dev() -> regent_types::session::CreateSession {
    let body = json!({ "template": "sleep", "placement": { "platform": "process" } });
    serde_json::from_value(body).unwrap()
}

/// A small generator whose sequence is the same in every run (xorshift64*).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % sides
    }

    /// Some JSON, seldom what is expected.
    fn json(&mut self, depth: u32) -> Value {
        match self.roll(if depth == 0 { 8 } else { 10 }) {
            0 => Value::Null,
            1 => json!(self.roll(2) == 0),
            2 => json!(self.roll(u64::MAX)),
            3 => json!(-1),
            4 => json!(1.5e300),
            5 => json!(""),
            6 => json!("\u{0}\u{202e}ü\n".repeat(usize::try_from(self.roll(40)).unwrap())),
            7 => json!("x".repeat(usize::try_from(self.roll(3_000)).unwrap())),
            8 => (0..self.roll(5)).map(|_| self.json(depth - 1)).collect(),
            _ => (0..self.roll(5))
                .map(|n| (format!("k{n}"), self.json(depth - 1)))
                .collect(),
        }
    }
}

/// A good body of each call, as the seed of bad ones.
fn seeds() -> Vec<(Method, &'static str, Value)> {
    let token = json!({ "token": 1 });
    vec![
        (
            Method::POST,
            "auth/login",
            json!({ "username": "u", "password": "p" }),
        ),
        (
            Method::POST,
            "sessions",
            json!({
                "user": "nobody", "template": "nothing", "resources": { "cpu": "1", "memory": "1Gi" }, "persistentHome": false,
                "idleTimeout": "5m", "maxSessionDuration": "1h", "tags": ["t"],
                "placement": { "platform": "p", "region": "r", "labels": { "a": "b" } }, "whenFull": "reject",
            }),
        ),
        (
            Method::PATCH,
            "sessions/nothing",
            json!({ "tags": ["t"], "idleTimeout": "5m" }),
        ),
        (
            Method::POST,
            "agents/register",
            json!({
                "agentId": "fuzzed", "platform": "p", "region": "r", "capacity": { "maxSessions": 1, "cpu": "1", "memory": "1Gi" },
                "labels": { "a": "b" }, "metadata": { "a": 1 },
            }),
        ),
        (
            Method::POST,
            "agents/nobody/commands",
            json!({ "action": "a", "sessionId": "s", "payload": {}, "expiresIn": "1m" }),
        ),
        (Method::POST, "agents/nobody/drain", json!({ "deadline": "5m" })),
        (
            Method::POST,
            "templates",
            json!({
                "apiVersion": "stream.space/v1alpha1", "kind": "Template", "metadata": { "name": "fuzzed", "labels": { "a": "b" } },
                "spec": { "command": ["a"], "args": ["b"], "env": [{ "name": "A", "value": "b" }],
                    "ports": [{ "name": "p", "containerPort": 1, "protocol": "TCP" }], "hibernate": "pause" },
            }),
        ),
        (
            Method::POST,
            "users",
            json!({ "username": "fuzzed", "password": "short", "role": "user", "quota": { "sessions": 1, "cpu": "1" } }),
        ),
        (
            Method::PUT,
            "users/nobody/quota",
            json!({ "sessions": 1, "cpu": "1", "memory": "1Gi" }),
        ),
        (
            Method::PUT,
            "users/nobody/password",
            json!({ "password": "long enough" }),
        ),
        (
            Method::POST,
            "tokens",
            json!({ "user": "nobody", "description": "d", "expiresIn": "1h" }),
        ),
        (
            Method::POST,
            "leases/fuzzed/acquire",
            json!({ "holder": "h", "ttlMs": 100 }),
        ),
        (Method::POST, "leases/fuzzed/renew", token.clone()),
        (Method::POST, "leases/fuzzed/release", token.clone()),
        (Method::POST, "leases/fuzzed/verify", token),
    ]
}

#[tokio::test]
async fn fuzzed_bodies_get_a_clear_refusal() {
    let dev = Dev::start();
    let mut dice = Dice(0x5eed);
    for round in 0..12 {
        for (method, path, seed) in seeds() {
            let api = dev.api(usize::try_from(dice.roll(3)).unwrap());
            let mut body = seed.clone();
            let fields = body.as_object_mut().unwrap();
            let keys: Vec<String> = fields.keys().cloned().collect();
            let key = &keys[usize::try_from(dice.roll(keys.len() as u64)).unwrap()];
            match round % 4 {
                0 | 1 => drop(fields.insert(key.clone(), dice.json(3))),
                2 => drop(fields.remove(key)),
                _ => body = dice.json(3),
            }
            let request = api.request(method.clone(), path).json(&body);
            let answer = api.send(request).await;
            assert!(answer.status < 500, "{method} {path} {body}: {}", answer.text);
            if answer.status >= 400 {
                answer.is_a_problem();
            }
        }
    }
    // Text that is no JSON at all, cut off, or of another kind.
    for (method, path, seed) in seeds() {
        let api = dev.api(1);
        let text = seed.to_string();
        for broken in [
            "",
            "{",
            "null",
            "[]",
            "\"text\"",
            "{\"a\":1}{",
            &text[..text.len() - 1],
            "\u{feff}{}",
            "NaN",
        ] {
            let request = api
                .request(method.clone(), path)
                .header("content-type", "application/json")
                .body(broken.to_owned());
            let answer = api.send(request).await;
            assert!(
                (400..500).contains(&answer.status) || broken.is_empty(),
                "{method} {path} {broken:?}: {}",
                answer.text
            );
            if answer.status >= 400 {
                answer.is_a_problem();
            }
        }
        for bytes in [vec![0xff, 0xfe, 0x00], "[".repeat(100_000).into_bytes()] {
            let request = api
                .request(method.clone(), path)
                .header("content-type", "application/json")
                .body(bytes);
            api.send(request).await.problem(400, "invalid_request");
        }
        let form = api
            .request(method.clone(), path)
            .header("content-type", "application/x-www-form-urlencoded")
            .body("a=b");
        api.send(form).await.problem(415, "unsupported_media_type");
    }
    unharmed(&dev).await;
}

#[tokio::test]
async fn a_refusal_names_the_field() {
    let dev = Dev::start();
    let api = dev.api(0);
    for (path, body, field) in [
        ("sessions", json!({}), "template"),
        ("sessions", json!({ "template": 5 }), "template"),
        ("sessions", json!({ "template": "Not A Name" }), "template"),
        (
            "sessions",
            json!({ "template": "sleep", "resources": { "cpu": "many" } }),
            "resources.cpu",
        ),
        (
            "sessions",
            json!({ "template": "sleep", "tags": ["a", 5] }),
            "tags[1]",
        ),
        (
            "sessions",
            json!({ "template": "sleep", "idleTimeout": "soon" }),
            "idleTimeout",
        ),
        (
            "sessions",
            json!({ "template": "sleep", "whenFull": "explode" }),
            "whenFull",
        ),
        (
            "users",
            json!({ "username": "a b", "password": "12345678" }),
            "username",
        ),
        (
            "users",
            json!({ "username": "ab", "password": "short" }),
            "password",
        ),
        ("agents/dev/commands", json!({ "action": "a b" }), "action"),
    ] {
        let answer = api.post(path, body.clone()).await;
        assert_eq!(answer.fields(), [field], "{path} {body}: {}", answer.text);
        answer.problem(400, "invalid_request");
    }
    let unknown = api
        .post("sessions", json!({ "template": "sleep", "tempalte": 1 }))
        .await;
    assert!(unknown.text.contains("tempalte"), "{}", unknown.text);
    unknown.problem(400, "invalid_request");
    let start = api
        .post("agents/dev/commands", json!({ "action": "start_session" }))
        .await;
    assert!(
        (400..500).contains(&start.status),
        "placement is not bypassed: {}",
        start.text
    );
    for (query, word) in [
        ("sessions?limit=0", "limit"),
        ("sessions?limit=1001", "limit"),
        ("sessions?limit=x", "limit"),
        ("sessions?cursor=nonsense", "cursor"),
        ("sessions?stat=running", "stat"),
        ("sessions?state=asleep", "state"),
        ("sessions?consistency=maybe", "consistency"),
        ("sessions?min_index=-1", "min_index"),
        ("commands?status=lost", "status"),
        ("agents?x=1", "x"),
        ("sessions?limit=1&limit=2", "limit"),
    ] {
        let answer = api.get(query).await;
        assert!(
            answer.body["fields"].to_string().contains(word),
            "{query}: {}",
            answer.text
        );
        answer.problem(400, "invalid_request");
    }
}

#[tokio::test]
async fn wrong_routes_methods_tokens_and_headers_are_problems() {
    let dev = Dev::start();
    let api = dev.api(0);
    for path in [
        "nothing",
        "/nothing",
        "/api/v2/sessions",
        "sessions/a/b/c",
        "/api/v1//sessions",
        "/",
    ] {
        api.get(path).await.problem(404, "route_not_found");
    }
    for (method, path) in [
        (Method::DELETE, "sessions"),
        (Method::PATCH, "agents/dev"),
        (Method::PUT, "/health"),
        (Method::POST, "events"),
    ] {
        let answer = api.send(api.request(method, path)).await;
        assert!(!answer.header("allow").is_empty());
        answer.problem(405, "method_not_allowed");
    }
    for (path, noun) in [
        ("sessions/none", "session"),
        ("agents/none", "agent"),
        ("commands/none", "command"),
        ("leases/none", "lease"),
        ("templates/none", "template"),
    ] {
        api.get(path).await.problem(404, &format!("{noun}_not_found"));
    }
    for path in [
        "sessions/%ff",
        "sessions/UPPER",
        "sessions/%2e%2e%2f",
        &format!("sessions/{}", "x".repeat(64)),
        "commands/%00",
    ] {
        api.get(path).await.problem(400, "invalid_request");
    }
    for header in [
        "",
        "Bearer",
        "Bearer wrong",
        "Basic YTpi",
        &format!("Bearer {}", "x".repeat(5_000)),
    ] {
        let request = api
            .with_token("")
            .request(Method::GET, "sessions")
            .header("authorization", header);
        api.send(request).await.problem(401, "unauthenticated");
    }
    let long = "k".repeat(129);
    for key in ["", long.as_str(), "a\tb"] {
        let answer = api
            .post_once("sessions", key, json!({ "template": "sleep" }))
            .await;
        assert_eq!(answer.fields(), ["Idempotency-Key"]);
        answer.problem(400, "invalid_request");
    }
    let session = api.post("sessions", json!({ "template": "sleep" })).await.ok(202);
    let path = format!("sessions/{}", session["name"].as_str().unwrap());
    let patch = |tag: &str| {
        api.request(Method::PATCH, &path)
            .header("if-match", tag)
            .json(&json!({ "tags": ["a"] }))
    };
    for bad in ["x", "\"x\"", "\"-1\"", "\"1\",\"2\""] {
        assert_eq!(api.send(patch(bad)).await.fields(), ["If-Match"], "{bad}");
    }
    api.send(patch("\"1\"")).await.problem(412, "changed");
    api.send(patch("*")).await.ok(200);
    // A body over 1 MiB, declared or not, and one just below it.
    let large = json!({ "template": "sleep", "tags": ["x".repeat(1 << 20)] }).to_string();
    for node in 0..3 {
        let api = dev.api(node);
        let request = api
            .request(Method::POST, "sessions")
            .header("content-type", "application/json");
        let text = large.clone();
        api.send(request.body(text.clone()))
            .await
            .problem(413, "too_large");
        let chunks = futures::stream::iter(
            text.into_bytes()
                .chunks(10_000)
                .map(|c| Ok::<_, std::io::Error>(c.to_vec()))
                .collect::<Vec<_>>(),
        );
        let request = api
            .request(Method::POST, "sessions")
            .header("content-type", "application/json");
        api.send(request.body(reqwest::Body::wrap_stream(chunks)))
            .await
            .problem(413, "too_large");
    }
    let below = json!({ "template": "sleep", "tags": ["x".repeat(1_000_000)] });
    assert_eq!(api.post("sessions", below).await.fields(), ["tags[0]"]);
    unharmed(&dev).await;
}

#[tokio::test]
async fn frames_that_make_no_sense_are_counted_and_ignored_and_others_notice_nothing() {
    let dev = Dev::start();
    let api = dev.api(0);
    let before = api.get("agents/dev").await.ok(200)["epoch"].clone();
    let mut good = Streamspace::start(&api, "good").await;
    dev.agent_online(&good.id).await;
    let key = api.agent(json!({ "agentId": "bad" })).await;
    for query in [
        "agent_id=bad&protocol=v3",
        "agent_id=bad&protocol=-1",
        "protocol=3",
    ] {
        let refused = Socket::try_connect(&api, query, &key).await.err();
        assert_eq!(refused, Some(400), "{query}");
    }
    let mut dice = Dice(0xbad);
    for round in 0..4 {
        let mut socket = Socket::connect(&api, "agent_id=bad", &key).await;
        if round > 0 {
            socket.send(json!({ "type": "hello", "payload": { "protocol": 3, "runtimeId": "r", "sessions": [] } })).await;
            socket.frame("welcome").await;
        }
        let kinds = [
            "heartbeat",
            "ack",
            "progress",
            "complete",
            "failed",
            "status",
            "lease_campaign",
            "lease_keepalive",
            "lease_release",
            "pong",
            "unknown",
            "hello",
        ];
        for n in 0..60 {
            let kind = kinds[usize::try_from(dice.roll(kinds.len() as u64)).unwrap()];
            let message = match n % 6 {
                0 => Message::binary(vec![u8::try_from(dice.roll(256)).unwrap(); 100]),
                1 => Message::text(format!("{{\"type\":\"{kind}\",")),
                2 => Message::text(dice.json(3).to_string()),
                3 => Message::text(json!({ "type": kind, "timestamp": "never" }).to_string()),
                4 => Message::text("{\"type\":\"pong\"}\n{\"type\":\"pong\"}"),
                _ => Message::text(json!({ "type": kind, "payload": dice.json(3) }).to_string()),
            };
            // It may be closed for talking nonsense only; that is clear enough.
            if !socket.try_send(message).await {
                break;
            }
            // A word of sense between, so that it is not.
            if !socket.try_send(Message::text("{\"type\":\"pong\"}")).await {
                break;
            }
        }
        if let Some(Came::Closed(code, reason)) = socket.next_within(Duration::from_millis(200)).await {
            assert!([1008, 4001, 1013].contains(&code), "{code}: {reason}");
        }
    }
    for why in ["malformed", "binary", "unknown"] {
        assert!(
            api.metric("regent_agent_frames_ignored_total", why).await > 0,
            "{why} was not counted"
        );
    }
    // Nothing but nonsense is told so and closed.
    let mut socket = Socket::connect(&api, "agent_id=bad", &key).await;
    for _ in 0..100 {
        if !socket.try_send(Message::text("nonsense")).await {
            break;
        }
    }
    assert_eq!(socket.closed().await.0, 1008);
    // So is a frame over the limit.
    let mut socket = Socket::connect(&api, "agent_id=bad", &key).await;
    socket.try_send(Message::text("x".repeat((1 << 20) + 1))).await;
    socket.closed().await;
    // Reports about what is another's.
    let session = dev.client().create_session(&on_dev()).await.unwrap();
    let running = session_state(
        &dev.client(),
        &session.name,
        regent_types::session::SessionState::Running,
    )
    .await;
    let mut socket = Socket::connect(&api, "agent_id=bad", &key).await;
    socket
        .send(json!({ "type": "hello", "payload": { "protocol": 3, "runtimeId": "r", "sessions": [] } }))
        .await;
    socket.frame("welcome").await;
    socket
        .send(json!({ "type": "status", "payload": { "sessionId": session.name, "state": "failed" } }))
        .await;
    socket
        .send(json!({ "type": "lease_release", "payload": { "name": "agent/dev", "token": 1 } }))
        .await;
    socket
        .send(json!({ "type": "lease_campaign", "payload": { "name": "mine", "ttlMs": 60000 } }))
        .await;
    socket.frame("lease_granted").await;
    let seen = dev.client().session(&session.name).await.unwrap();
    assert_eq!((seen.state, seen.generation), (running.state, running.generation));
    // The others are where they were, over the same connections.
    assert_eq!(api.get("agents/dev").await.ok(200)["epoch"], before);
    let command = api
        .post("agents/good/commands", json!({ "action": "still.there" }))
        .await
        .ok(202);
    assert_eq!(
        command["commandId"],
        good.told_to("still.there").await.id.as_str()
    );
    unharmed(&dev).await;
}
