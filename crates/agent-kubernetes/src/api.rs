//! The API server: where it is, how long it may take to answer, and what its answers mean for a person.

use std::future::Future;
use std::time::Duration;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod, Service};
use kube::api::{Api, ListParams, PatchParams};
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use kube::core::Status;
use kube::{Client, Resource};
use regent_agent::runtime::RuntimeError;

use crate::KubernetesOptions;
use crate::names::MANAGER;

/// A request that takes longer is given up; the server answers within a second unless it is in trouble.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);

/// What a request came to instead of an answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    /// The server refused.
    #[error("{}", .0.message)]
    Refused(Box<Status>),
    /// The server did not answer in time.
    #[error("the API server did not answer within {} s", ANSWER_WITHIN.as_secs())]
    Silent,
    /// It could not be reached, or not be understood.
    #[error(transparent)]
    Failed(kube::Error),
}

impl ApiError {
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused(status) if status.is_not_found())
    }

    pub(crate) fn is_already_exists(&self) -> bool {
        matches!(self, Self::Refused(status) if status.is_already_exists())
    }

    /// Whether the object was changed since it was read.
    pub(crate) fn is_conflict(&self) -> bool {
        matches!(self, Self::Refused(status) if status.is_conflict() && !status.is_already_exists())
    }

    /// Whether the server understood the object and will never take it.
    pub(crate) fn is_invalid(&self) -> bool {
        matches!(self, Self::Refused(status) if matches!(status.code, 400 | 422))
    }

    /// Whether the same request may succeed later. A quota may be raised or freed; a missing right may not be
    /// there without anybody giving it.
    fn is_retryable(&self) -> bool {
        match self {
            Self::Refused(status) => match status.code {
                403 => status.message.contains("exceeded quota"),
                401 | 408 | 409 | 410 | 429 => true,
                code => code >= 500,
            },
            Self::Silent => true,
            Self::Failed(error) => {
                !matches!(error, kube::Error::SerdeError(_) | kube::Error::BuildRequest(_))
            }
        }
    }

    /// As an error of a runtime: `what` says what was being done, to what.
    pub(crate) fn at(self, what: impl Into<String>) -> RuntimeError {
        let mut what = what.into();
        if let Self::Refused(status) = &self
            && status.is_forbidden()
            // Quotas, limits and webhooks forbid as well, in other words.
            && status.message.contains(" cannot ")
        {
            what.push_str(
                ": the agent's Role does not allow it; deploy/kubernetes/agent.yaml has the one it needs",
            );
        }
        RuntimeError::Engine {
            what,
            retryable: self.is_retryable(),
            source: Box::new(self),
        }
    }
}

/// How long the server may be silent where it owes something.
const READ_WITHIN: Duration = Duration::from_secs(30);
/// After so many seconds the server ends a watch, and it is begun again.
pub(crate) const WATCH_SECONDS: u32 = 20;

/// Waits for an answer, for so long and no longer.
pub(crate) async fn answer<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, ApiError> {
    // Boxed, as requests are large and actions make many.
    match tokio::time::timeout(ANSWER_WITHIN, Box::pin(request)).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) => Err(ApiError::Refused(status)),
        Ok(Err(error)) => Err(ApiError::Failed(error)),
        Err(_) => Err(ApiError::Silent),
    }
}

/// One namespace of one server.
#[derive(Clone)]
pub(crate) struct Space {
    client: Client,
    pub(crate) namespace: String,
}

impl std::fmt::Debug for Space {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Space")
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}

impl Space {
    pub(crate) async fn open(options: &KubernetesOptions) -> Result<Self, RuntimeError> {
        let mut config = config(options).await?;
        // A connection that died without a word: what is watched says something at least this often.
        config.read_timeout = Some(READ_WITHIN);
        let namespace = options
            .namespace
            .clone()
            .unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config)
            .map_err(|error| unusable("cannot make a client of the configuration", error))?;
        Ok(Self { client, namespace })
    }

    fn all<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub(crate) fn deployments(&self) -> Api<Deployment> {
        self.all()
    }

    pub(crate) fn services(&self) -> Api<Service> {
        self.all()
    }

    pub(crate) fn claims(&self) -> Api<PersistentVolumeClaim> {
        self.all()
    }

    pub(crate) fn pods(&self) -> Api<Pod> {
        self.all()
    }

    pub(crate) fn config_maps(&self) -> Api<ConfigMap> {
        self.all()
    }
}

async fn config(options: &KubernetesOptions) -> Result<Config, RuntimeError> {
    let named = KubeConfigOptions {
        context: options.context.clone(),
        ..KubeConfigOptions::default()
    };
    if let Some(path) = &options.kubeconfig {
        let what = format!("cannot use the kubeconfig {}", path.display());
        let kubeconfig = Kubeconfig::read_from(path).map_err(|error| unusable(&what, error))?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &named).await;
        return config.map_err(|error| unusable(&what, error));
    }
    // A pod's own account comes before a kubeconfig that its image may happen to have.
    if options.context.is_none()
        && let Ok(config) = Config::incluster()
    {
        return Ok(config);
    }
    let config = Config::from_kubeconfig(&named).await;
    config.map_err(|error| {
        unusable(
            "there is neither a service account of a pod nor a usable kubeconfig",
            error,
        )
    })
}

fn unusable(what: &str, error: impl std::error::Error + Send + Sync + 'static) -> RuntimeError {
    RuntimeError::Engine {
        what: what.to_owned(),
        retryable: false,
        source: Box::new(error),
    }
}

/// Lists by label.
pub(crate) async fn list<K>(api: &Api<K>, selector: &str) -> Result<Vec<K>, RuntimeError>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let found = answer(api.list(&ListParams::default().labels(selector))).await;
    let found = found.map_err(|error| error.at(format!("cannot list {}", K::plural(&()))))?;
    Ok(found.items)
}

/// Reads one object.
pub(crate) async fn get<K>(api: &Api<K>, name: &str) -> Result<Option<K>, RuntimeError>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let found = answer(api.get_opt(name)).await;
    found.map_err(|error| error.at(format!("cannot read {}", named::<K>(name))))
}

/// An object, for a person.
pub(crate) fn named<K: Resource<DynamicType = ()>>(name: &str) -> String {
    format!("the {} {name}", K::kind(&()))
}

/// Patches of what is there.
pub(crate) fn patching() -> PatchParams {
    PatchParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PatchParams::default()
    }
}
