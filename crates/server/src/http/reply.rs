//! Answers that went well: a record with its `ETag`, a page, nothing; each with the revision it is of.

use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use regent_types::Revision;
use regent_types::cluster::INDEX_HEADER;
use serde::Serialize;

/// Sets `X-Regent-Index`.
pub(super) fn set_index(response: &mut Response, revision: Revision) {
    response.headers_mut().insert(
        HeaderName::from_static(INDEX_HEADER),
        HeaderValue::from(revision.0),
    );
}

/// An answer of this status with a JSON body.
pub(super) fn json<T: Serialize>(status: StatusCode, revision: Revision, body: &T) -> Response {
    let mut response = (status, Json(body)).into_response();
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
