//! Following what is applied: which events are new since the last look.
//!
//! Events are kept within a bound, so a follower that looks too seldom may have missed some. It then
//! looks at everything once; nothing here may depend on seeing every event.

use std::sync::Arc;

use regent_state::{Event, EventId, State};
use regent_types::Revision;

/// How far a follower has come.
#[derive(Debug)]
pub(crate) struct Cursor {
    /// The first event that it has not seen, or a smaller id.
    next: EventId,
}

/// What is new.
pub(crate) enum News {
    /// These, in order.
    Events(Vec<(EventId, Arc<Event>)>),
    /// Some were dropped before they were seen: look at everything.
    Missed,
}

impl Cursor {
    /// Everything up to now is seen.
    pub(crate) fn at_end_of(state: &State) -> Self {
        Self { next: after(state) }
    }

    /// What came since the last call. An older state than the last one gives nothing.
    pub(crate) fn advance(&mut self, state: &State) -> News {
        let end = after(state);
        if end <= self.next {
            return News::Events(Vec::new());
        }
        let missed = state.events_floor() > self.next;
        let news = if missed {
            News::Missed
        } else {
            News::Events(state.events().from(self.next).cloned().collect())
        };
        self.next = end;
        news
    }
}

fn after(state: &State) -> EventId {
    EventId(Revision(state.revision().0 + 1), 0)
}
