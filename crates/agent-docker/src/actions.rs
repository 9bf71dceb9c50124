//! The actions on sessions, each a few calls to the engine.
//!
//! What decides is read from the engine at the time, never remembered, so a new object or another replica finds the
//! same. Nothing holds a lock over calls: a replica that is frozen in the middle must not stop the next one. Instead
//! the fence is asked before anything and again before a container is made, the engine makes a name only once, and
//! all that is removed is named by container id or by generation, so that a late call cannot hit the next generation.

use std::collections::BTreeMap;
use std::time::Duration;

use bollard::models::Volume;
use bollard::query_parameters::CreateContainerOptionsBuilder;
use regent_agent::runtime::Generation;
use regent_agent::runtime::{
    HibernateMode, Observed, RuntimeError, RuntimeEvent, SessionRef, StartSpec, Stop,
};
use regent_types::SessionName;
use tokio::time::Instant;

use crate::engine::Engine;
use crate::error::{engine, is_conflict, is_missing, status, words};
use crate::images::{self, NoImage, OWN_PROGRAM};
use crate::names::{self, Identity, Purpose, Scope};
use crate::objects::{Found, HEALTHY_WITHIN, NO_FORCE, Phase, READY_INTERVAL, mark_of};
use crate::spec;

/// The grace of a generation that is replaced, and of a session that hibernates by ending.
const REPLACE_GRACE: Duration = Duration::from_secs(10);

/// How long a wake waits for the session's port; the start has said it, and it is not kept.
const WAKE_READY: Duration = Duration::from_secs(10);

/// How long a start looks for the container that another one of its generation is making: its name is taken before it
/// can be seen.
const SEEN_WITHIN: Duration = Duration::from_secs(10);

impl Engine {
    pub(crate) async fn start(&self, spec: &StartSpec) -> Result<Observed, RuntimeError> {
        let scope = self.joined()?;
        self.until_there().await?;
        self.admit(spec.token).await?;
        let until = Instant::now() + SEEN_WITHIN;
        loop {
            let mut here = self.of_session(&scope, &spec.session).await?;
            refuse_older(&here, &spec.session, spec.generation)?;
            if let Some(at) = here
                .iter()
                .position(|one| one.identity.generation == spec.generation)
            {
                let found = here.swap_remove(at);
                return match found.phase() {
                    Phase::Made => self.run(&scope, spec, &found.id).await,
                    Phase::Removing => Err(RuntimeError::StartFailed {
                        session: spec.session.clone(),
                        reason: "its container is just being removed".to_owned(),
                    }),
                    _ => Ok(self.seen(&found)),
                };
            }
            // Older generations, or what is left of them.
            self.remove(
                &scope,
                &spec.session,
                spec.generation.saturating_sub(1),
                REPLACE_GRACE,
                false,
            )
            .await?;
            if let Some(made) = Box::pin(self.make(&scope, spec)).await? {
                return self.run(&scope, spec, &made).await;
            }
            if Instant::now() >= until {
                return Err(not_started(spec, "another container has its name".to_owned()));
            }
            tokio::time::sleep(READY_INTERVAL).await;
        }
    }

    /// Makes the container; none if there is one of the name now.
    async fn make(&self, scope: &Scope, spec: &StartSpec) -> Result<Option<String>, RuntimeError> {
        let bad = |reason: String| RuntimeError::BadSpec {
            session: spec.session.clone(),
            reason,
        };
        let session = spec.session_ref();
        let own = spec.image.is_none() && spec.command == "regent";
        let image = match &spec.image {
            Some(image) => image.clone(),
            None => match self.options.own_program.as_ref().filter(|_| own) {
                Some(program) => {
                    let made = images::ensure_own(&self.docker, program, &self.own_image).await;
                    made.map_err(|reason| not_started(spec, reason))?
                }
                None => {
                    return Err(bad(
                        "the template names no image, and this agent runs containers".to_owned()
                    ));
                }
            },
        };
        let network = self.network(scope).await?;
        let mut plan = spec::plan(&self.options, &self.site, scope, spec, &image, &network).map_err(bad)?;
        if own {
            plan.container.entrypoint = Some(vec![OWN_PROGRAM.to_owned()]);
            // It is the first process of its container, where the default action of TERM is to do nothing.
            plan.container.stop_signal = Some("SIGKILL".to_owned());
        } else {
            self.pull(spec, &image).await?;
        }
        // The pull may have taken long. From here on what is made has the names that a newer leader's would have, so that
        // is not rolled back once there is one.
        self.admit(spec.token).await?;
        for (name, labels) in &plan.volumes {
            self.make_volume(name, labels.clone()).await?;
        }
        let name = scope.container(&spec.session, spec.generation);
        let options = CreateContainerOptionsBuilder::new().name(&name).build();
        match self.docker.create_container(Some(options), plan.container).await {
            Ok(made) => Ok(Some(made.id)),
            Err(error) if is_conflict(&error) => {
                tracing::info!(%name, error = words(&error), "another start was first");
                Ok(None)
            }
            Err(error) => {
                self.roll_back(scope, &session, None).await;
                Err(match status(&error) {
                    Some(400 | 404) => bad(words(&error)),
                    _ => not_started(spec, words(&error)),
                })
            }
        }
    }

    async fn pull(&self, spec: &StartSpec, image: &str) -> Result<(), RuntimeError> {
        let tell = |message: String, percent| {
            let session = spec.session.clone();
            // Nobody listening is fine: it is only how far it has come.
            let _ = self.events.send(RuntimeEvent::Progress {
                session,
                message,
                percent,
            });
        };
        images::ensure(&self.docker, &self.options, image, tell)
            .await
            .map_err(|none| match none {
                NoImage::ForGood(reason) => RuntimeError::BadSpec {
                    session: spec.session.clone(),
                    reason,
                },
                NoImage::ForNow(reason) => not_started(spec, reason),
            })
    }

    /// Starts a container that is made, and waits until it is ready.
    async fn run(&self, scope: &Scope, spec: &StartSpec, id: &str) -> Result<Observed, RuntimeError> {
        let identity = Identity {
            session: spec.session.clone(),
            generation: spec.generation,
            token: spec.token,
        };
        self.memory().expect(id, &identity);
        if let Err(error) = self.start_container(id).await {
            let said = words(&error);
            self.roll_back(scope, &spec.session_ref(), Some(id)).await;
            // A program that is not in the image will not be there next time.
            let for_good = [
                "executable file not found",
                "no such file or directory",
                "permission denied",
                "exec format error",
            ]
            .iter()
            .any(|word| said.contains(word));
            return Err(if for_good {
                RuntimeError::BadSpec {
                    session: spec.session.clone(),
                    reason: said,
                }
            } else {
                not_started(spec, said)
            });
        }
        let within = spec
            .port
            .as_ref()
            .map_or(HEALTHY_WITHIN, |port| port.ready_within);
        if let Err(error) = self.until_ready(id, within).await {
            tracing::warn!(session = %spec.session, %error, "it runs, and whether it is ready is not known");
        }
        let found = self
            .inspect(scope, id)
            .await?
            .ok_or_else(|| not_started(spec, "its container was removed while it started".to_owned()))?;
        Ok(self.seen(&found))
    }

    pub(crate) async fn stop(&self, session: &SessionRef, how: Stop) -> Result<(), RuntimeError> {
        let stopped = self.stop_all(session, how).await;
        if stopped.is_err() {
            self.settle(&session.session).await;
        }
        stopped
    }

    async fn stop_all(&self, session: &SessionRef, how: Stop) -> Result<(), RuntimeError> {
        let scope = self.joined()?;
        self.until_there().await?;
        self.admit(session.token).await?;
        let _busy = self.busy(&session.session);
        let here = self.of_session(&scope, &session.session).await?;
        refuse_older(&here, &session.session, session.generation)?;
        if how.delete_home {
            // Only the container tells which home it has, so what is to go is noted before it goes.
            for one in &here {
                if let Some(home) = names::record(&one.inspected).and_then(|record| record.home) {
                    let mark = scope.volume(&session.session, one.identity.generation, "home-goes");
                    let labels = scope.home_goes_labels(&one.session_ref(session.token), &home);
                    self.make_volume(&mark, labels).await?;
                }
            }
        }
        self.remove(&scope, &session.session, session.generation, how.grace, true)
            .await?;
        self.forget(&session.session, session.generation);
        Ok(())
    }

    pub(crate) async fn hibernate(&self, session: &SessionRef) -> Result<Observed, RuntimeError> {
        let asleep = self.put_to_sleep(session).await;
        if asleep.is_err() {
            self.settle(&session.session).await;
        }
        asleep
    }

    async fn put_to_sleep(&self, session: &SessionRef) -> Result<Observed, RuntimeError> {
        let scope = self.joined()?;
        self.until_there().await?;
        self.admit(session.token).await?;
        let _busy = self.busy(&session.session);
        let found = self.existing(&scope, session).await?;
        let failed = || engine(format!("session {} cannot be put to sleep", session.session));
        match found.phase() {
            Phase::Ended(exit) => return Err(wrong_state(session, "hibernate", exit.to_string())),
            Phase::Made | Phase::Removing => {
                return Err(wrong_state(
                    session,
                    "hibernate",
                    "is neither running nor asleep".to_owned(),
                ));
            }
            Phase::Asleep | Phase::Paused => return Ok(self.seen(&found)),
            Phase::Running => {}
        }
        let mode = names::record(&found.inspected).map_or(HibernateMode::Restart, |record| record.hibernate);
        match mode {
            HibernateMode::Stop => match self.docker.pause_container(&found.id).await {
                Err(error) if !is_conflict(&error) => return Err(failed()(error)),
                _ => {}
            },
            HibernateMode::Restart => {
                // Marked first, so that its end is never taken for one of its own. The mark counts for this run only.
                let mark = mark_of(&scope, &found);
                self.make_volume(
                    &mark,
                    scope.volume_labels(&found.session_ref(session.token), Purpose::Asleep),
                )
                .await?;
                if let Err(error) = self.end(&found.id, REPLACE_GRACE).await {
                    // It goes on, and its end will be one of its own.
                    self.remove_volume(&session.session, &mark).await?;
                    return Err(failed()(error));
                }
            }
        }
        let found = self.existing(&scope, session).await?;
        match found.phase() {
            Phase::Asleep | Phase::Paused => Ok(self.seen(&found)),
            other => Err(wrong_state(
                session,
                "hibernate",
                format!("is {other:?} and not asleep"),
            )),
        }
    }

    pub(crate) async fn wake(&self, session: &SessionRef) -> Result<Observed, RuntimeError> {
        let scope = self.joined()?;
        self.until_there().await?;
        self.admit(session.token).await?;
        let found = self.existing(&scope, session).await?;
        let failed = || engine(format!("session {} cannot be woken", session.session));
        match found.phase() {
            Phase::Ended(exit) => return Err(wrong_state(session, "wake", exit.to_string())),
            Phase::Made | Phase::Removing => {
                return Err(wrong_state(
                    session,
                    "wake",
                    "is neither running nor asleep".to_owned(),
                ));
            }
            Phase::Running => {}
            Phase::Paused => match self.docker.unpause_container(&found.id).await {
                Err(error) if !is_conflict(&error) => return Err(failed()(error)),
                _ => {}
            },
            Phase::Asleep => {
                self.start_container(&found.id).await.map_err(failed())?;
                if let Err(error) = self.until_ready(&found.id, WAKE_READY).await {
                    tracing::warn!(session = %session.session, %error, "it runs, and whether it is ready is not known");
                }
            }
        }
        let found = self.existing(&scope, session).await?;
        // The marks of runs that are over mean nothing any more.
        for mark in self
            .volumes(&scope, Some(&session.session), Purpose::Asleep)
            .await?
        {
            if mark.name != mark_of(&scope, &found) {
                self.remove_volume(&session.session, &mark.name).await?;
            }
        }
        Ok(self.seen(&found))
    }

    pub(crate) async fn list(&self) -> Result<Vec<Observed>, RuntimeError> {
        let Some(scope) = self.scope() else {
            return Ok(Vec::new());
        };
        let found = self.all(&scope, None).await?;
        let mut newest: BTreeMap<SessionName, Found> = BTreeMap::new();
        for one in found {
            let older = newest
                .get(&one.identity.session)
                .is_none_or(|other| other.identity.generation < one.identity.generation);
            // Made and never started is a start that was cut off: it is not done.
            if older && !matches!(one.phase(), Phase::Made | Phase::Removing) {
                newest.insert(one.identity.session.clone(), one);
            }
        }
        Ok(newest.values().map(|one| self.seen(one)).collect())
    }

    /// Removes all that there is of a session up to this generation.
    async fn remove(
        &self,
        scope: &Scope,
        session: &SessionName,
        newest: Generation,
        grace: Duration,
        homes: bool,
    ) -> Result<(), RuntimeError> {
        let _busy = self.busy(session);
        for one in self.of_session(scope, session).await? {
            if one.identity.generation <= newest {
                self.remove_container(session, &one, grace).await?;
            }
        }
        let mine = |volume: &Volume| names::generation_of(&volume.labels).is_some_and(|own| own <= newest);
        let mut marks = Vec::new();
        for volume in self
            .list_volumes(&scope.filter(Some(session)))
            .await?
            .into_iter()
            .filter(mine)
        {
            match names::home_of(&volume.labels).cloned() {
                Some(home) => marks.push((volume.name, home)),
                None => self.remove_volume(session, &volume.name).await?,
            }
        }
        for (mark, home) in marks {
            if !homes {
                // A stop that wanted it gone was cut off, and the session goes on with it.
                self.remove_volume(session, &mark).await?;
                continue;
            }
            match self.docker.remove_volume(&home, NO_FORCE).await {
                Err(error) if is_conflict(&error) => {
                    tracing::info!(%session, home, "its home stays: another session has it too");
                }
                Err(error) if !is_missing(&error) => {
                    return Err(RuntimeError::StopIncomplete {
                        session: session.clone(),
                        left: format!("its home {home}: {}", words(&error)),
                    });
                }
                _ => {}
            }
            self.remove_volume(session, &mark).await?;
        }
        Ok(())
    }

    /// Removes what a start has made that failed: its container, and the volumes of the generation. One that another
    /// start of it has in use stays.
    async fn roll_back(&self, scope: &Scope, session: &SessionRef, container: Option<&str>) {
        let left = async {
            // The generation is a newer leader's by now, with all that it has.
            self.admit(session.token).await?;
            if let Some(id) = container {
                let _busy = self.busy(&session.session);
                if let Some(found) = self.inspect(scope, id).await? {
                    self.remove_container(&session.session, &found, Duration::ZERO)
                        .await?;
                }
                self.forget(&session.session, session.generation);
            }
            for volume in self.list_volumes(&scope.filter(Some(&session.session))).await? {
                if names::generation_of(&volume.labels) == Some(session.generation) {
                    match self.docker.remove_volume(&volume.name, NO_FORCE).await {
                        Err(error) if !is_missing(&error) && !is_conflict(&error) => {
                            return Err(engine(format!("the volume {} stays", volume.name))(error));
                        }
                        _ => {}
                    }
                }
            }
            Ok::<_, RuntimeError>(())
        };
        if let Err(error) = left.await {
            tracing::error!(session = %session.session, %error, "a failed start left something");
        }
    }

    async fn existing(&self, scope: &Scope, session: &SessionRef) -> Result<Found, RuntimeError> {
        let here = self.of_session(scope, &session.session).await?;
        refuse_older(&here, &session.session, session.generation)?;
        let newest = here.into_iter().max_by_key(|one| one.identity.generation);
        let session_name = session.session.clone();
        match newest {
            None => Err(RuntimeError::NotFound {
                session: session_name,
            }),
            Some(found) if found.identity.generation == session.generation => Ok(found),
            Some(found) => Err(RuntimeError::OtherGeneration {
                session: session_name,
                have: found.identity.generation,
                asked: session.generation,
            }),
        }
    }
}

fn wrong_state(session: &SessionRef, action: &'static str, state: String) -> RuntimeError {
    RuntimeError::WrongState {
        session: session.session.clone(),
        action,
        state,
    }
}

fn refuse_older(here: &[Found], session: &SessionName, asked: Generation) -> Result<(), RuntimeError> {
    match here.iter().map(|one| one.identity.generation).max() {
        Some(have) if have > asked => Err(RuntimeError::StaleGeneration {
            session: session.clone(),
            have,
            asked,
        }),
        _ => Ok(()),
    }
}

fn not_started(spec: &StartSpec, reason: String) -> RuntimeError {
    RuntimeError::StartFailed {
        session: spec.session.clone(),
        reason,
    }
}
