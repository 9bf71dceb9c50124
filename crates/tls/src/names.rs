//! How a certificate says which node it is for: by DNS names that no resolver knows.
//!
//! Every node's certificate has [`PEER_HOST`], for which the other nodes ask when they connect, and exactly one
//! [`node_host`]. Plain DNS names and no extension of our own, so that any CA can make such certificates.

use regent_types::NodeId;
use rustls::pki_types::ServerName;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// The name that every node answers to on its peer port.
pub const PEER_HOST: &str = "peer.regent.internal";

const PREFIX: &str = "node-";
const SUFFIX: &str = ".regent.internal";

/// The name of one node, for its certificate.
pub fn node_host(node: NodeId) -> String {
    format!("{PREFIX}{node}{SUFFIX}")
}

/// Whether this can stand in a certificate as where a node is reached: an IP address or a host name.
pub fn is_host(text: &str) -> bool {
    ServerName::try_from(text).is_ok()
}

/// What the holder of a certificate is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Subject {
    /// The node.
    pub(crate) node: NodeId,
    /// When the certificate ends, in seconds since 1970.
    pub(crate) not_after: i64,
}

/// Reads which node a certificate is for. That it may be believed must be known before.
pub(crate) fn subject(der: &[u8]) -> Result<Subject, String> {
    let (_, certificate) =
        X509Certificate::from_der(der).map_err(|error| format!("cannot be read: {error}"))?;
    let names = certificate
        .subject_alternative_name()
        .map_err(|error| format!("has names that cannot be read: {error}"))?;
    let mut nodes = names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => node_of(name),
            // Where it is reached; the rest means nothing to us.
            _ => None,
        });
    match (nodes.next(), nodes.next()) {
        (Some(node), None) => Ok(Subject {
            node,
            not_after: certificate.validity().not_after.timestamp(),
        }),
        (None, _) => Err(format!(
            "names no node: a node's certificate has the DNS name {PREFIX}N{SUFFIX}"
        )),
        (Some(one), Some(two)) => Err(format!("names more than one node: {one} and {two}")),
    }
}

fn node_of(name: &str) -> Option<NodeId> {
    let digits = name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?;
    let id = NodeId(digits.parse().ok()?);
    // Only as it is written here: not node-03, not node-+3.
    (node_host(id) == name).then_some(id)
}
