//! The engine as the agent holds it: the connection, the options, the fence, and whose containers are meant.

use std::sync::{Arc, Mutex, OnceLock};

use bollard::Docker;
use regent_agent::fence::{Fence, FenceError};
use regent_agent::runtime::{RuntimeError, RuntimeEvent};
use regent_types::{ClusterId, Token};
use tokio::sync::broadcast;

use crate::memory::Memory;
use crate::names::Scope;
use crate::options::DockerOptions;
use crate::spec::Site;

/// The engine and what is known of it.
pub(crate) struct Engine {
    pub(crate) docker: Docker,
    pub(crate) options: DockerOptions,
    pub(crate) site: Site,
    fence: Fence,
    cluster: OnceLock<ClusterId>,
    pub(crate) events: broadcast::Sender<RuntimeEvent>,
    pub(crate) memory: Mutex<Memory>,
    /// What the image of the agent's own program is called.
    pub(crate) own_image: tokio::sync::Mutex<Option<String>>,
    /// Networks are not unique by name: one task makes it.
    pub(crate) network: tokio::sync::Mutex<()>,
}

impl Engine {
    pub(crate) fn new(docker: Docker, options: DockerOptions, site: Site, fence: Fence) -> Self {
        Self {
            docker,
            options,
            site,
            fence,
            cluster: OnceLock::new(),
            events: broadcast::channel(crate::EVENT_BUFFER).0,
            memory: Mutex::default(),
            own_image: tokio::sync::Mutex::default(),
            network: tokio::sync::Mutex::default(),
        }
    }

    pub(crate) fn join(&self, cluster: &ClusterId) {
        if self.cluster.get_or_init(|| cluster.clone()) != cluster {
            tracing::error!(%cluster, "this agent belongs to another cluster already");
        }
    }

    /// Whose containers are ours; none before the cluster is known.
    pub(crate) fn scope(&self) -> Option<Scope> {
        Some(Scope {
            agent: self.options.agent.clone(),
            cluster: self.cluster.get()?.clone(),
        })
    }

    /// Whose containers are ours, where nothing can be done without.
    pub(crate) fn joined(&self) -> Result<Scope, RuntimeError> {
        self.scope().ok_or_else(|| RuntimeError::Engine {
            what: "nothing can be done before the cluster is known".to_owned(),
            retryable: true,
            source: "not connected yet".into(),
        })
    }

    pub(crate) async fn admit(&self, token: Token) -> Result<(), RuntimeError> {
        let fence = self.fence.clone();
        let admitted = tokio::task::spawn_blocking(move || fence.admit(token)).await;
        admitted.unwrap_or_else(|error| {
            let source = std::io::Error::other(error);
            let path = "the fence".into();
            Err(FenceError::Io { path, source })
        })?;
        Ok(())
    }
}

/// Shared by the runtime and the task that follows the engine's events.
pub(crate) type Shared = Arc<Engine>;
