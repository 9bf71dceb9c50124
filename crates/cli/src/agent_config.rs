//! Settings of `regent agent run`.

use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use regent_trace::OtlpEndpoint;
use regent_types::duration::Span;
use regent_types::{AgentId, Cpu, Memory, ReplicaName};
use serde::{Deserialize, Serialize};

use crate::args::Global;
use crate::config::{Settings, load};

/// What an agent runs sessions on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum RuntimeKind {
    /// Plain processes of this machine.
    #[default]
    Process,
    /// Containers of a Docker engine.
    Docker,
    /// Pods of a Kubernetes cluster.
    Kubernetes,
}

impl RuntimeKind {
    /// The word for it, which is also the agent's default platform.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Docker => "docker",
            Self::Kubernetes => "kubernetes",
        }
    }
}

/// When a Docker agent pulls an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Pull {
    /// When the engine does not have it.
    Missing,
    /// Before every start.
    Always,
    /// Never.
    Never,
}

/// A pod security standard of Kubernetes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum PodSecurity {
    /// No program is root.
    Restricted,
    /// A program may be root within its container.
    Baseline,
}

/// Settings of `regent agent run`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(crate) struct AgentConfig {
    /// The agent's id.
    #[arg(long, value_name = "ID")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) agent_id: Option<AgentId>,
    /// Nodes of the cluster, comma-separated, tried in turn.
    #[arg(long, value_name = "URL,URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) servers: Option<String>,
    /// The agent's own token (`regent agent token ID`); --token-file keeps it out of the process list.
    #[arg(long, value_name = "T", conflicts_with = "token_file")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token: Option<String>,
    /// File with the agent's token, readable by its owner only.
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_file: Option<PathBuf>,
    /// File with a join token (`regent token create --join agent:ID`), or an operator's own, that is exchanged at the
    /// first start for a token of the agent, which is kept in the data folder.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["token", "token_file"])]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) join_token_file: Option<PathBuf>,
    /// What sessions run on [default: process].
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) runtime: Option<RuntimeKind>,
    /// The name of this replica of the agent: several with one agent id elect their leader. A process without one
    /// and replicas refuse each other.
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) replica: Option<ReplicaName>,
    /// How long the replica that leads may be silent before another one does [default: 4s].
    #[arg(long, value_name = "DURATION")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lease_ttl: Option<Span>,
    /// Give the lead up this long after the connection is lost, before the lease ends. The old leader may still act
    /// for a moment when another one does; its actions are fenced [default: off].
    #[arg(long, value_name = "DURATION")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) release_on_disconnect: Option<Span>,
    /// Folder for sessions and records of what was done; replicas of one host share it. Required.
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) data: Option<PathBuf>,
    /// See [`Global`]: every command has these flags.
    #[arg(skip)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ca_file: Option<PathBuf>,
    /// The same.
    #[arg(skip)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cert_file: Option<PathBuf>,
    /// The same.
    #[arg(skip)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) key_file: Option<PathBuf>,
    /// What placement calls it [default: the runtime].
    #[arg(long, value_name = "P")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) platform: Option<String>,
    /// Where it is.
    #[arg(long, value_name = "R")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) region: Option<String>,
    /// A label for placement; may be repeated.
    #[arg(long = "label", value_name = "K=V")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) labels: Vec<String>,
    /// How many sessions it takes at the same time.
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_sessions: Option<u32>,
    /// CPU for sessions [default: the machine's].
    #[arg(long, value_name = "CPU")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpu: Option<Cpu>,
    /// Memory for sessions [default: the machine's].
    #[arg(long, value_name = "MEMORY")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) memory: Option<Memory>,
    /// How many commands are worked on side by side, starts among them [default: 16].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) parallel: Option<NonZeroUsize>,
    /// Where the engine listens: `unix:///PATH` or `tcp://HOST:PORT` [default: `DOCKER_HOST`, else
    /// `unix:///var/run/docker.sock`].
    #[arg(long, value_name = "URL", help_heading = "Docker")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) docker_host: Option<String>,
    /// The address on which ports of sessions are published [default: 127.0.0.1].
    #[arg(long, value_name = "ADDRESS", help_heading = "Docker")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) docker_publish: Option<IpAddr>,
    /// The host in the URLs of sessions [default: the address on which they are published].
    #[arg(long, value_name = "HOST", help_heading = "Docker")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) docker_url_host: Option<String>,
    /// How many processes one session may have [default: 512].
    #[arg(long, value_name = "N", help_heading = "Docker")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) docker_pids_limit: Option<u32>,
    /// Where a home goes whose template does not say [default: /config].
    #[arg(long, value_name = "PATH", help_heading = "Docker")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) docker_home_path: Option<String>,
    /// A folder of the host below which templates may ask for binds; may be repeated [default: none].
    #[arg(long = "docker-allow-bind", value_name = "DIR", help_heading = "Docker")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) docker_allow_bind: Vec<PathBuf>,
    /// A capability that templates may ask for; may be repeated [default: none].
    #[arg(
        long = "docker-allow-capability",
        value_name = "NAME",
        help_heading = "Docker"
    )]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) docker_allow_capability: Vec<String>,
    /// When images are pulled: `missing`, `always` or `never` [default: missing].
    #[arg(
        long,
        value_name = "WHEN",
        value_enum,
        hide_possible_values = true,
        help_heading = "Docker"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) docker_pull: Option<Pull>,
    /// How long a pull may take, with its repetitions [default: 150s].
    #[arg(long, value_name = "DURATION", help_heading = "Docker")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) docker_pull_within: Option<Span>,
    /// File with the credentials of registries, as `docker login` writes it.
    #[arg(long, value_name = "FILE", help_heading = "Docker")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) docker_registry_config: Option<PathBuf>,
    /// A kubeconfig [default: the pod's own account, else KUBECONFIG, else ~/.kube/config].
    #[arg(long, value_name = "FILE", help_heading = "Kubernetes")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kubernetes_kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig [default: its current one].
    #[arg(long, value_name = "NAME", help_heading = "Kubernetes")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kubernetes_context: Option<String>,
    /// The namespace for sessions [default: the context's, or the pod's].
    #[arg(long, value_name = "NAME", help_heading = "Kubernetes")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kubernetes_namespace: Option<String>,
    /// The storage class of homes [default: the cluster's].
    #[arg(long, value_name = "NAME", help_heading = "Kubernetes")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kubernetes_storage_class: Option<String>,
    /// The size of a home [default: 10Gi].
    #[arg(long, value_name = "QUANTITY", help_heading = "Kubernetes")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kubernetes_home_size: Option<String>,
    /// Where a home goes whose template does not say [default: /config].
    #[arg(long, value_name = "PATH", help_heading = "Kubernetes")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kubernetes_home_path: Option<String>,
    /// The pod security standard that sessions keep: `restricted` or `baseline`, in which images may run as
    /// root [default: restricted].
    #[arg(
        long,
        value_name = "STANDARD",
        value_enum,
        hide_possible_values = true,
        help_heading = "Kubernetes"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kubernetes_pod_security: Option<PodSecurity>,
    /// The user id of sessions whose template names none [default: the image's].
    #[arg(long, value_name = "UID", help_heading = "Kubernetes")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kubernetes_run_as_user: Option<u32>,
    /// A capability that templates may ask for; may be repeated [default: none].
    #[arg(
        long = "kubernetes-allow-capability",
        value_name = "NAME",
        help_heading = "Kubernetes"
    )]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) kubernetes_allow_capability: Vec<String>,
    /// How long a start waits until its container runs [default: 150s].
    #[arg(long, value_name = "DURATION", help_heading = "Kubernetes")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kubernetes_start_within: Option<Span>,
    /// When nodes pull images: `Always`, `IfNotPresent` or `Never` [default: by the tag].
    #[arg(long, value_name = "POLICY", help_heading = "Kubernetes")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kubernetes_image_pull_policy: Option<String>,
    /// Send traces to this collector: the base of its OTLP over HTTP, such as `http://127.0.0.1:4318` [default: off].
    #[arg(long, value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) otlp_endpoint: Option<OtlpEndpoint>,
    /// End, sessions included, when this process ends (`PID:STARTTIME`).
    #[arg(long, hide = true, value_name = "PID:STARTTIME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lifeline: Option<String>,
}

impl Settings for AgentConfig {
    const KEYS: &'static [&'static str] = &[
        "agent-id",
        "servers",
        "token",
        "token-file",
        "join-token-file",
        "ca-file",
        "cert-file",
        "key-file",
        "runtime",
        "replica",
        "lease-ttl",
        "release-on-disconnect",
        "data",
        "platform",
        "region",
        "labels",
        "max-sessions",
        "cpu",
        "memory",
        "parallel",
        "docker-host",
        "docker-publish",
        "docker-url-host",
        "docker-pids-limit",
        "docker-home-path",
        "docker-allow-bind",
        "docker-allow-capability",
        "docker-pull",
        "docker-pull-within",
        "docker-registry-config",
        "kubernetes-kubeconfig",
        "kubernetes-context",
        "kubernetes-namespace",
        "kubernetes-storage-class",
        "kubernetes-home-size",
        "kubernetes-home-path",
        "kubernetes-pod-security",
        "kubernetes-run-as-user",
        "kubernetes-allow-capability",
        "kubernetes-start-within",
        "kubernetes-image-pull-policy",
        "otlp-endpoint",
    ];
    const LISTS: &'static [&'static str] = &[
        "labels",
        "docker-allow-bind",
        "docker-allow-capability",
        "kubernetes-allow-capability",
    ];
}

impl AgentConfig {
    /// Takes what is given by flags of every command.
    pub(crate) fn take_global(&mut self, global: &Global) {
        self.ca_file.clone_from(&global.ca_file);
        self.cert_file.clone_from(&global.cert_file);
        self.key_file.clone_from(&global.key_file);
    }

    /// The token is set in one of two ways. A flag of either stands for both: the client's `REGENT_TOKEN`, which
    /// many shells have, must not contradict it.
    pub(crate) fn load(file: Option<&Path>, flags: Self) -> anyhow::Result<Self> {
        let (token, token_file) = (flags.token.is_some(), flags.token_file.is_some());
        let join = flags.join_token_file.is_some();
        let mut config = load(file, flags)?;
        if join {
            (config.token, config.token_file) = (None, None);
        } else if token_file {
            config.token = None;
        } else if token {
            config.token_file = None;
        }
        Ok(config)
    }
}
