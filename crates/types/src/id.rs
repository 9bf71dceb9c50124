//! Identifiers. Each is its own type, so that a session's name can never stand where an
//! agent's id belongs, and each is checked once, where it enters.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Why a text is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {given:?} is not valid: {rule}")]
pub struct IdError {
    /// What was being parsed, for example `agent id`.
    pub what: &'static str,
    /// The text as given, cut to 80 characters.
    pub given: String,
    /// The rule that it breaks.
    pub rule: &'static str,
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $rule:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(value_type = String))]
        pub struct $name(Arc<str>);

        impl $name {
            /// The rule for this identifier, in words.
            pub const RULE: &'static str = $rule;

            /// Checks and takes the text.
            pub fn new(text: impl AsRef<str>) -> Result<Self, IdError> {
                let text = text.as_ref();
                let check: fn(&str) -> bool = $check;
                if check(text) {
                    Ok(Self(Arc::from(text)))
                } else {
                    Err(IdError { what: $what, given: text.chars().take(80).collect(), rule: $rule })
                }
            }

            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Visitor;
                impl de::Visitor<'_> for Visitor {
                    type Value = $name;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        write!(f, "{}: {}", $what, $rule)
                    }
                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$name, E> {
                        $name::new(text).map_err(E::custom)
                    }
                }
                deserializer.deserialize_str(Visitor)
            }
        }
    };
}

fn word(text: &str, max: usize) -> bool {
    !text.is_empty()
        && text.len() <= max
        && text.as_bytes()[0].is_ascii_alphanumeric()
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

fn dns_label(text: &str, max: usize) -> bool {
    let bytes = text.as_bytes();
    let alnum = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    !text.is_empty()
        && text.len() <= max
        && bytes.first().is_some_and(alnum)
        && bytes.last().is_some_and(alnum)
        && bytes.iter().all(|b| alnum(b) || *b == b'-')
}

text_id!(
    /// An agent's id, chosen by who deploys it.
    AgentId, "agent id",
    "1 to 128 letters, digits, `.`, `_` or `-`, beginning with a letter or digit",
    |t| word(t, 128)
);
text_id!(
    /// The name of one replica of an agent; empty for an agent that has only one.
    ReplicaName, "replica name",
    "empty, or 1 to 64 letters, digits, `.`, `_` or `-`, beginning with a letter or digit",
    |t| t.is_empty() || word(t, 64)
);
text_id!(
    /// A session's name: `{user}-{template}-{8 hex}`, a DNS-1123 label, so that every runtime can use it.
    SessionName, "session name",
    "1 to 63 lower-case letters, digits or `-`, beginning and ending with a letter or digit",
    |t| dns_label(t, 63)
);
text_id!(
    /// A command's id.
    CommandId, "command id",
    "1 to 64 letters, digits, `.`, `_` or `-`, beginning with a letter or digit",
    |t| word(t, 64)
);
text_id!(
    /// A template's name.
    TemplateName, "template name",
    "1 to 63 lower-case letters, digits or `-`, beginning and ending with a letter or digit",
    |t| dns_label(t, 63)
);
text_id!(
    /// A user's name. Need not be a DNS label: names of sessions are derived, not copied, from it.
    UserName, "user name",
    "1 to 128 letters, digits, `.`, `_`, `@`, `+` or `-`, beginning with a letter or digit",
    |t| {
        t.len() <= 128
            && t.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric)
            && t.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'@' | b'+' | b'-'))
    }
);
text_id!(
    /// The id of an API token; not a secret.
    TokenId, "token id",
    "1 to 64 letters, digits, `.`, `_` or `-`, beginning with a letter or digit",
    |t| word(t, 64)
);
text_id!(
    /// A lease's name; `/` makes families of names, such as `agent/dev`.
    LeaseName, "lease name",
    "1 to 200 printable characters without spaces",
    |t| (1..=200).contains(&t.chars().count()) && t.chars().all(|c| !c.is_control() && !c.is_whitespace())
);
text_id!(
    /// Names one candidacy for a lease, so that asking again keeps its place and its grant.
    CandidateId, "candidate id",
    "1 to 64 letters, digits, `.`, `_` or `-`, beginning with a letter or digit",
    |t| word(t, 64)
);
text_id!(
    /// The identity of a cluster, made at its first start.
    ClusterId, "cluster id",
    "1 to 64 letters, digits, `.`, `_` or `-`, beginning with a letter or digit",
    |t| word(t, 64)
);

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = std::num::ParseIntError;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }

        impl From<u64> for $name {
            fn from(value: u64) -> Self {
                Self(value)
            }
        }
    };
}

number_id!(
    /// A node's id within its cluster, 1 and up; never used again once a node is gone.
    NodeId
);
number_id!(
    /// The position of an applied operation: revision base plus log index, below 2^53, only growing.
    Revision
);
number_id!(
    /// A fencing token: the revision of the grant. Says who leads.
    Token
);
number_id!(
    /// The revision of a connection. Says which socket.
    Epoch
);

impl LeaseName {
    /// The lease that says which replica of an agent leads: `agent/{id}`.
    pub fn of_agent(agent: &AgentId) -> Self {
        Self(Arc::from(format!("agent/{agent}")))
    }

    /// The agent whose lease this is, if it is one.
    pub fn agent(&self) -> Option<AgentId> {
        self.0.strip_prefix("agent/").and_then(|id| AgentId::new(id).ok())
    }
}

/// Who acts: a user, or an agent under its own token.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Principal {
    /// A person or a program with a user's token.
    User(UserName),
    /// An agent with its agent token.
    Agent(AgentId),
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(name) => write!(f, "user:{name}"),
            Self::Agent(id) => write!(f, "agent:{id}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn session_names_are_dns_labels() {
        assert!(SessionName::new("alice-demo-0a1b2c3d").is_ok());
        for bad in ["", "-a", "a-", "A", "a_b", &"a".repeat(64)] {
            assert!(SessionName::new(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn a_bad_id_says_what_the_rule_is() {
        let error = serde_json::from_str::<AgentId>("\"a b\"")
            .unwrap_err()
            .to_string();
        assert!(error.contains("agent id") && error.contains("letters"), "{error}");
    }

    #[test]
    fn lease_names_may_hold_slashes_and_other_letters() {
        assert_eq!(
            LeaseName::new("agent/dev").unwrap().agent(),
            Some(AgentId::new("dev").unwrap())
        );
        assert!(LeaseName::new("ä/ö").is_ok());
        assert!(LeaseName::new("a b").is_err());
        assert!(LeaseName::new("x".repeat(201)).is_err());
    }
}
