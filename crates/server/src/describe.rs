//! What the nodes say of themselves beside consensus: which program runs there, what it supports, room on the disk.
//!
//! Asked now and then over the peer transport and kept in memory. It travels as JSON, so that programs of two versions
//! understand each other: an older one that does not know the question supports the first feature level.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use regent_raft::CallError;
use regent_types::NodeId;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::bootstrap::FEATURE_LEVEL;
use crate::leader::{Answer, Ask};
use crate::service::Service;

/// How often the others are asked.
const EVERY: Duration = Duration::from_secs(2);
/// How long one may take to answer.
const WITHIN: Duration = Duration::from_secs(1);
/// An answer that is older says nothing any more.
const FRESH: Duration = Duration::from_secs(15);

/// What a node says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Description {
    /// The version of its program; empty when it is one that does not say.
    pub(crate) version: String,
    /// The feature level that it supports.
    pub(crate) supports: u32,
    /// Bytes free where its data is.
    pub(crate) disk_free: Option<u64>,
    /// Bytes there in all.
    pub(crate) disk_total: Option<u64>,
}

impl Default for Description {
    fn default() -> Self {
        Self {
            version: String::new(),
            supports: 1,
            disk_free: None,
            disk_total: None,
        }
    }
}

impl Description {
    /// Of this process, with its data in that folder, or on no disk at all.
    pub(crate) fn own(data: Option<&Path>) -> Self {
        let disk = data.and_then(|data| rustix::fs::statvfs(data).ok());
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            supports: FEATURE_LEVEL,
            disk_free: disk
                .as_ref()
                .map(|disk| disk.f_bavail.saturating_mul(disk.f_frsize)),
            disk_total: disk
                .as_ref()
                .map(|disk| disk.f_blocks.saturating_mul(disk.f_frsize)),
        }
    }

    /// As it travels.
    pub(crate) fn text(&self) -> String {
        serde_json::to_string(self).expect("a struct of numbers and a text")
    }
}

/// What the nodes have said lately. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Descriptions(Arc<Mutex<BTreeMap<NodeId, (Instant, Description)>>>);

impl Descriptions {
    /// What a node has said, if it was lately.
    pub(crate) fn of(&self, node: NodeId) -> Option<Description> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, description) = all.get(&node)?;
        (at.elapsed() < FRESH).then(|| description.clone())
    }

    fn note(&self, heard: impl Iterator<Item = (NodeId, Description)>, members: &[NodeId]) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        all.extend(heard.map(|(node, description)| (node, (now, description))));
        all.retain(|node, _| members.contains(node));
    }
}

/// Asks until `stop`.
pub(crate) async fn run(service: Service, stop: CancellationToken) {
    loop {
        let status = service.node().status();
        let members: Vec<NodeId> = status.members.iter().map(|member| member.id).collect();
        let reachable = status.members.iter().filter(|member| member.reachable);
        let asked = reachable.map(|member| ask(&service, member.id));
        let heard = join_all(asked).await;
        service.descriptions().note(heard.into_iter().flatten(), &members);
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

/// Whether all of these support a feature level, as they say now: a node may have been put back to an older program
/// since it was asked last.
pub(crate) async fn support(service: &Service, nodes: impl IntoIterator<Item = NodeId>, level: u32) -> bool {
    let asked = nodes.into_iter().map(|node| ask(service, node));
    let heard = join_all(asked).await;
    heard
        .into_iter()
        .all(|heard| heard.is_some_and(|(_, description)| description.supports >= level))
}

async fn ask(service: &Service, node: NodeId) -> Option<(NodeId, Description)> {
    let deadline = Instant::now() + WITHIN;
    let answer = service.node().call(node, Ask::Describe.encode(), deadline).await;
    let description = match answer {
        Ok(bytes) => match Answer::decode(&bytes)? {
            Answer::Described(text) => serde_json::from_str(&text).ok()?,
            _ => return None,
        },
        // It is there and does not know the question.
        Err(CallError::Refused(_)) => Description::default(),
        Err(_) => return None,
    };
    Some((node, description))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A newer program says more, an older one less.
    #[test]
    fn what_another_version_says_is_understood() {
        let newer = r#"{"version":"9.0.0","supports":7,"mood":"good"}"#;
        let read: Description = serde_json::from_str(newer).unwrap();
        assert_eq!((read.version.as_str(), read.supports), ("9.0.0", 7));
        let older: Description = serde_json::from_str("{}").unwrap();
        assert_eq!(older.supports, 1);
    }

    #[test]
    fn a_node_knows_its_disk() {
        let own = Description::own(Some(Path::new(".")));
        assert!(own.disk_total > Some(0) && own.disk_free <= own.disk_total);
        assert_eq!(serde_json::from_str::<Description>(&own.text()).unwrap(), own);
    }
}
