//! Hibernate and wake: no pod and one. A pod cannot be frozen, so its program ends and begins again; its home
//! stays.

use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use regent_agent::runtime::{Observed, ObservedState, RuntimeError, SessionRef};
use tokio::time::Instant;

use crate::change;
use crate::engine::{Engine, read};
use crate::found::Found;
use crate::record::{Phase, Record};
use crate::settle::Unsettled;

/// The grace of a session that is put to sleep.
const HIBERNATE_GRACE: Duration = Duration::from_secs(10);

impl Engine {
    pub(crate) async fn hibernate(&self, session: &SessionRef) -> Result<Observed, RuntimeError> {
        self.admit(session.token).await?;
        let found = self.existing(session, "hibernate").await?;
        self.enter(session, &found.record, &Phase::Hibernated).await?;
        self.await_rest(session, HIBERNATE_GRACE).await?;
        self.observe(session).await
    }

    pub(crate) async fn wake(&self, session: &SessionRef) -> Result<Observed, RuntimeError> {
        self.admit(session.token).await?;
        let deadline = Instant::now() + self.options.start_within;
        let found = self.existing(session, "wake").await?;
        let asleep = found.state() == ObservedState::Hibernated;
        match found.record.phase {
            Phase::Started if !asleep => return Ok(found.observed(&self.space.namespace)),
            Phase::Hibernated
            | Phase::Starting
            | Phase::Started
            | Phase::Waking
            | Phase::Ended(_)
            | Phase::Stopping => {}
        }
        self.begins(&session.session, session.generation);
        if asleep {
            // A hibernate that was cut off may have left the old pod on its way out, with the same home.
            self.await_rest(session, HIBERNATE_GRACE).await?;
            self.enter(session, &found.record, &Phase::Waking).await?;
        }
        self.await_wake(session, &found.record, deadline).await
    }

    /// Waits until a session that was woken is up. One that cannot come up goes back to sleep.
    pub(crate) async fn await_wake(
        &self,
        session: &SessionRef,
        record: &Record,
        deadline: Instant,
    ) -> Result<Observed, RuntimeError> {
        match self.settle(session, record, deadline).await {
            Ok(()) => {
                self.has_come_up(session, record).await?;
                self.observe(session).await
            }
            Err(unsettled) => {
                if !matches!(unsettled, Unsettled::Gone(_))
                    && let Err(error) = self.enter(session, record, &Phase::Hibernated).await
                {
                    tracing::error!(session = %session.session, %error, "a failed wake left something");
                }
                Err(unsettled.into_error(&session.session))
            }
        }
    }

    /// The session, if the action fits what it does.
    async fn existing(&self, session: &SessionRef, action: &'static str) -> Result<Found, RuntimeError> {
        let found = self.look(&session.session).await?;
        let found = found.filter(|found| !found.record.going);
        let found = found.ok_or_else(|| RuntimeError::NotFound {
            session: session.session.clone(),
        })?;
        found.is_meant_by(session)?;
        let state = match (&found.record.phase, found.state()) {
            (Phase::Stopping, _) => "is being stopped".to_owned(),
            (_, ObservedState::Exited(exit)) => exit.to_string(),
            (_, ObservedState::Running | ObservedState::Hibernated) => return Ok(found),
        };
        Err(RuntimeError::WrongState {
            session: session.session.clone(),
            action,
            state,
        })
    }

    /// Puts a session into a phase. One that ended or is being stopped meanwhile stays so.
    async fn enter(&self, session: &SessionRef, record: &Record, phase: &Phase) -> Result<(), RuntimeError> {
        let deployments = self.space.deployments();
        let entered = change::change(
            &deployments,
            &record.name,
            session.token,
            |deployment: &Deployment| {
                let now = read(deployment)?;
                let over = now.uid != record.uid
                    || now.going
                    || matches!(now.phase, Phase::Ended(_) | Phase::Stopping);
                let there = now.phase == *phase && now.replicas == phase.replicas();
                Ok((!over && !there).then(|| phase.patch()))
            },
        );
        entered.await.map(|_| ())
    }
}
