//! Start: create what is missing, wait until it runs, and take all of it back if it does not.

use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use kube::api::{Api, PostParams};
use kube::{Resource, ResourceExt};
use regent_agent::runtime::{Observed, RuntimeError, SessionRef, StartSpec, Stop};
use regent_types::Token;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::api::{ApiError, answer, named};
use crate::change::{self, Object, TRIES};
use crate::engine::{Engine, read};
use crate::found::Found;
use crate::names::{MANAGER, annotation};
use crate::objects::{Plan, token_of};
use crate::pods::Condition;
use crate::record::{Phase, Record};
use crate::settle::Unsettled;

/// The grace of a generation that is replaced.
const REPLACE_GRACE: Duration = Duration::from_secs(10);

impl Engine {
    pub(crate) async fn start(&self, spec: &StartSpec) -> Result<Observed, RuntimeError> {
        let scope = self.admit(spec.token).await?;
        let deadline = Instant::now() + self.options.start_within;
        let session = spec.session_ref();
        let plan = match Plan::new(scope, &self.options, spec) {
            Ok(plan) => plan,
            // It may run all the same, since before the agent was configured anew.
            Err(reason) => {
                let there = self.observe(&session).await;
                return there.map_err(|error| match error {
                    RuntimeError::NotFound { session } | RuntimeError::OtherGeneration { session, .. } => {
                        RuntimeError::BadSpec { session, reason }
                    }
                    other => other,
                });
            }
        };
        self.begins(&session.session, session.generation);
        let started = Box::pin(self.bring_up(&plan, &session, deadline)).await;
        if started.is_err() {
            self.forgets(&session.session);
        }
        started
    }

    async fn bring_up(
        &self,
        plan: &Plan,
        session: &SessionRef,
        deadline: Instant,
    ) -> Result<Observed, RuntimeError> {
        let found = Box::pin(self.obtain(plan, session)).await?;
        let record = &found.record;
        match record.phase {
            Phase::Starting => {}
            Phase::Waking => return self.await_wake(session, record, deadline).await,
            Phase::Started => {
                // Somebody may have deleted its Service.
                self.complete(plan, record, session).await?;
                return Ok(found.observed(&self.space.namespace));
            }
            Phase::Hibernated | Phase::Ended(_) | Phase::Stopping => {
                return Ok(found.observed(&self.space.namespace));
            }
        }
        let up = match self.complete(plan, record, session).await {
            Ok(()) => self.settle(session, record, deadline).await,
            Err(error) => Err(Unsettled::Api(error)),
        };
        match up {
            Ok(()) => {
                self.has_come_up(session, record).await?;
                self.observe(session).await
            }
            Err(unsettled) => {
                if !matches!(unsettled, Unsettled::Gone(_)) {
                    self.take_back(session).await;
                }
                Err(unsettled.into_error(&session.session))
            }
        }
    }

    /// The Deployment of this generation: the one that is there, or a new one.
    async fn obtain(&self, plan: &Plan, session: &SessionRef) -> Result<Found, RuntimeError> {
        for _ in 0..TRIES {
            match self.look(&session.session).await? {
                Some(found) if found.record.generation > session.generation => {
                    return found.is_meant_by(session).map(|()| found);
                }
                Some(found)
                    if found.record.generation == session.generation
                        && !found.record.going
                        && found.record.phase != Phase::Stopping =>
                {
                    return Ok(found);
                }
                // An older generation, or one whose removal was begun: none of it may be there when the next begins.
                Some(_) => self.remove(session, Stop::within(REPLACE_GRACE)).await?,
                None => {
                    Box::pin(self.await_gone(session, REPLACE_GRACE)).await?;
                    if let Some(record) = Box::pin(self.create(plan, session)).await? {
                        return Ok(Found {
                            record,
                            pods: Vec::new(),
                        });
                    }
                }
            }
        }
        Err(RuntimeError::StartFailed {
            session: session.session.clone(),
            reason: format!("others started and stopped it {TRIES} times in a row"),
        })
    }

    /// Creates the Deployment; nothing if another replica was faster. An apply would overwrite what that one
    /// made: a creation is fenced by its unique name, and only a create is a creation.
    async fn create(&self, plan: &Plan, session: &SessionRef) -> Result<Option<Record>, RuntimeError> {
        match answer(self.space.deployments().create(&creating(), &plan.deployment)).await {
            Ok(created) => {
                tracing::info!(session = %session.session, generation = session.generation, deployment = plan.name, "created");
                // A newer leader that took over just before has not seen it, and nobody would look for it.
                if let Err(error) = self.admit(session.token).await {
                    self.take_back(session).await;
                    return Err(error);
                }
                read(&created).map(Some)
            }
            Err(error) if error.is_already_exists() || error.is_conflict() => Ok(None),
            Err(error) => Err(refused::<Deployment>(error, &plan.name, session)),
        }
    }

    /// Creates the claim and the Service where they are missing, and has this token on all three.
    async fn complete(&self, plan: &Plan, record: &Record, session: &SessionRef) -> Result<(), RuntimeError> {
        let deployments = self.space.deployments();
        let adopted = change::change(
            &deployments,
            &record.name,
            session.token,
            |deployment: &Deployment| Ok(raised(deployment, session.token)),
        );
        adopted.await?;
        let (name, claim) = plan.claim(record);
        self.ensure(&self.space.claims(), name, &claim, session).await?;
        if let Some(service) = plan.service(record) {
            self.ensure(&self.space.services(), &record.name, &service, session)
                .await?;
        }
        Ok(())
    }

    /// Creates an object that is missing; an apply would overwrite what a newer leader made meanwhile. One that is
    /// there stays as it is, but for the token and who uses it: a claim cannot be changed, and its size may be
    /// configured anew since.
    async fn ensure<K: Object + Serialize>(
        &self,
        api: &Api<K>,
        name: &str,
        object: &Value,
        session: &SessionRef,
    ) -> Result<(), RuntimeError> {
        let mut waiting = self.waiting_for(&session.session);
        let deadline = Instant::now() + self.options.start_within;
        loop {
            let there = change::change(api, name, session.token, |found: &K| {
                // Written each time, so that whoever deletes a home at the version that it read before does not.
                let user = format!("{}.{}", session.session, session.generation);
                let used = found.annotations().get(annotation::USED_BY) == Some(&user);
                let patch = json!({ "metadata": { "annotations": { annotation::USED_BY: user } } });
                Ok(if used {
                    raised(found, session.token)
                } else {
                    Some(patch)
                })
            });
            match there.await? {
                Some(found) if found.meta().deletion_timestamp.is_none() => return Ok(()),
                Some(_) if Instant::now() >= deadline => {
                    return Err(RuntimeError::StartFailed {
                        session: session.session.clone(),
                        reason: format!("{} of an earlier session does not go away", named::<K>(name)),
                    });
                }
                Some(_) => waiting.a_while().await,
                None => {
                    let wanted: K =
                        serde_json::from_value(object.clone()).map_err(|error| RuntimeError::BadSpec {
                            session: session.session.clone(),
                            reason: format!("cannot make {}: {error}", named::<K>(name)),
                        })?;
                    match answer(api.create(&creating(), &wanted)).await {
                        Ok(_) => return Ok(()),
                        // Somebody was faster, or a quota was being counted: look again.
                        Err(error) if error.is_already_exists() || error.is_conflict() => {
                            if Instant::now() >= deadline {
                                return Err(refused::<K>(error, name, session));
                            }
                            waiting.a_while().await;
                        }
                        Err(error) => return Err(refused::<K>(error, name, session)),
                    }
                }
            }
        }
    }

    /// From here on it is a session that runs, and no start or wake takes it back.
    pub(crate) async fn has_come_up(
        &self,
        session: &SessionRef,
        record: &Record,
    ) -> Result<(), RuntimeError> {
        let deployments = self.space.deployments();
        let marked = change::change(
            &deployments,
            &record.name,
            session.token,
            |deployment: &Deployment| {
                let now = read(deployment)?;
                let ours = now.uid == record.uid && !now.going;
                let up = matches!(now.phase, Phase::Starting | Phase::Waking);
                Ok((ours && up).then(|| Phase::Started.patch()))
            },
        );
        marked.await.map(|_| ())
    }

    /// The same for a session whose start or wake was cut off, if its container runs.
    pub(crate) async fn record_up(&self, session: &SessionRef) -> Result<(), RuntimeError> {
        let found = self.look(&session.session).await?;
        let found = found.filter(|found| found.record.generation == session.generation);
        match found.as_ref().map(|found| (&found.record, found.condition())) {
            Some((record, Some(Condition::Ready | Condition::NotReady))) => {
                self.has_come_up(session, record).await
            }
            Some((_, Some(Condition::Ended(_) | Condition::Coming | Condition::Stuck { .. }) | None))
            | None => Ok(()),
        }
    }

    /// The session as it is now, after an action on it.
    pub(crate) async fn observe(&self, session: &SessionRef) -> Result<Observed, RuntimeError> {
        let found = self.look(&session.session).await?;
        let found = found.filter(|found| !found.record.going);
        let found = found.ok_or_else(|| RuntimeError::NotFound {
            session: session.session.clone(),
        })?;
        found.is_meant_by(session)?;
        Ok(found.observed(&self.space.namespace))
    }

    async fn take_back(&self, session: &SessionRef) {
        if let Err(error) = self.remove(session, Stop::within(Duration::ZERO)).await {
            tracing::error!(session = %session.session, %error, "a failed start left something");
        }
    }
}

/// Of what is not there yet.
fn creating() -> PostParams {
    PostParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PostParams::default()
    }
}

/// The patch that has a token on an object, if it is not there yet.
fn raised<K: Resource>(object: &K, token: Token) -> Option<Value> {
    (token_of(object.meta().annotations.as_ref()) < token).then(|| json!({}))
}

/// What the server's refusal of an object means for a start.
fn refused<K: Object>(error: ApiError, name: &str, session: &SessionRef) -> RuntimeError {
    if error.is_invalid() {
        return RuntimeError::BadSpec {
            session: session.session.clone(),
            reason: error.to_string(),
        };
    }
    error.at(format!("cannot create {}", named::<K>(name)))
}
