//! Around every request: its id, its metrics, a net for panics, and the rendering of problems.
//!
//! Invariant: no error leaves but as a problem document that carries the id of its request. Labels of
//! metrics are bounded: the matched route, never the path that was asked for.

use std::panic::AssertUnwindSafe;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use futures::FutureExt as _;
use regent_types::cluster::{INDEX_HEADER, REQUEST_ID_HEADER};
use regent_types::{Code, Problem};

use super::problem::{Failure, Unrendered};
use super::reply::set_index;
use crate::ids;
use crate::service::Service;

/// Longest id of a request that is taken over from its caller.
const MAX_REQUEST_ID_CHARS: usize = 128;

/// Requests answered, by method, route and status.
pub(super) const REQUESTS: &str = "regent_http_requests_total";
/// Seconds from a request's head to its answer's head, by method and route.
pub(super) const DURATION: &str = "regent_http_request_duration_seconds";
/// Requests under way.
pub(super) const IN_FLIGHT: &str = "regent_http_requests_in_flight";

/// Puts it around all routes, those that do not exist included.
pub(super) fn observed(router: Router<Service>, service: &Service) -> Router<Service> {
    // `route_layer` would not see fallbacks; the matched path is set before `layer` runs.
    router
        .layer(from_fn_with_state(service.clone(), finish))
        .layer(from_fn(counted))
}

/// Counts and times.
async fn counted(request: Request, next: Next) -> Response {
    let method = method_label(request.method());
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map(|path| path.as_str().to_owned());
    let route = route.unwrap_or_else(|| "unmatched".to_owned());
    let started = Instant::now();
    let in_flight = InFlight::begin();
    let response = next.run(request).await;
    drop(in_flight);
    let status = response.status().as_u16().to_string();
    metrics::counter!(REQUESTS, "method" => method, "route" => route.clone(), "status" => status)
        .increment(1);
    metrics::histogram!(DURATION, "method" => method, "route" => route)
        .record(started.elapsed().as_secs_f64());
    response
}

/// Counts down also when the caller goes away and the future is dropped.
struct InFlight;

impl InFlight {
    fn begin() -> Self {
        metrics::gauge!(IN_FLIGHT).increment(1.0);
        Self
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        metrics::gauge!(IN_FLIGHT).decrement(1.0);
    }
}

fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

/// Gives the answer its headers, and its document if it is a problem.
async fn finish(State(service): State<Service>, request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let outcome = AssertUnwindSafe(next.run(request)).catch_unwind().await;
    let mut response = outcome.unwrap_or_else(|_| {
        tracing::error!(request = id, %method, path, "a handler panicked");
        Failure::internal("a fault of Regent itself; its log has the request's id").into_response()
    });
    if let Some(Unrendered(problem)) = response.extensions_mut().remove::<Unrendered>() {
        if problem.status >= 500 && problem.code == Code::Internal {
            tracing::error!(request = id, %method, path, detail = problem.detail, "request failed");
        } else {
            tracing::debug!(request = id, %method, path, code = problem.code.as_str(), "request refused");
        }
        render(&mut response, *problem, &id);
    }
    if !response.headers().contains_key(INDEX_HEADER) {
        let revision = service.node().view().revision;
        set_index(&mut response, revision);
    }
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(&id) {
        headers.insert(HeaderName::from_static(REQUEST_ID_HEADER), id);
    }
    headers
        .entry(header::CACHE_CONTROL)
        .or_insert(HeaderValue::from_static("no-store"));
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    response
}

fn render(response: &mut Response, mut problem: Problem, id: &str) {
    id.clone_into(&mut problem.request_id);
    let body = serde_json::to_vec(&problem).unwrap_or_default();
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/problem+json"),
    );
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
    *response.body_mut() = Body::from(body);
}

/// The caller's own, if it can stand in a header and a log, or a new one.
fn request_id(headers: &HeaderMap) -> String {
    headers
        .get(REQUEST_ID_HEADER)
        .and_then(|value| value.to_str().ok())
        .filter(|id| (1..=MAX_REQUEST_ID_CHARS).contains(&id.len()))
        .filter(|id| {
            id.bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b':' | b'/'))
        })
        .map_or_else(ids::request_id, str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sane_request_id_is_kept_and_any_other_replaced() {
        let given = |id: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID_HEADER, HeaderValue::from_static(id));
            request_id(&headers)
        };
        assert_eq!(given("abc-1.2_3:4/5"), "abc-1.2_3:4/5");
        for bad in ["", "a b", "a\"b", "{}"] {
            assert!(given(bad).starts_with("req-"), "{bad:?} was kept");
        }
        assert!(request_id(&HeaderMap::new()).starts_with("req-"));
    }
}
