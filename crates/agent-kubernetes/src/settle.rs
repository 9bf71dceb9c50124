//! Waiting for a session's pod: until it runs, has ended, or cannot come up.

use std::time::Duration;

use regent_agent::runtime::{RuntimeError, RuntimeEvent, SessionRef};
use regent_types::SessionName;
use tokio::time::Instant;

use crate::engine::Engine;
use crate::pods::{CANNOT_BE_PULLED, Condition};
use crate::record::{Phase, Record};

/// How long something must have been in the way before it is told: a claim is bound within a second, and an image that
/// is there needs no pull.
const TELL_AFTER: Duration = Duration::from_secs(2);

/// How long the pull of an image may go on failing.
const PULL_FAILS_FOR: Duration = Duration::from_secs(20);

/// Why a session did not come up.
#[derive(Debug)]
pub(crate) enum Unsettled {
    /// It never can.
    Hopeless(String),
    /// It may another time.
    NotNow(String),
    /// It is not there any more, or is another's now: nothing to be taken back.
    Gone(String),
    /// The API refused.
    Api(RuntimeError),
}

impl Unsettled {
    /// As the error of an action.
    pub(crate) fn into_error(self, session: &SessionName) -> RuntimeError {
        let session = session.clone();
        match self {
            Self::Hopeless(reason) => RuntimeError::BadSpec { session, reason },
            Self::NotNow(reason) | Self::Gone(reason) => RuntimeError::StartFailed { session, reason },
            Self::Api(error) => error,
        }
    }
}

impl Engine {
    /// Waits until the container runs and answers on its port, or has run for as long as that may take; until it
    /// has ended by itself, which is put on record; or until it is certain that it will not run by `deadline`.
    pub(crate) async fn settle(
        &self,
        session: &SessionRef,
        record: &Record,
        deadline: Instant,
    ) -> Result<(), Unsettled> {
        let mut waiting = self.waiting_for(&session.session);
        let mut progress = Progress::default();
        let mut runs_since = None;
        let mut pull: Option<String> = None;
        let mut fails_since = None;
        loop {
            let now = Instant::now();
            let words = match self.look(&session.session).await {
                Ok(None) => return Err(Unsettled::Gone("it was removed while it came up".to_owned())),
                // The API may be away for a moment, and the pod comes up meanwhile.
                Err(error) if error.is_retryable() => error.to_string(),
                Err(error) => return Err(Unsettled::Api(error)),
                Ok(Some(found)) if found.record.uid != record.uid || found.record.going => {
                    return Err(Unsettled::Gone("it was removed while it came up".to_owned()));
                }
                Ok(Some(found)) => match (&found.record.phase, found.condition()) {
                    (Phase::Stopping, _) => {
                        return Err(Unsettled::Gone("it was stopped while it came up".to_owned()));
                    }
                    (Phase::Ended(_) | Phase::Hibernated, _) | (_, Some(Condition::Ready)) => return Ok(()),
                    (_, Some(Condition::Ended(_))) => {
                        let ended = self.record_end(&session.session, session.generation, session.token);
                        return ended.await.map(|_| ()).map_err(Unsettled::Api);
                    }
                    (_, Some(Condition::NotReady)) => {
                        if now - *runs_since.get_or_insert(now) >= record.ready_within {
                            tracing::debug!(session = %session.session, "session does not serve its port yet");
                            return Ok(());
                        }
                        waiting.a_while().await;
                        continue;
                    }
                    (
                        _,
                        Some(Condition::Stuck {
                            why,
                            hopeless,
                            pull: pulled,
                        }),
                    ) => {
                        let backs_off = why.contains(CANNOT_BE_PULLED);
                        if hopeless {
                            return Err(Unsettled::Hopeless(match pull {
                                // Of a pull that backs off only the tries before say what was wrong.
                                Some(cause) if !pulled => cause,
                                _ => why,
                            }));
                        }
                        if pulled {
                            pull = Some(why.clone());
                        }
                        if pulled || backs_off {
                            fails_since.get_or_insert(now);
                        }
                        // A registry may be away for a moment. After that the next run is for it.
                        if fails_since.is_some_and(|since| now - since >= PULL_FAILS_FOR) {
                            return Err(Unsettled::NotNow(pull.unwrap_or(why)));
                        }
                        why
                    }
                    (_, Some(Condition::Coming)) => "pulling its image and creating its container".to_owned(),
                    (_, None) => match found.record.failure {
                        Some(failure) => format!("its pod cannot be created: {failure}"),
                        None => "waiting for its pod".to_owned(),
                    },
                },
            };
            runs_since = None;
            if now >= deadline {
                return Err(Unsettled::NotNow(words));
            }
            if let Some(message) = progress.now(now, words) {
                self.tell(RuntimeEvent::Progress {
                    session: session.session.clone(),
                    message,
                    percent: None,
                });
            }
            waiting.a_while().await;
        }
    }
}

/// What is being waited for, told once each time that it has lasted.
#[derive(Debug, Default)]
struct Progress {
    words: String,
    since: Option<Instant>,
    told: bool,
}

impl Progress {
    fn now(&mut self, now: Instant, words: String) -> Option<String> {
        if self.words != words {
            *self = Self {
                words,
                since: Some(now),
                told: false,
            };
        }
        let lasts = self.since.is_some_and(|since| now - since >= TELL_AFTER);
        if self.told || !lasts {
            return None;
        }
        self.told = true;
        Some(self.words.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_told_when_it_lasts_and_once() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut progress = Progress::default();
        let mut say = |millis, words: &str| progress.now(at(millis), words.to_owned());
        assert_eq!(say(0, "waiting for its pod"), None);
        assert_eq!(say(500, "unschedulable"), None);
        assert_eq!(say(2400, "unschedulable"), None);
        assert_eq!(say(2500, "unschedulable").as_deref(), Some("unschedulable"));
        assert_eq!(say(9000, "unschedulable"), None);
        assert_eq!(say(9100, "pulling"), None);
        assert_eq!(say(11100, "pulling").as_deref(), Some("pulling"));
    }
}
