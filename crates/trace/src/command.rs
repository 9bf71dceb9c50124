//! The trace of a command, which everybody finds by the command's id.
//!
//! The cluster is hashed too: ids that the state machine makes count from a revision, and clusters may send to the same
//! collector. It is the first cluster of its line, whose name agents keep through a restore.

use std::cell::Cell;

use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator};
use regent_types::{ClusterId, CommandId};
use sha2::{Digest as _, Sha256};

/// The root of a command's trace: a span that whoever makes the command sends, and everybody else may refer to.
pub(crate) fn root(cluster: &ClusterId, id: &CommandId) -> SpanContext {
    let hash = Sha256::digest(format!("regent command {cluster} {id}"));
    let trace = u128::from_be_bytes(std::array::from_fn(|at| hash[at]));
    let span = u64::from_be_bytes(std::array::from_fn(|at| hash[16 + at]));
    // Zero is no id.
    SpanContext::new(
        TraceId::from(trace.max(1)),
        SpanId::from(span.max(1)),
        TraceFlags::SAMPLED,
        true,
        TraceState::default(),
    )
}

thread_local! {
    static NEXT: Cell<Option<(TraceId, SpanId)>> = const { Cell::new(None) };
}

/// Ids by chance, but for spans that are made within [`with_ids_of`].
#[derive(Debug, Default)]
pub(crate) struct Ids(RandomIdGenerator);

/// Makes a span that has the ids of `root`. A builder of spans takes none.
pub(crate) fn with_ids_of<T>(root: &SpanContext, make: impl FnOnce() -> T) -> T {
    NEXT.set(Some((root.trace_id(), root.span_id())));
    let made = make();
    NEXT.set(None);
    made
}

impl IdGenerator for Ids {
    fn new_trace_id(&self) -> TraceId {
        NEXT.get()
            .map_or_else(|| self.0.new_trace_id(), |(trace, _)| trace)
    }

    fn new_span_id(&self) -> SpanId {
        NEXT.get().map_or_else(|| self.0.new_span_id(), |(_, span)| span)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(cluster: &str, id: &str) -> SpanContext {
        root(&ClusterId::new(cluster).unwrap(), &CommandId::new(id).unwrap())
    }

    #[test]
    fn a_command_has_one_trace_and_another_command_or_cluster_another() {
        let one = of("c-1", "auto-7-0");
        assert!(one.is_valid() && one.is_sampled());
        assert_eq!(one, of("c-1", "auto-7-0"));
        for other in [of("c-1", "auto-7-1"), of("c-2", "auto-7-0")] {
            assert_ne!(one.trace_id(), other.trace_id());
            assert_ne!(one.span_id(), other.span_id());
        }
    }

    /// Nodes and agents of different versions look for the same trace: what it is made of may not change.
    #[test]
    fn the_trace_of_a_command_stays_what_it_is() {
        let root = of("c-1", "cmd-0123456789abcdef");
        assert_eq!(root.trace_id().to_string(), "0840adf0f3c88ed3828b8e579cb15c51");
        assert_eq!(root.span_id().to_string(), "258313f250f38199");
    }

    #[test]
    fn ids_are_chosen_only_where_they_are_asked_for() {
        let (ids, root) = (Ids::default(), of("c-1", "cmd-1"));
        let chosen = with_ids_of(&root, || (ids.new_trace_id(), ids.new_span_id()));
        assert_eq!(chosen, (root.trace_id(), root.span_id()));
        assert_ne!(ids.new_trace_id(), root.trace_id());
        assert_ne!(ids.new_span_id(), root.span_id());
    }
}
