//! How a Docker runtime is set up, and what templates may ask of it.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use regent_types::AgentId;

/// When an image is pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pull {
    /// When the engine does not have it.
    #[default]
    Missing,
    /// Before every start; when the registry does not answer, what the engine has will do.
    Always,
    /// Never: what the engine does not have cannot be started.
    Never,
}

/// How a Docker runtime is set up.
#[derive(Debug, Clone)]
pub struct DockerOptions {
    /// The agent: it sees only containers that carry its id.
    pub agent: AgentId,
    /// The folder with the fence, shared by the replicas of one host.
    pub data: PathBuf,
    /// Where the engine listens: `unix:///path` or `tcp://host:port`.
    pub host: String,
    /// The address on which ports of sessions are published.
    pub publish: IpAddr,
    /// The host in the URLs of sessions, when that is not the address on which they are published.
    pub url_host: Option<String>,
    /// Processes that one session may have.
    pub pids_limit: u32,
    /// Where a home goes whose template does not say.
    pub home_path: String,
    /// Folders of the host below which templates may ask for binds.
    pub allowed_binds: Vec<PathBuf>,
    /// Capabilities that templates may ask for.
    pub allowed_capabilities: Vec<String>,
    /// When images are pulled.
    pub pull: Pull,
    /// How long one pull may take, its repetitions included.
    pub pull_within: Duration,
    /// A file as `docker login` writes it, with the credentials of registries.
    pub registry_config: Option<PathBuf>,
    /// The program of which an image is made for templates whose command is `regent`; none refuses them.
    pub own_program: Option<PathBuf>,
}

impl DockerOptions {
    /// Where Debian's and everybody's engine listens.
    pub const DEFAULT_HOST: &str = "unix:///var/run/docker.sock";

    /// The defaults: all that is safe, and nothing else.
    pub fn new(agent: AgentId, data: impl Into<PathBuf>) -> Self {
        Self {
            agent,
            data: data.into(),
            host: Self::DEFAULT_HOST.to_owned(),
            publish: IpAddr::V4(Ipv4Addr::LOCALHOST),
            url_host: None,
            pids_limit: 512,
            home_path: "/config".to_owned(),
            allowed_binds: Vec::new(),
            allowed_capabilities: Vec::new(),
            pull: Pull::Missing,
            // Below the three minutes that a start may take, so that the reason is the one that the registry gave.
            pull_within: Duration::from_secs(150),
            registry_config: None,
            own_program: None,
        }
    }
}
