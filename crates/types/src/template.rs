//! Templates: what a session runs. StreamSpace's manifest, with `command`, `args` and `env` for plain processes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::session::Resources;
use crate::{TemplateName, Time};

/// A template's manifest, as it is applied and as agents get it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// `stream.space/v1alpha1`.
    #[serde(default = "api_version")]
    pub api_version: String,
    /// `Template`.
    #[serde(default = "kind")]
    pub kind: String,
    /// Name and labels.
    pub metadata: ManifestMetadata,
    /// What runs.
    pub spec: ManifestSpec,
}

fn api_version() -> String {
    "stream.space/v1alpha1".to_owned()
}

fn kind() -> String {
    "Template".to_owned()
}

/// Name and labels of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct ManifestMetadata {
    /// The template's name.
    pub name: TemplateName,
    /// Free, for people.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Free, for programs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// What a template runs.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct ManifestSpec {
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub display_name: String,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub category: String,
    /// The container image; empty for a plain process.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub base_image: String,
    /// What runs, in place of the image's entry point. `regent` as first word is the agent's own program.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// Its arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Ports that it listens on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<ManifestPort>,
    /// Its environment.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<ManifestEnv>,
    /// Where volumes go.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volume_mounts: Vec<ManifestMount>,
    /// What a session gets that does not say.
    #[serde(default)]
    pub default_resources: Resources,
    /// Its screen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vnc: Option<ManifestVnc>,
    /// How it sleeps; without it as the runtime does by itself: processes are frozen, containers and pods end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hibernate: Option<HibernateMode>,
    /// What a container of it may and may not; ignored by plain processes.
    #[serde(default, skip_serializing_if = "ManifestSecurity::is_default")]
    pub security: ManifestSecurity,
    /// Kubernetes: only nodes with these labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Kubernetes: taints of nodes that it stands.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<ManifestToleration>,
    /// Kubernetes: names of secrets with which its image is pulled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub image_pull_secrets: Vec<String>,
}

/// How a session of a template sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum HibernateMode {
    /// Frozen in place and continued. Pods cannot be frozen: they end and are started again.
    Pause,
    /// Ended, and started again.
    Restart,
}

/// A port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct ManifestPort {
    /// For people.
    #[serde(default)]
    pub name: String,
    /// The port inside.
    pub container_port: u16,
    /// `TCP` or `UDP`.
    #[serde(default = "tcp")]
    pub protocol: String,
}

fn tcp() -> String {
    "TCP".to_owned()
}

/// An environment variable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ManifestEnv {
    /// Its name.
    pub name: String,
    /// Its value.
    #[serde(default)]
    pub value: String,
}

/// Where a volume goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct ManifestMount {
    /// The volume.
    pub name: String,
    /// Where it goes. A volume named `home` or `user-home` is the session's home.
    pub mount_path: String,
    /// Whether it can only be read.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
    /// Docker: a folder of the host instead of a volume; the agent's configuration says which may be asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_path: Option<String>,
}

/// What a container of a template may and may not. What goes beyond the default must be allowed by the agent.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct ManifestSecurity {
    /// Whether the image can only be read; `/tmp` and the volumes can be written all the same.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only_root_filesystem: bool,
    /// The user id that it runs as, in place of the image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_as_user: Option<u32>,
    /// Capabilities that it needs, such as `NET_BIND_SERVICE`; all others are dropped.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub capabilities: Vec<String>,
}

impl ManifestSecurity {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A taint of a Kubernetes node that a template stands, as in a pod's `tolerations`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct ManifestToleration {
    /// The taint's key; empty for all.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub key: String,
    /// `Exists` or `Equal`, the default.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub operator: String,
    /// The taint's value.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub value: String,
    /// `NoSchedule`, `PreferNoSchedule` or `NoExecute`; empty for all.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub effect: String,
}

/// A template's screen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ManifestVnc {
    /// Whether it has one.
    #[serde(default)]
    pub enabled: bool,
    /// Its port.
    #[serde(default)]
    pub port: u16,
    /// `vnc` or another.
    #[serde(default)]
    pub protocol: String,
}

/// A template.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct Template {
    /// Its name.
    pub name: TemplateName,
    /// Whether it came with Regent.
    pub built_in: bool,
    /// What it runs.
    pub manifest: Manifest,
    /// When it was first applied.
    pub created_at: Time,
    /// When it last changed.
    pub updated_at: Time,
}

/// Answer to `GET /templates`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct TemplateList {
    /// One page, by name.
    pub templates: Vec<Template>,
    /// How many there are.
    pub total: u64,
    /// Where the next page starts, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}
