//! Around every request: its id, its metrics, its span, a net for panics, and the rendering of problems.
//!
//! Invariant: no error leaves but as a problem document that carries the id of its request. Labels of
//! metrics are bounded: the matched route, never the path that was asked for.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::FutureExt as _;
use metrics::{Counter, Gauge, Histogram};
use regent_trace::Span;
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

/// The metrics of one route, looked up by name once and not with every request.
pub(super) struct Counted {
    service: Service,
    method: &'static str,
    route: &'static str,
    /// What probes and scrapes ask every second would drown the rest.
    traced: bool,
    duration: Histogram,
    in_flight: Gauge,
    /// By status; a route answers with a handful.
    answers: RwLock<Vec<(StatusCode, Counter)>>,
}

impl Counted {
    /// For the requests of this method (in capitals) that match the route.
    pub(super) fn new(service: &Service, method: &'static str, route: &'static str) -> Arc<Self> {
        Arc::new(Self {
            service: service.clone(),
            method,
            route,
            traced: route.starts_with("/api/"),
            duration: metrics::histogram!(DURATION, "method" => method, "route" => route),
            in_flight: metrics::gauge!(IN_FLIGHT),
            answers: RwLock::default(),
        })
    }

    fn answered(&self, status: StatusCode, started: Instant) {
        let found = |answers: &[(StatusCode, Counter)]| {
            let (_, counter) = answers.iter().find(|(known, _)| *known == status)?;
            counter.increment(1);
            Some(())
        };
        // A push is never half done, so a panic of another thread spoils nothing.
        let known = found(&self.answers.read().unwrap_or_else(PoisonError::into_inner));
        if known.is_none() {
            let counter = metrics::counter!(REQUESTS, "method" => self.method, "route" => self.route,
                "status" => status.as_u16().to_string());
            let mut answers = self.answers.write().unwrap_or_else(PoisonError::into_inner);
            answers.push((status, counter));
            found(&answers);
        }
        self.duration.record(started.elapsed().as_secs_f64());
    }
}

/// Counts down also when the caller goes away and the future is dropped.
struct InFlight<'a>(&'a Gauge);

impl<'a> InFlight<'a> {
    fn begin(gauge: &'a Gauge) -> Self {
        gauge.increment(1.0);
        Self(gauge)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

/// Goes around every route, those that do not exist included: counts, times and traces, gives the answer
/// its headers, and its document if it is a problem.
pub(super) async fn observe(State(counted): State<Arc<Counted>>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let in_flight = InFlight::begin(&counted.in_flight);
    let id = request_id(request.headers());
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let span = if counted.traced {
        regent_trace::request(counted.method, counted.route, request.headers())
    } else {
        Span::none()
    };
    let outcome = span
        .around(AssertUnwindSafe(next.run(request)).catch_unwind())
        .await;
    drop(in_flight);
    let path = uri.path();
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
        let revision = counted.service.node().view().revision;
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
    counted.answered(response.status(), started);
    span.answered(response.status().as_u16());
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
