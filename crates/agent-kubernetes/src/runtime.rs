//! The runtime as the agent sees it.

use std::sync::Arc;

use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, StreamExt};
use regent_agent::runtime::{
    Observed, Runs, Runtime, RuntimeError, RuntimeEvent, RuntimeKind, SessionRef, StartSpec, Stop,
};
use regent_types::{ClusterId, Token};
use tokio::sync::broadcast;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::KubernetesOptions;
use crate::api::Space;
use crate::engine::Engine;
use crate::fence::Fence;
use crate::names::Scope;
use crate::watch;

/// Runs sessions as pods of a Kubernetes cluster. Must be used within a tokio runtime.
#[derive(Debug)]
pub struct KubernetesRuntime {
    engine: Arc<Engine>,
    runtime_id: String,
    stopped: CancellationToken,
    _stop_watching: DropGuard,
}

impl KubernetesRuntime {
    /// Finds the API server and the agent's `ConfigMap` there, which is made if it is missing. Sessions are found by
    /// the first [`Runtime::list`] after [`Runtime::joined`].
    pub async fn connect(options: KubernetesOptions) -> Result<Self, RuntimeError> {
        let space = Space::open(&options).await?;
        let fence = Fence::new(&space, &options.agent);
        let runtime_id = format!("kubernetes:{}:{}", fence.identity().await?, space.namespace);
        let stopped = CancellationToken::new();
        Ok(Self {
            engine: Arc::new(Engine::new(options, space, fence)),
            runtime_id,
            stopped: stopped.clone(),
            _stop_watching: stopped.drop_guard(),
        })
    }
}

impl Runtime for KubernetesRuntime {
    fn kind(&self) -> RuntimeKind {
        RuntimeKind::Kubernetes
    }

    fn runtime_id(&self) -> &str {
        &self.runtime_id
    }

    fn runs(&self) -> &'static [Runs] {
        &[Runs::Image]
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn joined(&self, cluster: &ClusterId) {
        let scope = Scope {
            agent: self.engine.options.agent.clone(),
            cluster: cluster.clone(),
        };
        if self.engine.set_scope(scope) {
            tokio::spawn(watch::run(Arc::clone(&self.engine), self.stopped.clone()));
        }
    }

    fn take_over(&self, token: Token) -> BoxFuture<'_, Result<(), RuntimeError>> {
        Box::pin(self.engine.take_over(token))
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
