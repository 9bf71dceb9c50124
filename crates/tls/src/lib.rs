//! Certificates: read, checked, used, and read again while the process runs.
//!
//! Everything that is said over TLS between machines goes through here, so that there is one answer to what is
//! trusted. One CA per cluster: whoever shows a certificate of it, and names itself in it, is a node of that
//! cluster. Who calls the public API is still shown by a token.
//!
//! - [`Credentials`]: what a node has: its certificate, its key and the CA, for peers and for HTTP; followed as
//!   the files change.
//! - [`Trust`]: what a client or an agent has: whom it believes, and perhaps a certificate of its own.
//! - `names`: how a certificate says which node it is for.
//! - `files`: PEM files, with the rule that nobody else may read a key.
//! - [`explain`]: what went wrong in a handshake, for the person who has to mend it.

mod credentials;
mod error;
mod explain;
mod files;
mod names;
mod trust;

use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring};

pub use credentials::{CHECK_EVERY, Credentials, HttpClients};
pub use error::{Error, NoNode};
pub use explain::explain;
pub use files::{Files, is_secret, owner_only};
pub use names::{PEER_HOST, is_host, node_host};
pub use rustls::{ClientConfig, ServerConfig};
pub use trust::{Identity, Trust};

/// The ciphers that everything here uses.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// Makes the ciphers of this crate those of the whole process, for libraries that look for such a default and fail
/// without one. One that is installed already stays.
pub fn install_provider() {
    // An error says that there is one.
    let _ = ring::default_provider().install_default();
}

#[cfg(test)]
mod tests;
