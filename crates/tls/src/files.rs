//! PEM files. Invariant: a key that anybody but its owner may read is never used.

use std::fs::Metadata;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::Error;

/// Largest file that is read: a CA file with hundreds of certificates is far below.
const MAX_BYTES: u64 = 1024 * 1024;

/// The three files of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// Its certificate, and after it those between it and the CA, if there are any.
    pub cert: PathBuf,
    /// The key of the certificate.
    pub key: PathBuf,
    /// The CA of the cluster; while one CA follows another, both.
    pub ca: PathBuf,
}

impl Files {
    /// What is in them now.
    pub(crate) fn read(&self) -> Result<Contents, Error> {
        Ok(Contents {
            cert: read(&self.cert)?,
            key: read_key(&self.key)?,
            ca: read(&self.ca)?,
        })
    }
}

/// What was in the files at one time.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Contents {
    pub(crate) cert: Vec<u8>,
    pub(crate) key: Vec<u8>,
    pub(crate) ca: Vec<u8>,
}

/// What a mode gives to the group and to everybody else.
const OTHERS: u32 = 0o077;
/// The same, but that the group may read.
const OTHERS_BUT_GROUP_READS: u32 = 0o037;

/// Whether only the owner may read or write a file or folder with this mode.
pub fn owner_only(mode: u32) -> bool {
    mode & OTHERS == 0
}

/// Whether a secret file is one. That of root may be readable by a group too when this process is not root's: so
/// Kubernetes gives secrets to programs that are not (`fsGroup`).
pub fn is_secret(file: &Metadata) -> bool {
    let of_root_for_others = file.uid() == 0 && !rustix::process::geteuid().is_root();
    let forbidden = if of_root_for_others {
        OTHERS_BUT_GROUP_READS
    } else {
        OTHERS
    };
    file.permissions().mode() & forbidden == 0
}

/// A file that is no secret.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    if std::fs::metadata(path).map_err(failed)?.len() > MAX_BYTES {
        return Err(Error::content(path, format!("more than {MAX_BYTES} bytes")));
    }
    std::fs::read(path).map_err(failed)
}

/// A file that is one.
pub(crate) fn read_key(path: &Path) -> Result<Vec<u8>, Error> {
    let metadata = std::fs::metadata(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })?;
    if !is_secret(&metadata) {
        return Err(Error::Loose(path.to_owned()));
    }
    read(path)
}

/// The certificates in a file, at least one.
pub(crate) fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| Error::content(path, format!("a certificate that cannot be read: {error}")))?;
    if found.is_empty() {
        return Err(Error::content(
            path,
            "no certificate (-----BEGIN CERTIFICATE-----)",
        ));
    }
    Ok(found)
}

/// The key in a file.
pub(crate) fn key(path: &Path, pem: &[u8]) -> Result<PrivateKeyDer<'static>, Error> {
    PrivateKeyDer::from_pem_slice(pem)
        .map_err(|error| Error::content(path, format!("no private key that can be read: {error}")))
}

/// The CAs in a file, as what is trusted.
pub(crate) fn roots(path: &Path, pem: &[u8]) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path, pem)? {
        roots
            .add(certificate)
            .map_err(|error| Error::content(path, format!("a certificate that cannot be a CA: {error}")))?;
    }
    Ok(roots)
}
