//! What the engine has of ours, and the calls that make, start, end and remove it.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use bollard::models::{
    ContainerConfig, ContainerInspectResponse, ContainerState, ContainerStateStatusEnum, ContainerSummary,
    ContainerSummaryStateEnum, HealthStatusEnum, NetworkCreateRequest, Volume, VolumeCreateRequest,
};
use bollard::query_parameters::{
    ListContainersOptionsBuilder, ListNetworksOptionsBuilder, ListVolumesOptionsBuilder,
    RemoveContainerOptionsBuilder, RemoveVolumeOptions, StopContainerOptionsBuilder,
};
use futures::{StreamExt as _, TryStreamExt as _};
use regent_agent::runtime::{Exit, RuntimeError, SessionRef};
use regent_types::{SessionName, Token};
use tokio::io::AsyncReadExt as _;
use tokio::time::Instant;

use crate::engine::Engine;
use crate::error::{engine, is_conflict, is_missing, is_unchanged, status, words};
use crate::names::{self, Identity, Purpose, Scope};

/// A container that somebody else removes is gone within this time.
const GONE_WITHIN: Duration = Duration::from_secs(10);
/// How long one container may take to be looked at when all are.
const LOOK_WITHIN: Duration = Duration::from_secs(2);
/// How long an action waits for an engine that is away: it may be restarting.
const BACK_WITHIN: Duration = Duration::from_secs(45);
/// How often it is asked for.
const BACK_INTERVAL: Duration = Duration::from_millis(500);
/// How long the image's own health check may take to be content where no port says it.
pub(crate) const HEALTHY_WITHIN: Duration = Duration::from_secs(10);
/// So many containers are looked at side by side.
pub(crate) const LOOKS: usize = 16;

/// How often a port or a health check is tried while a session gets ready.
pub(crate) const READY_INTERVAL: Duration = Duration::from_millis(50);

/// Two networks of one name are there no longer than this.
pub(crate) const UNAMBIGUOUS_WITHIN: Duration = Duration::from_secs(5);

/// A port whose connection stands this long has somebody behind it: the engine's proxy closes it at once otherwise.
pub(crate) const ANSWERS_WITHIN: Duration = Duration::from_millis(200);

/// A volume that is in use stays.
pub(crate) const NO_FORCE: Option<RemoveVolumeOptions> = None;

/// A container of ours, and what it says of itself.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) id: String,
    pub(crate) identity: Identity,
    pub(crate) inspected: ContainerInspectResponse,
    /// Whether this very run was ended to sleep.
    asleep: bool,
}

/// What of a container's state matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Made, and never started: a start that was cut off, or is under way.
    Made,
    Running,
    Paused,
    Asleep,
    Removing,
    Ended(Exit),
}

impl Found {
    pub(crate) fn status(&self) -> Option<ContainerStateStatusEnum> {
        self.inspected.state.as_ref()?.status
    }

    pub(crate) fn phase(&self) -> Phase {
        let state = self.inspected.state.clone().unwrap_or_default();
        match self.status() {
            Some(ContainerStateStatusEnum::CREATED) => Phase::Made,
            Some(ContainerStateStatusEnum::RUNNING | ContainerStateStatusEnum::RESTARTING) => Phase::Running,
            Some(ContainerStateStatusEnum::PAUSED) => Phase::Paused,
            Some(ContainerStateStatusEnum::REMOVING | ContainerStateStatusEnum::DEAD) => Phase::Removing,
            _ if self.asleep => Phase::Asleep,
            _ => Phase::Ended(exit_of(&state)),
        }
    }

    pub(crate) fn started_at(&self) -> &str {
        let state = self.inspected.state.as_ref();
        state
            .and_then(|state| state.started_at.as_deref())
            .unwrap_or_default()
    }

    /// Which run of which container.
    pub(crate) fn run(&self) -> (String, String) {
        (self.id.clone(), self.started_at().to_owned())
    }

    pub(crate) fn session_ref(&self, token: Token) -> SessionRef {
        SessionRef {
            session: self.identity.session.clone(),
            generation: self.identity.generation,
            token,
        }
    }
}

fn exit_of(state: &bollard::models::ContainerState) -> Exit {
    let code = state.exit_code.unwrap_or_default();
    match i32::try_from(code) {
        Ok(code) if code != 0 && state.oom_killed == Some(true) => {
            tracing::debug!(code, "killed for memory");
            Exit::OutOfMemory
        }
        // The engine adds 128 to a signal's number.
        Ok(code @ 129..=192) => Exit::Signal(code - 128),
        Ok(code) => Exit::Code(code),
        Err(_) => Exit::Unknown,
    }
}

impl Engine {
    /// All containers of a session, whatever they do.
    pub(crate) async fn of_session(
        &self,
        scope: &Scope,
        session: &SessionName,
    ) -> Result<Vec<Found>, RuntimeError> {
        self.all(scope, Some(session)).await
    }

    pub(crate) async fn all(
        &self,
        scope: &Scope,
        session: Option<&SessionName>,
    ) -> Result<Vec<Found>, RuntimeError> {
        let filter = scope.filter(session);
        let options = ListContainersOptionsBuilder::new()
            .all(true)
            .filters(&filter)
            .build();
        let listed: Vec<ContainerSummary> = self
            .docker
            .list_containers(Some(options))
            .await
            .map_err(engine("the engine's containers cannot be listed"))?;
        let marks: BTreeSet<String> = self
            .volumes(scope, session, Purpose::Asleep)
            .await?
            .into_iter()
            .map(|volume| volume.name)
            .collect();
        futures::stream::iter(listed)
            .map(|summary| self.look_or_glance(scope, summary, &marks))
            .buffer_unordered(LOOKS)
            .try_filter_map(|found| std::future::ready(Ok(found)))
            .try_collect()
            .await
    }

    /// One listed container. The engine may be stuck over a single one; what it says of that one in the list will do,
    /// if it runs, so that all others are seen.
    async fn look_or_glance(
        &self,
        scope: &Scope,
        summary: ContainerSummary,
        marks: &BTreeSet<String>,
    ) -> Result<Option<Found>, RuntimeError> {
        let id = summary.id.clone().unwrap_or_default();
        let looked = tokio::time::timeout(LOOK_WITHIN, self.look(scope, id.clone(), marks)).await;
        let why = match looked {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(error)) => error,
            Err(late) => RuntimeError::Engine {
                what: format!("container {id} cannot be looked at"),
                retryable: true,
                source: Box::new(late),
            },
        };
        let status = match summary.state {
            Some(ContainerSummaryStateEnum::RUNNING) => ContainerStateStatusEnum::RUNNING,
            Some(ContainerSummaryStateEnum::PAUSED) => ContainerStateStatusEnum::PAUSED,
            // How it ended, or whether it sleeps, is only to be seen by looking.
            _ => return Err(why),
        };
        tracing::warn!(container = id, error = %why, "the engine is stuck over a container");
        let labels = summary.labels.unwrap_or_default();
        Ok(names::identity(&labels).map(|identity| Found {
            id,
            identity,
            inspected: ContainerInspectResponse {
                name: summary.names.and_then(|names| names.into_iter().next()),
                config: Some(ContainerConfig {
                    labels: Some(labels),
                    ..ContainerConfig::default()
                }),
                state: Some(ContainerState {
                    status: Some(status),
                    ..ContainerState::default()
                }),
                ..ContainerInspectResponse::default()
            },
            asleep: false,
        }))
    }

    /// One container by id; none if it is gone, or not ours.
    pub(crate) async fn inspect(&self, scope: &Scope, id: &str) -> Result<Option<Found>, RuntimeError> {
        let Some(found) = self.look(scope, id.to_owned(), &BTreeSet::new()).await? else {
            return Ok(None);
        };
        let marks = self
            .volumes(scope, Some(&found.identity.session), Purpose::Asleep)
            .await?;
        let asleep = marks.iter().any(|mark| mark.name == mark_of(scope, &found));
        Ok(Some(Found { asleep, ..found }))
    }

    pub(crate) async fn look(
        &self,
        scope: &Scope,
        id: String,
        marks: &BTreeSet<String>,
    ) -> Result<Option<Found>, RuntimeError> {
        let inspected = match self.docker.inspect_container(&id, None).await {
            Ok(inspected) => inspected,
            Err(error) if is_missing(&error) => return Ok(None),
            Err(error) => return Err(engine(format!("container {id} cannot be looked at"))(error)),
        };
        let labels = inspected
            .config
            .as_ref()
            .and_then(|config| config.labels.clone())
            .unwrap_or_default();
        let ours = labels.get(names::CLUSTER).map(String::as_str) == Some(scope.cluster.as_str());
        let Some(identity) = names::identity(&labels).filter(|_| ours) else {
            return Ok(None);
        };
        let mut found = Found {
            id,
            identity,
            inspected,
            asleep: false,
        };
        found.asleep = marks.contains(&mark_of(scope, &found));
        Ok(Some(found))
    }

    pub(crate) async fn volumes(
        &self,
        scope: &Scope,
        session: Option<&SessionName>,
        purpose: Purpose,
    ) -> Result<Vec<Volume>, RuntimeError> {
        let filter = scope.filter_volumes(session, purpose);
        self.list_volumes(&filter).await
    }

    pub(crate) async fn list_volumes(
        &self,
        filter: &HashMap<String, Vec<String>>,
    ) -> Result<Vec<Volume>, RuntimeError> {
        let options = ListVolumesOptionsBuilder::new().filters(filter).build();
        let listed = self.docker.list_volumes(Some(options)).await;
        let listed = listed.map_err(engine("the engine's volumes cannot be listed"))?;
        Ok(listed.volumes.unwrap_or_default())
    }

    pub(crate) async fn make_volume(
        &self,
        name: &str,
        labels: HashMap<String, String>,
    ) -> Result<(), RuntimeError> {
        let request = VolumeCreateRequest {
            name: Some(name.to_owned()),
            labels: Some(labels),
            ..VolumeCreateRequest::default()
        };
        let made = self.docker.create_volume(request).await;
        made.map(drop)
            .map_err(engine(format!("the volume {name} cannot be made")))
    }

    pub(crate) async fn remove_volume(&self, session: &SessionName, name: &str) -> Result<(), RuntimeError> {
        match self.docker.remove_volume(name, NO_FORCE).await {
            Err(error) if !is_missing(&error) => Err(RuntimeError::StopIncomplete {
                session: session.clone(),
                left: format!("the volume {name}: {}", words(&error)),
            }),
            _ => Ok(()),
        }
    }

    pub(crate) async fn remove_container(
        &self,
        session: &SessionName,
        one: &Found,
        grace: Duration,
    ) -> Result<(), RuntimeError> {
        let left = |error: bollard::errors::Error| RuntimeError::StopIncomplete {
            session: session.clone(),
            left: format!("its container: {}", words(&error)),
        };
        if one.phase() == Phase::Paused {
            // A frozen process cannot act on the signal that asks it to end.
            match self.docker.unpause_container(&one.id).await {
                Err(error) if !is_conflict(&error) && !is_missing(&error) => return Err(left(error)),
                _ => {}
            }
        }
        match self.end(&one.id, grace).await {
            Err(error) if !is_missing(&error) => return Err(left(error)),
            _ => {}
        }
        self.memory().gone(&one.id);
        let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
        match self.docker.remove_container(&one.id, Some(options)).await {
            Ok(()) => Ok(()),
            Err(error) if is_missing(&error) => Ok(()),
            // Somebody else removes it just now; it must be gone before its volumes can go.
            Err(error) if is_conflict(&error) => self.until_gone(&one.id).await.map_err(left),
            Err(error) => Err(left(error)),
        }
    }

    pub(crate) async fn until_gone(&self, id: &str) -> Result<(), bollard::errors::Error> {
        let until = Instant::now() + GONE_WITHIN;
        loop {
            match self.docker.inspect_container(id, None).await {
                Err(error) if is_missing(&error) => return Ok(()),
                Err(error) => return Err(error),
                Ok(_) if Instant::now() >= until => {
                    return Err(bollard::errors::Error::DockerStreamError {
                        error: "it is still being removed".to_owned(),
                    });
                }
                Ok(_) => tokio::time::sleep(READY_INTERVAL).await,
            }
        }
    }

    /// Starts a container that is made or has ended. One that runs is fine.
    pub(crate) async fn start_container(&self, id: &str) -> Result<(), bollard::errors::Error> {
        let until = Instant::now() + UNAMBIGUOUS_WITHIN;
        loop {
            match self.docker.start_container(id, None).await {
                Err(error) if is_unchanged(&error) => return Ok(()),
                // Another agent has made the network too since this one looked.
                Err(error) if words(&error).contains("ambiguous") && Instant::now() < until => {
                    if let Some(scope) = self.scope()
                        && let Err(error) = self.network(&scope).await
                    {
                        tracing::debug!(%error, "there may still be two networks of one name");
                    }
                    tokio::time::sleep(READY_INTERVAL).await;
                }
                other => return other,
            }
        }
    }

    /// Asks a container to end, and forces it after the grace. One that has ended is fine.
    pub(crate) async fn end(&self, id: &str, grace: Duration) -> Result<(), bollard::errors::Error> {
        // The engine counts in seconds.
        let seconds = i32::try_from(grace.as_millis().div_ceil(1000)).unwrap_or(i32::MAX);
        let options = StopContainerOptionsBuilder::new().t(seconds).build();
        let docker = self.docker.clone().with_timeout(grace + crate::CALL_WITHIN);
        match docker.stop_container(id, Some(options)).await {
            Err(error) if !is_unchanged(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// The network of the cluster's sessions, made if there is none. The engine takes several of one name, and several
    /// agents may make it at once: the oldest counts. The others go, whoever has made them: with two of one name no
    /// container starts, and an agent that was cut off does not take its own back.
    pub(crate) async fn network(&self, scope: &Scope) -> Result<String, RuntimeError> {
        let _alone = self.network.lock().await;
        let name = scope.network();
        let by_age = || async {
            let filters = HashMap::from([("name".to_owned(), vec![format!("^{name}$")])]);
            let options = ListNetworksOptionsBuilder::new().filters(&filters).build();
            let listed = self.docker.list_networks(Some(options)).await?;
            let found = listed
                .into_iter()
                .filter(|network| network.name.as_deref() == Some(&name));
            let ages = found.filter_map(|network| Some((moment(&network.created?), network.id?)));
            Ok::<BTreeSet<_>, bollard::errors::Error>(ages.collect())
        };
        let failed = || engine(format!("the network {name} cannot be made"));
        let mut found = by_age().await.map_err(failed())?;
        if found.is_empty() {
            let request = NetworkCreateRequest {
                name: name.clone(),
                driver: Some("bridge".to_owned()),
                labels: Some(scope.network_labels()),
                ..NetworkCreateRequest::default()
            };
            match self.docker.create_network(request).await {
                Err(error) if !is_conflict(&error) => return Err(failed()(error)),
                _ => found = by_age().await.map_err(failed())?,
            }
        }
        let (_, id) = found.pop_first().ok_or_else(|| RuntimeError::Engine {
            what: format!("the network {name} cannot be made"),
            retryable: true,
            source: "it went away again".into(),
        })?;
        for (_, other) in found {
            tracing::info!(network = %name, id = %other, "a second network of that name is removed");
            match self.docker.remove_network(&other).await {
                // Gone already, or sessions are on it: then it stays until they end.
                Err(error) if is_missing(&error) || is_conflict(&error) || status(&error) == Some(403) => {}
                removed => removed.map_err(failed())?,
            }
        }
        Ok(id)
    }

    /// Returns when the engine answers, or what it says after a while.
    pub(crate) async fn until_there(&self) -> Result<(), RuntimeError> {
        let until = Instant::now() + BACK_WITHIN;
        loop {
            match self.docker.ping().await {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() >= until => {
                    return Err(engine("the Docker engine does not answer")(error));
                }
                Err(_) => tokio::time::sleep(BACK_INTERVAL).await,
            }
        }
    }

    /// Removes the cluster's network, unless a session is on it.
    pub(crate) async fn remove_network(&self) -> Result<(), RuntimeError> {
        let Some(scope) = self.scope() else { return Ok(()) };
        match self.docker.remove_network(&scope.network()).await {
            Err(error) if !is_missing(&error) && status(&error) != Some(403) && !is_conflict(&error) => {
                Err(engine(format!("the network {} stays", scope.network()))(error))
            }
            _ => Ok(()),
        }
    }

    /// Returns when the container's health check is content, or, if it has none, something answers on its port; or it
    /// has ended, or the time is over, which is no error: it runs all the same.
    pub(crate) async fn until_ready(&self, id: &str, within: Duration) -> Result<(), RuntimeError> {
        let until = Instant::now() + within;
        loop {
            let inspected = match self.docker.inspect_container(id, None).await {
                Ok(inspected) => inspected,
                Err(error) if is_missing(&error) => return Ok(()),
                Err(error) => return Err(engine(format!("container {id} cannot be looked at"))(error)),
            };
            let state = inspected.state.clone().unwrap_or_default();
            if state.status != Some(ContainerStateStatusEnum::RUNNING) {
                return Ok(());
            }
            let ready = match state.health.and_then(|health| health.status) {
                Some(HealthStatusEnum::HEALTHY) => true,
                Some(HealthStatusEnum::STARTING | HealthStatusEnum::UNHEALTHY) => false,
                Some(HealthStatusEnum::NONE | HealthStatusEnum::EMPTY) | None => {
                    match published(&inspected) {
                        Some((address, port, true)) => answers(address, port).await,
                        Some(_) | None => true,
                    }
                }
            };
            if ready {
                return Ok(());
            }
            if Instant::now() >= until {
                tracing::debug!(id, "session does not serve its port yet");
                return Ok(());
            }
            tokio::time::sleep(READY_INTERVAL).await;
        }
    }
}

/// A time of the engine in a form that can be compared: it leaves out zeros at the end of the fraction.
fn moment(time: &str) -> String {
    let (seconds, fraction) = time.trim_end_matches('Z').split_once('.').unwrap_or((time, ""));
    format!("{seconds}.{fraction:0<9}")
}

/// The mark that says that this run of the container was ended to sleep. The next run has another name for it, so a
/// mark that was left behind says nothing.
pub(crate) fn mark_of(scope: &Scope, found: &Found) -> String {
    let what = format!("asleep-{}", found.started_at());
    scope.volume(&found.identity.session, found.identity.generation, &what)
}

/// Where the session's port is published, and whether it is one that connections can be made to.
pub(crate) fn published(inspected: &ContainerInspectResponse) -> Option<(IpAddr, u16, bool)> {
    let name = names::record(inspected)?.port?;
    let ports = inspected.network_settings.as_ref()?.ports.as_ref()?;
    let binding = ports.get(&name)?.as_ref()?.first()?;
    let address: IpAddr = binding.host_ip.as_deref()?.parse().ok()?;
    let address = match address {
        IpAddr::V4(any) if any.is_unspecified() => IpAddr::from([127, 0, 0, 1]),
        other => other,
    };
    Some((
        address,
        binding.host_port.as_deref()?.parse().ok()?,
        name.ends_with("/tcp"),
    ))
}

/// Whether somebody takes connections there. The engine's proxy takes all, and closes those that nobody wants.
async fn answers(address: IpAddr, port: u16) -> bool {
    let Ok(Ok(mut socket)) =
        tokio::time::timeout(ANSWERS_WITHIN, tokio::net::TcpStream::connect((address, port))).await
    else {
        return false;
    };
    let mut byte = [0; 1];
    match tokio::time::timeout(ANSWERS_WITHIN, socket.read(&mut byte)).await {
        Ok(Ok(read)) => read > 0,
        Ok(Err(_)) => false,
        // It waits for us to speak first, as most do.
        Err(_) => true,
    }
}
