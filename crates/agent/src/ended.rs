//! Sessions that ended by themselves and whose remains are still here.
//!
//! No frame says that a report has arrived, but a connection whose reports cannot be written is closed, and
//! each new connection says all of it again. So what was told over a connection that has stood for long has
//! arrived, and only then is it removed.

use std::collections::BTreeMap;

use regent_types::SessionName;

use crate::runtime::{Exit, Generation};
use crate::session::Millis;

/// So many are kept in mind; beyond it the next `hello` tells, as it says what is there.
const MAX_ENDED: usize = 4096;
/// What is left of a session that ended by itself is removed this long after it was reported, if the
/// control plane has not asked for it: long enough to look at its log.
pub const ENDED_KEPT: Millis = 3_600_000;

#[derive(Debug)]
struct Ended {
    generation: Generation,
    exit: Exit,
    /// When it was told over the connection that stands.
    told: Option<Millis>,
}

/// The sessions that ended, by name; of each the newest generation.
#[derive(Debug, Default)]
pub(crate) struct EndedSessions {
    sessions: BTreeMap<SessionName, Ended>,
}

impl EndedSessions {
    /// One ended.
    pub(crate) fn note(&mut self, session: &SessionName, generation: Generation, exit: Exit) {
        match self.sessions.get(session) {
            Some(ended) if ended.generation >= generation => {}
            None if self.sessions.len() >= MAX_ENDED => {
                tracing::warn!(%session, "too many ended sessions to keep in mind; the next hello tells");
            }
            Some(_) | None => {
                let told = None;
                self.sessions.insert(
                    session.clone(),
                    Ended {
                        generation,
                        exit,
                        told,
                    },
                );
            }
        }
    }

    /// `hello` tells of it.
    pub(crate) fn told(&mut self, session: &SessionName, now: Millis) {
        if let Some(ended) = self.sessions.get_mut(session) {
            ended.told = Some(now);
        }
    }

    /// The connection is lost, and with it perhaps what was told.
    pub(crate) fn connection_lost(&mut self) {
        for ended in self.sessions.values_mut() {
            ended.told = None;
        }
    }

    /// Whether this generation of a session, or a newer one, has ended.
    pub(crate) fn covers(&self, session: &SessionName, generation: Generation) -> bool {
        self.sessions
            .get(session)
            .is_some_and(|ended| ended.generation >= generation)
    }

    /// Nothing is left of it, or it runs again.
    pub(crate) fn forget(&mut self, session: &SessionName) {
        self.sessions.remove(session);
    }

    /// Those that were not told yet, and now are.
    pub(crate) fn tell(&mut self, now: Millis) -> Vec<(SessionName, Generation, Exit)> {
        let untold = self.sessions.iter_mut().filter(|(_, ended)| ended.told.is_none());
        untold
            .map(|(session, ended)| {
                ended.told = Some(now);
                (session.clone(), ended.generation, ended.exit)
            })
            .collect()
    }

    /// Those whose remains go now.
    pub(crate) fn take_due(&mut self, now: Millis) -> Vec<(SessionName, Generation)> {
        let due = self
            .sessions
            .extract_if(.., |_, ended| ended.told.is_some_and(|at| now >= at + ENDED_KEPT));
        due.map(|(session, ended)| (session, ended.generation)).collect()
    }
}
