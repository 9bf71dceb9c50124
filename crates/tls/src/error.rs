//! Why certificates cannot be used.

use std::path::{Path, PathBuf};

/// Why certificates cannot be used. Each says which file it is about and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("{} cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// A key that others may read.
    #[error("the key file {} may be read by others: run chmod 600 on it", _0.display())]
    Loose(PathBuf),
    /// Not what should be in it.
    #[error("{} holds {what}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The certificate is not for this node.
    #[error("the certificate {} {what}", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The certificates that the machine trusts cannot be found.
    #[error(
        "no certificates that this machine trusts were found; give --ca-file (REGENT_CA_FILE) with the cluster's CA"
    )]
    NoRoots,
}

/// The certificate at the other end of a peer connection is not a node's.
#[derive(Debug, thiserror::Error)]
#[error("the certificate of the other side {0}")]
pub struct NoNode(pub(crate) String);

impl Error {
    pub(crate) fn content(path: &Path, what: impl Into<String>) -> Self {
        Self::Content {
            path: path.to_owned(),
            what: what.into(),
        }
    }

    pub(crate) fn certificate(path: &Path, what: impl Into<String>) -> Self {
        Self::Certificate {
            path: path.to_owned(),
            what: what.into(),
        }
    }
}
