//! Which of the actions that were cut off were done all the same.
//!
//! An agent that is killed between doing and recording leaves an intent without an outcome. On its next
//! start what the runtime has tells whether it was done; then the outcome is recorded and a redelivery is
//! answered with it. Where it tells nothing the intent stays as it is: a redelivery does the action again,
//! which for every action of a runtime is the same as doing it once. A stop is never known to be done: that
//! nothing runs any more does not say that nothing is left.

use regent_types::SessionName;

use crate::action::result_of;
use crate::journal::{Intent, Outcome};
use crate::runtime::{Observed, ObservedState};

/// The outcome of an action that was begun, if `found`, all that the runtime has, shows that it was done.
pub fn resolve(intent: &Intent, found: &[Observed]) -> Option<Outcome> {
    let session: &SessionName = intent.session.as_ref()?;
    let here = found.iter().find(|one| one.session == *session);
    let same = here.filter(|one| one.generation == intent.generation);
    let done = |one: &Observed| Outcome::Completed {
        result: result_of(one),
    };
    match intent.action.as_str() {
        // It was started; that it may have ended since is told by its own status.
        "start_session" => same.map(done),
        "hibernate_session" => same
            .filter(|one| one.state == ObservedState::Hibernated)
            .map(done),
        "wake_session" => same.filter(|one| one.state == ObservedState::Running).map(done),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use regent_types::Token;

    use super::*;
    use crate::runtime::Exit;

    fn intent(action: &str, generation: u64) -> Intent {
        Intent {
            session: Some(SessionName::new("alice-demo-1").unwrap()),
            generation,
            action: action.to_owned(),
            token: Token(3),
            begun_at_ms: 0,
        }
    }

    fn observed(generation: u64, state: ObservedState) -> Observed {
        Observed {
            session: SessionName::new("alice-demo-1").unwrap(),
            generation,
            token: Token(3),
            state,
            pid: Some(7),
            port: None,
            url: Some("http://127.0.0.1:1/".to_owned()),
            started_at_ms: None,
            metadata: BTreeMap::new(),
        }
    }

    #[test]
    fn what_was_done_before_the_agent_was_killed_is_known_to_be_done() {
        let running = [observed(2, ObservedState::Running)];
        let asleep = [observed(2, ObservedState::Hibernated)];
        let ended = [observed(2, ObservedState::Exited(Exit::Code(0)))];
        let known = |action: &str, generation: u64, found: &[Observed]| {
            resolve(&intent(action, generation), found).is_some()
        };

        assert!(known("start_session", 2, &running) && known("start_session", 2, &ended));
        assert!(
            !known("start_session", 3, &running),
            "an older generation is not this start"
        );
        assert!(!known("start_session", 2, &[]));
        assert!(!known("stop_session", 2, &[]), "its files may be left");
        assert!(known("hibernate_session", 2, &asleep) && !known("hibernate_session", 2, &running));
        assert!(known("wake_session", 2, &running) && !known("wake_session", 2, &asleep));
        assert!(!known("dance", 2, &running));
    }

    #[test]
    fn the_outcome_says_where_the_session_can_be_opened() {
        let Some(Outcome::Completed { result }) = resolve(
            &intent("start_session", 2),
            &[observed(2, ObservedState::Running)],
        ) else {
            panic!("not resolved");
        };
        assert_eq!(result["url"], "http://127.0.0.1:1/");
        assert_eq!(result["metadata"]["pid"], 7);
    }
}
