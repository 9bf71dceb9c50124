//! Nodes of two programs in one cluster: that of an earlier commit and this one. Nodes are upgraded and put back while
//! everything else goes on; in the end all are upgraded, the feature level rises, and nodes can join.
//!
//! One keeps the older program until then. Without one the level would rise, and nobody could be put back.

use std::time::Duration;

use regent_types::NodeId;
use regent_types::auth::CreateToken;
use regent_types::duration::Span;

use crate::cluster::Cluster;
use crate::nemesis::soon;
use crate::seats::Program;

/// What was done, as the cluster counts it.
pub(crate) const EXCHANGED: &str = "programs exchanged";
pub(crate) const UPGRADED: &str = "nodes upgraded";
pub(crate) const PUT_BACK: &str = "nodes put back to the previous program";
pub(crate) const RAISED: &str = "feature levels raised";

/// How long handing the leadership over may take; then it is tried again.
const TRANSFERRED_WITHIN: Duration = Duration::from_secs(2);
/// The level at which the cluster begins, with a node that supports no other.
const FIRST_LEVEL: u32 = 1;

/// A node goes on with the other program. The last one that has the older keeps it: another one is put back instead.
/// Gives which it was.
pub(crate) async fn exchange(cluster: &Cluster, node: usize) -> Result<usize, String> {
    let node = match older(cluster).as_slice() {
        [last] if *last == node => {
            let others = cluster.members().into_iter().filter(|other| other != last);
            others.max().ok_or("a cluster has more than one node")?
        }
        _ => node,
    };
    let (program, what) = if older(cluster).contains(&node) {
        (Program::This, UPGRADED)
    } else {
        (Program::Previous, PUT_BACK)
    };
    cluster.stop(&cluster.name(node)).await?;
    cluster.seats.change(node, |seat| seat.program = program);
    cluster.start_node(node);
    cluster.has_changed(what);
    cluster.has_changed(EXCHANGED);
    Ok(node)
}

/// All that still have the older program are upgraded, one by one, and the level rises with the last of them.
pub(crate) async fn finish(cluster: &Cluster) -> Result<(), String> {
    let nodes = older(cluster);
    let (last, others) = nodes.split_last().ok_or("no node has the older program")?;
    for node in others {
        upgrade(cluster, *node).await?;
    }
    if let Some(newer) = newer(cluster).last() {
        put_back_unnoticed(cluster, *newer, *last).await?;
    }
    for node in older(cluster) {
        // Only the newer program says a level.
        if let Some(newer) = newer(cluster).first() {
            let level = soon("level", || async {
                Some(cluster.seen_by(*newer).await?.feature_level)
            })
            .await?;
            if level != FIRST_LEVEL {
                return Err(format!(
                    "the level is {level} while {} cannot have it",
                    cluster.name(node)
                ));
            }
        }
        upgrade(cluster, node).await?;
    }
    let client = cluster.client(0);
    soon(
        "feature level of the new program, with nothing else to be said",
        || async {
            let seen = client.cluster().await.ok()?;
            let known = seen.members.iter().all(|member| member.since.is_some());
            (seen.feature_level > FIRST_LEVEL && known && seen.findings.is_empty()).then_some(())
        },
    )
    .await?;
    let wanted = CreateToken {
        join: Some("node".to_owned()),
        expires_in: Some(Span(60_000)),
        ..CreateToken::default()
    };
    soon("join token", || async { client.create_token(&wanted).await.ok() }).await?;
    cluster.has_changed(RAISED);
    Ok(())
}

/// While one is away the last one is upgraded; then the first comes back with the older program. What it said of itself
/// before must not count.
async fn put_back_unnoticed(cluster: &Cluster, away: usize, last: usize) -> Result<(), String> {
    cluster.stop(&cluster.name(away)).await?;
    cluster
        .seats
        .change(away, |seat| seat.program = Program::Previous);
    upgrade(cluster, last).await?;
    let id = cluster.id(last);
    let all = newer(cluster);
    soon("word of the program that the upgraded node has", || async {
        for node in &all {
            let seen = cluster.seen_by(*node).await?;
            let member = seen.members.iter().find(|member| Some(member.id.0) == id)?;
            member.version.as_ref()?;
        }
        Some(())
    })
    .await?;
    // One leads that has heard it before.
    if let Some(stayed) = all.iter().find(|node| **node != last) {
        let id = cluster.id(*stayed).map(NodeId);
        soon("leader that has stayed", || async {
            let client = cluster.client_of(*stayed).with_deadline(TRANSFERRED_WITHIN);
            let _ = client.transfer(id).await;
            (cluster.leader().await == Some(*stayed)).then_some(())
        })
        .await?;
    }
    cluster.start_node(away);
    cluster.has_changed(PUT_BACK);
    let client = cluster.client_of(away);
    let back = soon("node that serves with the older program", || async {
        client.readyz().await.ok()
    });
    back.await.map_err(|why| format!("{why}: {}", cluster.name(away)))
}

async fn upgrade(cluster: &Cluster, node: usize) -> Result<(), String> {
    cluster.stop(&cluster.name(node)).await?;
    cluster.seats.change(node, |seat| seat.program = Program::This);
    cluster.start_node(node);
    cluster.has_changed(UPGRADED);
    let client = cluster.client_of(node);
    soon("upgraded node that serves", || async {
        client.readyz().await.ok()
    })
    .await
}

/// The nodes that have the older program.
fn older(cluster: &Cluster) -> Vec<usize> {
    of(cluster, Program::Previous)
}

/// The nodes that have the newer program.
fn newer(cluster: &Cluster) -> Vec<usize> {
    of(cluster, Program::This)
}

fn of(cluster: &Cluster, program: Program) -> Vec<usize> {
    let mut nodes = cluster.members();
    let is_of = |seat: crate::seats::Seat| seat.program == program;
    nodes.retain(|node| cluster.seats.at(*node).is_some_and(is_of));
    nodes
}
