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
    /// Indexes at which a term is known: the entry there was written in it or in a later one.
    terms: BTreeMap<u64, u64>,
    /// The term that each node had promised when its last start began.
    promised: BTreeMap<Host, u64>,
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
            let index = view.applied_index;
            if let Some(mine) = leadership.mine
                && self.leaderships.insert((mine.term, mine.node.0))
            {
                // It has applied an entry of its own.
                let known = self.terms.entry(index).or_default();
                *known = mine.term.max(*known);
            }
            let start = cluster.members[place].starts;
            let (before, last, term) = self.last.get(&place).copied().unwrap_or_default();
            let (last, term) = if before == start {
                (last, term)
            } else {
                self.restarted(place, last);
                (0, 0)
            };
            if index == last && leadership.term == term {
                continue;
            }
            let seen = |what: u64| (id, now, what);
            forward::check("the applied index", &[seen(last), seen(index)])?;
            forward::check("the term", &[seen(term), seen(leadership.term)])?;
            // A node that has only just been started does not know its term yet.
            let promised = self.promised.get(&place).copied().unwrap_or_default();
            if leadership.term > 0 {
                forward::check(
                    "the term that was promised before a start",
                    &[seen(promised), seen(leadership.term)],
                )?;
            }
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

    /// Notes which term a node has promised that had applied the log up to `index` before it was started again.
    ///
    /// That is not the term that it showed. A node shows a term as soon as it has heard of it, which may be before its
    /// vote is synced, and a power cut in between takes that term back rightly: nobody was told of it. But a node
    /// takes no entry before it has synced a vote of the entry's term or a later one, so the terms of what it had
    /// applied must be there after any crash.
    fn restarted(&mut self, place: Host, index: u64) {
        let applied = self.terms.range(..=index).map(|(_, term)| *term).max();
        let promised = self.promised.entry(place).or_default();
        *promised = applied.unwrap_or_default().max(*promised);
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
