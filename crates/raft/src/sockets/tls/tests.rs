//! Peers that have the cluster secret, and certificates that say something else than they do.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use regent_tls::{Files, HttpClients, node_host};

use super::*;
use crate::identity::{Identity, Record, Refusal};
use crate::options::ClusterSecret;
use crate::roster::Roster;
use crate::transport::connection::LinkError;
use crate::transport::handshake::{accept, dial};
use crate::transport::wire::Purpose;

struct Ca {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
    folder: tempfile::TempDir,
}

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        Self {
            pem: params.self_signed(&key).unwrap().pem(),
            issuer: Issuer::new(params, key),
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// A node that calls itself `node` and has the certificate of `certified`.
    fn identity(&self, node: u64, certified: u64) -> Identity {
        let names = vec![PEER_HOST.to_owned(), node_host(NodeId(certified))];
        let mut params = CertificateParams::new(names).unwrap();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate().unwrap();
        let file = |name: &str| self.folder.path().join(format!("{node}-{name}"));
        let files = Files {
            cert: file("cert"),
            key: file("key"),
            ca: file("ca"),
        };
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(&files.cert, cert.pem()).unwrap();
        std::fs::write(&files.key, key.serialize_pem()).unwrap();
        std::fs::set_permissions(&files.key, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&files.ca, &self.pem).unwrap();
        let credentials = Credentials::load(files, NodeId(certified), HttpClients::Any).unwrap();
        identity(node, Arc::new(Tls::new(Arc::new(credentials))))
    }
}

fn identity(node: u64, sockets: Arc<dyn Sockets>) -> Identity {
    let members: BTreeMap<NodeId, String> = [(NodeId(1), "a".to_owned()), (NodeId(2), "b".to_owned())].into();
    let roster = Roster::of_nobody(0);
    let secret = ClusterSecret::new("the secret of this cluster").unwrap();
    Identity::new(Record::new(NodeId(node)), members, roster, secret, sockets)
}

/// What each end makes of the other: node 1 listens, node 2 calls.
async fn meet(
    client: &Identity,
    server: &Identity,
) -> (Result<NodeId, LinkError>, Result<NodeId, LinkError>) {
    let mut port = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = port.local_addr().unwrap().to_string();
    let accepted = async {
        let (stream, _) = Port::accept(&mut port).await.unwrap();
        accept(server, stream).await.map(|(link, _)| link.peer)
    };
    let dialled = async {
        let dialled = dial(client, NodeId(1), &address, Purpose::Identity).await;
        dialled.map(|link| link.peer)
    };
    tokio::join!(dialled, accepted)
}

#[tokio::test]
async fn two_members_meet_by_their_certificates() {
    let ca = Ca::new();
    let (dialled, accepted) = meet(&ca.identity(2, 2), &ca.identity(1, 1)).await;
    assert_eq!((dialled.unwrap(), accepted.unwrap()), (NodeId(1), NodeId(2)));
}

/// Who has the secret of the cluster and the key of one node could else speak, and vote, for every other.
#[tokio::test]
async fn nobody_is_another_node_than_its_certificate_says() {
    let ca = Ca::new();
    let wrong = |result: Result<NodeId, LinkError>| match result {
        Err(LinkError::Refused(Refusal::Certificate { claimed, proven })) => (claimed.0, proven.0),
        other => panic!("{other:?}"),
    };
    let (dialled, accepted) = meet(&ca.identity(2, 3), &ca.identity(1, 1)).await;
    assert_eq!((wrong(dialled), wrong(accepted)), ((2, 3), (2, 3)));

    let (dialled, accepted) = meet(&ca.identity(2, 2), &ca.identity(1, 3)).await;
    assert_eq!(wrong(dialled), (1, 3));
    assert!(accepted.is_err());
}

#[tokio::test]
async fn another_ca_and_plain_text_are_refused_in_words() {
    let (ca, other) = (Ca::new(), Ca::new());
    let (dialled, accepted) = meet(&other.identity(2, 2), &ca.identity(1, 1)).await;
    let dialled = dialled.unwrap_err();
    assert!(dialled.is_fault());
    assert!(
        dialled.to_string().contains("is not of this cluster's CA"),
        "{dialled}"
    );
    assert!(
        accepted
            .unwrap_err()
            .to_string()
            .contains("refuses the certificate")
    );

    let plain = |node| identity(node, Arc::new(Tcp));
    let (dialled, accepted) = meet(&plain(2), &ca.identity(1, 1)).await;
    assert!(matches!(dialled, Err(LinkError::Foreign)), "{dialled:?}");
    let accepted = accepted.unwrap_err();
    assert!(accepted.to_string().contains("does not speak TLS"), "{accepted}");

    let (dialled, accepted) = meet(&ca.identity(2, 2), &plain(1)).await;
    assert!(dialled.is_err());
    assert!(matches!(accepted, Err(LinkError::Foreign)), "{accepted:?}");
}
