//! Opens the runtime that an agent is configured with.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use regent_agent::Runtime;
use regent_agent::runtime::process::{ProcessOptions, ProcessRuntime};
use regent_types::AgentId;

use crate::agent_config::{AgentConfig, RuntimeKind};
use crate::config::UsageError;
use crate::lifeline::Lifeline;

/// The runtime of this agent.
pub(crate) async fn open(
    config: &AgentConfig,
    agent: &AgentId,
    data: &Path,
    lifeline: Lifeline,
) -> anyhow::Result<Arc<dyn Runtime>> {
    let kind = config.runtime.unwrap_or_default();
    refuse_others(config, kind)?;
    match kind {
        RuntimeKind::Process => {
            let mut process = ProcessOptions::new(data)?;
            process.lifeline = lifeline.id();
            let runtime = ProcessRuntime::open(process).context("the process runtime cannot start")?;
            Ok(Arc::new(runtime))
        }
        RuntimeKind::Docker => docker::open(config, agent, data).await,
        RuntimeKind::Kubernetes => kubernetes::open(config, agent).await,
    }
}

/// A setting of another runtime would be ignored; better said than found out.
fn refuse_others(config: &AgentConfig, kind: RuntimeKind) -> Result<(), UsageError> {
    let set = serde_json::to_value(config).unwrap_or_default();
    for other in [RuntimeKind::Docker, RuntimeKind::Kubernetes] {
        let prefix = format!("{}-", other.as_str());
        let foreign = set
            .as_object()
            .and_then(|set| set.keys().find(|key| key.starts_with(&prefix)));
        if let Some(key) = foreign.filter(|_| other != kind) {
            return Err(UsageError(format!(
                "{key} is a setting of the runtime {}, and this agent's is {}: leave it out, or set runtime",
                other.as_str(),
                kind.as_str()
            )));
        }
    }
    Ok(())
}

#[cfg(feature = "docker")]
pub(crate) mod docker {
    use std::time::Duration;

    use regent_agent::fence::Fence;
    use regent_agent_docker::{DockerOptions, DockerRuntime};
    use regent_types::ClusterId;
    use regent_types::duration::Span;

    use super::*;
    use crate::agent_config::Pull;

    pub(super) async fn open(
        config: &AgentConfig,
        agent: &AgentId,
        data: &Path,
    ) -> anyhow::Result<Arc<dyn Runtime>> {
        let options = options(config, agent, data)?;
        let runtime = DockerRuntime::connect(options).await;
        Ok(Arc::new(runtime.context("the Docker runtime cannot start")?))
    }

    fn options(config: &AgentConfig, agent: &AgentId, data: &Path) -> anyhow::Result<DockerOptions> {
        let defaults = DockerOptions::new(agent.clone(), data);
        // What the docker command itself goes by.
        let host = config
            .docker_host
            .clone()
            .or_else(|| std::env::var("DOCKER_HOST").ok());
        let host = host
            .filter(|host| !host.is_empty())
            .unwrap_or(defaults.host.clone());
        if !["unix://", "tcp://", "http://"]
            .iter()
            .any(|scheme| host.starts_with(scheme))
        {
            let told = format!("docker-host is unix:///PATH or tcp://HOST:PORT, and {host:?} is neither");
            return Err(UsageError(told).into());
        }
        if let Some(relative) = config
            .docker_allow_bind
            .iter()
            .find(|folder| !folder.is_absolute())
        {
            let told = format!(
                "docker-allow-bind takes absolute paths, and {} is none",
                relative.display()
            );
            return Err(UsageError(told).into());
        }
        if let Some(home) = config
            .docker_home_path
            .as_ref()
            .filter(|home| !home.starts_with('/'))
        {
            return Err(UsageError(format!(
                "docker-home-path is an absolute path, and {home:?} is none"
            ))
            .into());
        }
        if config.docker_pids_limit == Some(0) {
            return Err(UsageError("docker-pids-limit is at least 1".to_owned()).into());
        }
        if let Some(file) = &config.docker_registry_config {
            // It holds passwords; read again at every pull.
            crate::config::secret_file(file)?;
        }
        Ok(DockerOptions {
            host,
            publish: config.docker_publish.unwrap_or(defaults.publish),
            url_host: config.docker_url_host.clone(),
            pids_limit: config.docker_pids_limit.unwrap_or(defaults.pids_limit),
            home_path: config
                .docker_home_path
                .clone()
                .unwrap_or(defaults.home_path.clone()),
            allowed_binds: config.docker_allow_bind.clone(),
            allowed_capabilities: config.docker_allow_capability.clone(),
            pull: match config.docker_pull {
                None | Some(Pull::Missing) => regent_agent_docker::Pull::Missing,
                Some(Pull::Always) => regent_agent_docker::Pull::Always,
                Some(Pull::Never) => regent_agent_docker::Pull::Never,
            },
            pull_within: config
                .docker_pull_within
                .map_or(defaults.pull_within, Span::duration),
            registry_config: config.docker_registry_config.clone(),
            own_program: Some(regent_agent::runtime::process::own_executable()?),
            ..defaults
        })
    }

    /// How long the sessions of a `dev` may take to end.
    const END_WITHIN: Duration = Duration::from_secs(10);

    /// Ends what an agent of `dev` has left at the engine, which it does itself unless it was killed.
    pub(crate) async fn end_sessions(agent: &AgentId, data: &Path) -> anyhow::Result<()> {
        let Some(cluster) = regent_agent::cluster_of(data)? else {
            return Ok(());
        };
        let end = async |cluster: ClusterId| {
            // As the agent was: by the same variables.
            let config = AgentConfig::load(None, AgentConfig::default())?;
            let options = options(&config, agent, data)?;
            let runtime = DockerRuntime::connect(options).await?;
            runtime.joined(&cluster);
            let token = Fence::open(data)?.highest()?;
            regent_agent::stop_sessions(&runtime, token).await;
            runtime.remove_network().await?;
            anyhow::Ok(())
        };
        tokio::time::timeout(END_WITHIN, end(cluster))
            .await
            .context("containers were perhaps left")?
    }
}

#[cfg(not(feature = "docker"))]
pub(crate) mod docker {
    use super::*;

    pub(super) async fn open(_: &AgentConfig, _: &AgentId, _: &Path) -> anyhow::Result<Arc<dyn Runtime>> {
        Err(not_built("docker"))
    }

    pub(crate) async fn end_sessions(_: &AgentId, _: &Path) -> anyhow::Result<()> {
        Ok(())
    }
}

#[cfg(feature = "kubernetes")]
mod kubernetes {
    use regent_agent_kubernetes::{KubernetesOptions, KubernetesRuntime};
    use regent_types::duration::Span;

    use super::*;
    use crate::agent_config::PodSecurity;

    pub(super) async fn open(config: &AgentConfig, agent: &AgentId) -> anyhow::Result<Arc<dyn Runtime>> {
        let defaults = KubernetesOptions::new(agent.clone());
        let options = KubernetesOptions {
            kubeconfig: config.kubernetes_kubeconfig.clone(),
            context: config.kubernetes_context.clone(),
            namespace: config.kubernetes_namespace.clone(),
            storage_class: config.kubernetes_storage_class.clone(),
            home_size: config
                .kubernetes_home_size
                .clone()
                .unwrap_or(defaults.home_size.clone()),
            home_path: config
                .kubernetes_home_path
                .clone()
                .unwrap_or(defaults.home_path.clone()),
            restricted: config.kubernetes_pod_security != Some(PodSecurity::Baseline),
            run_as_user: config.kubernetes_run_as_user,
            allowed_capabilities: config.kubernetes_allow_capability.clone(),
            start_within: config
                .kubernetes_start_within
                .map_or(defaults.start_within, Span::duration),
            image_pull_policy: config.kubernetes_image_pull_policy.clone(),
            ..defaults
        };
        let runtime = KubernetesRuntime::connect(options).await;
        Ok(Arc::new(runtime.context("the Kubernetes runtime cannot start")?))
    }
}

#[cfg(not(feature = "kubernetes"))]
mod kubernetes {
    use super::*;

    pub(super) async fn open(_: &AgentConfig, _: &AgentId) -> anyhow::Result<Arc<dyn Runtime>> {
        Err(not_built("kubernetes"))
    }
}

#[cfg(not(all(feature = "docker", feature = "kubernetes")))]
fn not_built(feature: &str) -> anyhow::Error {
    UsageError(format!(
        "this regent was built without the runtime {feature}: build it with --features {feature}"
    ))
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_of_another_runtime_is_refused_by_name() {
        let config = AgentConfig {
            docker_pids_limit: Some(7),
            ..AgentConfig::default()
        };
        refuse_others(&config, RuntimeKind::Docker).unwrap();
        for other in [RuntimeKind::Process, RuntimeKind::Kubernetes] {
            let error = refuse_others(&config, other).unwrap_err().to_string();
            assert!(
                error.contains("docker-pids-limit") && error.contains(other.as_str()),
                "{error}"
            );
        }
        refuse_others(&AgentConfig::default(), RuntimeKind::Process).unwrap();
    }
}
