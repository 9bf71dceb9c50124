//! Ids and secrets. They are made here, on the node that took the request, and travel in the operation:
//! apply must not be random.

use std::fmt::Write as _;

use regent_types::{
    AgentId, CandidateId, CommandId, Epoch, ReplicaName, SessionName, TemplateName, TokenId, UserName,
};
use sha2::{Digest as _, Sha256};

/// Longest name of a session: a DNS-1123 label.
const SESSION_NAME_CHARS: usize = 63;
/// `-` and eight hexadecimal digits.
const SUFFIX_CHARS: usize = 9;
/// Random bytes of an API token: more than anybody can guess.
const SECRET_BYTES: usize = 32;
/// What every secret begins with, so that scanners for leaked secrets can find it.
const SECRET_PREFIX: &str = "regent_";

/// `{user}-{template}-{8 hex}`, at most 63 characters. User names need not be DNS labels, so theirs is
/// turned into one; the template gets what the user's leaves, and at least half.
pub(crate) fn session_name(user: &UserName, template: &TemplateName) -> SessionName {
    let room = SESSION_NAME_CHARS - SUFFIX_CHARS - 1;
    let slug = slug(user.as_str());
    let template = template.as_str();
    let for_template = template.len().min(room - slug.len().min(room / 2));
    let slug = slug[..slug.len().min(room - for_template)].trim_end_matches('-');
    let template = template[..for_template].trim_end_matches('-');
    SessionName::new(format!("{slug}-{template}-{}", hex(&random::<4>())))
        .expect("slug, template and hexadecimal digits make a label of at most 63 characters")
}

/// Lower-case letters, digits and single `-`, beginning and ending with a letter or digit.
fn slug(text: &str) -> String {
    let mut slug = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii_alphanumeric() {
            slug.push(c.to_ascii_lowercase());
        } else if !slug.ends_with('-') {
            slug.push('-');
        }
    }
    slug.trim_matches('-').to_owned()
}

/// `cmd-{16 hex}`.
pub(crate) fn command_id() -> CommandId {
    CommandId::new(format!("cmd-{}", hex(&random::<8>()))).expect("a word")
}

/// `tok-{16 hex}`.
pub(crate) fn token_id() -> TokenId {
    TokenId::new(format!("tok-{}", hex(&random::<8>()))).expect("a word")
}

/// The id of a candidacy for a lease: of the idempotency key that it was asked for with, else a random one.
pub(crate) fn candidate_id(key: Option<[u8; 16]>) -> CandidateId {
    CandidateId::new(hex(&key.unwrap_or_else(random::<16>))).expect("hexadecimal digits are a word")
}

/// The id of the candidacies of one connection of an agent.
pub(crate) fn connection_candidate_id(agent: &AgentId, replica: &ReplicaName, epoch: Epoch) -> CandidateId {
    let hash = Sha256::digest(format!("{agent}/{replica}/{epoch}"));
    CandidateId::new(format!("ws-{}", hex(&hash[..16]))).expect("hexadecimal digits are a word")
}

/// The id of a request that came without one.
pub(crate) fn request_id() -> String {
    format!("req-{}", hex(&random::<8>()))
}

/// A new API token's secret, and the hash that is kept of it.
pub(crate) fn secret() -> (String, [u8; 32]) {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(random::<SECRET_BYTES>());
    let secret = format!("{SECRET_PREFIX}{text}");
    let hash = secret_hash(&secret);
    (secret, hash)
}

/// What is kept of a secret. Plain SHA-256 suffices: the input is random, nobody can run through it.
pub(crate) fn secret_hash(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

fn random<const N: usize>() -> [u8; N] {
    rand::random()
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fault 17 of StreamSpace: user names that were no DNS labels broke the names of resources.
    #[test]
    fn every_user_and_template_give_a_dns_label() {
        let users = [
            "alice",
            "Alice.B@Example.org",
            "a__b",
            "7+",
            "x-",
            &"u".repeat(128),
            &format!("a{}", "-".repeat(100)),
        ];
        let templates = [
            "demo",
            "a",
            &"t".repeat(63),
            &format!("{}-{}", "t".repeat(26), "u".repeat(30)),
        ];
        for user in users {
            for template in templates {
                let user = UserName::new(user).unwrap();
                let name = session_name(&user, &TemplateName::new(template).unwrap());
                assert!(name.as_str().len() <= 63);
            }
        }
    }

    #[test]
    fn short_names_are_kept_whole() {
        let name = session_name(
            &UserName::new("Alice").unwrap(),
            &TemplateName::new("firefox-browser").unwrap(),
        );
        assert!(name.as_str().starts_with("alice-firefox-browser-"), "{name}");
        assert_eq!(name.as_str().len(), "alice-firefox-browser-".len() + 8);
    }

    #[test]
    fn secrets_have_the_documented_form_and_differ() {
        let (a, hash) = secret();
        assert_eq!(a.len(), "regent_".len() + 43);
        assert_eq!(secret_hash(&a), hash);
        assert_ne!(a, secret().0);
    }
}
