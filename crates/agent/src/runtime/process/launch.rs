//! Starts a session's shim, and through it the program.
//!
//! Invariant: the launch record is synced before anything runs, so what a launch began can be found and
//! ended whenever it is cut off; what is left after an error is the caller's to remove.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use regent_types::SessionName;
use rustix::event::{PollFd, PollFlags};

use super::super::{ENV_SESSION, ObservedState, RuntimeError, StartSpec};
use super::engine::{Engine, Launched, describe};
use super::layout::{ENV_FOLDER, ENV_SHIM, Launch, Reply, SessionFolder, private_folder};
use crate::files;
use crate::lifeline::poll_for;

/// How long a shim may take to start the program: two syncs and two execs, on a machine that is busy.
const LAUNCH_WAIT: Duration = Duration::from_secs(30);

/// How often another free port is asked for when the system offers one that a session of ours was given.
const PORT_TRIES: usize = 64;

/// The longest answer of a shim.
const MAX_REPLY: usize = 64 * 1024;

/// Where programs are looked for when the agent itself has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

impl Engine {
    /// Starts the shim and waits until it has started the program. What is left after an error is the
    /// caller's to remove.
    pub(super) fn launch(&self, spec: &StartSpec, folder: &SessionFolder) -> Result<Launched, RuntimeError> {
        let failed = |what: &str, error: &io::Error| RuntimeError::StartFailed {
            session: spec.session.clone(),
            reason: format!("{what}: {error}"),
        };
        if let Err(reason) = check(spec) {
            return Err(RuntimeError::BadSpec {
                session: spec.session.clone(),
                reason,
            });
        }
        let launch = self
            .prepare(spec, folder)
            .map_err(|error| failed("cannot prepare its folder", &error))?;
        let Some((program, arguments)) = self.options.shim.split_first() else {
            return Err(failed(
                "cannot start the shim",
                &io::ErrorKind::InvalidInput.into(),
            ));
        };
        let mut child = Command::new(program)
            .args(arguments)
            .arg(folder.launch_file())
            .env_clear()
            .env(ENV_SHIM, &folder.path)
            .env(ENV_SESSION, spec.session.as_str())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| failed("cannot start the shim", &error))?;
        let reply = read_reply(&mut child);
        let running = match reply {
            Ok(Reply::Started(running)) => running,
            Ok(Reply::Failed { reason, for_good }) => {
                reap(&mut child);
                let session = spec.session.clone();
                return Err(if for_good {
                    RuntimeError::BadSpec { session, reason }
                } else {
                    RuntimeError::StartFailed { session, reason }
                });
            }
            Err(error) => {
                reap(&mut child);
                return Err(failed("the shim did not answer", &error));
            }
        };
        tracing::info!(
            session = %spec.session, generation = spec.generation, pid = running.program.pid, "session started"
        );
        Ok(Launched {
            observed: describe(&launch, Some(&running), ObservedState::Running, folder),
            shim: Some(running.shim),
            child: Some(child),
            ready_within: spec.port.as_ref().map(|port| port.ready_within),
        })
    }

    /// Makes the folders and the launch record.
    fn prepare(&self, spec: &StartSpec, folder: &SessionFolder) -> io::Result<Launch> {
        let home = if spec.persistent_home {
            self.layout.home(&spec.user, &spec.template)
        } else {
            folder.home()
        };
        private_folder(&folder.path)?;
        private_folder(&home)?;
        files::sync_folder(&self.layout.sessions())?;
        let port = spec
            .port
            .as_ref()
            .map(|_| self.free_port(&spec.session))
            .transpose()?;
        let regent = self.options.regent.to_string_lossy();
        let resolve = |text: &str| text.replace("{regent}", &regent);
        let program = if spec.command == "regent" {
            regent.clone().into_owned()
        } else {
            resolve(&spec.command)
        };
        let cgroup = self
            .options
            .cgroup
            .as_ref()
            .filter(|_| spec.cpu_milli.is_some() || spec.memory_bytes.is_some())
            .map(|parent| parent.join(format!("regent-{}-{}", spec.session, spec.generation)));
        let launch = Launch {
            spec: spec.clone(),
            folder: folder.path.clone(),
            env: environment(spec, folder, &home, port),
            home,
            program,
            args: spec.args.iter().map(|arg| resolve(arg)).collect(),
            port,
            log_bytes: self.options.log_bytes,
            lifeline: self.options.lifeline,
            cgroup,
        };
        files::write_json(&folder.launch_file(), &launch)?;
        Ok(launch)
    }

    /// A port on loopback that nobody listens on and no session of this process was given.
    fn free_port(&self, session: &SessionName) -> io::Result<u16> {
        let mut ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..PORT_TRIES {
            let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
            if !ports
                .iter()
                .any(|(holder, held)| *held == port && holder != session)
            {
                ports.insert(session.clone(), port);
                return Ok(port);
            }
        }
        Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "no free port was offered",
        ))
    }
}

/// What no machine could start. A variable's name with `=` in it could pose as one of Regent's.
fn check(spec: &StartSpec) -> Result<(), String> {
    if spec.command.is_empty() {
        return Err("the template names no program".to_owned());
    }
    spec.check_env()
}

/// The whole environment of a session's program: nothing comes from the agent's but `PATH`, and what
/// Regent sets cannot be replaced by a template.
fn environment(
    spec: &StartSpec,
    folder: &SessionFolder,
    home: &Path,
    port: Option<u16>,
) -> BTreeMap<String, String> {
    let path = std::env::var("PATH").unwrap_or_else(|_| DEFAULT_PATH.to_owned());
    let mut env = BTreeMap::from([
        ("PATH".to_owned(), path),
        ("LANG".to_owned(), "C.UTF-8".to_owned()),
    ]);
    env.extend(spec.env.iter().map(|(name, value)| (name.clone(), value.clone())));
    let places = [
        (ENV_FOLDER, folder.path.to_string_lossy().into_owned()),
        ("HOME", home.to_string_lossy().into_owned()),
    ];
    let ours = spec.regent_env().into_iter().chain(places);
    env.extend(ours.map(|(name, value)| (name.to_owned(), value)));
    env.remove(ENV_SHIM);
    if let Some(port) = port {
        env.insert("PORT".to_owned(), port.to_string());
    }
    env
}

/// Reads the shim's one line, in [`LAUNCH_WAIT`] at most.
fn read_reply(child: &mut Child) -> io::Result<Reply> {
    let mut output = child
        .stdout
        .take()
        .ok_or_else(|| io::Error::other("no pipe to the shim"))?;
    let until = Instant::now() + LAUNCH_WAIT;
    let mut line = Vec::new();
    let mut chunk = [0; 4096];
    while !line.ends_with(b"\n") {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut fds = [PollFd::from_borrowed_fd(output.as_fd(), PollFlags::IN)];
        poll_for(&mut fds, Some(left))?;
        if fds[0].revents().is_empty() {
            continue;
        }
        let n = output.read(&mut chunk)?;
        if n == 0 || line.len() + n > MAX_REPLY {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "it ended without an answer",
            ));
        }
        line.extend_from_slice(&chunk[..n]);
    }
    serde_json::from_slice(&line).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Ends a shim that could not start its program, and takes it off the process table.
fn reap(child: &mut Child) {
    // Both fail only if it is gone already.
    let _ = child.kill();
    let _ = child.wait();
}
