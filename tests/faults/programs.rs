//! Nodes of two programs in one cluster: that of an earlier commit and this one. Nodes are upgraded and put back while
//! everything else goes on; in the end all are upgraded, the feature level rises, and nodes can join.
//!
//! One keeps the older program until then. Without one the level would rise, and nobody could be put back.

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
    for node in older(cluster) {
        // Only the newer program says a level.
        let newer = cluster
            .members()
            .into_iter()
            .find(|node| !older(cluster).contains(node));
        if let Some(newer) = newer {
            let level = soon("level", || async {
                Some(cluster.seen_by(newer).await?.feature_level)
            })
            .await?;
            if level != FIRST_LEVEL {
                return Err(format!(
                    "the level is {level} while node {} cannot have it",
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
    let mut nodes = cluster.members();
    let is_older = |seat: crate::seats::Seat| seat.program == Program::Previous;
    nodes.retain(|node| cluster.seats.at(*node).is_some_and(is_older));
    nodes
}
