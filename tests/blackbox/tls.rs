//! Between machines: certificates by one command, nodes, an agent and clients over TLS, and what is refused.

use std::io::Read as _;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use regent_client::{Client, Identity, Trust};
use regent_types::agent::AgentStatus;
use regent_types::session::SessionState;
use regent_types::{AgentId, Code, NodeId};

use crate::harness::{PATIENCE, REGENT, eventually, is_alive, restrict, session_of, session_state};
use crate::membership::voters;
use crate::secured::{Cluster, register, run, text};
use crate::writers::Writers;

#[tokio::test]
async fn three_nodes_an_agent_and_a_session_over_tls_with_certificates_of_one_command() {
    let mut cluster = Cluster::new(3);
    cluster.start_all();
    let client = cluster.client();
    eventually("a leader", || async { client.cluster().await.ok()?.leader }).await;
    eventually("all members with their addresses", || async {
        let members = client.cluster().await.ok()?.members;
        let secured = |member: &regent_types::cluster::Member| member.http.starts_with("https://127.0.0.1:");
        members.iter().all(secured).then_some(())
    })
    .await;

    let agent = cluster.start_agent(&client).await;
    online(&client, &agent).await;
    let session = client.create_session(&session_of("sleep")).await.unwrap();
    session_state(&client, &session.name, SessionState::Running).await;

    let ca = cluster.file("node-1/ca.pem");
    let ca = [("REGENT_CA_FILE", ca.to_str().unwrap())];
    let listed = cluster.cli(&["session", "list"], &ca);
    assert!(text(&listed.stdout).contains(session.name.as_str()), "{listed:?}");
    let held = cluster.cli(&["lease", "hold", "nightly", "--", "sh", "-c", "exit 7"], &ca);
    assert_eq!(held.status.code(), Some(7), "{held:?}");

    // The CA of another cluster, and whom the machine trusts: neither believes these nodes.
    let others = Cluster::new(1);
    let other = others.file("node-1/ca.pem");
    for env in [&[("REGENT_CA_FILE", other.to_str().unwrap())][..], &[]] {
        let refused = cluster.cli(&["session", "list"], env);
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        let told = text(&refused.stderr);
        assert!(told.contains("is not of this cluster's CA; --ca-file"), "{told}");
    }
}

/// The path of docs/operations.md: a certificate, a join token, a start; and the other way, out.
#[tokio::test]
async fn a_node_joins_over_tls_and_a_founder_is_taken_out() {
    let mut cluster = Cluster::new(3);
    cluster.start_all();
    let client = cluster.client();
    voters(&client, &[1, 2, 3]).await;
    let agent = cluster.start_agent(&client).await;
    online(&client, &agent).await;
    let session = client.create_session(&session_of("sleep")).await.unwrap();
    session_state(&client, &session.name, SessionState::Running).await;

    let ca = cluster.file("ca/ca.pem");
    let ca = [("REGENT_CA_FILE", ca.to_str().unwrap())];
    // Refused until all nodes have said what they support, a moment after the first start.
    let token = eventually("a join token", || async {
        let added = cluster.cli(&["cluster", "add"], &ca);
        added.status.success().then_some(added)
    })
    .await;
    let told = text(&token.stderr);
    let start = format!(
        " --tls-cert node.pem --tls-key node.key --tls-ca ca.pem --join {} --join-token-file join",
        cluster.urls().join(",")
    );
    assert!(told.contains(&start), "{told}");
    cluster.write_secret("join", &text(&token.stdout));
    let new = cluster.add();
    assert_eq!(new, 3);

    // With certificates that are not its own, of another node and of another CA, the latter also with a CA that
    // believes it: nobody is let in, and the token is not spent.
    let strangers = Cluster::new(4);
    let node_files = [
        (cluster.file("node-1"), 2, "is node 1's, and this is node 4"),
        (
            strangers.file("node-4"),
            1,
            "is not of this cluster's CA; --tls-ca",
        ),
    ];
    for (files, code, words) in node_files {
        let own = cluster.take_node_files(new, &files);
        let refused = run(&mut cluster.command(new));
        let told = text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(code), "{told}");
        assert!(told.contains(words), "{words:?} is not said: {told}");
        cluster.take_node_files(new, own.path());
    }
    let own = cluster.take_node_files(new, &strangers.file("node-4"));
    std::fs::copy(cluster.file("ca/ca.pem"), cluster.file("node-4/ca.pem")).unwrap();
    let refused = run(&mut cluster.command(new));
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(
        text(&refused.stderr).contains("is not of the CA in"),
        "{refused:?}"
    );
    cluster.take_node_files(new, own.path());
    assert_eq!(client.cluster().await.unwrap().members.len(), 3);
    assert_eq!(join_tokens(&client).await, 1, "it is not spent");

    let writers = Writers::start(&client);
    cluster.start(new);
    let members = voters(&client, &[1, 2, 3, 4]).await.members;
    let joined = members.iter().find(|member| member.id == NodeId(4)).unwrap();
    assert_eq!(joined.http, cluster.url(new));
    assert_eq!(join_tokens(&client).await, 0, "it is spent");
    writers.go_on().await;

    // A founder goes, the one that leads if it is one.
    let leader = client.cluster().await.unwrap().leader.unwrap();
    let gone = leader.0.min(3);
    let removed = cluster.cli(&["cluster", "remove", &gone.to_string()], &ca);
    assert!(removed.status.success(), "{removed:?}");
    let index = usize::try_from(gone).unwrap() - 1;
    eventually("end of a node that was removed", || async {
        (!is_alive(cluster.pid(index))).then_some(())
    })
    .await;
    cluster
        .logged(index, &format!("node {gone} is not a member"))
        .await;
    let stay: Vec<u64> = (1..=4).filter(|id| *id != gone).collect();
    voters(&client, &stay).await;
    writers.go_on().await;
    let (_, failed) = writers.end().await;
    assert_eq!(failed, Vec::<String>::new(), "no write fails");

    // The same command again, and the token is gone.
    cluster.stop(new);
    std::fs::remove_file(cluster.file("join")).unwrap();
    cluster.start(new);
    cluster.ready(new).await;
    let through = Client::with_trust([cluster.url(new)], Some(cluster.token()), &cluster.trust()).unwrap();
    session_state(&through, &session.name, SessionState::Running).await;
    let next = through.create_session(&session_of("sleep")).await.unwrap();
    session_state(&through, &next.name, SessionState::Running).await;
}

#[tokio::test]
async fn an_agent_exchanges_a_join_token_over_tls() {
    let mut cluster = Cluster::new(1);
    cluster.start_all();
    let client = cluster.client();
    voters(&client, &[1]).await;
    let ca = cluster.file("ca/ca.pem");
    let env = [("REGENT_CA_FILE", ca.to_str().unwrap())];
    let create = ["token", "create", "--join", "agent:a*", "--expires-in", "1h"];
    let token = eventually("a join token", || async {
        let created = cluster.cli(&create, &env);
        created.status.success().then_some(created)
    })
    .await;
    cluster.write_secret("join", &text(&token.stdout));
    let join = |cluster: &Cluster, id: &AgentId, ca: &Path| {
        cluster.agent_command(id, "--join-token-file", "join", ca)
    };

    // To a server that it does not believe it gives nothing; it may be that the right one comes.
    let id = AgentId::new("a1").unwrap();
    let others = Cluster::new(1);
    let wrong = others.file("ca/ca.pem");
    cluster.spawn("agent", join(&cluster, &id, &wrong));
    cluster.said("agent", "is not of this cluster's CA").await;
    cluster.end("agent");
    let own = cluster.agent_command(&id, "--token-file", "node-1/admin.token", &wrong);
    cluster.spawn("agent", own);
    cluster.said("agent", "is not of this cluster's CA").await;
    cluster.end("agent");
    let other = AgentId::new("b1").unwrap();
    let refused = run(&mut join(&cluster, &other, &ca));
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    let told = text(&refused.stderr);
    assert!(
        told.contains("agent b1 got no token for its join token"),
        "{told}"
    );
    assert_eq!(join_tokens(&client).await, 1, "it is not spent");

    cluster.spawn("agent", join(&cluster, &id, &ca));
    online(&client, &id).await;
    assert_eq!(join_tokens(&client).await, 0, "it is spent");
    let session = client.create_session(&session_of("sleep")).await.unwrap();
    session_state(&client, &session.name, SessionState::Running).await;

    // The same command again, and the token is gone.
    cluster.end("agent");
    std::fs::remove_file(cluster.file("join")).unwrap();
    cluster.spawn("agent", join(&cluster, &id, &ca));
    cluster.said("agent", "connected").await;
    online(&client, &id).await;
    let next = client.create_session(&session_of("sleep")).await.unwrap();
    session_state(&client, &next.name, SessionState::Running).await;
}

#[tokio::test]
async fn who_speaks_plain_http_to_a_node_is_told_so() {
    let mut cluster = Cluster::new(1);
    cluster.start_all();
    cluster.ready(0).await;
    let url = cluster.url(0).replace("https://", "http://");
    let plain = Client::new([url], Some(cluster.token())).unwrap();
    let refused = plain.cluster().await.unwrap_err();
    assert_eq!(refused.code(), Some(Code::InvalidRequest));
    assert!(refused.to_string().contains("speaks TLS only"), "{refused}");
}

#[tokio::test]
async fn a_node_is_refused_without_a_certificate_with_anothers_and_with_another_cas() {
    let mut cluster = Cluster::new(3);
    cluster.start_all();
    cluster.ready(2).await;
    cluster.stop(2);

    // Its own start: the certificate of node 2.
    let own = cluster.take_node_files(2, &cluster.file("node-2"));
    let refused = cluster.command(2).output().unwrap();
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(
        text(&refused.stderr).contains("is node 2's, and this is node 3"),
        "{refused:?}"
    );

    // Everything as it should be, but another cluster's CA: the others do not believe it, nor it them.
    let others = Cluster::new(3);
    cluster.take_node_files(2, &others.file("node-3"));
    cluster.start(2);
    cluster.logged(2, "is not of this cluster's CA").await;
    cluster
        .logged(
            0,
            "refuses the certificate of this one: it is not of its cluster's CA",
        )
        .await;
    cluster.stop(2);

    // Without certificates.
    cluster.start_with(2, &[]);
    cluster
        .logged(2, "one of the two speaks TLS and the other does not")
        .await;
    cluster.logged(0, "the other side does not speak TLS").await;
    cluster.stop(2);

    // The others went on, and with its own it is back.
    register(&cluster.client(), &AgentId::new("while-away").unwrap()).await;
    cluster.take_node_files(2, own.path());
    cluster.start(2);
    cluster.ready(2).await;
}

#[tokio::test]
async fn new_certificates_are_taken_up_while_the_node_runs_and_bad_ones_are_not() {
    let mut cluster = Cluster::new(1);
    cluster.start_all();
    cluster.ready(0).await;
    let first = cluster.certificate_ends(0).await;

    cluster.make(&["--days", "30"]);
    cluster.hang_up(0);
    cluster.logged(0, "new certificates are in use").await;
    let second = cluster.certificate_ends(0).await;
    assert!(second < first, "{second} is not before {first}");

    let (cert, good) = (cluster.file("node-1/node.pem"), cluster.read("node-1/node.pem"));
    std::fs::write(&cert, "no certificate at all").unwrap();
    cluster.hang_up(0);
    cluster
        .logged(0, "new certificates are not used, the old ones stay")
        .await;
    assert_eq!(cluster.certificate_ends(0).await, second);

    // Nobody tells it this time.
    std::fs::write(&cert, good).unwrap();
    cluster.make(&["--days", "60"]);
    eventually("the next certificate", || async {
        (cluster.certificate_ends(0).await > second).then_some(())
    })
    .await;
}

/// Connections that say nothing, on both ports: nobody waits for them, and they are let go.
#[tokio::test]
async fn who_does_not_finish_a_handshake_is_given_up() {
    let mut cluster = Cluster::new(1);
    cluster.start_all();
    cluster.ready(0).await;
    let node = &cluster.nodes[0];
    let mut silent: Vec<_> = [node.http, node.peer]
        .into_iter()
        .flat_map(|port| std::iter::repeat_n(port, 100))
        .map(|port| TcpStream::connect(("127.0.0.1", port)).unwrap())
        .collect();
    cluster.client().cluster().await.unwrap();
    for stream in &mut silent {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the node closes it");
    }
}

#[tokio::test]
async fn a_node_may_ask_its_clients_for_certificates() {
    let mut cluster = Cluster::new(1);
    cluster.start_with(
        0,
        &[&cluster.tls_flags(0)[..], &["--tls-clients".to_owned()]].concat(),
    );
    let (ca, out) = (cluster.file("ca"), cluster.file("alice"));
    let made = run(Command::new(REGENT)
        .args(["cert", "client", "--name", "alice", "--ca"])
        .arg(ca)
        .arg("--out")
        .arg(&out));
    assert!(made.status.success(), "{made:?}");
    let trust = Trust {
        identity: Some(Identity {
            cert: out.join("client.pem"),
            key: out.join("client.key"),
        }),
        ..cluster.trust()
    };
    let alice = Client::with_trust([cluster.url(0)], Some(cluster.token()), &trust).unwrap();
    eventually("an answer to alice", || async {
        alice.cluster().await.ok()?.leader
    })
    .await;

    let (ca, cert, key) = (out.join("ca.pem"), out.join("client.pem"), out.join("client.key"));
    let mut env = vec![
        ("REGENT_CA_FILE", ca.to_str().unwrap()),
        ("REGENT_CERT_FILE", cert.to_str().unwrap()),
        ("REGENT_KEY_FILE", key.to_str().unwrap()),
    ];
    let served = cluster.cli(&["cluster", "status"], &env);
    assert!(served.status.success(), "{served:?}");
    env.pop();
    let half = cluster.cli(&["cluster", "status"], &env);
    assert_eq!(half.status.code(), Some(2), "{half:?}");
    env.pop();
    let refused = cluster.cli(&["cluster", "status"], &env);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(
        text(&refused.stderr).contains("CertificateRequired"),
        "{refused:?}"
    );
}

#[test]
fn plain_text_between_machines_must_be_asked_for_by_name() {
    let cluster = Cluster::new(1);
    let with = |flags: &[&str]| {
        let refused = run(cluster.command_with(0, &[]).args(flags));
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        text(&refused.stderr)
    };
    for flag in ["--http", "--peer"] {
        let mut command = cluster.command_with(0, &[]);
        // An address for documents, which no machine has: nothing listens before the refusal.
        let refused = run(replace(&mut command, flag, "192.0.2.1:7000"));
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        let told = text(&refused.stderr);
        assert!(
            told.contains(&format!("{flag} 192.0.2.1:7000 is not a loopback address")),
            "{told}"
        );
        assert!(told.contains("--plaintext"), "{told}");

        // By name it is taken, and then there is no such address here.
        let mut command = cluster.command_with(0, &["--plaintext".to_owned()]);
        let taken = run(replace(&mut command, flag, "192.0.2.1:7000"));
        assert_eq!(taken.status.code(), Some(1), "{taken:?}");
        assert!(
            text(&taken.stderr).contains("cannot listen on 192.0.2.1:7000"),
            "{taken:?}"
        );
    }
    let cert = cluster.file("node-1/node.pem");
    assert!(with(&["--tls-cert", cert.to_str().unwrap()]).contains("--tls-key and --tls-ca is missing"));
    assert!(with(&["--tls-clients"]).contains("tls-clients needs certificates"));
    let both = run(cluster.command(0).arg("--plaintext"));
    assert!(text(&both.stderr).contains("contradict each other"), "{both:?}");

    let key = cluster.file("node-1/node.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let loose = run(&mut cluster.command(0));
    assert_eq!(loose.status.code(), Some(2), "{loose:?}");
    assert!(text(&loose.stderr).contains("chmod 600"), "{loose:?}");

    restrict(&key);
    let data = cluster.file("data-1");
    std::fs::create_dir(&data).unwrap();
    std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o750)).unwrap();
    let loose = run(&mut cluster.command(0));
    assert_eq!(loose.status.code(), Some(2), "{loose:?}");
    assert!(text(&loose.stderr).contains("chmod 700"), "{loose:?}");
}

/// A command with another value for a flag that it has.
fn replace<'a>(command: &'a mut Command, flag: &str, value: &str) -> &'a mut Command {
    let mut args: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
    let at = args.iter().position(|arg| arg == flag).unwrap();
    args[at + 1] = value.into();
    *command = Command::new(REGENT);
    command.args(args)
}

async fn online(client: &Client, agent: &AgentId) {
    eventually("the agent", || async {
        let agent = client.agent(agent).await.ok()?;
        (agent.status == AgentStatus::Online).then_some(())
    })
    .await;
}

/// How many join tokens are good.
async fn join_tokens(client: &Client) -> usize {
    let tokens = client.all_tokens().await.unwrap();
    tokens.iter().filter(|token| token.join.is_some()).count()
}
