//! What is asked of single members while others are gone or stand still: each question has its own short patience,
//! since a frozen member takes a connection and never answers.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::cluster::regent::Regent;
use crate::cluster::{Cluster, until};

/// How long one member may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_millis(250);

/// Whether a member says that it leads; false when it says nothing.
pub(super) async fn leads(cluster: &Cluster, member: usize) -> bool {
    let asked = async {
        match cluster {
            Cluster::Etcd(etcd) => {
                let status = etcd.status(member).await?;
                let own = status.header.map(|header| header.member_id);
                anyhow::Ok(status.leader != 0 && own == Some(status.leader))
            }
            Cluster::Regent(regent) => {
                let seen = regent.call(member, "GET", "/api/v1/cluster", None).await?;
                // Ids count from 1, in the order of the members.
                Ok(seen["leader"].as_u64() == Some(member as u64 + 1))
            }
        }
    };
    matches!(tokio::time::timeout(ANSWER_WITHIN, asked).await, Ok(Ok(true)))
}

/// Waits until one of the other members leads.
pub(super) async fn another_leads(cluster: &Cluster, old: usize) -> anyhow::Result<()> {
    until("another leader", async || {
        for member in (0..cluster.members().len()).filter(|member| *member != old) {
            if leads(cluster, member).await {
                return Ok(true);
            }
        }
        Ok(false)
    })
    .await
}

/// How far a member has applied.
async fn applied(cluster: &Cluster, member: usize) -> anyhow::Result<u64> {
    match cluster {
        Cluster::Etcd(etcd) => {
            let header = etcd.status(member).await?.header.context("no header")?;
            Ok(header.revision.cast_unsigned())
        }
        Cluster::Regent(regent) => {
            let applied = metric(regent, member, "regent_applied_revision").await?;
            Ok(applied.context("no regent_applied_revision")?)
        }
    }
}

/// Waits until every member has what any of them has now.
pub(super) async fn caught_up(cluster: &Cluster) -> anyhow::Result<()> {
    let members = 0..cluster.members().len();
    let mut most = 0;
    for member in members.clone() {
        most = most.max(applied(cluster, member).await?);
    }
    until("members that have caught up", async || {
        for member in members.clone() {
            if applied(cluster, member).await? < most {
                return Ok(false);
            }
        }
        Ok(true)
    })
    .await
}

/// The sum of a metric of one node, as a whole number; `None` when it is not there.
pub(super) async fn metric(regent: &Regent, member: usize, name: &str) -> anyhow::Result<Option<u64>> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "counts, below 2^53"
    )]
    let whole = |value: f64| value as u64;
    Ok(metric_value(regent, member, name).await?.map(whole))
}

/// The sum of a metric of one node.
pub(super) async fn metric_value(regent: &Regent, member: usize, name: &str) -> anyhow::Result<Option<f64>> {
    let mut connection = regent.connect(member).await?;
    let answer = connection.request("GET", "/metrics", b"").await?.ok()?;
    sum(std::str::from_utf8(answer.body)?, name)
}

fn sum(text: &str, name: &str) -> anyhow::Result<Option<f64>> {
    let mut found = None;
    for line in text.lines() {
        let Some(rest) = line.strip_prefix(name) else {
            continue;
        };
        if !rest.starts_with([' ', '{']) {
            continue;
        }
        let value = rest.rsplit(' ').next().unwrap_or_default();
        let value: f64 = value.parse().with_context(|| format!("not a metric: {line}"))?;
        found = Some(found.unwrap_or(0.0) + value);
    }
    Ok(found)
}

/// The bytes of all files in a folder. One that goes meanwhile is no longer there.
pub(super) fn folder_bytes(folder: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    for entry in entries {
        let entry = entry?;
        let Ok(meta) = entry.metadata() else { continue };
        if meta.is_dir() {
            bytes += folder_bytes(&entry.path()).unwrap_or(0);
        } else {
            // What it takes, not how long it is: logs are made long before they are filled.
            use std::os::unix::fs::MetadataExt as _;
            bytes += meta.blocks() * 512;
        }
    }
    Ok(bytes)
}

/// The mean of the members' folders, in MB.
pub(super) fn data_mb(cluster: &Cluster) -> anyhow::Result<f64> {
    let members = cluster.members();
    ensure!(!members.is_empty(), "a cluster without members");
    let mut bytes = 0;
    for member in members {
        bytes += folder_bytes(&member.data)?;
    }
    Ok(bytes as f64 / members.len() as f64 / 1e6)
}

/// The bytes of a node's largest snapshot; 0 of none.
pub(super) fn snapshot_bytes(data: &Path) -> u64 {
    let entries = std::fs::read_dir(data.join("snapshots"));
    let sizes = entries.into_iter().flatten().flatten();
    sizes
        .filter_map(|entry| Some(entry.metadata().ok()?.len()))
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_summed_over_their_labels_and_not_mistaken() {
        let text = "# HELP a b\na 1\na_total 7\nb{x=\"1\"} 2\nb{x=\"2\"} 3.5\n";
        assert_eq!(sum(text, "a").unwrap(), Some(1.0));
        assert_eq!(sum(text, "b").unwrap(), Some(5.5));
        assert_eq!(sum(text, "c").unwrap(), None);
    }
}
