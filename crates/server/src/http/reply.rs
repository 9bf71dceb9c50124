//! Answers that went well: a record with its `ETag`, a page, nothing; each with the revision it is of.

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use regent_types::Revision;
use regent_types::cluster::INDEX_HEADER;
use serde::Serialize;

use super::problem::Failure;

/// Bytes that most records take as JSON: room for them is made at once.
const MOST_RECORDS: usize = 1_024;

/// Sets `X-Regent-Index`.
pub(super) fn set_index(response: &mut Response, revision: Revision) {
    response.headers_mut().insert(
        HeaderName::from_static(INDEX_HEADER),
        HeaderValue::from(revision.0),
    );
}

/// An answer of this status with a JSON body.
pub(super) fn json<T: Serialize>(status: StatusCode, revision: Revision, body: &T) -> Response {
    let mut text = Vec::with_capacity(MOST_RECORDS);
    if let Err(error) = serde_json::to_writer(&mut text, body) {
        tracing::error!(%error, "an answer cannot be written as JSON");
        return Failure::internal("the answer cannot be written as JSON").into_response();
    }
    let mut response = Body::from(text).into_response();
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    set_index(&mut response, revision);
    response
}

/// A record: its `ETag` is the revision of its last change.
pub(super) fn record<T: Serialize>(
    status: StatusCode,
    revision: Revision,
    changed: Revision,
    body: &T,
) -> Response {
    let mut response = json(status, revision, body);
    if let Ok(tag) = HeaderValue::from_str(&format!("\"{changed}\"")) {
        response.headers_mut().insert(header::ETAG, tag);
    }
    response
}

/// 204.
pub(super) fn nothing(revision: Revision) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    set_index(&mut response, revision);
    response
}
