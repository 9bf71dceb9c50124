//! Names that engines take, made of names that they would not.
//!
//! User names and volume names are freer than what Kubernetes or Docker allow; that such names broke resources was
//! a fault of the system that came before. Two texts get one name only if 64 bits of a hash meet.

use std::fmt::Write as _;

use sha2::{Digest, Sha256};

/// The longest DNS-1123 label.
pub const MAX_LABEL: usize = 63;

/// Hexadecimal digits of the hash in a name that was changed.
const HASH: usize = 16;

/// A DNS-1123 label of at most `max` bytes (of 24 at least): `text` itself if it is one, else what of it can be
/// kept, and a hash.
pub fn dns_label(text: &str, max: usize) -> String {
    let kept = text.len() <= max
        && text.starts_with(|first: char| first.is_ascii_lowercase() || first.is_ascii_digit())
        && !text.ends_with('-')
        && text
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if kept {
        return text.to_owned();
    }
    let mut name: String = text
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_lowercase()
            } else {
                '-'
            }
        })
        .take(max - HASH - 1)
        .collect();
    let inner = name.trim_matches('-').len();
    name = name.trim_matches('-').to_owned();
    if inner > 0 {
        name.push('-');
    }
    let hash = Sha256::digest(text.as_bytes());
    for byte in &hash[..HASH / 2] {
        write!(name, "{byte:02x}").expect("writing to a string never fails");
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_names_become_labels_of_their_own_fault_17() {
        let long = "x".repeat(64);
        let odd = [
            "", "-", "a-", "-a", "A", "a.b", "a_b", "a@b", "Ä", &long, "a b", "A.", "_",
        ];
        let mut names: Vec<String> = odd.iter().map(|text| dns_label(text, MAX_LABEL)).collect();
        for name in &names {
            assert!(
                name.len() <= MAX_LABEL && *name == dns_label(name, MAX_LABEL),
                "{name:?}"
            );
        }
        names.sort();
        names.dedup();
        assert_eq!(names.len(), odd.len(), "two names met");
        assert_eq!(dns_label("alice-demo-1", MAX_LABEL), "alice-demo-1");
        assert_eq!(dns_label(&"x".repeat(63), MAX_LABEL), "x".repeat(63));
    }
}
