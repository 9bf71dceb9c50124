//! Events: all of them, or some kinds.

use futures::stream::BoxStream;
use regent_types::event::Event;

use crate::call::Call;
use crate::follow::{self, Begins};
use crate::{Client, Error};

/// Which events.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EventFilter {
    /// Only what came after the event with this id, `REVISION.N`; from now on when absent.
    pub after: Option<String>,
    /// Only these kinds, such as `session.running`; all when empty.
    pub kinds: Vec<String>,
}

impl Client {
    /// Events as they happen. The stream reconnects by itself; it ends after an error that waiting does
    /// not cure: `gone` (410) when the place to go on from is pruned or of another cluster, or a refusal.
    pub fn events(&self, filter: EventFilter) -> BoxStream<'static, Result<Event, Error>> {
        let kinds = (!filter.kinds.is_empty()).then(|| ("kinds", filter.kinds.join(",")));
        let call = Call::get(["events"]).query(kinds);
        follow::follow(self, call, Begins::FromNowOn, filter.after)
    }
}
