//! How a node learns its id: a number, or `from-hostname` where all nodes are started by the same words and only the
//! name of their machine differs, as the pods of a `StatefulSet`.
//!
//! The name is read where the setting is, so that everything behind it sees a plain id.

use regent_types::NodeId;
use serde::{Deserialize, Deserializer};

/// Instead of a number.
const FROM_HOSTNAME: &str = "from-hostname";

/// Reads the flag.
pub(crate) fn parse(text: &str) -> Result<NodeId, String> {
    if text == FROM_HOSTNAME {
        of_host(&rustix::system::uname().nodename().to_string_lossy())
    } else {
        text.parse()
            .map_err(|error| format!("{text:?} is neither a number nor {FROM_HOSTNAME}: {error}"))
    }
}

/// Reads the key of the file and the variable.
pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<NodeId>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a number or from-hostname")]
    enum Form {
        Number(u64),
        Text(String),
    }
    match Form::deserialize(deserializer)? {
        Form::Number(id) => Ok(Some(NodeId(id))),
        Form::Text(text) => parse(&text).map(Some).map_err(serde::de::Error::custom),
    }
}

/// The number at the end of the host's own name, plus one: hosts are counted from 0, nodes from 1.
fn of_host(name: &str) -> Result<NodeId, String> {
    let own = name.split('.').next().unwrap_or_default();
    let digits = own.len() - own.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    own[own.len() - digits..]
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_add(1))
        .map(NodeId)
        .ok_or_else(|| {
            format!("{FROM_HOSTNAME} needs a host name that ends with a number, such as regent-0; this host is called {name:?}")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_counted_from_zero_and_nodes_from_one() {
        assert_eq!(of_host("regent-0"), Ok(NodeId(1)));
        assert_eq!(of_host("regent-12.regent.default.svc"), Ok(NodeId(13)));
        assert_eq!(parse("3"), Ok(NodeId(3)));
    }

    #[test]
    fn a_host_without_a_number_is_named() {
        for name in ["", "regent", "regent-.7", "regent-18446744073709551615"] {
            let error = of_host(name).unwrap_err();
            assert!(error.contains(&format!("{name:?}")), "{error}");
        }
        assert!(parse("from-host").unwrap_err().contains(FROM_HOSTNAME));
    }
}
