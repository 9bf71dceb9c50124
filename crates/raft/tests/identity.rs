//! Who may be a member: wiped, renamed, misconfigured and foreign nodes.

mod support;

use regent_raft::{ClusterSecret, Health, StartError};
use regent_types::NodeId;
use support::{Cluster, failure, soon, start, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

type Test = anyhow::Result<()>;

/// A node that lost its data has forgotten its votes: under its old id it could elect a second leader.
#[tokio::test(flavor = "multi_thread")]
async fn a_wiped_node_is_refused_and_told_the_way_back() -> Test {
    for wiped in [1, 3] {
        let mut cluster = Cluster::start().await;
        cluster.stop_node(wiped).await;
        cluster.wipe(wiped);
        cluster.start_node(wiped).await;
        let why = failure(&cluster.nodes[&wiped]).await;
        assert!(
            why.contains("is gone") && why.contains("node id that was never used"),
            "{why}"
        );
        assert!(matches!(cluster.nodes[&wiped].status().health, Health::Failed(_)));

        let other = 2;
        cluster.write(other, "without-it").await?.applied.unwrap();
        let voted = cluster.nodes[&other].status();
        assert!(
            voted
                .members
                .iter()
                .any(|m| m.id == NodeId(wiped) && !m.reachable),
            "it was let in"
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_folder_keeps_its_node_id() -> Test {
    let mut cluster = Cluster::start().await;
    cluster.stop_node(3).await;
    let mut renamed = cluster.options(3);
    renamed.node = NodeId(2);
    let error = start(renamed).await.unwrap_err();
    assert!(
        matches!(
            error,
            StartError::NodeIdChanged {
                found: NodeId(3),
                given: NodeId(2),
                ..
            }
        ),
        "{error}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_must_be_in_its_own_list() -> Test {
    let cluster = Cluster::plan().await;
    let mut options = cluster.options(2);
    options.members.remove(&NodeId(2));
    assert!(matches!(
        start(options).await,
        Err(StartError::NotAMember { node: NodeId(2), .. })
    ));
    Ok(())
}

/// The others do not begin without the one whose list differs, and both lists are named.
#[tokio::test(flavor = "multi_thread")]
async fn another_member_list_is_refused_by_name() -> Test {
    let mut cluster = Cluster::plan().await;
    cluster.start_node(1).await;
    cluster.start_node(2).await;
    let mut options = cluster.options(3);
    options.members.insert(NodeId(4), "127.0.0.1:1".to_owned());
    let (ours, theirs) = (cluster.members.clone(), options.members.clone());
    let odd = start(options).await?;
    for (node, list) in [(&cluster.nodes[&1], &theirs), (&odd, &ours)] {
        let told = until("the lists are compared", || match node.status().health {
            Health::Starting(waits_for) if waits_for.contains("same list") => Some(waits_for),
            _ => None,
        })
        .await;
        for address in list.values() {
            assert!(told.contains(address), "{address} is not in: {told}");
        }
    }
    assert_eq!(cluster.nodes[&1].cluster_id(), None);
    odd.shutdown().await;

    // With the right list it goes on by itself.
    cluster.start_node(3).await;
    cluster.leader().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn another_secret_is_refused() -> Test {
    let mut cluster = Cluster::plan().await;
    cluster.start_node(1).await;
    cluster.start_node(2).await;
    let mut options = cluster.options(3);
    options.secret = ClusterSecret::new("another secret altogether")?;
    let stranger = start(options).await?;
    for node in [&cluster.nodes[&1], &stranger] {
        until("the secrets are compared", || match node.status().health {
            Health::Starting(waits_for) if waits_for.contains("secrets differ") => Some(()),
            _ => None,
        })
        .await;
    }
    assert_eq!(cluster.nodes[&2].cluster_id(), None);
    stranger.shutdown().await;
    Ok(())
}

/// Bytes from strangers and broken frames end their own connection and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_peer_port_disturbs_nobody() -> Test {
    let cluster = Cluster::start().await;
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0, 0, 0, 2, 1, 255],
        &[0, 0, 0, 1, 9],
        &[255; 64],
        &[],
    ] {
        let mut stream = TcpStream::connect(&cluster.members[&NodeId(2)]).await?;
        stream.write_all(garbage).await?;
        stream.shutdown().await?;
        let mut answer = Vec::new();
        // Closed or reset; never left hanging.
        let _ = stream.read_to_end(&mut answer).await;
        assert!(answer.len() < 64, "a stranger was told {} bytes", answer.len());
    }
    cluster.write(2, "undisturbed").await?.applied.unwrap();
    assert_eq!(cluster.nodes[&2].read(soon()).await?.state.users().len(), 2);
    Ok(())
}
