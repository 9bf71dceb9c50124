//! The OpenAPI document, made from the handlers and the types, and the problems that each kind of call
//! can answer with. `router` has a test that every route is in it and nothing else.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use axum::http::header;
use axum::response::IntoResponse;
use regent_types::{Code, Problem};
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::schema::{Object, Type};
use utoipa::openapi::security::{ApiKey, ApiKeyValue, Http, HttpAuthScheme, SecurityScheme};
use utoipa::openapi::{ContentBuilder, Ref, RefOr, Response, ResponseBuilder};
use utoipa::{IntoResponses, Modify, OpenApi};

use super::{
    agents, auth, backup, cluster, commands, events, health, leases, members, metrics, sessions, templates,
    tokens, users,
};

/// The document.
#[derive(OpenApi)]
#[openapi(
    info(title = "Regent", description = "A highly available control plane for sessions and their agents. \
        Every error is an application/problem+json document with a stable `code`: 503 means certainly not \
        done, 504 that it may be done. Another user's record is answered 403, one that does not exist 404."),
    paths(
        auth::login, auth::logout,
        sessions::list, sessions::create, sessions::get, sessions::patch, sessions::delete,
        sessions::hibernate, sessions::wake, sessions::heartbeat,
        agents::list, agents::register, agents::get, agents::delete, agents::cordon, agents::uncordon,
        agents::drain, agents::token, agents::command, connect,
        commands::list, commands::get, commands::cancel, commands::retry,
        leases::list, leases::get, leases::acquire, leases::renew, leases::release, leases::verify,
        leases::watch,
        leases::force_release,
        templates::list, templates::create, templates::get, templates::put, templates::delete,
        users::list, users::create, users::delete, users::set_password, users::set_quota,
        tokens::list, tokens::create, tokens::delete,
        events::watch, cluster::get, cluster::transfer, backup::get,
        members::join, members::remove, members::promote,
        health::livez, health::readyz, health::health, health::version, metrics::get, get,
    ),
    components(schemas(Problem)),
    modifiers(&Security),
    security(("token" = [])),
)]
struct Document;

struct Security;

impl Modify for Security {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("token", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
        let agent =
            ApiKeyValue::with_description("X-Agent-API-Key", "How StreamSpace's agents send their token");
        components.add_security_scheme("agent", SecurityScheme::ApiKey(ApiKey::Header(agent)));
    }
}

/// The document, once made.
pub(super) fn document() -> &'static utoipa::openapi::OpenApi {
    static DOCUMENT: OnceLock<utoipa::openapi::OpenApi> = OnceLock::new();
    DOCUMENT.get_or_init(Document::openapi)
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "health", security(()),
    responses((status = 200, description = "The OpenAPI document", body = Object)))]
pub(super) async fn get() -> impl IntoResponse {
    static TEXT: OnceLock<String> = OnceLock::new();
    let text = TEXT.get_or_init(|| document().to_json().unwrap_or_default());
    ([(header::CONTENT_TYPE, "application/json")], text.as_str())
}

/// The WebSocket of agents; what goes over it is not OpenAPI's matter. Served by `gateway`.
#[utoipa::path(get, path = "/api/v1/agents/connect", tag = "agents", security(("token" = []), ("agent" = [])),
    params(("agent_id" = String, Query, description = "The agent"),
        ("replica" = Option<String>, Query, description = "Which of its replicas; empty when it has only one"),
        ("protocol" = Option<u32>, Query, description = "What it speaks, 3 for now; without it an agent that does not say hello at once is taken for one of StreamSpace v2")),
    responses((status = 101, description = "Frames follow"), ReadProblems))]
#[allow(dead_code)]
fn connect() {}

const READ: [Code; 14] = [
    Code::InvalidRequest,
    Code::Unauthenticated,
    Code::Forbidden,
    Code::SessionNotFound,
    Code::AgentNotFound,
    Code::CommandNotFound,
    Code::LeaseNotFound,
    Code::TemplateNotFound,
    Code::MethodNotAllowed,
    Code::Busy,
    Code::Internal,
    Code::NoLeader,
    Code::NoQuorum,
    Code::NotServing,
];

const WRITE: [Code; 18] = [
    Code::MemberNotFound,
    Code::QuotaExceeded,
    Code::UserNotFound,
    Code::TokenNotFound,
    Code::WrongState,
    Code::AlreadyExists,
    Code::LeaseHeld,
    Code::LeaseLost,
    Code::Changed,
    Code::TooLarge,
    Code::UnsupportedMediaType,
    Code::IdempotencyKeyReused,
    Code::NoAgentsAvailable,
    Code::LeasesHeldBack,
    Code::NoLeader,
    Code::NoQuorum,
    Code::NotServing,
    Code::OutcomeUnknown,
];

/// Problems of a read.
pub(super) struct ReadProblems;

impl IntoResponses for ReadProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        problems(READ.iter().copied())
    }
}

/// Problems of a write: those of a read, and more.
pub(super) struct WriteProblems;

impl IntoResponses for WriteProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        problems(READ.iter().chain(&WRITE).copied())
    }
}

/// Problems of a login.
pub(super) struct LoginProblems;

impl IntoResponses for LoginProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let not_found = |code: &Code| code.status() == 404;
        let codes = READ.iter().filter(|code| !not_found(code)).copied();
        problems(codes.chain([Code::TooLarge, Code::UnsupportedMediaType, Code::OutcomeUnknown]))
    }
}

/// Problems of the stream of events.
pub(super) struct EventProblems;

impl IntoResponses for EventProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        problems(READ.iter().copied().chain([Code::Gone]))
    }
}

fn problems(codes: impl Iterator<Item = Code>) -> BTreeMap<String, RefOr<Response>> {
    let mut words: BTreeMap<u16, Vec<String>> = BTreeMap::new();
    for code in codes {
        let of_status = words.entry(code.status()).or_default();
        if !of_status.contains(&code.as_str()) {
            of_status.push(code.as_str());
        }
    }
    words
        .into_iter()
        .map(|(status, codes)| (status.to_string(), RefOr::T(problem(status, &codes))))
        .collect()
}

fn problem(status: u16, codes: &[String]) -> Response {
    let schema = Ref::from_schema_name("Problem");
    let mut response = ResponseBuilder::new().description(codes.join(", ")).content(
        "application/problem+json",
        ContentBuilder::new().schema(Some(schema)).build(),
    );
    if matches!(status, 429 | 503) {
        let seconds = HeaderBuilder::new()
            .description(Some("Seconds after which to try again"))
            .schema(Some(Object::with_type(Type::Integer)))
            .build();
        response = response.header("Retry-After", seconds);
    }
    response.build()
}
