//! What all actions share: whose sessions these are, the look at one and at all, takeovers, and the end of a
//! session put on record.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::stream::{self, StreamExt, TryStreamExt};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::Api;
use regent_agent::runtime::{Generation, Observed, RuntimeError, RuntimeEvent};
use regent_types::{SessionName, Token};
use serde_json::json;
use tokio::sync::broadcast;

use crate::KubernetesOptions;
use crate::api::{self, Space};
use crate::change::{self, Object, TRIES};
use crate::fence::Fence;
use crate::found::Found;
use crate::names::{Scope, label};
use crate::objects::token_of;
use crate::pods::Condition;
use crate::record::{Phase, Record};

/// Events that a slow reader may fall behind before it is told to look for itself.
const EVENT_BUFFER: usize = 1024;
/// Changes that a waiting action may fall behind; it looks for itself then.
const TOUCH_BUFFER: usize = 256;
/// How often an action that waits looks again without a change: changes may be missed, and not all are watched.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// Objects that a takeover writes to at a time.
const ADOPTED_AT_A_TIME: usize = 8;

#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) options: KubernetesOptions,
    pub(crate) space: Space,
    fence: Fence,
    scope: OnceLock<Scope>,
    /// The highest token that this object acted under, zero before the first: then it only looks.
    acted_under: AtomicU64,
    /// What was started or woken here, for the watch: its end is news even if it is over before the first look.
    begun: Mutex<BTreeMap<SessionName, Generation>>,
    pub(crate) events: broadcast::Sender<RuntimeEvent>,
    touched: broadcast::Sender<SessionName>,
}

impl Engine {
    pub(crate) fn new(options: KubernetesOptions, space: Space, fence: Fence) -> Self {
        Self {
            options,
            space,
            fence,
            scope: OnceLock::new(),
            acted_under: AtomicU64::new(0),
            begun: Mutex::default(),
            events: broadcast::channel(EVENT_BUFFER).0,
            touched: broadcast::channel(TOUCH_BUFFER).0,
        }
    }

    /// Sets whose sessions these are. Gives whether that was news.
    pub(crate) fn set_scope(&self, scope: Scope) -> bool {
        self.scope.set(scope).is_ok()
    }

    pub(crate) fn scope(&self) -> Result<&Scope, RuntimeError> {
        self.scope.get().ok_or_else(|| RuntimeError::Engine {
            what: "the agent does not know its cluster yet".to_owned(),
            retryable: true,
            source: "nothing may be started before it does".into(),
        })
    }

    /// Lets an action under this token go on, or refuses it.
    pub(crate) async fn admit(&self, token: Token) -> Result<&Scope, RuntimeError> {
        let scope = self.scope()?;
        self.fence.admit(scope, token).await?;
        self.acted_under.fetch_max(token.0, Ordering::Relaxed);
        Ok(scope)
    }

    /// The token under which the watch may write.
    pub(crate) fn acts_under(&self) -> Option<Token> {
        Some(Token(self.acted_under.load(Ordering::Relaxed))).filter(|token| token.0 > 0)
    }

    pub(crate) fn begins(&self, session: &SessionName, generation: Generation) {
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        begun.insert(session.clone(), generation);
    }

    pub(crate) fn has_begun(&self, session: &SessionName, generation: Generation) -> bool {
        let begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        begun.get(session) == Some(&generation)
    }

    pub(crate) fn forgets(&self, session: &SessionName) {
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        begun.remove(session);
    }

    /// Wakes actions that wait for a session.
    pub(crate) fn touch(&self, session: &SessionName) {
        // Nobody waits most of the time.
        let _ = self.touched.send(session.clone());
    }

    pub(crate) fn waiting_for(&self, session: &SessionName) -> Waiting {
        Waiting {
            session: session.clone(),
            touched: self.touched.subscribe(),
        }
    }

    pub(crate) fn tell(&self, event: RuntimeEvent) {
        // Nobody listening is fine: a list tells the same.
        let _ = self.events.send(event);
    }

    /// What there is of a session. The Deployment is read before the pods: what is decided by both and done at
    /// that version of the Deployment was decided by pods of its phase.
    pub(crate) async fn look(&self, session: &SessionName) -> Result<Option<Found>, RuntimeError> {
        let scope = self.scope()?;
        let name = scope.object(session);
        let Some(deployment) = api::get(&self.space.deployments(), &name).await? else {
            return Ok(None);
        };
        let record = read(&deployment)?;
        let pods = api::list(&self.space.pods(), &scope.session_selector(session)).await?;
        Ok(Some(Found { record, pods }))
    }

    /// All sessions, by name.
    pub(crate) async fn list(&self) -> Result<Vec<Observed>, RuntimeError> {
        let Some(scope) = self.scope.get() else {
            return Ok(Vec::new());
        };
        let deployments = api::list(&self.space.deployments(), &scope.selector()).await?;
        let pods = api::list(&self.space.pods(), &scope.selector()).await?;
        let mut of_session: BTreeMap<String, Vec<Pod>> = BTreeMap::new();
        for pod in pods {
            if let Some(session) = pod.labels().get(label::SESSION) {
                of_session.entry(session.clone()).or_default().push(pod);
            }
        }
        let within = u64::try_from(self.options.start_within.as_millis()).unwrap_or(u64::MAX);
        let now = now_ms();
        let mut sessions: Vec<Observed> = deployments
            .iter()
            .filter_map(|deployment| {
                Record::read(deployment)
                    .inspect_err(|reason| unreadable(deployment, reason))
                    .ok()
            })
            .map(|record| Found {
                pods: of_session.remove(record.session.as_str()).unwrap_or_default(),
                record,
            })
            .filter(|found| found.is_told(now, within))
            .map(|found| found.observed(&self.space.namespace))
            .collect();
        sessions.sort_by(|a, b| a.session.cmp(&b.session));
        Ok(sessions)
    }

    /// Raises the fence, then writes the token to all that is there: what a former leader has read before is another
    /// version from then on.
    pub(crate) async fn take_over(&self, token: Token) -> Result<(), RuntimeError> {
        let selector = self.admit(token).await?.selector();
        tokio::try_join!(
            adopt(self.space.deployments(), &selector, token),
            adopt(self.space.services(), &selector, token),
            adopt(self.space.claims(), &selector, token),
        )?;
        Ok(())
    }

    /// Puts the end of a session on record, if it has ended by itself, and scales it to zero: else Kubernetes
    /// would run its program again. Decides by a look of its own, and gives whether an end is on record now.
    pub(crate) async fn record_end(
        &self,
        session: &SessionName,
        generation: Generation,
        token: Token,
    ) -> Result<bool, RuntimeError> {
        for _ in 0..TRIES {
            let Some(found) = self.look(session).await? else {
                return Ok(false);
            };
            let phase = match (&found.record.phase, found.condition()) {
                _ if found.record.generation != generation || found.record.going => return Ok(false),
                (Phase::Ended(_), _) => return Ok(true),
                (Phase::Starting | Phase::Started | Phase::Waking, Some(Condition::Ended(ended))) => {
                    Phase::Ended(ended)
                }
                (
                    Phase::Starting | Phase::Started | Phase::Waking | Phase::Hibernated | Phase::Stopping,
                    _,
                ) => {
                    return Ok(false);
                }
            };
            let version = &found.record.version;
            let mut written = false;
            change::change(
                &self.space.deployments(),
                &found.record.name,
                token,
                |deployment: &Deployment| {
                    written = deployment.metadata.resource_version.as_ref() == Some(version);
                    Ok(written.then(|| phase.patch()))
                },
            )
            .await?;
            if written {
                return Ok(true);
            }
        }
        Err(RuntimeError::Engine {
            what: format!("cannot put the end of session {session} on record"),
            retryable: true,
            source: format!("it was changed by others {TRIES} times in a row").into(),
        })
    }
}

/// An action that waits for something to change about a session.
pub(crate) struct Waiting {
    session: SessionName,
    touched: broadcast::Receiver<SessionName>,
}

impl Waiting {
    /// Returns when the session has changed, or when it is time to look in any case.
    pub(crate) async fn a_while(&mut self) {
        let changed = async {
            loop {
                match self.touched.recv().await {
                    Ok(session) if session != self.session => {}
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => return,
                    Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
                }
            }
        };
        // Either is a reason to look.
        let _ = tokio::time::timeout(LOOK_AGAIN, changed).await;
    }
}

/// Reads a Deployment of ours; somebody may have meddled with it.
pub(crate) fn read(deployment: &Deployment) -> Result<Record, RuntimeError> {
    Record::read(deployment).map_err(|reason| RuntimeError::Engine {
        what: format!("the Deployment {} is damaged", deployment.name_any()),
        retryable: false,
        source: reason.into(),
    })
}

/// Says that a Deployment is passed over.
pub(crate) fn unreadable(deployment: &Deployment, reason: &str) {
    tracing::error!(
        deployment = deployment.name_any(),
        reason,
        "a Deployment with this agent's labels cannot be read and is passed over"
    );
}

async fn adopt<K: Object>(api: Api<K>, selector: &str, token: Token) -> Result<(), RuntimeError> {
    let objects = api::list(&api, selector).await?;
    stream::iter(objects)
        .map(|object| {
            let api = &api;
            async move {
                let older = |object: &K| token_of(object.meta().annotations.as_ref()) < token;
                change::change(api, &object.name_any(), token, |object| {
                    Ok(older(object).then(|| json!({})))
                })
                .await
            }
        })
        .buffer_unordered(ADOPTED_AT_A_TIME)
        .try_for_each(|_| async { Ok(()) })
        .await
}

fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
