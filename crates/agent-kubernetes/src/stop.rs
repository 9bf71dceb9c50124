//! Stop: delete what belongs to a session, and wait until it is gone.
//!
//! The phase `stopping` is written first, so that no watch takes the deletion for somebody else's, and so that a
//! start which finds a removal half done finishes it. A home goes before the Deployment that names it: a stop that
//! is cut off finds what is left when it comes again. The claim itself stays until no pod uses it.

use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Service};
use kube::api::DeleteParams;
use kube::{Resource, ResourceExt};
use regent_agent::runtime::{RuntimeError, SessionRef, Stop};
use tokio::time::Instant;

use crate::api::{self, answer, named};
use crate::change::{self, TRIES};
use crate::engine::{Engine, Waiting, read};
use crate::names::{Scope, label};
use crate::pods;
use crate::record::Phase;
use crate::template::TERMINATION_GRACE_SECONDS;

/// How long Kubernetes may take to delete what it was told to, beyond the grace of containers.
const GONE_WITHIN: Duration = Duration::from_secs(40);

/// The shortest grace of a pod: one of zero forgets the pod while its container may still run.
pub(crate) const SHORTEST_GRACE: Duration = Duration::from_secs(1);

impl Engine {
    pub(crate) async fn stop(&self, session: &SessionRef, how: Stop) -> Result<(), RuntimeError> {
        self.admit(session.token).await?;
        self.remove(session, how).await?;
        self.forgets(&session.session);
        Ok(())
    }

    /// Removes a session of this generation or an older one.
    pub(crate) async fn remove(&self, session: &SessionRef, how: Stop) -> Result<(), RuntimeError> {
        let scope = self.scope()?;
        let name = scope.object(&session.session);
        let deployments = self.space.deployments();
        let stopping = change::change(&deployments, &name, session.token, |deployment: &Deployment| {
            let record = read(deployment)?;
            if record.generation > session.generation {
                return Err(RuntimeError::StaleGeneration {
                    session: session.session.clone(),
                    have: record.generation,
                    asked: session.generation,
                });
            }
            let marked = record.phase == Phase::Stopping && record.replicas == 0;
            Ok((!marked).then(|| Phase::Stopping.patch()))
        });
        let mut home = None;
        if let Some(deployment) = stopping.await? {
            home = read(&deployment)?.home.filter(|_| how.delete_home);
            if let Some(claim) = &home
                && !self.delete_home(scope, session, claim).await?
            {
                home = None;
            }
            let uid = deployment.uid();
            let foreground = DeleteParams::foreground();
            change::delete(&deployments, &name, session.token, &foreground, |found| {
                Ok(found.uid() == uid && found.metadata.deletion_timestamp.is_none())
            })
            .await?;
        }
        Box::pin(self.await_gone(session, how.grace)).await?;
        if let Some(home) = home {
            self.await_no_home(session, &home).await?;
        }
        Ok(())
    }

    /// Deletes a persistent home, unless another session has it. Gives whether it goes.
    async fn delete_home(
        &self,
        scope: &Scope,
        session: &SessionRef,
        home: &str,
    ) -> Result<bool, RuntimeError> {
        let selector = format!("{},{}={home}", scope.selector(), label::HOME);
        let claims = self.space.claims();
        for _ in 0..TRIES {
            // Read before the users are listed: a session that begins to use it meanwhile writes to it.
            let Some(before) = api::get(&claims, home).await? else {
                return Ok(false);
            };
            let users = api::list(&self.space.deployments(), &selector).await?;
            if users.iter().any(|other: &Deployment| {
                other.labels().get(label::SESSION).map(String::as_str) != Some(session.session.as_str())
            }) {
                tracing::info!(session = %session.session, home, "its home stays: another session has it too");
                return Ok(false);
            }
            let (how, mut same) = (DeleteParams::default(), true);
            let there = change::delete(
                &claims,
                home,
                session.token,
                &how,
                |claim: &PersistentVolumeClaim| {
                    same = claim.resource_version() == before.resource_version();
                    Ok(same && claim.metadata.deletion_timestamp.is_none())
                },
            );
            let there = there.await?;
            if same {
                return Ok(there);
            }
        }
        Err(RuntimeError::StopIncomplete {
            session: session.session.clone(),
            left: format!("its home {home}, which others keep using"),
        })
    }

    /// Waits until the claim of a home is gone, whose last pod is.
    async fn await_no_home(&self, session: &SessionRef, home: &str) -> Result<(), RuntimeError> {
        let deadline = deadline(Duration::ZERO);
        let mut waiting = self.waiting_for(&session.session);
        loop {
            let claim = api::get(&self.space.claims(), home).await?;
            // Made anew by the next session of its user.
            let claim = claim.filter(|claim| claim.metadata.deletion_timestamp.is_some());
            if claim.is_none() {
                return Ok(());
            }
            let left = names(&claim).collect();
            self.in_time(session, left, deadline, &mut waiting).await?;
        }
    }

    /// Waits until nothing of a session is left. What nobody deletes any more, since its owner is gone already, is
    /// deleted here.
    pub(crate) async fn await_gone(&self, session: &SessionRef, grace: Duration) -> Result<(), RuntimeError> {
        let scope = self.scope()?;
        let selector = scope.session_selector(&session.session);
        let deadline = deadline(grace);
        let mut waiting = self.waiting_for(&session.session);
        loop {
            // The owner first: what is owned and seen after it is gone has no owner.
            let owner = api::get(&self.space.deployments(), &scope.object(&session.session)).await?;
            if owner
                .as_ref()
                .is_some_and(|owner| owner.metadata.deletion_timestamp.is_none())
            {
                return Err(RuntimeError::StopIncomplete {
                    session: session.session.clone(),
                    left: "it was started again meanwhile".to_owned(),
                });
            }
            let (pods, services, claims) = tokio::try_join!(
                async { api::list::<Pod>(&self.space.pods(), &selector).await },
                async { api::list::<Service>(&self.space.services(), &selector).await },
                async { api::list::<PersistentVolumeClaim>(&self.space.claims(), &selector).await },
            )?;
            if owner.is_none() {
                let how = DeleteParams::default();
                for name in abandoned(&services) {
                    change::delete(&self.space.services(), &name, session.token, &how, |_| Ok(true)).await?;
                }
                for name in abandoned(&claims) {
                    change::delete(&self.space.claims(), &name, session.token, &how, |_| Ok(true)).await?;
                }
            }
            // Not those of a newer generation, whose Deployment may be a moment old.
            let older: Vec<Pod> = pods
                .iter()
                .filter(|pod| pods::generation(pod).is_none_or(|generation| generation <= session.generation))
                .cloned()
                .collect();
            self.hurry(&older, grace, owner.is_none()).await?;
            let left: Vec<String> = names(&owner)
                .chain(names(&pods))
                .chain(names(&services))
                .chain(names(&claims))
                .collect();
            self.in_time(session, left, deadline, &mut waiting).await?;
            if owner.is_none() && pods.is_empty() && services.is_empty() && claims.is_empty() {
                return Ok(());
            }
        }
    }

    /// Waits until nothing of a session that was scaled to zero runs. A pod whose container has ended begins no other
    /// on its way out; how long its node takes to forget it is nobody's business.
    pub(crate) async fn await_rest(&self, session: &SessionRef, grace: Duration) -> Result<(), RuntimeError> {
        let selector = self.scope()?.session_selector(&session.session);
        let deadline = deadline(grace);
        let mut waiting = self.waiting_for(&session.session);
        loop {
            let pods: Vec<Pod> = api::list(&self.space.pods(), &selector).await?;
            let running =
                |pod: &Pod| pods::generation(pod) == Some(session.generation) && !pods::is_at_rest(pod);
            let pods: Vec<Pod> = pods.into_iter().filter(running).collect();
            if pods.is_empty() {
                return Ok(());
            }
            self.hurry(&pods, grace, false).await?;
            self.in_time(session, names(&pods).collect(), deadline, &mut waiting)
                .await?;
        }
    }

    /// Waits a while if anything is left, or gives up and says what.
    async fn in_time(
        &self,
        session: &SessionRef,
        left: Vec<String>,
        deadline: Instant,
        waiting: &mut Waiting,
    ) -> Result<(), RuntimeError> {
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(RuntimeError::StopIncomplete {
                session: session.session.clone(),
                left: left.join(", "),
            });
        }
        waiting.a_while().await;
        Ok(())
    }

    /// Shortens the grace of pods that are on their way out. One that is not would be made again, unless nobody is
    /// there to do so.
    async fn hurry(&self, pods: &[Pod], grace: Duration, ownerless: bool) -> Result<(), RuntimeError> {
        let grace = i64::try_from(grace.max(SHORTEST_GRACE).as_secs()).unwrap_or(i64::MAX);
        for pod in pods {
            let (going, left) = (
                pod.metadata.deletion_timestamp.is_some(),
                pod.metadata.deletion_grace_period_seconds,
            );
            if !(if going { left > Some(grace) } else { ownerless }) {
                continue;
            }
            let how = DeleteParams::default().grace_period(u32::try_from(grace).unwrap_or(u32::MAX));
            let how = match pod.uid() {
                Some(uid) => how.preconditions(kube::api::Preconditions {
                    uid: Some(uid),
                    resource_version: None,
                }),
                None => how,
            };
            match answer(self.space.pods().delete(&pod.name_any(), &how)).await {
                Ok(_) => {}
                // Gone, or another pod of that name.
                Err(error) if error.is_not_found() || error.is_conflict() => {}
                Err(error) => {
                    return Err(error.at(format!("cannot delete {}", named::<Pod>(&pod.name_any()))));
                }
            }
        }
        Ok(())
    }
}

/// When waiting is over. A kubelet before 1.22 does not hear of a grace that is shortened.
fn deadline(grace: Duration) -> Instant {
    let termination = Duration::from_secs(TERMINATION_GRACE_SECONDS.into());
    Instant::now() + grace.max(termination) + GONE_WITHIN
}

/// The names of objects that nobody deletes.
fn abandoned<K: Resource<DynamicType = ()>>(objects: &[K]) -> Vec<String> {
    let there = objects
        .iter()
        .filter(|object| object.meta().deletion_timestamp.is_none());
    there.map(ResourceExt::name_any).collect()
}

/// What objects are called, for a person.
fn names<'a, K: Resource<DynamicType = ()> + 'a>(
    objects: impl IntoIterator<Item = &'a K> + 'a,
) -> impl Iterator<Item = String> + 'a {
    objects.into_iter().map(|object| named::<K>(&object.name_any()))
}
