//! What the commands make is what nodes and clients take.

use std::os::unix::fs::PermissionsExt as _;

use regent_tls::{Credentials, Files, HttpClients, Identity, Trust};

use super::*;

fn args(out: &Path, nodes: &[&str]) -> ClusterArgs {
    ClusterArgs {
        out: out.to_owned(),
        nodes: nodes.iter().map(|node| parse_node(node).unwrap()).collect(),
        days: 1,
    }
}

fn load(folder: &Path, node: u64) -> Result<Credentials, regent_tls::Error> {
    let files = Files {
        cert: folder.join("node.pem"),
        key: folder.join("node.key"),
        ca: folder.join("ca.pem"),
    };
    Credentials::load(files, NodeId(node), HttpClients::Any)
}

#[test]
fn one_command_makes_all_that_three_nodes_need_and_again_renews_it() {
    let folder = tempfile::tempdir().unwrap();
    let nodes = ["1=10.0.0.1,one.example.org", "2=10.0.0.2", "3=::1,localhost"];
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();

    cluster(args(folder.path(), &nodes)).unwrap();
    for node in 1..=3 {
        let its = folder.path().join(format!("node-{node}"));
        load(&its, node).unwrap();
        assert_eq!(mode(&its), 0o700);
        for secret in ["node.key", "cluster.secret", "admin.token"] {
            assert_eq!(mode(&its.join(secret)), 0o600, "{secret}");
        }
    }
    assert_eq!(mode(&folder.path().join("ca/ca.key")), 0o600);
    let stays = [
        "ca/ca.pem",
        "ca/ca.key",
        "admin.token",
        "node-2/cluster.secret",
        "node-2/ca.pem",
    ];
    let before = stays.map(read);
    let certificate = read("node-2/node.pem");

    cluster(args(folder.path(), &nodes)).unwrap();
    assert_eq!(before, stays.map(read));
    assert_ne!(certificate, read("node-2/node.pem"));
    load(&folder.path().join("node-2"), 2).unwrap();
}

#[test]
fn a_clients_certificate_is_no_nodes() {
    let folder = tempfile::tempdir().unwrap();
    let (ca, out) = (folder.path().join("ca"), folder.path().join("client"));
    new_ca(&ca, 1).unwrap();
    let authority = Authority::open(&ca).unwrap();
    let issued = authority.client("alice", 1).unwrap();
    write(&authority, &issued, &out, "client", String::new()).unwrap();
    let trust = Trust {
        ca: Some(out.join("ca.pem")),
        identity: Some(Identity {
            cert: out.join("client.pem"),
            key: out.join("client.key"),
        }),
    };
    trust.client_config().unwrap();
    std::fs::rename(out.join("client.pem"), out.join("node.pem")).unwrap();
    std::fs::rename(out.join("client.key"), out.join("node.key")).unwrap();
    assert!(load(&out, 1).is_err());
}

#[test]
fn what_cannot_be_certified_is_refused_in_words() {
    for (bad, words) in [
        ("1", "is not ID=HOST"),
        ("0=a", "not a node id"),
        ("x=a", "not a node id"),
        ("1=10.0.0.1:8000", "neither an IP address nor a host name"),
        ("1=https://a", "neither an IP address nor a host name"),
        ("1=*.example.org", "neither an IP address nor a host name"),
        ("1=node-2.regent.internal", "says which node"),
    ] {
        let refused = parse_node(bad).unwrap_err();
        assert!(refused.contains(words), "{bad}: {refused}");
    }
    let folder = tempfile::tempdir().unwrap();
    let twice = cluster(args(folder.path(), &["1=a", "1=b"])).unwrap_err();
    assert!(twice.to_string().contains("given twice"));

    let ca = CaArgs {
        out: folder.path().to_owned(),
        days: 1,
    };
    new_ca(&ca.out, 1).unwrap();
    let again = make_ca(&ca, output::Format::Json).unwrap_err();
    assert!(again.to_string().contains("there is a CA"), "{again}");
    let none = Authority::open(&folder.path().join("nothing")).err().unwrap();
    assert!(none.to_string().contains("regent ca --out"), "{none}");
    std::fs::set_permissions(
        folder.path().join("ca.key"),
        std::fs::Permissions::from_mode(0o644),
    )
    .unwrap();
    let loose = Authority::open(folder.path()).err().unwrap();
    assert!(loose.to_string().contains("chmod 600"), "{loose}");
}
