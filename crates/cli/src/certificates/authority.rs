//! A CA in a folder: made once, and what it issues.
//!
//! All keys are ECDSA on P-256, which everything that speaks TLS knows. A certificate begins an hour ago, since the
//! clocks of the machines that check it may differ.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use regent_tls::{PEER_HOST, node_host};
use regent_types::NodeId;

use crate::config::{UsageError, secret_file};
use crate::secrets;

/// What every node is called on its own machine: probes and people there use it.
const OWN_HOSTS: [&str; 3] = ["localhost", "127.0.0.1", "::1"];
/// Names that say who a node is, and so cannot be asked for.
const RESERVED: &str = ".regent.internal";
/// How much the clocks of two machines may differ.
const CLOCKS_DIFFER: Duration = Duration::from_hours(1);

/// A CA that can issue.
pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A certificate and its key, as PEM.
pub(super) struct Issued {
    pub(super) cert: String,
    pub(super) key: String,
}

impl Authority {
    /// The key of the CA in the folder, if there is one.
    pub(super) fn key_in(folder: &Path) -> Option<PathBuf> {
        Some(folder.join("ca.key")).filter(|key| key.exists())
    }

    /// Makes a CA in the folder; gives the files of its certificate and its key.
    pub(super) fn create(folder: &Path, days: u32) -> anyhow::Result<(PathBuf, PathBuf)> {
        // Different for each: two clusters' CAs of one name would be told apart by their signatures only.
        let name = format!("regent cluster CA {:08x}", rand::random::<u32>());
        let mut params = params(&name, days);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().context("no key could be made")?;
        let cert = params.self_signed(&key).context("the CA could not be made")?;
        let files = (folder.join("ca.pem"), folder.join("ca.key"));
        secrets::write_public(&files.0, &cert.pem())?;
        // Last: it is what says that there is a CA.
        secrets::write(&files.1, &key.serialize_pem())?;
        Ok(files)
    }

    /// Opens the CA of a folder.
    pub(super) fn open(folder: &Path) -> anyhow::Result<Self> {
        let (cert_file, key_file) = (folder.join("ca.pem"), folder.join("ca.key"));
        if !key_file.exists() {
            return Err(UsageError(format!(
                "there is no CA in {}: make one with `regent ca --out {}`",
                folder.display(),
                folder.display()
            ))
            .into());
        }
        let key = KeyPair::from_pem(&secret_file(&key_file)?)
            .with_context(|| format!("{} holds no key that can be used", key_file.display()))?;
        let pem = std::fs::read_to_string(&cert_file)
            .with_context(|| format!("{} cannot be read", cert_file.display()))?;
        let issuer = Issuer::from_ca_cert_pem(&pem, key)
            .with_context(|| format!("{} holds no CA that can be used", cert_file.display()))?;
        Ok(Self { issuer, pem })
    }

    /// Its certificate.
    pub(super) fn pem(&self) -> &str {
        &self.pem
    }

    /// A certificate by which a node is known to the other nodes, and believed by clients under these names.
    pub(super) fn node(&self, node: NodeId, hosts: &[String], days: u32) -> anyhow::Result<Issued> {
        let mut params = params(&format!("regent node {node}"), days);
        let names = [PEER_HOST.to_owned(), node_host(node)]
            .into_iter()
            .chain(OWN_HOSTS.map(str::to_owned))
            .chain(
                hosts
                    .iter()
                    .filter(|host| !OWN_HOSTS.contains(&host.as_str()))
                    .cloned(),
            );
        params.subject_alt_names = CertificateParams::new(names.collect::<Vec<_>>())
            .context("a name of the node cannot stand in a certificate")?
            .subject_alt_names;
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        self.issue(params)
    }

    /// A certificate that shows no more than that its holder has to do with the cluster.
    pub(super) fn client(&self, name: &str, days: u32) -> anyhow::Result<Issued> {
        let mut params = params(name, days);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(params)
    }

    fn issue(&self, mut params: CertificateParams) -> anyhow::Result<Issued> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().context("no key could be made")?;
        let cert = params
            .signed_by(&key, &self.issuer)
            .context("the certificate could not be made")?;
        Ok(Issued {
            cert: cert.pem(),
            key: key.serialize_pem(),
        })
    }
}

/// Whether this can stand in a certificate as where a node is reached.
pub(super) fn check_host(host: &str) -> Result<(), String> {
    if host.ends_with(RESERVED) {
        return Err(format!(
            "{host:?} ends with {RESERVED}, which says which node a certificate is for and where no node is reached"
        ));
    }
    // Without a wildcard, which would be believed for hosts that are no nodes.
    if regent_tls::is_host(host) {
        Ok(())
    } else {
        Err(format!(
            "{host:?} is neither an IP address nor a host name; leave ports and URLs out"
        ))
    }
}

fn params(name: &str, days: u32) -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, name);
    params.distinguished_name = subject;
    params.is_ca = IsCa::ExplicitNoCa;
    let now = SystemTime::now();
    params.not_before = (now - CLOCKS_DIFFER).into();
    params.not_after = (now + Duration::from_hours(24) * days).into();
    params
}
