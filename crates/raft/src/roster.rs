//! Who is a member, as far as this node knows.
//!
//! The table of members in the state says it (`regent-state`, feature level 2), and from which data folder each may
//! speak. Before that table names a node, the settlement of the first start does. A member that was removed is heard
//! until consensus has let it go: the node that is to be removed may be the one that leads.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use regent_types::{NodeId, Revision};

use crate::identity::Incarnation;
use crate::machine::Published;

/// What the applied state says of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Nothing: it is from before the table, or has been admitted since.
    Unknown,
    /// A member, with this data folder.
    Member(Incarnation),
    /// It was one.
    Removed,
}

/// A node in the configuration of consensus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Configured {
    pub(crate) peer: String,
    pub(crate) http: String,
    pub(crate) voter: bool,
}

/// See the module.
#[derive(Clone)]
pub(crate) struct Roster {
    published: Published,
    configured: Arc<ArcSwap<BTreeMap<NodeId, Configured>>>,
}

impl Roster {
    /// Of a node that has applied so much and knows nobody.
    #[cfg(test)]
    pub(crate) fn of_nobody(applied: u64) -> Self {
        Self::new(Published::new(crate::machine::View {
            state: regent_state::State::new(),
            revision: Revision(applied),
            applied_index: applied,
            last: None,
            membership: Arc::default(),
        }))
    }

    pub(crate) fn new(published: Published) -> Self {
        Self {
            published,
            configured: Arc::default(),
        }
    }

    /// What consensus is made of now.
    pub(crate) fn configured(&self) -> Arc<BTreeMap<NodeId, Configured>> {
        self.configured.load_full()
    }

    /// Notes what consensus is made of; says whether that is news.
    pub(crate) fn note(&self, now: BTreeMap<NodeId, Configured>) -> bool {
        let news = **self.configured.load() != now;
        if news {
            self.configured.store(Arc::new(now));
        }
        news
    }

    /// What is known of a node, and up to which revision.
    pub(crate) fn standing(&self, node: NodeId) -> (Standing, Revision) {
        let view = self.published.load();
        let standing = match view.state.member(node) {
            None => Standing::Unknown,
            Some(member) if member.is_live() || self.may_be_configured(node) => {
                Standing::Member(Incarnation(member.incarnation))
            }
            Some(_) => Standing::Removed,
        };
        (standing, view.revision)
    }

    /// Whether consensus has not let a node go, or is not known yet: this node is starting.
    fn may_be_configured(&self, node: NodeId) -> bool {
        let configured = self.configured.load();
        configured.is_empty() || configured.contains_key(&node)
    }

    /// Where a member said that it is, if it did.
    pub(crate) fn address(&self, node: NodeId) -> Option<String> {
        let view = self.published.load();
        view.state.member(node).map(|member| member.peer.clone())
    }

    /// The members by the state, removed ones left out.
    pub(crate) fn members(&self) -> Vec<NodeId> {
        let view = self.published.load();
        let live = view.state.members().values().filter(|member| member.is_live());
        live.map(|member| member.id).collect()
    }
}
