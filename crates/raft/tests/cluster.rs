//! Three nodes together: elections, writes and reads through any of them, loss and return.

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use regent_raft::{Alarm, CallError, Health, ProposeError, ReadError, Role, SnapshotPolicy};
use regent_state::{Operation, Request};
use regent_types::{NodeId, TemplateName};
use support::{Cluster, failure, make_user, soon, until, users, within};
use tokio::time::{Instant, sleep};

type Test = anyhow::Result<()>;

#[tokio::test(flavor = "multi_thread")]
async fn every_node_takes_writes_and_linearizable_reads() -> Test {
    let cluster = Cluster::start().await;
    for writer in 1..=3 {
        let done = cluster.write(writer, &format!("user-{writer}")).await?;
        done.applied.unwrap();
        for reader in 1..=3 {
            let view = cluster.nodes[&reader].read(soon()).await?;
            assert!(view.revision >= done.revision, "node {reader} read the past");
            assert_eq!(view.state.users().len(), 1 + usize::try_from(writer)?);
        }
    }
    let again = cluster.write(2, "user-1").await?;
    assert!(again.applied.is_err(), "a rejection is a replicated result");
    assert!(cluster.nodes[&3].wait_for(again.revision, soon()).await?.revision >= again.revision);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn many_writes_at_once_through_all_nodes_are_each_applied_once() -> Test {
    let cluster = Cluster::start().await;
    let mut writes = Vec::new();
    for n in 0..300_u64 {
        let node = cluster.nodes[&(n % 3 + 1)].clone();
        writes.push(tokio::spawn(async move {
            node.propose(&make_user(&format!("user-{n}")), soon()).await
        }));
    }
    let mut revisions = BTreeSet::new();
    for write in writes {
        let done = write.await??;
        done.applied.unwrap();
        assert!(revisions.insert(done.revision), "two writes share a revision");
    }
    assert_eq!(cluster.converge().await.len(), 300);
    Ok(())
}

/// Everything that was acknowledged before the leader vanished is there afterwards, nothing twice.
#[tokio::test(flavor = "multi_thread")]
async fn no_acknowledged_write_is_lost_with_the_leader() -> Test {
    let cluster = Cluster::start().await;
    let leader = cluster.leader().await;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut writers = Vec::new();
    for (&id, node) in cluster.nodes.iter().filter(|(id, _)| **id != leader) {
        let (node, stopped) = (node.clone(), stopped.clone());
        writers.push(tokio::spawn(async move {
            let (mut acknowledged, mut unknown) = (BTreeSet::new(), BTreeSet::new());
            for n in 0_u64.. {
                if *stopped.borrow() {
                    break;
                }
                let name = format!("w{id}-{n}");
                match node.propose(&make_user(&name), within(4_000)).await {
                    Ok(done) => {
                        done.applied.expect("every name is new");
                        acknowledged.insert(name);
                    }
                    Err(ProposeError::OutcomeUnknown) => {
                        unknown.insert(name);
                    }
                    Err(_) => {}
                }
            }
            (acknowledged, unknown)
        }));
    }
    let some = |node: u64, at_least: usize| users(&cluster.nodes[&node]).len() >= at_least;
    until("writes flow", || some(leader, 50).then_some(())).await;
    cluster.isolate([leader]);
    let next = cluster.leader().await;
    assert_ne!(next, leader);
    let before = users(&cluster.nodes[&next]).len();
    until("writes go on", || some(next, before + 50).then_some(())).await;
    cluster.heal();
    stop.send_replace(true);

    let (mut acknowledged, mut unknown) = (BTreeSet::new(), BTreeSet::new());
    for writer in writers {
        let (a, u) = writer.await?;
        acknowledged.extend(a);
        unknown.extend(u);
    }
    let kept = cluster.converge().await;
    let lost: Vec<_> = acknowledged.difference(&kept).collect();
    assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
    let refused: Vec<_> = kept
        .iter()
        .filter(|n| !acknowledged.contains(*n) && !unknown.contains(*n))
        .collect();
    assert!(
        refused.is_empty(),
        "refused as certainly not done, and yet there: {refused:?}"
    );
    Ok(())
}

/// A leader that is cut off must not confirm a keepalive, nor answer a read, while another may lead.
#[tokio::test(flavor = "multi_thread")]
async fn an_isolated_leader_confirms_nothing() -> Test {
    let cluster = Cluster::start().await;
    let old = cluster.leader().await;
    let (leadership, view) = cluster.nodes[&old].confirm(soon()).await?;
    assert_eq!(leadership.node, NodeId(old));
    assert_eq!(view.state.users().len(), 1);
    let follower = cluster.follower().await;
    assert!(matches!(
        cluster.nodes[&follower].confirm(soon()).await,
        Err(ReadError::NoLeader { .. })
    ));

    cluster.isolate([old]);
    // From this moment on: not only after it has noticed.
    assert!(cluster.nodes[&old].confirm(within(3_000)).await.is_err());
    assert!(cluster.nodes[&old].read(within(3_000)).await.is_err());
    let new = cluster.leader().await;
    cluster.write(new, "after").await?.applied.unwrap();
    assert!(cluster.nodes[&old].confirm(within(1_000)).await.is_err());

    cluster.heal();
    assert_eq!(cluster.converge().await.len(), 1);
    Ok(())
}

/// Without a quorum writes and reads fail fast and say so, and a refused write is certainly not done.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_work_is_refused_before_the_deadline() -> Test {
    let mut cluster = Cluster::start().await;
    let leader = cluster.leader().await;
    for id in [1, 2, 3].into_iter().filter(|id| *id != leader) {
        cluster.stop_node(id).await;
    }
    let alone = cluster.nodes[&leader].clone();
    until("the loss is noticed", || {
        (alone.status().health == Health::NoQuorum).then_some(())
    })
    .await;
    let error = alone.propose(&make_user("never"), soon()).await.unwrap_err();
    assert_eq!(
        error,
        ProposeError::NoQuorum {
            reachable: vec![NodeId(leader)]
        }
    );
    assert!(!error.is_unknown());
    assert!(matches!(
        alone.read(soon()).await,
        Err(ReadError::NoQuorum { .. })
    ));
    assert_eq!(alone.view().state.users().len(), 1, "a stale read goes on");

    let back = if leader == 1 { 2 } else { 1 };
    cluster.start_node(back).await;
    cluster.write(back, "later").await?.applied.unwrap();
    let seen = cluster.nodes[&leader].read(soon()).await?;
    let names: Vec<String> = seen.state.users().keys().map(ToString::to_string).collect();
    assert_eq!(names, ["admin", "later"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_stops_hands_over_and_comes_back_with_everything() -> Test {
    let mut cluster = Cluster::start().await;
    for round in 0..3 {
        let leader = cluster.leader().await;
        cluster.stop_node(leader).await;
        let next = cluster.leader().await;
        cluster
            .write(next, &format!("round-{round}"))
            .await?
            .applied
            .unwrap();
        cluster.start_node(leader).await;
        assert_eq!(cluster.converge().await.len(), round + 1);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn all_nodes_can_stop_and_start_again() -> Test {
    let mut cluster = Cluster::start().await;
    cluster.write(1, "kept").await?.applied.unwrap();
    let id = cluster.nodes[&1].cluster_id();
    for node in 1..=3 {
        cluster.stop_node(node).await;
    }
    for node in 1..=3 {
        cluster.start_node(node).await;
    }
    cluster.leader().await;
    assert_eq!(cluster.nodes[&2].read(soon()).await?.state.users().len(), 2);
    assert_eq!(cluster.nodes[&1].cluster_id(), id);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_far_behind_gets_a_snapshot() -> Test {
    let mut cluster = Cluster::start_with(SnapshotPolicy { every: 20, keep: 2 }).await;
    let lagging = cluster.follower().await;
    cluster.stop_node(lagging).await;
    let leader = cluster.leader().await;
    for n in 0..120 {
        cluster
            .write(leader, &format!("user-{n}"))
            .await?
            .applied
            .unwrap();
    }
    cluster.start_node(lagging).await;
    assert_eq!(cluster.converge().await.len(), 120);
    cluster.write(lagging, "after").await?.applied.unwrap();
    assert_eq!(cluster.converge().await.len(), 121);
    Ok(())
}

/// Status and heartbeats must not write: an idle cluster's log would grow for ever.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_cluster_appends_nothing() -> Test {
    let cluster = Cluster::start().await;
    cluster.converge().await;
    let before: Vec<u64> = cluster
        .nodes
        .values()
        .map(|node| node.view().applied_index)
        .collect();
    // Several rounds of reports, reads and confirmations.
    for _ in 0..5 {
        sleep(Duration::from_millis(300)).await;
        cluster.nodes[&2].read(soon()).await?;
        cluster.nodes[&cluster.leader().await].confirm(soon()).await?;
    }
    let after: Vec<u64> = cluster
        .nodes
        .values()
        .map(|node| node.view().applied_index)
        .collect();
    assert_eq!(before, after);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leadership_can_be_handed_over() -> Test {
    let cluster = Cluster::start().await;
    cluster.connected().await;
    let to = cluster.follower().await;
    let deadline = soon();
    let mut leader = cluster.leader().await;
    while leader != to {
        assert!(Instant::now() < deadline, "{leader} leads, and not {to}");
        let before = cluster.nodes[&leader].status().term;
        // On a busy machine an election of its own may come before or after.
        let handed_over = cluster.nodes[&leader].transfer(Some(NodeId(to)), deadline).await;
        leader = cluster.leader().await;
        let after = cluster.nodes[&leader].status().term;
        assert!(
            leader == to || after > before + 1 || handed_over.is_err(),
            "{leader} was elected in its place"
        );
    }
    let leader = *cluster.nodes.keys().find(|id| **id != to).unwrap();
    cluster
        .write(leader, "through-the-old-one")
        .await?
        .applied
        .unwrap();
    assert!(
        cluster.nodes[&leader].transfer(None, soon()).await.is_err(),
        "only a leader can"
    );
    Ok(())
}

/// What is sent to a leader that is gone is lost with it: nobody knows then whether it happened.
#[tokio::test(flavor = "multi_thread")]
async fn a_proposal_is_kept_while_the_leader_is_silent() -> Test {
    let cluster = Cluster::start().await;
    cluster.connected().await;
    cluster.converge().await;
    let leader = cluster.leader().await;
    let follower = cluster.follower().await;
    cluster.isolate([leader]);
    until("the leader is missed", || {
        let status = cluster.nodes[&follower].status();
        let member = status.members.iter().find(|member| member.id == NodeId(leader))?;
        member.lag_ms.filter(|lag| *lag > 160)
    })
    .await;
    cluster.write(follower, "kept").await?.applied.unwrap();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_call_each_other() -> Test {
    let cluster = Cluster::start().await;
    cluster.connected().await;
    for to in 1..=3 {
        let deadline = soon();
        let answer = loop {
            match cluster.nodes[&1].call(NodeId(to), "hello".into(), deadline).await {
                // A node is heard over one connection a moment before the one for calls stands.
                Err(CallError::Unreachable(_)) if Instant::now() < deadline => {
                    sleep(Duration::from_millis(10)).await;
                }
                answered => break answered?,
            }
        };
        assert_eq!(answer, "1:hello");
    }
    let refused = cluster.nodes[&1].call(NodeId(2), "refuse".into(), soon()).await;
    assert_eq!(refused, Err(CallError::Refused("as you wish".to_owned())));
    let unknown = cluster.nodes[&1].call(NodeId(9), "hello".into(), soon()).await;
    assert_eq!(unknown, Err(CallError::UnknownNode(NodeId(9))));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_node_can_say_how_the_cluster_is() -> Test {
    let mut cluster = Cluster::start().await;
    let leader = cluster.leader().await;
    for node in cluster.nodes.values() {
        let status = until("all members are known", || {
            let status = node.status();
            let complete = status
                .members
                .iter()
                .all(|m| m.reachable && m.role != Role::Unknown && m.applied_index > 0);
            (complete && status.leader == Some(NodeId(leader)) && status.health == Health::Serving)
                .then_some(status)
        })
        .await;
        assert_eq!(status.members.len(), 3);
        assert_eq!(status.cluster_id, cluster.nodes[&1].cluster_id());
        assert_eq!(status.members[1].http, "http://node-2");
        assert_eq!(
            status.members.iter().filter(|m| m.role == Role::Leader).count(),
            1
        );
        assert!(status.alarms.is_empty(), "{:?}", status.alarms);
    }
    let gone = cluster.follower().await;
    cluster.stop_node(gone).await;
    until("the stopped node is missed", || {
        let status = cluster.nodes[&leader].status();
        status
            .members
            .iter()
            .any(|m| m.id == NodeId(gone) && !m.reachable)
            .then_some(())
    })
    .await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn cluster_time_is_one_and_grows() -> Test {
    let cluster = Cluster::start().await;
    let leader = cluster.leader().await;
    let done = cluster.write(leader, "now").await?;
    for node in cluster.nodes.values() {
        let view = node.wait_for(done.revision, soon()).await?;
        let now = node.cluster_now();
        assert!(now >= view.state.now());
        assert!(
            now - view.state.now() < 60_000,
            "an estimate is close to what was stamped"
        );
        assert!(node.cluster_now() >= now);
    }
    Ok(())
}

/// A node whose apply differs must not answer anybody, and must not lead.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_differs_from_the_majority_stops_serving() -> Test {
    let cluster = Cluster::start().await;
    cluster.connected().await;
    let odd = cluster.leader().await;
    cluster.nodes[&odd].skew(1).await;
    let other = cluster.follower().await;
    // The fault is in the time of a template; then past two checkpoints.
    let put = Operation::PutTemplate {
        name: TemplateName::new("odd")?,
        manifest: "{}".to_owned(),
        cpu: 1,
        memory: 1,
        create_only: false,
        if_match: None,
    };
    let request = Request {
        operation: put,
        ..make_user("nobody")
    };
    cluster.nodes[&other]
        .propose(&request, soon())
        .await?
        .applied
        .unwrap();
    for n in 0..130 {
        let _ = cluster.write(other, &format!("user-{n}")).await?;
    }
    until("the difference is noticed", || {
        (cluster.nodes[&odd].status().health == Health::Diverged).then_some(())
    })
    .await;
    assert!(cluster.nodes[&odd].out_of_service().is_some());
    assert_eq!(cluster.nodes[&other].out_of_service(), None);
    assert!(matches!(
        cluster.nodes[&odd].read(soon()).await,
        Err(ReadError::Stopped(_))
    ));
    assert!(matches!(
        cluster.write(odd, "never").await,
        Err(ProposeError::Stopped(_))
    ));
    let told = until("the others name it", || {
        let alarms = cluster.nodes[&other].status().alarms;
        alarms
            .into_iter()
            .find(|alarm| matches!(alarm, Alarm::Diverged { .. }))
    })
    .await;
    assert!(
        matches!(told, Alarm::Diverged { node, .. } if node == NodeId(odd)),
        "{told:?}"
    );

    until("another one leads", || {
        let others = cluster.nodes.iter().filter(|(id, _)| **id != odd);
        others
            .into_iter()
            .any(|(_, node)| node.leadership().borrow().mine.is_some())
            .then_some(())
    })
    .await;
    cluster.write(other, "after").await?.applied.unwrap();
    assert_eq!(cluster.nodes[&other].status().health, Health::Serving);
    Ok(())
}

/// A node whose disk fails must say so and end; the others go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_failing_disk_ends_the_node_and_not_the_cluster() -> Test {
    let cluster = Cluster::start().await;
    let broken = cluster.leader().await;
    cluster.disks[&broken].set_failing(true);
    let other = cluster.follower().await;
    // Needs the broken disk at the latest when it leads.
    let _ = cluster.nodes[&other]
        .propose(&make_user("maybe"), within(2_000))
        .await;
    let why = failure(&cluster.nodes[&broken]).await;
    assert!(!why.is_empty());
    assert!(matches!(
        cluster.write(broken, "never").await,
        Err(ProposeError::Stopped(_))
    ));
    // One write may have been on its way to the broken node; after the election they go through.
    let mut tries = 0;
    while let Err(error) = cluster.write(other, &format!("after-{tries}")).await {
        assert!(error.is_unknown() && tries < 3, "{error}");
        tries += 1;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_node_is_a_cluster() -> Test {
    let mut cluster = Cluster::plan().await;
    cluster.members.retain(|id, _| *id == NodeId(1));
    cluster.start_node(1).await;
    assert_eq!(cluster.leader().await, 1);
    let (leadership, _) = cluster.nodes[&1].confirm(soon()).await?;
    assert_eq!(leadership.node, NodeId(1));
    assert!(cluster.nodes[&1].read(soon()).await?.applied_index > 0);
    cluster.stop_node(1).await;
    cluster.start_node(1).await;
    assert_eq!(cluster.leader().await, 1);
    Ok(())
}
