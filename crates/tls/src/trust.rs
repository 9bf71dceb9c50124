//! Whom a client or an agent believes, and what it shows.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore};

use crate::{Error, files, provider};

/// Whom a client believes, and what it shows. The files are read when a client is made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trust {
    /// The CA of the cluster, and nobody else; without it, whom the machine trusts.
    pub ca: Option<PathBuf>,
    /// What it shows when a node asks for a certificate.
    pub identity: Option<Identity>,
}

/// A certificate of a client and its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The certificate.
    pub cert: PathBuf,
    /// Its key, which only its owner may read.
    pub key: PathBuf,
}

impl Trust {
    /// Settings for connections over TLS.
    pub fn client_config(&self) -> Result<Arc<ClientConfig>, Error> {
        let roots = match &self.ca {
            Some(ca) => files::roots(ca, &files::read(ca)?)?,
            None => machine_roots()?,
        };
        self.with_roots(roots)
    }

    /// Settings for a client that makes no connection over TLS: it believes nobody, and reads nothing.
    pub fn none() -> Result<Arc<ClientConfig>, Error> {
        Self::default().with_roots(RootCertStore::empty())
    }

    fn with_roots(&self, roots: RootCertStore) -> Result<Arc<ClientConfig>, Error> {
        let config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("the provider has ciphers for all versions")
            .with_root_certificates(roots);
        let mut config = match &self.identity {
            None => config.with_no_client_auth(),
            Some(Identity { cert, key }) => {
                let chain = files::certificates(cert, &files::read(cert)?)?;
                let private = files::key(key, &files::read_key(key)?)?;
                config.with_client_auth_cert(chain, private).map_err(|error| {
                    Error::certificate(
                        cert,
                        format!("and the key {} cannot be used: {error}", key.display()),
                    )
                })?
            }
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

fn machine_roots() -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    // Single files that cannot be read are no reason not to trust the others.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        Err(Error::NoRoots)
    } else {
        Ok(roots)
    }
}
