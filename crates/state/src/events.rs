//! The events that are kept, in order.
//!
//! Events come at one end and go at the other, with every operation, so this is a persistent vector and
//! not a map: what is shared with a published state is copied by the chunk, not by the path.

use std::sync::Arc;

use imbl::Vector;

use crate::event::{Event, EventId};

/// Events in the order of their ids; cheap to clone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Events(Vector<(EventId, Arc<Event>)>);

impl Events {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The oldest.
    pub fn first(&self) -> Option<&(EventId, Arc<Event>)> {
        self.0.front()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &(EventId, Arc<Event>)> {
        self.0.iter()
    }

    /// Those from `id` on.
    pub fn from(&self, id: EventId) -> impl Iterator<Item = &(EventId, Arc<Event>)> {
        let start = match self.0.back() {
            // Whoever follows asks for the newest, or for none.
            Some((last, _)) if *last < id => self.0.len(),
            _ => self
                .0
                .binary_search_by(|(found, _)| found.cmp(&id))
                .unwrap_or_else(|start| start),
        };
        self.0.focus().narrow(start..self.0.len()).into_iter()
    }

    /// Adds the next one, and says whether it is one: its id must be after that of the last.
    #[must_use]
    pub(crate) fn push(&mut self, id: EventId, event: Arc<Event>) -> bool {
        let is_next = self.0.back().is_none_or(|(last, _)| *last < id);
        if is_next {
            self.0.push_back((id, event));
        }
        is_next
    }

    /// Takes the oldest away.
    pub(crate) fn pop_first(&mut self) -> Option<(EventId, Arc<Event>)> {
        self.0.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use regent_types::Revision;

    use super::*;
    use crate::event::{EventKind, EventRecord};

    #[test]
    fn what_follows_an_id_is_found_whatever_went_before() {
        let user = crate::record::User {
            name: regent_types::UserName::new("u").unwrap(),
            password_hash: None,
            role: crate::record::Role::User,
            quota: crate::record::Quota::default(),
            used: crate::record::Usage::default(),
            created_at: 0,
            changed: Revision(0),
        };
        let event = Arc::new(Event {
            kind: EventKind::UserCreated,
            at: 0,
            record: EventRecord::User(Arc::new(user)),
            by: String::new(),
        });
        let mut events = Events::default();
        for revision in 0..500 {
            for n in 0..=u32::from(revision % 5 == 0) {
                assert!(events.push(EventId(Revision(revision * 2), n), event.clone()));
            }
            if revision % 3 == 0 {
                events.pop_first();
            }
        }
        assert!(
            !events.push(EventId(Revision(998), 0), event),
            "it is not after the last"
        );
        let all: Vec<EventId> = events.iter().map(|(id, _)| *id).collect();
        for revision in 0..1_002 {
            for n in 0..3 {
                let id = EventId(Revision(revision), n);
                let found: Vec<EventId> = events.from(id).map(|(id, _)| *id).collect();
                let expected: Vec<EventId> = all.iter().copied().filter(|other| *other >= id).collect();
                assert_eq!(found, expected, "from {id}");
            }
        }
    }
}
