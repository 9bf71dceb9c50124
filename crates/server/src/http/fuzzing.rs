//! Bodies, queries, names and headers, as [`crate::fuzzing`] offers them.
//!
//! They panic when what was accepted does not survive being written and read again, when a refusal is not a clear
//! one, and when what is kept could not be read back from the places where it is shown.

use axum::http::{HeaderMap, HeaderValue, Uri, header};
use regent_state::Idempotency;
use regent_types::cluster::Transfer;
use regent_types::template::Manifest;
use regent_types::{
    AgentId, CandidateId, CommandId, LeaseName, Principal, SessionName, TemplateName, TokenId, UserName,
};
use regent_types::{agent, auth, command, lease, session};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::caller::revision_of;
use super::paging::Page;
use super::problem::{Failure, Result};
use super::{agents, body as bodies_of, commands, events, idempotency, leases, limits, query};
use super::{sessions, templates, tokens, users, view};

/// Most bytes of what a refusal says, as it is sent.
const MAX_REFUSAL: usize = 20 << 10;

/// A body. The first byte says of which request, the rest is the body.
pub fn body(bytes: &[u8]) {
    let Some((kind, body)) = bytes.split_first() else {
        return;
    };
    match kind % 13 {
        0 => read(body, |body: &session::CreateSession| {
            limits::tags(&body.tags)?;
            limits::labels("placement.labels", &body.placement.labels)?;
            limits::span("idleTimeout", body.idle_timeout)?;
            limits::resources("resources", &body.resources).map(drop)
        }),
        1 => read(body, |body: &session::PatchSession| {
            limits::tags(body.tags.as_deref().unwrap_or_default())
        }),
        2 => read(body, |body: &agent::RegisterAgent| {
            limits::labels("labels", &body.labels)?;
            limits::capacity(&body.capacity)?;
            kept(&limits::json("metadata", &body.metadata)?);
            Ok(())
        }),
        3 => read(body, |body: &agent::DrainAgent| {
            limits::span("deadline", body.deadline).map(drop)
        }),
        4 => read(body, |body: &command::CreateCommand| {
            kept(&limits::json("payload", &body.payload)?);
            Ok(())
        }),
        5 => read(body, |_: &lease::AcquireLease| Ok(())),
        6 => read(body, |_: &lease::LeaseTokenBody| Ok(())),
        7 => read(body, |_: &auth::CreateUser| Ok(())),
        8 => read(body, |_: &auth::SetPassword| Ok(())),
        9 => read(body, |body: &auth::Quota| limits::quota("", body).map(drop)),
        10 => read(body, |_: &auth::Login| Ok(())),
        11 => read(body, |body: &auth::CreateToken| {
            limits::span("expiresIn", body.expires_in).map(drop)
        }),
        _ => {
            clear(bodies_of::parse_optional::<Transfer>(&HeaderMap::new(), body).map(drop));
        }
    }
}

/// Bodies to begin with.
#[must_use]
pub fn bodies() -> Vec<Vec<u8>> {
    [
        (
            0,
            r#"{"user":"alice","template":"demo","resources":{"memory":"1Gi","cpu":"500m"},"persistentHome":true,
            "idleTimeout":"30m","maxSessionDuration":"8h","tags":["a"],"placement":{"platform":"docker","region":"eu",
            "labels":{"gpu":"yes"}},"whenFull":"queue"}"#,
        ),
        (1, r#"{"tags":["a","b"],"idleTimeout":null,"maxSessionDuration":"1h30m"}"#),
        (
            2,
            r#"{"agentId":"dev","platform":"process","region":"eu","capacity":{"maxSessions":5,"cpu":"64 cores",
            "memory":"128GB"},"labels":{"a":"b"},"metadata":{"a":[1,2.5,null,{"b":"\u00e4"}]}}"#,
        ),
        (3, r#"{"deadline":"5m"}"#),
        (
            4,
            r#"{"action":"note","sessionId":"alice-demo-1","payload":{"a":[[1]]},"expiresIn":"1h"}"#,
        ),
        (5, r#"{"holder":"h","ttlMs":5000,"waitMs":1000}"#),
        (6, r#"{"token":7}"#),
        (
            7,
            r#"{"username":"alice","password":"secret","role":"operator","quota":{"sessions":1,"cpu":2,"memory":"1Gi"}}"#,
        ),
        (8, r#"{"password":"new","currentPassword":"old"}"#),
        (9, r#"{"sessions":1,"cpu":"2","memory":"1Gi"}"#),
        (10, r#"{"username":"alice","password":"secret"}"#),
        (11, r#"{"user":"alice","description":"d","expiresIn":"24h"}"#),
        (12, r#"{"to":2}"#),
    ]
    .into_iter()
    .map(|(kind, body): (u8, &str)| [&[kind], body.as_bytes()].concat())
    .collect()
}

/// A template's manifest; gives it when it is accepted.
pub fn manifest(bytes: &[u8]) -> Option<Manifest> {
    let manifest: Manifest = clear(bodies_of::parse(&HeaderMap::new(), bytes))?;
    let text = clear(templates::text_of(&manifest))?;
    assert_eq!(
        serde_json::from_str::<Manifest>(&text).ok(),
        Some(manifest.clone()),
        "a manifest changed on its way"
    );
    Some(manifest)
}

/// The query, names of the path, and headers. The first byte says what the rest is.
pub fn parameters(bytes: &[u8]) {
    let Some((kind, rest)) = bytes.split_first() else {
        return;
    };
    let text = String::from_utf8_lossy(rest);
    match kind % 14 {
        0 => drop(clear(query::parse::<sessions::ListSessions>(&text))),
        1 => drop(clear(query::parse::<agents::ListAgents>(&text))),
        2 => drop(clear(query::parse::<agents::DeleteAgent>(&text))),
        3 => drop(clear(query::parse::<commands::ListCommands>(&text))),
        4 => drop(clear(query::parse::<leases::ListLeases>(&text))),
        5 => drop(clear(query::parse::<templates::ListTemplates>(&text))),
        6 => drop(clear(query::parse::<tokens::ListTokens>(&text))),
        7 => drop(clear(query::parse::<users::ListUsers>(&text))),
        8 => drop(clear(query::parse::<events::WatchEvents>(&text))),
        9 => drop(clear(query::parse::<query::Read>(&text))),
        10 => {
            clear(Page::new("leases", Some(5), Some(&text)));
            // Whatever is a key, its cursor leads back to it.
            let page = Page::new("leases", Some(1), None).expect("without a cursor there is always a page");
            let (_, _, next) = page.take([&text, &text].into_iter(), ToString::to_string);
            let next = next.expect("there is another one");
            if text.len() <= 800 {
                let after = Page::new("leases", Some(1), Some(&next)).expect("it is a cursor of ours");
                let (found, ..) = after.take([&text].into_iter(), ToString::to_string);
                assert!(found.is_empty(), "a page goes on after its last key");
            }
        }
        11 => {
            if let Some(id) = view::parse_event_id(&text) {
                assert_eq!(view::parse_event_id(&id.to_string()), Some(id));
                assert!(id.next() >= id, "an event's id is followed by a smaller one");
            }
            clear(events::parse_kinds(&text).map(drop));
        }
        12 => headers(rest),
        _ => {
            name::<AgentId>(&text);
            name::<SessionName>(&text);
            name::<CommandId>(&text);
            name::<TemplateName>(&text);
            name::<UserName>(&text);
            name::<TokenId>(&text);
            name::<LeaseName>(&text);
            name::<CandidateId>(&text);
        }
    }
}

/// Parameters to begin with.
#[must_use]
pub fn parameters_samples() -> Vec<Vec<u8>> {
    [
        (0, "user=alice&state=running&agent=dev&tag=a&limit=5&cursor=bGVhc2VzCmE&consistency=stale&min_index=7"),
        (2, "force=true"),
        (3, "agent=dev&session=a&status=failed&limit=1000"),
        (8, "after=42.0&kinds=session,lease.acquired&consistency=linearizable"),
        (9, "consistency=stale&min_index=7"),
        (10, "agent/dev"),
        (11, "42.7"),
        (11, "session, lease"),
        (12, "W/\"42\""),
        (13, "alice-demo-0a1b2c3d"),
    ]
    .into_iter()
    .map(|(kind, text): (u8, &str)| [&[kind], text.as_bytes()].concat())
    .collect()
}

fn headers(bytes: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(bytes) else {
        return;
    };
    let mut headers = HeaderMap::new();
    headers.insert(header::IF_MATCH, value.clone());
    clear(revision_of(&headers));
    headers.insert(idempotency::HEADER, value.clone());
    headers.insert("last-event-id", value.clone());
    headers.insert(header::CONTENT_TYPE, value);
    let principal = Principal::User(UserName::new("alice").expect("it is one"));
    let uri = Uri::from_static("/api/v1/sessions");
    let key: Option<Option<Idempotency>> = clear(idempotency::of(&headers, &principal, &uri, b""));
    assert!(
        key.is_none_or(|key| key.is_some()),
        "a key that is there was ignored"
    );
    clear(events::last_event_id(&headers).map_or(Ok(()), |id| {
        view::parse_event_id(id).map_or_else(|| Err(Failure::field("Last-Event-ID", "no")), |_| Ok(()))
    }));
    clear(bodies_of::parse_optional::<auth::CreateToken>(&headers, b"{}").map(drop));
}

fn name<T: std::str::FromStr + ToString + PartialEq + std::fmt::Debug>(text: &str)
where
    T::Err: std::fmt::Display,
{
    match text.parse::<T>() {
        Ok(name) => assert_eq!(name.to_string(), text),
        Err(error) => assert!(
            error.to_string().len() < 2_000,
            "a refusal is as long as what it refuses"
        ),
    }
}

fn read<T: Serialize + DeserializeOwned>(body: &[u8], check: impl Fn(&T) -> Result<()>) {
    let Some(value) = clear(bodies_of::parse::<T>(&HeaderMap::new(), body)) else {
        return;
    };
    clear(check(&value));
    let text = serde_json::to_vec(&value).expect("what came as JSON can be JSON");
    let again: T = bodies_of::parse(&HeaderMap::new(), &text).expect("what was written can be read");
    let (value, again) = (json!(value), json!(again));
    assert_eq!(
        without_fractions(&value),
        without_fractions(&again),
        "a body changed on its way"
    );
}

/// `serde_json` reads fractions to the last digit but one, so they may differ.
fn without_fractions(value: &Value) -> Value {
    match value {
        Value::Number(number) if number.is_f64() => Value::Null,
        Value::Array(values) => values.iter().map(without_fractions).collect(),
        Value::Object(fields) => fields
            .iter()
            .map(|(name, value)| (name.clone(), without_fractions(value)))
            .collect(),
        other => other.clone(),
    }
}

/// JSON that is kept is shown within lists and events and sent within frames: whoever reads those with our own
/// decoders must be able to.
pub(crate) fn kept(text: &str) {
    if text.is_empty() {
        return;
    }
    for (before, after) in [
        (r#"{"commands":[{"payload":"#, "}]}"),
        (r#"{"type":"command","payload":{"payload":{"payload":"#, "}}}"),
    ] {
        let shown = format!("{before}{text}{after}");
        let read = serde_json::from_str::<Value>(&shown);
        assert!(
            read.is_ok(),
            "what is kept cannot be read where it is shown: {:?}",
            read.err()
        );
    }
}

/// A refusal must be short, blame the request, and say which field.
fn clear<T>(result: Result<T>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(failure) => {
            let problem = failure.problem();
            assert!(
                (400..500).contains(&problem.status),
                "a bad request was answered with {problem:?}"
            );
            let text = serde_json::to_string(problem).expect("problems are JSON");
            assert!(text.len() <= MAX_REFUSAL, "a refusal has {} bytes", text.len());
            assert!(!problem.detail.is_empty(), "a refusal says nothing");
            None
        }
    }
}
