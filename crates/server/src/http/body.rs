//! Bodies of requests: bounded, JSON, and refused with the path of the field that is wrong.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, Request, header};
use bytes::Bytes;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use regent_types::{Code, Problem};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::problem::{Failure, Result};

/// Largest body: the largest manifest with room; an operation must fit into one log entry.
pub(super) const MAX_BODY_BYTES: usize = 1 << 20;
/// How long a body may take to arrive: a sender that trickles must not hold a connection for ever.
const BODY_DEADLINE: Duration = Duration::from_secs(30);
/// How much of a body that is too large is read away before it is refused, and how long that may take.
const MAX_DRAINED_BYTES: usize = 16 << 20;
const DRAIN_WITHIN: Duration = Duration::from_secs(5);

/// Reads the whole body.
pub(super) async fn read(request: Request<Body>) -> Result<Bytes> {
    let declared = request.headers().get(header::CONTENT_LENGTH);
    let declared = declared.and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let waits_for_leave = request.headers().contains_key(header::EXPECT);
    let mut body = request.into_body();
    if declared.is_some_and(|bytes| bytes > MAX_BODY_BYTES as u64) {
        if !waits_for_leave {
            drain(&mut body).await;
        }
        return Err(too_large());
    }
    let collected = Limited::new(&mut body, MAX_BODY_BYTES).collect();
    match tokio::time::timeout(BODY_DEADLINE, collected).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            drain(&mut body).await;
            Err(too_large())
        }
        Ok(Err(error)) => Err(Failure::new(
            Code::InvalidRequest,
            format!("the body did not arrive: {error}"),
        )),
        Err(_) => Err(Failure::new(
            Code::InvalidRequest,
            format!("the body did not arrive within {} s", BODY_DEADLINE.as_secs()),
        )),
    }
}

/// Reads away what a sender goes on sending: a connection that is closed with bytes unread is reset, and
/// the sender would see that instead of the answer.
async fn drain(body: &mut Body) {
    let rest = async {
        let mut drained = 0;
        while let Some(Ok(frame)) = body.frame().await {
            drained += frame.data_ref().map_or(0, Bytes::len);
            if drained > MAX_DRAINED_BYTES {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(DRAIN_WITHIN, rest).await;
}

fn too_large() -> Failure {
    Failure::new(
        Code::TooLarge,
        format!("a body may have at most {MAX_BODY_BYTES} bytes"),
    )
}

/// Parses a body that must be there.
pub(super) fn parse<T: Serialize + DeserializeOwned>(headers: &HeaderMap, body: &[u8]) -> Result<T> {
    check_content_type(headers)?;
    // serde would read an array as the fields of a struct in their order, which no schema promises.
    if body.trim_ascii_start().first() == Some(&b'[') {
        return Err(not_an_array("body"));
    }
    let value = serde_json::from_slice(body).or_else(|_| explain(body))?;
    // Within a body arrays are common, but few bodies have any.
    if body.contains(&b'[')
        && let (Ok(given), Ok(taken)) = (serde_json::from_slice(body), serde_json::to_value(&value))
        && let Some(field) = array_for_object(&given, &taken)
    {
        return Err(not_an_array(field.trim_start_matches('.')));
    }
    Ok(value)
}

fn not_an_array(field: &str) -> Failure {
    Failure::field(field, "must be a JSON object, not an array")
}

/// The path to an array that was taken for an object: what was read has an object there.
fn array_for_object(given: &Value, taken: &Value) -> Option<String> {
    match (given, taken) {
        (Value::Array(_), Value::Object(_)) => Some(String::new()),
        (Value::Array(given), Value::Array(taken)) => given
            .iter()
            .zip(taken)
            .enumerate()
            .find_map(|(n, (given, taken))| Some(format!("[{n}]{}", array_for_object(given, taken)?))),
        (Value::Object(given), Value::Object(taken)) => given
            .iter()
            .find_map(|(name, given)| Some(format!(".{name}{}", array_for_object(given, taken.get(name)?)?))),
        _ => None,
    }
}

/// Parses again and keeps track of where: it costs half as much again, so only what is wrong pays it.
fn explain<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        if inner.is_data() {
            let message = without_position(&inner);
            Failure::field(field_of(&path, &message), message)
        } else {
            not_json(&inner)
        }
    })?;
    json.end().map_err(|error| not_json(&error))?;
    Ok(value)
}

/// Parses a body that may be missing: then the default.
pub(super) fn parse_optional<T: Serialize + DeserializeOwned + Default>(
    headers: &HeaderMap,
    body: &[u8],
) -> Result<T> {
    if body.is_empty() {
        Ok(T::default())
    } else {
        parse(headers, body)
    }
}

fn not_json(error: &serde_json::Error) -> Failure {
    Problem::new(Code::InvalidRequest, format!("the body is not JSON: {error}"))
        .field("body", error.to_string())
        .into()
}

/// The field that an error is about. A missing one is noticed in what it is missing from.
fn field_of(path: &str, message: &str) -> String {
    let missing = message
        .strip_prefix("missing field `")
        .and_then(|rest| rest.strip_suffix('`'));
    match (path, missing) {
        (".", None) => "body".to_owned(),
        (".", Some(field)) => field.to_owned(),
        (path, None) => path.to_owned(),
        (path, Some(field)) => format!("{path}.{field}"),
    }
}

/// `missing field `x` at line 1 column 2` without where: the path of the field says it better.
fn without_position(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

/// `application/json` or `application/anything+json`; nothing said counts as JSON, for curl's sake
/// only with `-H 'Content-Type:'`: what curl and browsers send by themselves (a form) is refused.
fn check_content_type(headers: &HeaderMap) -> Result<()> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else {
        return Ok(());
    };
    let essence = value
        .to_str()
        .unwrap_or("?")
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    let json = essence
        .strip_prefix("application/")
        .is_some_and(|subtype| subtype == "json" || subtype.ends_with("+json"));
    if json {
        Ok(())
    } else {
        Err(Failure::new(
            Code::UnsupportedMediaType,
            format!("the body must be application/json, not {essence}"),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;
    use regent_types::session::CreateSession;

    fn refused(body: &str) -> String {
        format!(
            "{:?}",
            parse::<CreateSession>(&HeaderMap::new(), body.as_bytes()).unwrap_err()
        )
    }

    #[test]
    fn a_wrong_field_is_named_by_its_path() {
        assert!(refused(r#"{"template":"demo","resources":{"cpu":"x"}}"#).contains("\"resources.cpu\""));
        assert!(refused(r#"{"template":"demo","tags":["a",1]}"#).contains("\"tags[1]\""));
        assert!(refused("{}").contains("missing field `template`"));
        assert!(refused(r#"{"template":"demo","colour":1}"#).contains("colour"));
    }

    /// An array was read as the fields in their order, so that `["h", 5000]` acquired a lease.
    #[test]
    fn an_array_is_no_object() {
        for body in ["[]", r#"["admin","demo",{},false,null,null,[],{},"reject"]"#] {
            assert!(refused(body).contains("not an array"), "{body}");
        }
    }

    /// The same further within: `"resources": ["1Gi"]` asked for memory.
    #[test]
    fn an_array_within_is_no_object_either() {
        let text = refused(r#"{"template":"demo","resources":["1Gi","2"]}"#);
        assert!(
            text.contains("\"resources\"") && text.contains("not an array"),
            "{text}"
        );
        let manifest = r#"{"metadata":{"name":"t"},"spec":{"command":["a"],"env":[{"name":"A"},["B","c"]]}}"#;
        let refused = parse::<regent_types::template::Manifest>(&HeaderMap::new(), manifest.as_bytes());
        let text = format!("{:?}", refused.unwrap_err());
        assert!(text.contains("spec.env[1]"), "{text}");
        let free = r#"{"agentId":"a","metadata":{"a":[[1],{"b":[]}]},"labels":{}}"#;
        parse::<regent_types::agent::RegisterAgent>(&HeaderMap::new(), free.as_bytes()).unwrap();
    }

    #[test]
    fn what_is_not_json_is_refused() {
        for body in ["", "{", "nonsense", r#"{"template":"demo"} x"#, "\u{0}"] {
            assert!(refused(body).contains("InvalidRequest"), "{body:?}");
        }
    }

    #[test]
    fn other_content_types_are_refused() {
        let check = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(value));
            check_content_type(&headers).is_ok()
        };
        assert!(check("application/json; charset=utf-8") && check("application/merge-patch+json"));
        assert!(!check("text/plain") && !check("application/x-www-form-urlencoded") && !check("json"));
    }
}
