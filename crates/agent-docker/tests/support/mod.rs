//! What the tests of this crate share: agents on an engine, what they are told to start, and waiting.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test uses a part of it

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::stream::BoxStream;
use regent_agent::runtime::{
    ContainerSpec, Exit, Observed, PortSpec, Runtime, RuntimeEvent, StartSpec, Stop,
};
use regent_agent_docker::{DockerOptions, DockerRuntime};
use regent_types::template::ManifestPort;
use regent_types::{AgentId, ClusterId, SessionName, TemplateName, Token, UserName};

#[path = "../../../../tests/docker/engine.rs"]
mod engine;

pub use engine::Engine;

pub const GRACE: Duration = Duration::from_secs(10);
/// Only waited out by a test that fails.
pub const PATIENCE: Duration = Duration::from_mins(3);
/// Runs until it is told to end, and then ends at once.
pub const SLEEP: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

/// One agent's view of an engine: a data folder and an id of its own.
pub struct Agent<'a> {
    pub engine: &'a Engine,
    pub data: tempfile::TempDir,
    pub id: AgentId,
    pub cluster: ClusterId,
}

impl<'a> Agent<'a> {
    pub fn new(engine: &'a Engine, id: &str) -> Self {
        Self {
            engine,
            data: tempfile::tempdir().unwrap(),
            id: AgentId::new(id).unwrap(),
            cluster: ClusterId::new("test-cluster").unwrap(),
        }
    }

    pub fn options(&self) -> DockerOptions {
        DockerOptions {
            host: self.engine.host.clone(),
            ..DockerOptions::new(self.id.clone(), self.data.path())
        }
    }

    pub async fn open(&self) -> DockerRuntime {
        self.open_with(self.options()).await
    }

    pub async fn open_with(&self, options: DockerOptions) -> DockerRuntime {
        let runtime = DockerRuntime::connect(options).await.unwrap();
        runtime.joined(&self.cluster);
        runtime
    }

    /// Names of all containers and volumes that carry the session's label, of this agent.
    pub fn left(&self, session: &str) -> Vec<String> {
        let (agent, session) = (
            format!("label=regent.agent={}", self.id),
            format!("label=regent.session={session}"),
        );
        let containers = self
            .engine
            .docker(&["ps", "-aq", "--filter", &agent, "--filter", &session]);
        let volumes = self
            .engine
            .docker(&["volume", "ls", "-q", "--filter", &agent, "--filter", &session]);
        containers
            .lines()
            .chain(volumes.lines())
            .map(str::to_owned)
            .collect()
    }

    /// The container's id.
    pub fn container(&self, session: &str) -> String {
        let (agent, session) = (
            format!("label=regent.agent={}", self.id),
            format!("label=regent.session={session}"),
        );
        let found = self.engine.docker(&[
            "ps",
            "-aq",
            "--no-trunc",
            "--filter",
            &agent,
            "--filter",
            &session,
        ]);
        assert_eq!(found.lines().count(), 1, "containers of {session}: {found:?}");
        found
    }
}

pub fn spec(agent: &AgentId, session: &str, script: &str) -> StartSpec {
    StartSpec {
        session: SessionName::new(session).unwrap(),
        generation: 1,
        token: Token(1),
        agent: agent.clone(),
        user: UserName::new("alice").unwrap(),
        template: TemplateName::new("script").unwrap(),
        image: Some("regent-test:1".to_owned()),
        command: "sh".to_owned(),
        args: vec!["-c".to_owned(), script.to_owned()],
        env: BTreeMap::new(),
        cpu_milli: None,
        memory_bytes: None,
        persistent_home: false,
        port: None,
        hibernate: None,
        container: ContainerSpec::default(),
        metadata: BTreeMap::from([("colour".to_owned(), "blue".to_owned())]),
    }
}

/// Serves on a port.
pub fn with_port(spec: StartSpec, port: u16) -> StartSpec {
    StartSpec {
        port: Some(PortSpec {
            container_port: Some(port),
            ready_within: PATIENCE,
        }),
        container: ContainerSpec {
            ports: vec![ManifestPort {
                name: String::new(),
                container_port: port,
                protocol: "TCP".to_owned(),
            }],
            ..spec.container
        },
        ..spec
    }
}

pub async fn stop(runtime: &DockerRuntime, spec: &StartSpec) {
    runtime
        .stop(&spec.session_ref(), Stop::within(GRACE))
        .await
        .unwrap();
}

/// The next event that is no progress.
pub async fn next(events: &mut BoxStream<'static, RuntimeEvent>) -> RuntimeEvent {
    loop {
        let event = tokio::time::timeout(PATIENCE, events.next())
            .await
            .expect("an event")
            .unwrap();
        if !matches!(event, RuntimeEvent::Progress { .. }) {
            return event;
        }
    }
}

/// The next event, which must be an exit; and how long it took.
pub async fn next_exit(events: &mut BoxStream<'static, RuntimeEvent>) -> (String, Exit) {
    match next(events).await {
        RuntimeEvent::Exited { session, exit, .. } => (session.to_string(), exit),
        other => panic!("instead of an exit came {other:?}"),
    }
}

/// Waits for a condition, never for a time.
pub async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "still not: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The body of a page, or why there is none.
pub async fn get(address: &str) -> Result<String, String> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let failed = |error: std::io::Error| error.to_string();
    let mut socket = tokio::net::TcpStream::connect(address).await.map_err(failed)?;
    let request = format!("GET / HTTP/1.0\r\nHost: {address}\r\n\r\n");
    socket.write_all(request.as_bytes()).await.map_err(failed)?;
    let mut text = String::new();
    socket.read_to_string(&mut text).await.map_err(failed)?;
    Ok(text
        .split_once("\r\n\r\n")
        .map_or(text.clone(), |(_, body)| body.to_owned()))
}

/// `HOST:PORT` of a session's URL.
pub fn address(observed: &Observed) -> String {
    let url = observed.url.as_deref().unwrap();
    url.trim_start_matches("http://").trim_end_matches('/').to_owned()
}

/// A file below the folder of a test.
pub fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path
}
