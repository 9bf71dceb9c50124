//! Nodes join with a token, get a vote by themselves, and are taken out, while others write through all nodes and
//! nothing they write fails. A node that has lost its data, a token that was used and a node that was removed stay out.

use std::path::PathBuf;
use std::time::Instant;

use regent_client::{Client, Error};
use regent_types::auth::CreateToken;
use regent_types::cluster::{Cluster, Join};
use regent_types::duration::Span;
use regent_types::{Code, NodeId, TokenId};
use rustix::process::Signal;

use crate::harness::{Dev, NodeEntry, REGENT, eventually, findings, free_address, is_alive, restrict, send};
use crate::writers::{Writers, write};

#[tokio::test]
async fn three_nodes_become_five_and_three_others_and_no_write_fails() {
    let mut dev = Dev::start();
    let client = dev.client();
    let writers = Writers::start(&client);

    let first_three: Vec<NodeId> = dev.file.nodes.iter().map(|node| node.id).collect();
    let began = Instant::now();
    for id in [4, 5] {
        let token = join_token(&client, "node").await;
        let folder = dev.folder_of(id);
        add_node(&mut dev, id, Some(&token), &folder);
    }
    let cluster = voters(&client, &[1, 2, 3, 4, 5]).await;
    eprintln!(
        "two nodes joined and vote {:?} after they were started",
        began.elapsed()
    );
    assert_eq!(findings(&cluster), Vec::<&String>::new());
    writers.go_on().await;

    // The one that leads and another one, both at once.
    let leader = client.cluster().await.unwrap().leader.unwrap();
    let other = *first_three.iter().find(|id| **id != leader).unwrap();
    for id in [leader, other] {
        client.remove_member(id).await.unwrap();
    }
    let stay: Vec<u64> = (1..=5).filter(|id| *id != leader.0 && *id != other.0).collect();
    voters(&client, &stay).await;
    writers.go_on().await;
    let (done, failed) = writers.end().await;
    eprintln!("{done} writes were acknowledged meanwhile");
    assert_eq!(failed, Vec::<String>::new(), "no write fails");

    // Who was taken out ends, and says why.
    for id in [leader, other] {
        let node = dev.file.nodes.iter().find(|node| node.id == id).unwrap();
        eventually("end of a node that was removed", || async {
            (!is_alive(node.pid)).then_some(())
        })
        .await;
        let log = std::fs::read_to_string(dev.path().join(format!("node-{id}.log"))).unwrap_or_default();
        assert!(log.contains(&format!("node {id} is not a member")), "{log}");
    }
    // Those that are left lose one and go on.
    let left = dev
        .file
        .nodes
        .iter()
        .position(|node| node.id == NodeId(4))
        .unwrap();
    dev.kill_node(left);
    write(&client, 0).await.unwrap();
    dev.restart_node(left);
    eventually("return of the node that joined", || async {
        dev.client_of(left).readyz().await.ok()
    })
    .await;
}

#[tokio::test]
async fn who_may_not_join_is_told_why_and_what_to_do() {
    let mut dev = Dev::start();
    let client = dev.client();
    let token = join_token(&client, "node").await;
    let join = |id: u64, incarnation: &str| Join {
        node_id: NodeId(id),
        incarnation: incarnation.repeat(16),
        peer: "127.0.0.1:1".to_owned(),
        http: "http://127.0.0.1:2".to_owned(),
    };
    let refused = |answer: Result<_, Error>| match answer {
        Err(Error::Problem(problem)) => (problem.code, problem.detail),
        Err(other) => panic!("{other}"),
        Ok(()) => panic!("it was admitted"),
    };
    // An API token is none, even an admin's, and what is made up is none.
    let stranger = client.with_token("regent-nobody-has-made-this-token").unwrap();
    for not_a_join_token in [&client, &stranger] {
        let (code, detail) = refused(not_a_join_token.join(&join(4, "aa")).await.map(drop));
        assert_eq!(code, Code::Unauthenticated);
        assert!(detail.contains("regent cluster add"), "{detail}");
    }
    // For an agent it is another one.
    let agents = client
        .with_token(&join_token(&client, "agent:dev-*").await)
        .unwrap();
    assert_eq!(
        refused(agents.join(&join(4, "aa")).await.map(drop)).0,
        Code::Forbidden
    );
    // It speaks for nobody.
    let joining = client.with_token(&token).unwrap();
    assert_eq!(
        refused(joining.cluster().await.map(drop)).0,
        Code::Unauthenticated
    );

    // Once; the same node may ask again, nobody else.
    let admitted = joining.join(&join(4, "aa")).await.unwrap();
    assert_eq!(
        joining.join(&join(4, "aa")).await.unwrap().revision,
        admitted.revision
    );
    assert_eq!(
        refused(joining.join(&join(5, "bb")).await.map(drop)).0,
        Code::Unauthenticated
    );
    let (code, detail) = refused(joining.join(&join(4, "bb")).await.map(drop));
    assert_eq!(code, Code::WrongState);
    assert!(detail.contains("never used again"), "{detail}");

    // One that never came is in nobody's way: it has no vote, and can be taken out.
    let cluster = eventually("the learner that never came", || async {
        let cluster = client.cluster().await.ok()?;
        (cluster.members.len() == 4).then_some(cluster)
    })
    .await;
    assert!(
        cluster.findings.iter().any(|found| found.contains("node 4")),
        "{:?}",
        cluster.findings
    );
    let promoted = client.promote_member(NodeId(4)).await;
    assert_eq!(refused(promoted.map(drop)).0, Code::WrongState);
    client.remove_member(NodeId(4)).await.unwrap();
    assert_eq!(
        refused(client.remove_member(NodeId(9)).await.map(drop)).0,
        Code::MemberNotFound
    );

    // By the command line: a folder that is lost, and a token that is missing.
    let token = join_token(&client, "node").await;
    let folder = dev.folder_of(5);
    let node = add_node(&mut dev, 5, Some(&token), &folder);
    voters(&client, &[1, 2, 3, 5]).await;
    dev.kill_node(node);
    std::fs::remove_dir_all(&folder).unwrap();
    let token = join_token(&client, "node").await;
    let lost = dev.spawn("lost", &with_token(&dev, 5, Some(&token), &folder));
    ended(&dev, "lost", lost, "never used again").await;
    let bare = dev.folder_of(6);
    let none = dev.spawn("none", &with_token(&dev, 6, None, &bare));
    ended(&dev, "none", none, "join-token-file").await;
}

#[tokio::test]
async fn an_agent_exchanges_a_join_token_for_its_own_once() {
    let dev = Dev::start_with(&["--nodes", "1"]);
    let client = dev.client();
    let token = dev.secret("agent-join", &join_token(&client, "agent:edge-*").await);
    let mut command = dev.file.agents[0].command.clone();
    let data = dev.path().join("agent-edge-1");
    replace(&mut command, "--agent-id", "edge-1");
    replace(&mut command, "--data", &data.display().to_string());
    let at = command.iter().position(|word| word == "--token-file").unwrap();
    command[at] = "--join-token-file".to_owned();
    command[at + 1] = token.display().to_string();
    let id = "edge-1".parse().unwrap();
    dev.spawn("edge", &command);
    dev.agent_online(&id).await;
    // Again: the token is spent, and what it was exchanged for is kept.
    let tokens = client.all_tokens().await.unwrap();
    assert!(tokens.iter().all(|token| token.join.is_none()), "it is spent");
    let own: Vec<&TokenId> = tokens
        .iter()
        .filter(|token| token.agent_id.as_ref() == Some(&id))
        .map(|t| &t.id)
        .collect();
    assert_eq!(own.len(), 1);
    dev.stop("edge");
    dev.spawn("edge", &command);
    dev.agent_online(&id).await;
    dev.stop("edge");
    // The only node of a cluster stays.
    let last = client.remove_member(NodeId(1)).await.unwrap_err();
    assert!(last.to_string().contains("no quorum"), "{last}");
    // Without that folder it gets none.
    std::fs::remove_dir_all(&data).unwrap();
    let again = dev.spawn("edge-again", &command);
    ended(&dev, "edge-again", again, "got no token").await;
}

/// Only the one that leads can bring the entry that says who it is.
#[tokio::test]
async fn a_member_that_was_away_hears_a_leader_that_was_admitted_meanwhile() {
    let mut dev = Dev::start();
    let away = (dev.leader().await + 1) % 3;
    let client = dev.client();
    voters(&client, &[1, 2, 3]).await;
    dev.kill_node(away);
    let token = join_token(&client, "node").await;
    let folder = dev.folder_of(4);
    let new = add_node(&mut dev, 4, Some(&token), &folder);
    let client = dev.client_of(new);
    eventually("vote of the new node", || async {
        let cluster = client.cluster().await.ok()?;
        let voter = cluster
            .members
            .iter()
            .any(|member| member.id == NodeId(4) && member.voter);
        voter.then_some(())
    })
    .await;
    client.transfer(Some(NodeId(4))).await.unwrap();
    dev.restart_node(away);
    eventually("return of the one that was away", || async {
        let node = dev.client_of(away);
        node.readyz().await.ok()?;
        (node.cluster().await.ok()?.leader == Some(NodeId(4))).then_some(())
    })
    .await;
}

/// Taking out one of two that cannot both be spared is refused, and nothing is changed.
#[tokio::test]
async fn a_member_that_the_quorum_needs_stays() {
    let mut dev = Dev::start();
    let leader = dev.leader().await;
    let (dead, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let client = dev.client_of(leader);
    voters(&client, &[1, 2, 3]).await;
    dev.kill_node(dead);
    eventually("that the node is gone", || async {
        let cluster = client.cluster().await.ok()?;
        let dead = dev.file.nodes[dead].id;
        cluster
            .members
            .iter()
            .any(|member| member.id == dead && !member.reachable)
            .then_some(())
    })
    .await;
    let refused = client.remove_member(dev.file.nodes[other].id).await.unwrap_err();
    assert!(refused.to_string().contains("no quorum"), "{refused}");
    // The dead one can go; then two are left, and it says what that means.
    client.remove_member(dev.file.nodes[dead].id).await.unwrap();
    let stay = [dev.file.nodes[leader].id.0, dev.file.nodes[other].id.0];
    let cluster = voters(&client, &stay).await;
    assert!(
        cluster.findings.iter().any(|found| found.contains("two voters")),
        "{:?}",
        cluster.findings
    );
    // When it comes back it is told, and ends, though it never served.
    dev.restart_node(dead);
    let (name, pid) = (format!("node-{dead}"), dev.file.nodes[dead].pid);
    ended(&dev, &name, pid, "is not a member").await;
    let (code, text, _) = dev.cli(&["cluster", "status"]);
    assert_eq!(code, 0);
    assert!(text.contains("! with two voters"), "{text}");
}

impl Dev {
    fn folder_of(&self, id: u64) -> PathBuf {
        self.path().join(format!("joined-{id}"))
    }

    fn secret(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path().join(name);
        std::fs::write(&path, text).unwrap();
        restrict(&path);
        path
    }

    fn stop(&self, name: &str) {
        if let Some(pid) = self.pid_of(name) {
            send(pid, Signal::TERM);
            self.reap(name);
        }
    }
}

async fn join_token(client: &Client, what: &str) -> String {
    let wanted = CreateToken {
        join: Some(what.to_owned()),
        expires_in: Some(Span(60_000)),
        ..CreateToken::default()
    };
    // Refused until all nodes have said what they support, a moment after the first start.
    eventually("a join token", || async {
        client.create_token(&wanted).await.ok()?.token
    })
    .await
}

/// Starts a node that joins; gives its index.
fn add_node(dev: &mut Dev, id: u64, token: Option<&str>, folder: &std::path::Path) -> usize {
    let command = with_token(dev, id, token, folder);
    let http = format!("http://{}", value(&command, "--http"));
    let index = dev.file.nodes.len();
    let pid = dev.spawn(&format!("node-{index}"), &command);
    dev.file.nodes.push(NodeEntry {
        id: NodeId(id),
        http,
        pid,
        data: folder.to_owned(),
        command,
    });
    index
}

fn with_token(dev: &Dev, id: u64, token: Option<&str>, folder: &std::path::Path) -> Vec<String> {
    let servers: Vec<&str> = dev.file.nodes.iter().map(|node| node.http.as_str()).collect();
    let mut command = vec![REGENT.to_owned(), "server".to_owned()];
    let mut flag = |name: &str, value: String| command.extend([name.to_owned(), value]);
    flag("--node-id", id.to_string());
    flag("--data", folder.display().to_string());
    flag("--http", free_address());
    flag("--peer", free_address());
    flag("--join", servers.join(","));
    if let Some(token) = token {
        let file = dev.secret(&format!("join-{id}"), token);
        flag("--join-token-file", file.display().to_string());
    }
    command
}

fn value<'a>(command: &'a [String], flag: &str) -> &'a str {
    let at = command.iter().position(|word| word == flag).unwrap();
    &command[at + 1]
}

fn replace(command: &mut [String], flag: &str, value: &str) {
    let at = command.iter().position(|word| word == flag).unwrap();
    value.clone_into(&mut command[at + 1]);
}

/// Waits until a process has ended, and looks for the words in what it said.
async fn ended(dev: &Dev, name: &str, pid: u32, words: &str) {
    eventually(&format!("end of {name}"), || async {
        dev.has_ended(name, pid).then_some(())
    })
    .await;
    let log = std::fs::read_to_string(dev.path().join(format!("{name}.again.log"))).unwrap();
    assert!(log.contains(words), "{name} does not say {words:?}: {log}");
}

/// Waits until exactly these vote, and nobody else is there.
pub(crate) async fn voters(client: &Client, ids: &[u64]) -> Cluster {
    let mut wanted = ids.to_vec();
    wanted.sort_unstable();
    eventually(&format!("voters {wanted:?}"), || async {
        let cluster = client.cluster().await.ok()?;
        let found: Vec<u64> = cluster
            .members
            .iter()
            .filter(|m| m.voter)
            .map(|m| m.id.0)
            .collect();
        let settled =
            cluster.members.len() == found.len() && cluster.members.iter().all(|m| m.since.is_some());
        (found == wanted && settled).then_some(cluster)
    })
    .await
}
