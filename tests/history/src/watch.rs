//! A watch has no gap, no duplicate and no step back, from whichever node it comes and however often it is resumed.
//!
//! There is one sequence of events. What a watcher saw, from its first event to its last, must be just that part of
//! it. The sequence is not known; it is what all watchers saw together, so a gap is seen as long as somebody saw what
//! is missing.

use std::collections::BTreeMap;

use crate::Violation;

/// The name in [`Violation::checker`].
pub const CHECKER: &str = "whole watch";

/// An event as a watcher saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Where it is in the sequence.
    pub id: (u64, u64),
    /// What it says.
    pub content: String,
}

/// What one watcher saw, in the order in which it did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watched {
    /// Who it is; for people.
    pub watcher: String,
    /// What it saw.
    pub events: Vec<Event>,
}

/// Judges watchers of the same thing.
pub fn check(all: &[Watched]) -> Result<(), Violation> {
    let mut sequence: BTreeMap<(u64, u64), (&str, &str)> = BTreeMap::new();
    for Watched { watcher, events } in all {
        for pair in events.windows(2) {
            if pair[0].id >= pair[1].id {
                let what = if pair[0].id == pair[1].id {
                    "saw an event twice"
                } else {
                    "was taken back in time"
                };
                return Err(Violation::new(CHECKER, format!("{watcher} {what}")).with(
                    pair.iter()
                        .map(|event| format!("{:?} {}", event.id, event.content)),
                ));
            }
        }
        for event in events {
            let known = sequence.entry(event.id).or_insert((watcher, &event.content));
            if known.1 != event.content {
                return Err(
                    Violation::new(CHECKER, format!("event {:?} is not the same for all", event.id)).with([
                        format!("{}: {}", known.0, known.1),
                        format!("{watcher}: {}", event.content),
                    ]),
                );
            }
        }
    }
    for Watched { watcher, events } in all {
        let (Some(first), Some(last)) = (events.first(), events.last()) else {
            continue;
        };
        let mut seen = events.iter().map(|event| event.id);
        for (id, (who, content)) in sequence.range(first.id..=last.id) {
            if seen.next() != Some(*id) {
                return Err(Violation::new(
                    CHECKER,
                    format!("{watcher} did not see an event that {who} did"),
                )
                .with([format!("{id:?} {content}")]));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watched(watcher: &str, ids: &[u64]) -> Watched {
        let event = |id: &u64| Event {
            id: (*id, 0),
            content: format!("e{id}"),
        };
        Watched {
            watcher: watcher.to_owned(),
            events: ids.iter().map(event).collect(),
        }
    }

    #[test]
    fn gaps_duplicates_and_steps_back_are_seen() {
        let all = |a: &[u64], b: &[u64]| check(&[watched("a", a), watched("b", b)]);
        assert!(all(&[1, 2, 5], &[2, 5, 9]).is_ok());
        assert!(all(&[], &[2, 5, 9]).is_ok());
        assert!(all(&[1, 5], &[2, 5, 9]).is_err());
        assert!(all(&[1, 2, 2, 5], &[2, 5]).is_err());
        assert!(all(&[1, 5, 2], &[2, 5]).is_err());
    }

    #[test]
    fn an_event_that_says_different_things_is_seen() {
        let mut other = watched("b", &[1]);
        other.events[0].content = "something else".to_owned();
        assert!(check(&[watched("a", &[1]), other]).is_err());
    }
}
