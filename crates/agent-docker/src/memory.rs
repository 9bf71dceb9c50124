//! What only matters while this object lives: which containers were seen to run, so that their end is told once.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::PoisonError;
use std::time::Duration;

use regent_agent::runtime::{Exit, Generation, Observed, ObservedState, RuntimeError, RuntimeEvent};
use regent_types::{SessionName, Time};
use tokio::time::Instant;

use crate::engine::Engine;
use crate::names::{self, Identity};
use crate::objects::{Found, Phase, published};

/// How long an engine that came back may take to end what it had left running.
const RETURNING: Duration = Duration::from_secs(20);

/// What only matters while this object lives.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// The sessions that ran when they were last looked at, and whether their end has been told.
    known: BTreeMap<SessionName, Known>,
    /// Sessions that are being stopped or put to sleep here: their ends are no news.
    busy: BTreeMap<SessionName, usize>,
    /// Runs of containers, by id and start, that ended because the engine did.
    taken_along: BTreeSet<(String, String)>,
    /// The containers that were there when the engine came back, and until when that counts.
    returned: Option<(Instant, BTreeSet<String>)>,
}

/// A container that ran. One that has ended by itself never runs again, so its end is told once.
#[derive(Debug, Clone, PartialEq)]
struct Known {
    id: String,
    identity: Identity,
    told: bool,
}

impl Memory {
    /// Whether a container was there when the engine came back, a moment ago: an engine that was killed ends what it
    /// left running only once it is back.
    fn returned_lately(&self, id: &str) -> bool {
        let lately = |(until, ids): &(Instant, BTreeSet<String>)| Instant::now() < *until && ids.contains(id);
        self.returned.as_ref().is_some_and(lately)
    }

    /// A container is removed, and will not be seen again.
    pub(crate) fn gone(&mut self, id: &str) {
        self.taken_along.retain(|(container, _)| container != id);
    }

    pub(crate) fn expect(&mut self, id: &str, identity: &Identity) {
        let known = self.known.get(&identity.session);
        if known.is_none_or(|known| known.id != id && known.identity.generation <= identity.generation) {
            let known = Known {
                id: id.to_owned(),
                identity: identity.clone(),
                told: false,
            };
            self.known.insert(identity.session.clone(), known);
        }
    }
}

/// While it lives, the end of the session is no news.
pub(crate) struct Busy<'a> {
    engine: &'a Engine,
    session: SessionName,
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let mut memory = self.engine.memory();
        if let Some(count) = memory.busy.get_mut(&self.session) {
            *count -= 1;
            if *count == 0 {
                memory.busy.remove(&self.session);
            }
        }
    }
}

impl Engine {
    /// What a container looks like from outside; and it is kept in mind, so that its end is noticed.
    pub(crate) fn seen(&self, found: &Found) -> Observed {
        let mut memory = self.memory();
        let state = match found.phase() {
            Phase::Running => ObservedState::Running,
            Phase::Paused | Phase::Asleep => ObservedState::Hibernated,
            Phase::Ended(_) if memory.taken_along.contains(&found.run()) => {
                ObservedState::Exited(Exit::Unknown)
            }
            Phase::Ended(exit) => ObservedState::Exited(exit),
            Phase::Made | Phase::Removing => ObservedState::Exited(Exit::Removed),
        };
        let busy = memory.busy.contains_key(&found.identity.session);
        // What is seen while it is being stopped may be gone before it is told.
        if !busy && !matches!(state, ObservedState::Exited(_)) {
            memory.expect(&found.id, &found.identity);
        }
        drop(memory);
        self.describe(found, state)
    }

    pub(crate) fn describe(&self, found: &Found, state: ObservedState) -> Observed {
        let inspected = &found.inspected;
        let record = names::record(inspected);
        let mut metadata = record.map(|record| record.metadata).unwrap_or_default();
        let host = inspected.host_config.clone().unwrap_or_default();
        let limit = |limit: Option<i64>, unit: &dyn Fn(i64) -> String| {
            limit
                .filter(|limit| *limit > 0)
                .map_or_else(|| "none".to_owned(), unit)
        };
        metadata.insert(
            "cpuLimit".to_owned(),
            limit(host.nano_cpus, &|nano| format!("{}m", nano / 1_000_000)),
        );
        metadata.insert(
            "memoryLimit".to_owned(),
            limit(host.memory, &|bytes| bytes.to_string()),
        );
        metadata.insert(
            "container".to_owned(),
            inspected
                .name
                .clone()
                .unwrap_or_default()
                .trim_start_matches('/')
                .to_owned(),
        );
        let port = published(inspected).map(|(_, port, _)| port);
        let running = state == ObservedState::Running;
        let pid = inspected
            .state
            .as_ref()
            .and_then(|state| state.pid)
            .and_then(|pid| u32::try_from(pid).ok());
        let host = self
            .options
            .url_host
            .clone()
            .unwrap_or_else(|| match self.options.publish {
                // Published on every address: this machine's own is one of them.
                IpAddr::V4(address) if address.is_unspecified() => "127.0.0.1".to_owned(),
                IpAddr::V6(address) if address.is_unspecified() => "[::1]".to_owned(),
                IpAddr::V6(address) => format!("[{address}]"),
                IpAddr::V4(address) => address.to_string(),
            });
        Observed {
            session: found.identity.session.clone(),
            generation: found.identity.generation,
            token: found.identity.token,
            state,
            pid: pid.filter(|pid| *pid > 0),
            port,
            url: port
                .filter(|_| running)
                .map(|port| format!("http://{host}:{port}/")),
            started_at_ms: found.started_at().parse::<Time>().ok().map(|time| time.0),
            metadata,
        }
    }

    pub(crate) fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn forget(&self, session: &SessionName, generation: Generation) {
        let mut memory = self.memory();
        if memory
            .known
            .get(session)
            .is_some_and(|known| known.identity.generation <= generation)
        {
            memory.known.remove(session);
        }
    }

    pub(crate) fn busy(&self, session: &SessionName) -> Busy<'_> {
        *self.memory().busy.entry(session.clone()).or_default() += 1;
        Busy {
            engine: self,
            session: session.clone(),
        }
    }

    /// Tells the end of a session that came while an action on it was under way and was not what that action wanted.
    pub(crate) async fn settle(&self, session: &SessionName) {
        let known = {
            let memory = self.memory();
            memory.known.get(session).filter(|known| !known.told).cloned()
        };
        if let Some(Known { id, identity, .. }) = known
            && let Err(error) = self.after_end(&id, &identity).await
        {
            tracing::warn!(%session, %error, "whether it ended meanwhile is found out later");
        }
    }

    /// Something happened to a container: tells its end, once.
    pub(crate) async fn after_end(&self, id: &str, identity: &Identity) -> Result<(), RuntimeError> {
        let Some(scope) = self.scope() else { return Ok(()) };
        let exit = match self.inspect(&scope, id).await? {
            Some(found) => match found.phase() {
                Phase::Ended(_) if self.memory().returned_lately(id) => {
                    self.take_along(&[found]);
                    return Ok(());
                }
                Phase::Ended(exit) => exit,
                Phase::Removing => Exit::Removed,
                Phase::Made | Phase::Running | Phase::Paused | Phase::Asleep => return Ok(()),
            },
            None => Exit::Removed,
        };
        self.tell(id, identity, exit);
        Ok(())
    }

    pub(crate) fn tell(&self, id: &str, identity: &Identity, exit: Exit) {
        let Identity {
            session,
            generation,
            token,
        } = identity.clone();
        let mut memory = self.memory();
        if memory.busy.contains_key(&session) {
            return;
        }
        let news = match memory.known.get_mut(&session) {
            Some(known) if known.id == id => !std::mem::replace(&mut known.told, true),
            // Stopped, replaced, or never seen to run.
            Some(_) | None => return,
        };
        if exit == Exit::Removed {
            // Another replica may have stopped it: nobody here would ever forget it.
            memory.known.remove(&session);
            memory.gone(id);
        }
        drop(memory);
        if !news {
            return;
        }
        tracing::info!(%session, generation, %exit, "session ended");
        // Nobody listening is fine: a list tells the same.
        let _ = self.events.send(RuntimeEvent::Exited {
            session,
            generation,
            token,
            exit,
        });
    }

    /// These ended with the engine: they count as missing, and what shall run is started again.
    fn take_along(&self, taken: &[Found]) {
        if taken.is_empty() {
            return;
        }
        let mut memory = self.memory();
        for one in taken {
            memory.taken_along.insert(one.run());
            memory.known.remove(&one.identity.session);
        }
        drop(memory);
        let reason = format!("{} sessions ended with the engine", taken.len());
        // Nobody listening is fine: a list tells the same.
        let _ = self.events.send(RuntimeEvent::Restarted { reason });
    }

    /// Compares what is there with what was known to run, after events may have been missed. `engine_was_away`: what
    /// ended meanwhile ended with the engine, and is to be started again.
    pub(crate) async fn compare(&self, engine_was_away: bool) -> Result<(), RuntimeError> {
        let Some(scope) = self.scope() else { return Ok(()) };
        let known: Vec<Known> = {
            let memory = self.memory();
            memory
                .known
                .values()
                .filter(|known| !known.told)
                .cloned()
                .collect()
        };
        if known.is_empty() {
            return Ok(());
        }
        let found = self.all(&scope, None).await?;
        let (mut taken, mut returned) = (Vec::new(), BTreeSet::new());
        for Known { id, identity, .. } in known {
            match found
                .iter()
                .find(|one| one.id == id)
                .map(|one| (one, one.phase()))
            {
                None | Some((_, Phase::Removing)) => self.tell(&id, &identity, Exit::Removed),
                Some((one, Phase::Ended(_))) if engine_was_away => taken.push(one.clone()),
                Some((_, Phase::Ended(exit))) => self.tell(&id, &identity, exit),
                Some((_, Phase::Made | Phase::Running | Phase::Paused | Phase::Asleep)) => {
                    returned.insert(id);
                }
            }
        }
        if engine_was_away {
            self.memory().returned = Some((Instant::now() + RETURNING, returned));
        }
        self.take_along(&taken);
        Ok(())
    }
}
