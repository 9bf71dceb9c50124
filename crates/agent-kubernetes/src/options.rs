//! How a Kubernetes runtime is set up.

use std::path::PathBuf;
use std::time::Duration;

use regent_types::AgentId;

/// How a Kubernetes runtime is set up.
#[derive(Debug, Clone)]
pub struct KubernetesOptions {
    /// Whose sessions these are. All replicas of an agent have the same.
    pub agent: AgentId,
    /// A kubeconfig. By default the pod's own service account, and outside of pods what `KUBECONFIG` or
    /// `~/.kube/config` say.
    pub kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig, if not its current one.
    pub context: Option<String>,
    /// Where sessions live. By default the namespace of the context, or of the pod.
    pub namespace: Option<String>,
    /// The storage class of homes. By default the cluster's own.
    pub storage_class: Option<String>,
    /// The size of a home, as Kubernetes writes it.
    pub home_size: String,
    /// Where a home is mounted when the template does not say.
    pub home_path: String,
    /// Whether pods keep to the `restricted` pod security standard; else to `baseline`, in which a program may
    /// be root within its container.
    pub restricted: bool,
    /// The user id of sessions whose template names none. None leaves it to the image.
    pub run_as_user: Option<u32>,
    /// Capabilities that templates may ask for, such as `NET_BIND_SERVICE`.
    pub allowed_capabilities: Vec<String>,
    /// How long a start or a wake waits until the container runs.
    pub start_within: Duration,
    /// `Always`, `IfNotPresent` or `Never`. By default what Kubernetes makes of the image's tag.
    pub image_pull_policy: Option<String>,
}

impl KubernetesOptions {
    /// The defaults for an agent.
    pub fn new(agent: AgentId) -> Self {
        Self {
            agent,
            kubeconfig: None,
            context: None,
            namespace: None,
            storage_class: None,
            home_size: "10Gi".to_owned(),
            home_path: "/config".to_owned(),
            restricted: true,
            run_as_user: None,
            allowed_capabilities: Vec::new(),
            // Below the three minutes that a start may take, so that the reason is the one that Kubernetes gave.
            start_within: Duration::from_secs(150),
            image_pull_policy: None,
        }
    }
}
