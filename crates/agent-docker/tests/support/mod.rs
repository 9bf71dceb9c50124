//! An engine of its own for the tests, and the `docker` command for what a person would do by hand.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test uses a part of it

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::stream::BoxStream;
use regent_agent::runtime::{
    ContainerSpec, Exit, Observed, PortSpec, Runtime, RuntimeEvent, StartSpec, Stop,
};
use regent_agent_docker::{DockerOptions, DockerRuntime};
use regent_types::template::ManifestPort;
use regent_types::{AgentId, ClusterId, SessionName, TemplateName, Token, UserName};

pub const GRACE: Duration = Duration::from_secs(10);
/// Only waited out by a test that fails.
pub const PATIENCE: Duration = Duration::from_mins(1);
/// Runs until it is told to end, and then ends at once.
pub const SLEEP: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

/// A Docker engine that ends with this process, however that ends: it watches the pipe.
pub struct Engine {
    pub host: String,
    folder: tempfile::TempDir,
    control: Mutex<(ChildStdin, BufReader<ChildStdout>)>,
    _script: Child,
}

impl Engine {
    fn start() -> Result<Self, String> {
        let folder = tempfile::Builder::new()
            .prefix("regent-docker")
            .tempdir()
            .unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/docker/engine");
        let mut child = Command::new(script)
            .arg(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| error.to_string())?;
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut host = String::new();
        output.read_line(&mut host).unwrap();
        if host.is_empty() {
            let mut why = String::new();
            let mut errors = BufReader::new(child.stderr.take().unwrap());
            std::io::Read::read_to_string(&mut errors, &mut why).unwrap();
            return Err(why.trim().to_owned());
        }
        Ok(Self {
            host: host.trim().to_owned(),
            folder,
            control: Mutex::new((child.stdin.take().unwrap(), output)),
            _script: child,
        })
    }

    /// The engine that all tests of this process share; none, and said so, where there can be none.
    pub fn shared(test: &str) -> Option<&'static Self> {
        static SHARED: OnceLock<Result<Engine, String>> = OnceLock::new();
        usable(test, SHARED.get_or_init(Self::start).as_ref())
    }

    /// An engine for one test that ends it.
    pub fn own(test: &str) -> Option<Self> {
        usable(test, Self::start())
    }

    /// Tells the script to do something to the engine, and waits until it is done.
    pub fn control(&self, line: &str) {
        let mut control = self.control.lock().unwrap();
        writeln!(control.0, "{line}").unwrap();
        let mut answer = String::new();
        control.1.read_line(&mut answer).unwrap();
        assert!(
            !answer.is_empty(),
            "the engine is gone: see {}/log",
            self.folder.path().display()
        );
    }

    /// What a person would type.
    pub fn docker(&self, args: &[&str]) -> String {
        let output = self.docker_output(args);
        assert!(
            output.status.success(),
            "docker {args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    pub fn docker_output(&self, args: &[&str]) -> std::process::Output {
        Command::new("/usr/bin/docker")
            .env("DOCKER_HOST", &self.host)
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }
}

#[allow(clippy::print_stdout)] // it is for who runs the tests
fn usable<T, E: std::fmt::Display>(test: &str, engine: Result<T, E>) -> Option<T> {
    match engine {
        Ok(engine) => Some(engine),
        Err(why) => {
            let required = std::env::var("REGENT_REQUIRE").unwrap_or_default();
            assert!(
                !required.split(',').any(|need| need == "docker"),
                "REGENT_REQUIRE demands docker, which is not here: {why}"
            );
            println!("SKIPPED: {test} lacks docker ({why})");
            None
        }
    }
}

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
