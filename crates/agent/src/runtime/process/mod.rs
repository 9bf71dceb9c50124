//! The process runtime: sessions as process groups of this machine, with nothing to install.
//!
//! Each session's program runs under a shim ([`shim`]) that outlives the agent. What there is to know is on
//! disk ([`layout`]) and in `/proc` ([`scan`]); this type holds nothing that a new one would miss, so an
//! agent that is started again adopts all of it, and two replicas may share a data folder: actions take
//! the session's file lock, whose holder dies with it. The work itself is synchronous ([`engine`]) and
//! runs on tokio's blocking threads; here are the trait, the waiting for a port and the watching of exits.
//!
//! Decisions worth knowing: a persistent home is `DATA/homes/USER/TEMPLATE`; a log is bounded by two files
//! ([`log`]); limits are what the machine allows and are reported as applied ([`limits`]).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Child;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, StreamExt};
use regent_types::{SessionName, Token};
use tokio::sync::broadcast;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    Generation, Observed, ObservedState, Runs, Runtime, RuntimeError, RuntimeEvent, RuntimeKind, SessionRef,
    StartSpec, Stop,
};
use crate::lifeline::{self, ProcessId};

pub mod demo;
mod end;
mod engine;
mod launch;
mod layout;
mod limits;
mod log;
mod scan;
pub mod shim;

use engine::{Engine, Launched};
pub(crate) use layout::{Ended, Launch, Running};

/// Events that a slow reader may fall behind before it is told to look for itself: more than sessions
/// that could end at once on one machine.
const EVENT_BUFFER: usize = 1024;

/// How often a port is tried while a session gets ready.
const PORT_INTERVAL: Duration = Duration::from_millis(20);

/// The default bound of a session's log, both files together.
const DEFAULT_LOG_BYTES: u64 = 8 * 1024 * 1024;

/// How a process runtime is set up.
#[derive(Debug, Clone)]
pub struct ProcessOptions {
    /// The data folder, shared by the replicas of one host. Made if missing.
    pub data: PathBuf,
    /// How to run the shim: the program and its arguments, to which the path of a launch file is added.
    /// By default this executable with `internal shim --spec`.
    pub shim: Vec<OsString>,
    /// What `regent` and `{regent}` in a template's command mean; by default this executable.
    pub regent: PathBuf,
    /// A process with which all sessions shall end.
    pub lifeline: Option<ProcessId>,
    /// The bound of a session's log in bytes, both files together.
    pub log_bytes: u64,
    /// A control group (v2) under which sessions may get groups of their own. By default the one that is
    /// delegated to this process, if any.
    pub cgroup: Option<PathBuf>,
}

impl ProcessOptions {
    /// The defaults for a data folder.
    pub fn new(data: impl Into<PathBuf>) -> io::Result<Self> {
        let regent = own_executable()?;
        let shim = [
            regent.as_os_str(),
            "internal".as_ref(),
            "shim".as_ref(),
            "--spec".as_ref(),
        ];
        Ok(Self {
            data: data.into(),
            shim: shim.map(OsString::from).to_vec(),
            regent,
            lifeline: None,
            log_bytes: DEFAULT_LOG_BYTES,
            cgroup: limits::delegated_cgroup(),
        })
    }
}

/// The path of the running executable. Linux adds ` (deleted)` once the file was replaced, as by an
/// upgrade or a build; then it is the new file, or, if there is none, the old one through `/proc`.
pub fn own_executable() -> io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    let Some(original) = path.to_str().and_then(|path| path.strip_suffix(" (deleted)")) else {
        return Ok(path);
    };
    let original = PathBuf::from(original);
    Ok(if original.exists() {
        original
    } else {
        PathBuf::from("/proc/self/exe")
    })
}

/// Runs sessions as processes of this machine. Must be used within a tokio runtime.
#[derive(Debug)]
pub struct ProcessRuntime {
    shared: Arc<Shared>,
    runtime_id: String,
    _stop_watching: DropGuard,
}

#[derive(Debug)]
struct Shared {
    engine: Engine,
    events: broadcast::Sender<RuntimeEvent>,
    /// The shim that is watched for each session, so that none is watched twice.
    watched: Mutex<BTreeMap<SessionName, ProcessId>>,
    stopped: CancellationToken,
}

impl ProcessRuntime {
    /// Opens the data folder. Sessions that run there are found by the first [`Runtime::list`].
    pub fn open(options: ProcessOptions) -> Result<Self, RuntimeError> {
        let engine = Engine::open(options)?;
        let runtime_id = format!("process:{}:{}", machine_id(), engine.data().display());
        let stopped = CancellationToken::new();
        let shared = Shared {
            engine,
            events: broadcast::channel(EVENT_BUFFER).0,
            watched: Mutex::default(),
            stopped: stopped.clone(),
        };
        Ok(Self {
            shared: Arc::new(shared),
            runtime_id,
            _stop_watching: stopped.drop_guard(),
        })
    }

    /// Where a session's log is, whether or not the session is there.
    pub fn log_file(&self, session: &SessionName) -> PathBuf {
        self.shared.engine.log_file(session)
    }

    async fn launched(&self, launched: Launched) -> Result<Observed, RuntimeError> {
        let Launched {
            observed,
            shim,
            child,
            ready_within,
        } = launched;
        if let Some(shim) = shim {
            self.shared
                .watch(&observed.session, observed.generation, shim, child);
        }
        match (observed.port, ready_within) {
            (Some(port), Some(limit)) if observed.state == ObservedState::Running => {
                wait_for_port(port, limit, shim).await;
            }
            _ => {}
        }
        Ok(observed)
    }
}

impl Runtime for ProcessRuntime {
    fn kind(&self) -> RuntimeKind {
        RuntimeKind::Process
    }

    fn runtime_id(&self) -> &str {
        &self.runtime_id
    }

    fn runs(&self) -> &'static [Runs] {
        &[Runs::Command]
    }

    fn take_over(&self, token: Token) -> BoxFuture<'_, Result<(), RuntimeError>> {
        Box::pin(self.shared.blocking(move |engine| engine.take_over(token)))
    }

    fn start<'a>(&'a self, spec: &'a StartSpec) -> BoxFuture<'a, Result<Observed, RuntimeError>> {
        Box::pin(async move {
            let spec = spec.clone();
            let launched = self.shared.blocking(move |engine| engine.start(&spec)).await?;
            self.launched(launched).await
        })
    }

    fn stop<'a>(&'a self, session: &'a SessionRef, how: Stop) -> BoxFuture<'a, Result<(), RuntimeError>> {
        Box::pin(async move {
            let session = session.clone();
            self.shared
                .blocking(move |engine| engine.stop(&session, how))
                .await
        })
    }

    fn hibernate<'a>(&'a self, session: &'a SessionRef) -> BoxFuture<'a, Result<Observed, RuntimeError>> {
        Box::pin(async move {
            let session = session.clone();
            self.shared
                .blocking(move |engine| engine.hibernate(&session))
                .await
        })
    }

    fn wake<'a>(&'a self, session: &'a SessionRef) -> BoxFuture<'a, Result<Observed, RuntimeError>> {
        Box::pin(async move {
            let session = session.clone();
            let launched = self.shared.blocking(move |engine| engine.wake(&session)).await?;
            self.launched(launched).await
        })
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<Observed>, RuntimeError>> {
        Box::pin(async move {
            let found = self.shared.blocking(Engine::list).await?;
            let mut sessions = Vec::with_capacity(found.len());
            for (observed, to_watch) in found {
                if let Some(process) = to_watch {
                    self.shared
                        .watch(&observed.session, observed.generation, process, None);
                }
                sessions.push(observed);
            }
            Ok(sessions)
        })
    }

    fn watch(&self) -> BoxStream<'static, RuntimeEvent> {
        stream::unfold(self.shared.events.subscribe(), |mut events| async move {
            match events.recv().await {
                Ok(event) => Some((event, events)),
                Err(broadcast::error::RecvError::Lagged(_)) => Some((RuntimeEvent::Lagged, events)),
                Err(broadcast::error::RecvError::Closed) => None,
            }
        })
        .boxed()
    }
}

impl Shared {
    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Engine) -> Result<T, RuntimeError> + Send + 'static,
    ) -> Result<T, RuntimeError> {
        let shared = Arc::clone(self);
        match tokio::task::spawn_blocking(move || work(&shared.engine)).await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(error) => {
                    let source = io::Error::new(io::ErrorKind::Interrupted, error);
                    Err(RuntimeError::Io {
                        what: "the agent is shutting down".to_owned(),
                        source,
                    })
                }
            },
        }
    }

    /// Waits for the end of a shim (or of a program whose shim is gone) in the background and tells it.
    fn watch(
        self: &Arc<Self>,
        session: &SessionName,
        generation: Generation,
        process: ProcessId,
        child: Option<Child>,
    ) {
        {
            let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
            if watched.get(session) == Some(&process) {
                return;
            }
            watched.insert(session.clone(), process);
        }
        let (weak, stopped) = (Arc::downgrade(self), self.stopped.clone());
        let session = session.clone();
        tokio::spawn(async move {
            let mut next = Some((process, child));
            while let Some((process, child)) = next.take() {
                let waited = tokio::select! {
                    waited = wait_for_end(process, child) => waited,
                    () = stopped.cancelled() => return,
                };
                if let Err(error) = waited {
                    tracing::error!(%session, %process, %error, "an exit cannot be watched for");
                }
                let Some(shared) = weak.upgrade() else { return };
                let name = session.clone();
                // The lock is waited for, so a stop under way removes the session first and nothing is told.
                match shared
                    .blocking(move |engine| engine.after_end(&name, generation, process))
                    .await
                {
                    Ok(engine::AfterEnd::Tell { token, exit }) => {
                        tracing::info!(%session, generation, %exit, "session ended");
                        let event = RuntimeEvent::Exited {
                            session: session.clone(),
                            generation,
                            token,
                            exit,
                        };
                        // Nobody listening is fine: a list tells the same.
                        let _ = shared.events.send(event);
                    }
                    Ok(engine::AfterEnd::GoesOn { program }) => next = Some((program, None)),
                    Ok(engine::AfterEnd::Nothing) => {}
                    Err(error) => tracing::error!(%session, %error, "how a session ended cannot be read"),
                }
                if next.is_none() {
                    let mut watched = shared.watched.lock().unwrap_or_else(PoisonError::into_inner);
                    if watched.get(&session) == Some(&process) {
                        watched.remove(&session);
                    }
                }
            }
        });
    }
}

async fn wait_for_end(process: ProcessId, child: Option<Child>) -> io::Result<()> {
    if let Some(held) = process.open()? {
        lifeline::ended(held).await?;
    }
    if let Some(mut child) = child {
        // It has ended, so this only takes it off the process table.
        tokio::task::spawn_blocking(move || child.wait())
            .await
            .map_err(io::Error::other)??;
    }
    Ok(())
}

/// Returns when something accepts connections on the port, the session has ended or the time is over.
async fn wait_for_port(port: u16, limit: Duration, shim: Option<ProcessId>) {
    let ready = async {
        while tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port))
            .await
            .is_err()
        {
            if shim.is_some_and(|shim| !shim.is_alive()) {
                return;
            }
            tokio::time::sleep(PORT_INTERVAL).await;
        }
    };
    if tokio::time::timeout(limit, ready).await.is_err() {
        tracing::debug!(port, "session does not serve its port yet");
    }
}

/// What tells this machine from others that may have the same data folder path.
fn machine_id() -> String {
    [
        "/etc/machine-id",
        "/var/lib/dbus/machine-id",
        "/proc/sys/kernel/hostname",
    ]
    .into_iter()
    .filter_map(|path| std::fs::read_to_string(path).ok())
    .map(|id| id.trim().to_owned())
    .find(|id| !id.is_empty())
    .unwrap_or_else(|| "unknown".to_owned())
}
