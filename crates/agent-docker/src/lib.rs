//! The Docker runtime: sessions as containers of one engine.
//!
//! - [`DockerRuntime`] is the [`Runtime`]; [`DockerOptions`] how it is set up.
//! - `spec` plans a container: pure, with all that is safe and all that a template may ask for.
//! - `actions` are start, stop, hibernate, wake and list; `objects` the containers, volumes and the network that they
//!   look at and change; `images` gets images; `names` is what everything is called. `engine` holds it together.
//! - `follow` hears of what happens to containers by themselves or by others' hands, and `memory` sees to it that each
//!   end is told once.
//!
//! **Fencing.** Labels of a container cannot be changed, so the fence is the file in the data folder that the replicas
//! of one host share ([`regent_agent::fence`]): a later leader raises it before it acts, and every action asks it first.
//! A container's name carries session and generation, and the engine makes a name once: two leaders cannot start one
//! generation twice. What is left to a leader that was deposed between the check and the call is at most that one call:
//! it may make a container of a generation that nobody has (which the next list shows, and the reconcile loop removes
//! or adopts), or stop, pause or wake the one that it was asked for. It cannot touch a newer generation, since what it
//! acts on is named by container id, nor volumes of one, since their names carry the generation.
//!
//! **State at the engine.** What never changes is in labels. That a session sleeps is said by the paused state, or by a
//! small labelled volume that names the run which was ended; so any replica, with or without the data folder, sees it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bollard::{API_DEFAULT_VERSION, Docker};
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, StreamExt as _};
use regent_agent::fence::Fence;
use regent_agent::runtime::{
    Observed, Runs, Runtime, RuntimeError, RuntimeEvent, RuntimeKind, SessionRef, StartSpec, Stop,
};
use regent_types::{ClusterId, Token};
use tokio::sync::broadcast;
use tokio_util::sync::{CancellationToken, DropGuard};

mod actions;
mod engine;
mod error;
mod follow;
#[doc(hidden)]
pub mod fuzzing;
mod images;
mod memory;
mod names;
mod objects;
mod options;
mod spec;

use engine::{Engine, Shared};
pub use options::{DockerOptions, Pull};
use spec::Site;

/// Events that a slow reader may fall behind before it is told to look for itself.
pub(crate) const EVENT_BUFFER: usize = 1024;
/// The engine gets this long to answer one call, besides the grace of a stop.
pub(crate) const CALL_WITHIN: Duration = Duration::from_secs(30);

/// Runs sessions as containers. Must be used within a tokio runtime.
pub struct DockerRuntime {
    engine: Shared,
    runtime_id: String,
    _stop_following: DropGuard,
}

impl std::fmt::Debug for DockerRuntime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DockerRuntime")
            .field("runtime_id", &self.runtime_id)
            .finish_non_exhaustive()
    }
}

impl DockerRuntime {
    /// Connects to the engine, agrees with it on a version of its API, and follows its events from now on.
    pub async fn connect(options: DockerOptions) -> Result<Self, RuntimeError> {
        let docker = dial(&options.host).map_err(|source| unreachable_engine(&options.host, source))?;
        let docker = docker
            .negotiate_version()
            .await
            .map_err(|source| unreachable_engine(&options.host, source))?;
        let info = docker
            .info()
            .await
            .map_err(|source| unreachable_engine(&options.host, source))?;
        let fence = {
            let data = options.data.clone();
            tokio::task::spawn_blocking(move || Fence::open(&data)).await
        };
        let fence = fence.map_err(|error| RuntimeError::Io {
            what: "the fence cannot be opened".to_owned(),
            source: std::io::Error::other(error),
        })??;
        let site = Site {
            socket: options.host.strip_prefix("unix://").map(PathBuf::from),
            bound_logs: info.logging_driver.as_deref() == Some("json-file"),
        };
        let runtime_id = format!("docker:{}", info.id.as_deref().unwrap_or(&options.host));
        tracing::info!(
            engine = info.server_version,
            api = %docker.client_version(),
            storage = info.driver,
            cgroup = info.cgroup_version.map(|version| version.to_string()),
            "connected to the Docker engine"
        );
        for warning in info.warnings.unwrap_or_default() {
            tracing::warn!(warning, "the engine warns");
        }
        let engine = Arc::new(Engine::new(docker, options, site, fence));
        let stopped = CancellationToken::new();
        tokio::spawn(follow::follow(Arc::downgrade(&engine), stopped.clone()));
        Ok(Self {
            engine,
            runtime_id,
            _stop_following: stopped.drop_guard(),
        })
    }
}

impl DockerRuntime {
    /// Removes the network of the cluster's sessions, unless there are some: for a cluster that is no more.
    pub async fn remove_network(&self) -> Result<(), RuntimeError> {
        self.engine.remove_network().await
    }
}

fn dial(host: &str) -> Result<Docker, bollard::errors::Error> {
    match host.strip_prefix("unix://") {
        Some(_) => Docker::connect_with_unix(host, CALL_WITHIN.as_secs(), API_DEFAULT_VERSION),
        None => Docker::connect_with_http(host, CALL_WITHIN.as_secs(), API_DEFAULT_VERSION),
    }
}

/// Says what to do when the engine is not there, or not for this user.
fn unreachable_engine(host: &str, source: bollard::errors::Error) -> RuntimeError {
    let mut denied = std::error::Error::source(&source);
    let mut said = source.to_string();
    while let Some(cause) = denied {
        said.push_str(&cause.to_string());
        denied = cause.source();
    }
    let hint = if said.contains("ermission denied") || said.contains("os error 13") {
        "; this user may not use its socket: run the agent in the socket's group"
    } else {
        "; is it running, and is docker-host right?"
    };
    RuntimeError::Engine {
        what: format!("the Docker engine at {host} cannot be reached{hint}"),
        retryable: true,
        source: Box::new(source),
    }
}

impl Runtime for DockerRuntime {
    fn kind(&self) -> RuntimeKind {
        RuntimeKind::Docker
    }

    fn runtime_id(&self) -> &str {
        &self.runtime_id
    }

    fn runs(&self) -> &'static [Runs] {
        match self.engine.options.own_program {
            Some(_) => &[Runs::Image, Runs::Regent],
            None => &[Runs::Image],
        }
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn joined(&self, cluster: &ClusterId) {
        self.engine.join(cluster);
    }

    fn take_over(&self, token: Token) -> BoxFuture<'_, Result<(), RuntimeError>> {
        Box::pin(self.engine.admit(token))
    }

    fn start<'a>(&'a self, spec: &'a StartSpec) -> BoxFuture<'a, Result<Observed, RuntimeError>> {
        Box::pin(self.engine.start(spec))
    }

    fn stop<'a>(&'a self, session: &'a SessionRef, how: Stop) -> BoxFuture<'a, Result<(), RuntimeError>> {
        Box::pin(self.engine.stop(session, how))
    }

    fn hibernate<'a>(&'a self, session: &'a SessionRef) -> BoxFuture<'a, Result<Observed, RuntimeError>> {
        Box::pin(self.engine.hibernate(session))
    }

    fn wake<'a>(&'a self, session: &'a SessionRef) -> BoxFuture<'a, Result<Observed, RuntimeError>> {
        Box::pin(self.engine.wake(session))
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<Observed>, RuntimeError>> {
        Box::pin(self.engine.list())
    }

    fn watch(&self) -> BoxStream<'static, RuntimeEvent> {
        stream::unfold(self.engine.events.subscribe(), |mut events| async move {
            match events.recv().await {
                Ok(event) => Some((event, events)),
                Err(broadcast::error::RecvError::Lagged(_)) => Some((RuntimeEvent::Lagged, events)),
                Err(broadcast::error::RecvError::Closed) => None,
            }
        })
        .boxed()
    }
}
