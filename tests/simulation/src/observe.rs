//! What the nodes say of themselves, looked at from outside after every step.

use std::collections::BTreeMap;

use regent_history::{Violation, digest, forward};

use crate::cluster::Cluster;
use crate::network::Host;

/// The name in [`Violation::checker`] for a process that ends without a reason.
pub const ENDED: &str = "no node ends by itself";

/// What was seen of the nodes.
#[derive(Default)]
pub struct Observer {
    /// At which index which digest, as the first node had it.
    digests: BTreeMap<u64, (u64, u64)>,
    /// At which index which cluster time.
    times: BTreeMap<u64, u64>,
    /// The last applied index and term of each node, since its so-manieth start.
    last: BTreeMap<Host, (u64, u64, u64)>,
    /// Comparisons of two nodes at one index.
    pub compared: u64,
    /// Leaderships that were seen.
    pub leaderships: std::collections::BTreeSet<(u64, u64)>,
}

impl Observer {
    /// Looks at all nodes.
    ///
    /// # Errors
    /// Something is not as it must be.
    pub fn look(&mut self, cluster: &mut Cluster, now: u64) -> Result<(), Violation> {
        if let Some(why) = cluster.failures.pop() {
            return Err(Violation::new(ENDED, why));
        }
        for place in 0..cluster.len() {
            let Some(node) = cluster.node(place) else {
                continue;
            };
            let id = node.id().0;
            let view = node.view();
            let leadership = *node.leadership().borrow();
            if let Some(mine) = leadership.mine {
                self.leaderships.insert((mine.term, mine.node.0));
            }
            let index = view.applied_index;
            let start = cluster.members[place].starts;
            let same_start = self.last.get(&place).filter(|(at, _, _)| *at == start);
            let (_, last, term) = same_start.copied().unwrap_or_default();
            if index == last && leadership.term == term {
                continue;
            }
            let seen = |what: u64| (id, now, what);
            forward::check("the applied index", &[seen(last), seen(index)])?;
            forward::check("the term", &[seen(term), seen(leadership.term)])?;
            self.last.insert(place, (start, index, leadership.term));
            if index == 0 {
                continue;
            }
            let digest = view.state.digest();
            match self.digests.get(&index) {
                Some((other, known)) => {
                    self.compared += u64::from(*other != id);
                    digest::check(&[(*other, index, *known), (id, index, digest)])?;
                }
                None => {
                    self.digests.insert(index, (id, digest));
                }
            }
            self.time(index, view.state.now(), id)?;
        }
        Ok(())
    }

    /// Cluster time belongs to the log: it is the same wherever an index is applied, and never less than before.
    fn time(&mut self, index: u64, time: u64, node: u64) -> Result<(), Violation> {
        let before = self
            .times
            .range(..=index)
            .next_back()
            .map(|(at, time)| (*at, *time));
        let after = self.times.range(index..).next().map(|(at, time)| (*at, *time));
        let seen: Vec<(u64, u64, u64)> = before
            .into_iter()
            .chain([(index, time)])
            .chain(after)
            .map(|(at, time)| (0, at, time))
            .collect();
        forward::check(&format!("cluster time (by index, as node {node} has it)"), &seen)?;
        self.times.insert(index, time);
        Ok(())
    }
}
