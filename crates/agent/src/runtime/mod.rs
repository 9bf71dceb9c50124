//! What an agent needs of the thing that runs sessions: processes here, containers and pods elsewhere.
//!
//! Commands reach an agent at least once and agents are replaced while they work, so nothing in this
//! interface may depend on being called exactly once. The invariant that every runtime keeps:
//! **an action is idempotent by (session, generation)**, and
//!
//! - a start of the generation that is there answers with what is there, run or exited, and starts nothing;
//! - a start of a newer generation ends the older one first; an action on an older generation is refused;
//! - a start that fails half way leaves nothing behind;
//! - a stop or a removal that did not succeed is an error, never a quiet success;
//! - an action with a fencing token older than the highest seen is refused;
//! - `list` finds what runs even if the start was never recorded anywhere but at the running thing itself.
//!
//! [`conformance`] holds these rules as a test suite that runs against any runtime.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::BoxStream;
use regent_types::problem::quoted;
use regent_types::template::{ManifestMount, ManifestPort, ManifestSecurity, ManifestToleration};
use regent_types::{AgentId, ClusterId, SessionName, TemplateName, Token, UserName};
use serde::{Deserialize, Serialize};

use crate::fence::FenceError;

pub mod conformance;
pub mod process;

/// Which runtime an agent drives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RuntimeKind {
    /// Programs of this machine.
    Process,
    /// Containers of a Docker engine.
    Docker,
    /// Pods of a Kubernetes cluster.
    Kubernetes,
}

impl RuntimeKind {
    /// The name as the command line and `hello` spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Docker => "docker",
            Self::Kubernetes => "kubernetes",
        }
    }
}

impl fmt::Display for RuntimeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for RuntimeKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Process, Self::Docker, Self::Kubernetes]
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or_else(|| format!("unknown runtime {}: process, docker or kubernetes", quoted(text)))
    }
}

/// What a template must have for a runtime to start it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Runs {
    /// A command, for the machine's own programs.
    Command,
    /// An image.
    Image,
    /// A command that is `regent` itself, in an image made of it.
    Regent,
}

/// One incarnation of a session: 1 and up, raised by the control plane each time it is started anew.
pub type Generation = u64;

/// What to do with a session that shall hibernate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HibernateMode {
    /// Freeze it and keep its memory; a wake continues where it was.
    Stop,
    /// End it and keep its files; a wake starts the same specification again.
    Restart,
}

/// The wish for a port that the session serves on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortSpec {
    /// The port inside a container. The process runtime chooses a free one and hands it over as `PORT`.
    pub container_port: Option<u16>,
    /// How long a start may wait until something accepts connections there. Not an error when it passes:
    /// the session runs all the same. Zero does not wait.
    pub ready_within: Duration,
}

/// What of a template matters to runtimes that have images.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// All ports that it serves on; the first is the one of [`StartSpec::port`].
    pub ports: Vec<ManifestPort>,
    /// Where volumes go.
    pub mounts: Vec<ManifestMount>,
    /// What it may and may not.
    pub security: ManifestSecurity,
    /// Only nodes with these labels.
    pub node_selector: BTreeMap<String, String>,
    /// Taints of nodes that it stands.
    pub tolerations: Vec<ManifestToleration>,
    /// Names of secrets with which the image is pulled.
    pub image_pull_secrets: Vec<String>,
}

impl ContainerSpec {
    /// Where the home of a session is mounted: as the template says, else at `default`.
    pub fn home_path<'a>(&'a self, default: &'a str) -> &'a str {
        self.mounts
            .iter()
            .find(|mount| is_home(mount))
            .map_or(default, |mount| &mount.mount_path)
    }

    /// The volumes besides the home.
    pub fn other_mounts(&self) -> impl Iterator<Item = &ManifestMount> {
        self.mounts.iter().filter(|mount| !is_home(mount))
    }
}

/// `user-home` is what StreamSpace's templates call it.
fn is_home(mount: &ManifestMount) -> bool {
    mount.host_path.is_none() && matches!(mount.name.as_str(), "home" | "user-home")
}

/// Everything that is needed to start one generation of a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartSpec {
    /// The session.
    pub session: SessionName,
    /// Its generation.
    pub generation: Generation,
    /// The fencing token under which it is started.
    pub token: Token,
    /// The agent that starts it.
    pub agent: AgentId,
    /// Whose session it is.
    pub user: UserName,
    /// The template it was made from.
    pub template: TemplateName,
    /// The image, for runtimes that have images.
    pub image: Option<String>,
    /// The program. `regent` and `{regent}` mean the running executable (process runtime).
    pub command: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// The template's environment; cannot replace what Regent sets itself.
    pub env: BTreeMap<String, String>,
    /// Processor time in thousandths of a core; none is unlimited.
    pub cpu_milli: Option<u64>,
    /// Memory in bytes; none is unlimited.
    pub memory_bytes: Option<u64>,
    /// Whether the home folder outlives the session.
    pub persistent_home: bool,
    /// Whether and how it serves a port.
    pub port: Option<PortSpec>,
    /// What hibernating it means; none leaves it to the runtime.
    pub hibernate: Option<HibernateMode>,
    /// What matters to containers and pods only.
    #[serde(default)]
    pub container: ContainerSpec,
    /// Free words that come back in [`Observed::metadata`].
    pub metadata: BTreeMap<String, String>,
}

impl StartSpec {
    /// The reference by which later actions name what this starts.
    pub fn session_ref(&self) -> SessionRef {
        SessionRef {
            session: self.session.clone(),
            generation: self.generation,
            token: self.token,
        }
    }

    /// What Regent tells a session of itself, in whatever runtime. A template cannot replace it.
    pub fn regent_env(&self) -> [(&'static str, String); 5] {
        [
            (ENV_SESSION, self.session.to_string()),
            (ENV_GENERATION, self.generation.to_string()),
            (ENV_TOKEN, self.token.to_string()),
            ("REGENT_AGENT", self.agent.to_string()),
            ("REGENT_USER", self.user.to_string()),
        ]
    }

    /// Refuses names that no environment can have: one with `=` in it could pose as one of Regent's.
    pub fn check_env(&self) -> Result<(), String> {
        match self.env.keys().find(|name| name.is_empty() || name.contains('=')) {
            Some(name) => Err(format!("{name:?} cannot be the name of an environment variable")),
            None => Ok(()),
        }
    }
}

/// The session, in its environment.
pub const ENV_SESSION: &str = "REGENT_SESSION";
/// Its generation.
pub const ENV_GENERATION: &str = "REGENT_GENERATION";
/// The fencing token under which it was started. Not `REGENT_TOKEN`: that is where the command line looks for an API
/// token.
pub const ENV_TOKEN: &str = "REGENT_FENCING_TOKEN";

/// Names one generation of a session, and the token under which something is done to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRef {
    /// The session.
    pub session: SessionName,
    /// The generation that is meant.
    pub generation: Generation,
    /// The fencing token of who acts now, not of who started it.
    pub token: Token,
}

/// How to end a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stop {
    /// How long it may take to end when asked, before it is forced.
    pub grace: Duration,
    /// Whether a persistent home goes too. One that another session uses stays.
    pub delete_home: bool,
}

impl Stop {
    /// Asks first and forces after `grace`; a persistent home stays.
    pub fn within(grace: Duration) -> Self {
        Self {
            grace,
            delete_home: false,
        }
    }
}

/// How a session's program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "how", content = "value", rename_all = "lowercase")]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It took more memory than its limit allows and was killed.
    OutOfMemory,
    /// Its container was removed by somebody else.
    Removed,
    /// It is gone and nobody saw how, for example because the machine went down.
    Unknown,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with code {code}"),
            Self::Signal(signal) => write!(f, "ended by signal {signal}"),
            Self::OutOfMemory => f.write_str("ran out of memory: it needed more than its limit"),
            Self::Removed => f.write_str("was removed by somebody else"),
            Self::Unknown => f.write_str("ended in an unknown way"),
        }
    }
}

/// What a session is doing, as seen at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", content = "exit", rename_all = "lowercase")]
pub enum ObservedState {
    /// It runs.
    Running,
    /// It is frozen, or ended to be started again by a wake.
    Hibernated,
    /// Its program ended; its folder or container is still there until a stop removes it.
    Exited(Exit),
}

/// One session as found at the target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observed {
    /// The session.
    pub session: SessionName,
    /// Its generation.
    pub generation: Generation,
    /// The token under which it was started.
    pub token: Token,
    /// What it does.
    #[serde(flatten)]
    pub state: ObservedState,
    /// The process id of its program, where there is one.
    pub pid: Option<u32>,
    /// The port it serves on.
    pub port: Option<u16>,
    /// Where it can be opened.
    pub url: Option<String>,
    /// When it was started, in milliseconds since the Unix epoch (for people to read).
    pub started_at_ms: Option<u64>,
    /// The metadata of the start, and what the runtime adds: the limits that were really applied
    /// (`cpuLimit`, `memoryLimit`), the log file (`log`).
    pub metadata: BTreeMap<String, String>,
}

/// Something that happened to a session without being asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuntimeEvent {
    /// Its program ended by itself or was killed by somebody else. Not sent for a stop or a hibernate.
    Exited {
        /// The session.
        session: SessionName,
        /// The generation that ended.
        generation: Generation,
        /// The token under which it was started.
        token: Token,
        /// How it ended.
        exit: Exit,
    },
    /// It runs, and something about it is worth telling: where it can be opened has changed, or why it does not
    /// answer.
    Changed {
        /// What is true now.
        observed: Box<Observed>,
        /// For a person.
        reason: String,
    },
    /// A start that takes long has come further.
    Progress {
        /// The session.
        session: SessionName,
        /// What is being done, for a person.
        message: String,
        /// How much of it is done, if that can be said.
        percent: Option<u32>,
    },
    /// Events were lost because the reader was too slow: call [`Runtime::list`] to see what is true.
    Lagged,
    /// The engine went away and is back, and sessions may have gone with it. They count as missing: the control
    /// plane is told what is here, and starts again what shall run.
    Restarted {
        /// What happened.
        reason: String,
    },
}

/// Why an action failed.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// No such session here.
    #[error("session {session} is not here")]
    NotFound {
        /// The session asked for.
        session: SessionName,
    },
    /// A newer generation is here than the one asked for.
    #[error("session {session} is at generation {have}, newer than {asked}")]
    StaleGeneration {
        /// The session.
        session: SessionName,
        /// The generation that is here.
        have: Generation,
        /// The generation asked for.
        asked: Generation,
    },
    /// Only an older generation is here than the one asked for, so it cannot be hibernated or woken.
    #[error("session {session} is at generation {have}, older than {asked}")]
    OtherGeneration {
        /// The session.
        session: SessionName,
        /// The generation that is here.
        have: Generation,
        /// The generation asked for.
        asked: Generation,
    },
    /// The fencing token is older than one seen before, or the fence could not be used.
    #[error(transparent)]
    Fence(#[from] FenceError),
    /// The action does not fit what the session is doing, for example a wake of what has exited.
    #[error("session {session} cannot {action}: it {state}")]
    WrongState {
        /// The session.
        session: SessionName,
        /// What was asked.
        action: &'static str,
        /// What it does instead, in words that follow "it".
        state: String,
    },
    /// The program cannot be started: it does not exist, may not be run, or the specification is wrong.
    #[error("session {session} cannot be started: {reason}")]
    BadSpec {
        /// The session.
        session: SessionName,
        /// Why, for a person.
        reason: String,
    },
    /// A start failed for a reason that may pass; what it had made was removed again.
    #[error("session {session} did not start: {reason}")]
    StartFailed {
        /// The session.
        session: SessionName,
        /// Why, for a person.
        reason: String,
    },
    /// Something of the session is still there after a stop.
    #[error("session {session} did not end: {left}")]
    StopIncomplete {
        /// The session.
        session: SessionName,
        /// What is left.
        left: String,
    },
    /// A file or a system call failed.
    #[error("{what}")]
    Io {
        /// What was being done, to what.
        what: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The engine behind the runtime refused or could not be reached.
    #[error("{what}")]
    Engine {
        /// What was being done, to what.
        what: String,
        /// Whether the same call may succeed later.
        retryable: bool,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl RuntimeError {
    /// Whether the same call may succeed later without anything else being changed.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NotFound { .. }
            | Self::StaleGeneration { .. }
            | Self::OtherGeneration { .. }
            | Self::WrongState { .. }
            | Self::BadSpec { .. } => false,
            Self::Fence(error) => error.is_retryable(),
            Self::StartFailed { .. } | Self::StopIncomplete { .. } | Self::Io { .. } => true,
            Self::Engine { retryable, .. } => *retryable,
        }
    }
}

/// Runs sessions. See the module's text for the rules that every implementation keeps.
///
/// A call may take long (a stop waits its grace out); callers run calls for different sessions in
/// parallel. Dropping a returned future does not undo what it began.
pub trait Runtime: Send + Sync + 'static {
    /// Which runtime this is.
    fn kind(&self) -> RuntimeKind;

    /// Names the target: equal for two replicas exactly if each would find the other's sessions.
    fn runtime_id(&self) -> &str;

    /// What kinds of template it can start, for placement.
    fn runs(&self) -> &'static [Runs];

    /// Whether agents of other clusters may use the same target. Then nothing is found there before
    /// [`Runtime::joined`] has told which sessions are this one's.
    fn is_shared(&self) -> bool {
        false
    }

    /// The agent belongs to this cluster. Told before anything is started, and always the same.
    fn joined(&self, cluster: &ClusterId) {
        let _ = cluster;
    }

    /// Raises the fence of the target to this token: from now on every older one is refused.
    fn take_over(&self, token: Token) -> BoxFuture<'_, Result<(), RuntimeError>>;

    /// Starts a generation of a session, or answers with it if it is there already.
    fn start<'a>(&'a self, spec: &'a StartSpec) -> BoxFuture<'a, Result<Observed, RuntimeError>>;

    /// Ends a session and removes all that belongs to it, a persistent home only if asked. A session that is
    /// not here is a success.
    fn stop<'a>(&'a self, session: &'a SessionRef, how: Stop) -> BoxFuture<'a, Result<(), RuntimeError>>;

    /// Makes a running session use no processor time until a wake.
    fn hibernate<'a>(&'a self, session: &'a SessionRef) -> BoxFuture<'a, Result<Observed, RuntimeError>>;

    /// Continues a hibernated session.
    fn wake<'a>(&'a self, session: &'a SessionRef) -> BoxFuture<'a, Result<Observed, RuntimeError>>;

    /// All sessions that are here, in the order of their names. Needs no fencing token: it changes nothing.
    /// Waits for nobody, so a session that is just being started or stopped may be seen half way: ended, or
    /// not at all. Whoever reconciles leaves those alone that it has an action under way for.
    fn list(&self) -> BoxFuture<'_, Result<Vec<Observed>, RuntimeError>>;

    /// Events from now on. Sessions of an earlier agent process are watched once `list` has found them.
    fn watch(&self) -> BoxStream<'static, RuntimeEvent>;
}
