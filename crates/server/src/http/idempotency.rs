//! `Idempotency-Key`: makes repeating a POST safe. What is proposed is a hash of principal, route and
//! key, and one of the body; the rest is decided in apply, so it holds across nodes.

use axum::http::{HeaderMap, Uri};
use regent_state::Idempotency;
use regent_types::Principal;
use sha2::{Digest as _, Sha256};

use super::problem::{Failure, Result};

/// The header.
pub(super) const HEADER: &str = "idempotency-key";
/// Longest key.
const MAX_KEY_CHARS: usize = 128;

/// The key of a POST, if it came with one.
pub(super) fn of(
    headers: &HeaderMap,
    principal: &Principal,
    uri: &Uri,
    body: &[u8],
) -> Result<Option<Idempotency>> {
    let mut values = headers.get_all(HEADER).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let key = value.as_bytes();
    let printable = key.iter().all(|byte| (0x20..0x7f).contains(byte));
    if values.next().is_some() || !(1..=MAX_KEY_CHARS).contains(&key.len()) || !printable {
        return Err(Failure::field(
            "Idempotency-Key",
            format!("must be one value of 1 to {MAX_KEY_CHARS} printable ASCII characters"),
        ));
    }
    let target = uri.path_and_query().map_or(uri.path(), |target| target.as_str());
    Ok(Some(Idempotency {
        key: hash(&[principal.to_string().as_bytes(), target.as_bytes(), key]),
        body: hash(&[body]),
    }))
}

/// Half a SHA-256; each part goes in with its length, so that parts cannot run into each other.
fn hash(parts: &[&[u8]]) -> [u8; 16] {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    let full: [u8; 32] = hasher.finalize().into();
    let mut half = [0; 16];
    half.copy_from_slice(&full[..16]);
    half
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;
    use regent_types::UserName;

    fn key(user: &str, uri: &'static str, key: &str, body: &str) -> Result<Option<Idempotency>> {
        let mut headers = HeaderMap::new();
        headers.insert(HEADER, HeaderValue::from_bytes(key.as_bytes()).unwrap());
        let user = Principal::User(UserName::new(user).unwrap());
        of(&headers, &user, &Uri::from_static(uri), body.as_bytes())
    }

    #[test]
    fn a_key_is_of_one_caller_and_one_route() {
        let base = key("a", "/x", "k", "{}").unwrap().unwrap();
        assert_eq!(key("a", "/x", "k", "{}").unwrap().unwrap(), base);
        for other in [
            key("b", "/x", "k", "{}"),
            key("a", "/y", "k", "{}"),
            key("a", "/x", "l", "{}"),
        ] {
            assert_ne!(other.unwrap().unwrap().key, base.key);
        }
        let other_body = key("a", "/x", "k", "[]").unwrap().unwrap();
        assert_eq!(other_body.key, base.key);
        assert_ne!(other_body.body, base.body);
    }

    #[test]
    fn keys_that_are_empty_long_or_not_printable_are_refused() {
        for bad in ["", &"k".repeat(129), "a\tb", "ä"] {
            assert!(key("a", "/x", bad, "").is_err(), "{bad:?} was taken");
        }
        assert!(key("a", "/x", &"k".repeat(128), "").is_ok());
    }
}
