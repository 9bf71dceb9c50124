//! The sessions that are here: which run or sleep, and which have ended and are to be told of.
//!
//! It follows lists of the runtime, exits and outcomes of commands, in whatever order they arrive. Invariant: an
//! exit is never undone by a list that was made before it, so each is told by `hello` or reported after it.

use std::collections::BTreeMap;

use regent_types::SessionName;
use regent_types::frame::{CommandFrame, RunningSession};

use crate::action::Line;
use crate::ended::EndedSessions;
use crate::report;
use crate::runtime::{Exit, Generation, Observed, ObservedState};
use crate::session::Millis;

/// What is here.
#[derive(Debug, Default)]
pub(crate) struct Present {
    /// What runs or sleeps, and which generation of it.
    live: BTreeMap<SessionName, Generation>,
    /// What ended.
    pub(crate) ended: EndedSessions,
}

impl Present {
    /// How many run or sleep.
    pub(crate) fn count(&self) -> usize {
        self.live.len()
    }

    /// Whether this generation of it is here, running or asleep.
    pub(crate) fn has(&self, session: &SessionName, generation: Generation) -> bool {
        self.live.get(session) == Some(&generation)
    }

    /// `found` is all that the runtime has, seen a while ago. Gives what `hello` says of it; `keep` is whether
    /// exits are this process's affair.
    pub(crate) fn listed(&mut self, now: Millis, found: &[Observed], keep: bool) -> Vec<RunningSession> {
        self.live.clear();
        let mut sessions = Vec::with_capacity(found.len());
        for one in found {
            if let ObservedState::Exited(exit) = one.state {
                self.exited(&one.session, one.generation, exit, keep);
                self.ended.told(&one.session, now);
                // It did not end, it was taken along: by `dev`, or with the machine. Not said, it counts as
                // missing, and what shall run is started again.
                if exit == Exit::Unknown {
                    continue;
                }
            } else if !self.ended.covers(&one.session, one.generation) {
                self.live.insert(one.session.clone(), one.generation);
                self.ended.forget(&one.session);
            }
            sessions.push(report::session(one));
        }
        sessions
    }

    /// One ended by itself.
    pub(crate) fn exited(&mut self, session: &SessionName, generation: Generation, exit: Exit, keep: bool) {
        if self.live.get(session).is_some_and(|&live| live <= generation) {
            self.live.remove(session);
        }
        if keep {
            self.ended.note(session, generation, exit);
        }
    }

    /// A command about one was done.
    pub(crate) fn done(&mut self, command: &CommandFrame) {
        let Line::Session(session) = Line::of(command) else {
            return;
        };
        let generation = command.payload["generation"].as_u64().unwrap_or_default();
        match command.action.as_str() {
            "stop_session" => {
                self.live.remove(&session);
                self.ended.forget(&session);
            }
            // A start that was answered by what is there may be of a program that ended since.
            "start_session" | "wake_session" | "hibernate_session"
                if !self.ended.covers(&session, generation) =>
            {
                self.ended.forget(&session);
                self.live.insert(session, generation);
            }
            _ => {}
        }
    }

    /// Their ends are another's affair from now on, who sees them itself.
    pub(crate) fn hand_over(&mut self) {
        self.ended = EndedSessions::default();
    }
}
