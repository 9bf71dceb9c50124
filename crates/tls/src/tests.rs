//! What is accepted and what is refused, on files as an operator would have them.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use regent_types::NodeId;
use tempfile::TempDir;

use super::*;

struct Ca {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            pem,
            issuer: Issuer::new(params, key),
        }
    }

    /// Writes the three files of a node whose certificate has these names.
    fn write(&self, folder: &Path, names: &[&str]) -> Files {
        let mut params =
            CertificateParams::new(names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>()).unwrap();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate().unwrap();
        let files = Files {
            cert: folder.join("cert.pem"),
            key: folder.join("key.pem"),
            ca: folder.join("ca.pem"),
        };
        std::fs::write(&files.cert, params.signed_by(&key, &self.issuer).unwrap().pem()).unwrap();
        std::fs::write(&files.key, key.serialize_pem()).unwrap();
        std::fs::set_permissions(&files.key, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&files.ca, &self.pem).unwrap();
        files
    }
}

fn load(files: &Files, node: u64) -> Result<Credentials, String> {
    Credentials::load(files.clone(), NodeId(node), HttpClients::Any).map_err(|error| error.to_string())
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn a_node_starts_only_with_a_certificate_of_its_own() {
    let folder = folder();
    let ca = Ca::new();
    let files = ca.write(folder.path(), &[PEER_HOST, "node-3.regent.internal", "10.0.0.1"]);
    load(&files, 3).unwrap();
    assert!(
        load(&files, 2)
            .unwrap_err()
            .contains("is node 3's, and this is node 2")
    );

    for (names, words) in [
        (&[PEER_HOST][..], "names no node"),
        (&[PEER_HOST, "node-03.regent.internal"], "names no node"),
        (
            &[PEER_HOST, "node-3.regent.internal", "node-4.regent.internal"],
            "names more than one node: 3 and 4",
        ),
        (&["node-3.regent.internal"], PEER_HOST),
    ] {
        let files = ca.write(folder.path(), names);
        let refused = load(&files, 3).unwrap_err();
        assert!(refused.contains(words), "{names:?}: {refused}");
    }
}

#[test]
fn another_ca_a_key_of_another_and_a_key_for_everybody_are_refused() {
    let folder = folder();
    let ca = Ca::new();
    let names = [PEER_HOST, "node-1.regent.internal"];
    let files = ca.write(folder.path(), &names);

    std::fs::write(&files.ca, Ca::new().pem).unwrap();
    assert!(load(&files, 1).unwrap_err().contains("is not of the CA in"));

    let files = ca.write(folder.path(), &names);
    std::fs::write(&files.key, KeyPair::generate().unwrap().serialize_pem()).unwrap();
    assert!(load(&files, 1).unwrap_err().contains("cannot be used"));

    let files = ca.write(folder.path(), &names);
    std::fs::set_permissions(&files.key, std::fs::Permissions::from_mode(0o640)).unwrap();
    assert!(load(&files, 1).unwrap_err().contains("chmod 600"));

    let files = ca.write(folder.path(), &names);
    std::fs::write(&files.cert, "hello").unwrap();
    assert!(load(&files, 1).unwrap_err().contains("holds no certificate"));
    std::fs::remove_file(&files.cert).unwrap();
    assert!(load(&files, 1).unwrap_err().contains("cannot be read"));
}

#[test]
fn new_files_are_taken_and_bad_ones_leave_the_old_in_use() {
    let folder = folder();
    let ca = Ca::new();
    let names = [PEER_HOST, "node-1.regent.internal"];
    let credentials = load(&ca.write(folder.path(), &names), 1).unwrap();
    assert!(!credentials.reload().unwrap());

    let before = credentials.http();
    let files = ca.write(folder.path(), &names);
    let good = std::fs::read(&files.key).unwrap();
    // Half of the replacement: the certificate is new and the key is not yet.
    std::fs::write(&files.key, KeyPair::generate().unwrap().serialize_pem()).unwrap();
    assert!(credentials.reload().is_err());
    assert!(Arc::ptr_eq(&before, &credentials.http()));

    std::fs::write(&files.key, good).unwrap();
    assert!(credentials.reload().unwrap());
    assert!(!Arc::ptr_eq(&before, &credentials.http()));
    assert!(!credentials.reload().unwrap());
}
