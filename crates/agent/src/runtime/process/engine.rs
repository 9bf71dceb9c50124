//! The process runtime's actions, synchronous: each takes the session's lock, passes the fence, looks at
//! what is there, and only then acts.
//!
//! Invariant: what an action decides by was read under the session's lock, from disk and `/proc`, never
//! from memory. A launch that fails has ended everything it began before the error is told.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use regent_types::{SessionName, Token};

use super::super::{
    Exit, Generation, HibernateMode, Observed, ObservedState, RuntimeError, SessionRef, StartSpec, Stop,
};
use super::ProcessOptions;
use super::layout::{self, Hibernated, Launch, Layout, Running, SessionFolder, boot_id, now_ms};
use super::scan::Scan;
use super::{end, limits};
use crate::fence::Fence;
use crate::files;
use crate::lifeline::ProcessId;

/// How long a shim may take to end after its program: it sweeps up for two seconds and syncs a file.
const SHIM_WAIT: Duration = Duration::from_secs(4);

/// The grace of a generation that is replaced, and of a session that hibernates by ending.
const REPLACE_GRACE: Duration = Duration::from_secs(10);

/// How often a list looks again at sessions that are being replaced just then. One that is still not
/// settled is left out: the action that is at it tells how it went.
const LOOKS_AGAIN: usize = 3;

/// A session that was started, or found to be there.
#[derive(Debug)]
pub(super) struct Launched {
    pub(super) observed: Observed,
    /// The process to watch, if it runs.
    pub(super) shim: Option<ProcessId>,
    /// The shim as our child, to be taken off the process table when it ends.
    pub(super) child: Option<Child>,
    /// How long to wait for its port, if it was started just now.
    pub(super) ready_within: Option<Duration>,
}

/// What to do when a watched process has ended.
#[derive(Debug)]
pub(super) enum AfterEnd {
    /// The session has ended by itself.
    Tell { token: Token, exit: Exit },
    /// Only the shim has; the program is still there.
    GoesOn { program: ProcessId },
    /// It was stopped, hibernated or replaced.
    Nothing,
}

/// What was found of a session, and which process to watch.
struct Look {
    observed: Observed,
    watch: Option<ProcessId>,
    launch: Option<Launch>,
}

impl Look {
    /// Whether there is a record of its start, no process, and no record of its end.
    fn is_gone_without_a_word(&self) -> bool {
        self.observed.state == ObservedState::Exited(Exit::Unknown)
    }
}

#[derive(Debug)]
pub(super) struct Engine {
    pub(super) options: ProcessOptions,
    pub(super) layout: Layout,
    fence: Fence,
    boot: String,
    /// Ports given to sessions by this process: the system may offer one again before it is bound.
    pub(super) ports: Mutex<BTreeMap<SessionName, u16>>,
}

impl Engine {
    pub(super) fn open(options: ProcessOptions) -> Result<Self, RuntimeError> {
        let layout = Layout::open(&options.data).map_err(io_error(format!(
            "cannot open the data folder {}",
            options.data.display()
        )))?;
        let fence = Fence::open(layout.data())?;
        Ok(Self {
            options,
            layout,
            fence,
            boot: boot_id(),
            ports: Mutex::default(),
        })
    }

    pub(super) fn data(&self) -> &Path {
        self.layout.data()
    }

    pub(super) fn log_file(&self, session: &SessionName) -> PathBuf {
        self.layout.session(session).log_file()
    }

    pub(super) fn take_over(&self, token: Token) -> Result<(), RuntimeError> {
        Ok(self.fence.admit(token)?)
    }

    pub(super) fn start(&self, spec: &StartSpec) -> Result<Launched, RuntimeError> {
        let lock = self.lock(&spec.session)?;
        self.fence.admit(spec.token)?;
        let folder = self.layout.session(&spec.session);
        match self.look(&folder, &Scan::take().map_err(io_error("cannot read /proc"))?)? {
            Some(look) if look.observed.generation > spec.generation => {
                return Err(RuntimeError::StaleGeneration {
                    session: spec.session.clone(),
                    have: look.observed.generation,
                    asked: spec.generation,
                });
            }
            Some(look) if look.observed.generation == spec.generation => {
                return Ok(Launched {
                    shim: look.watch,
                    child: None,
                    ready_within: None,
                    observed: look.observed,
                });
            }
            // An older generation, or what an agent left that died in the middle of a start.
            _ => self.remove(&spec.session, &folder, REPLACE_GRACE)?,
        }
        let launched = self.launch(spec, &folder);
        if launched.is_err() {
            match self.remove(&spec.session, &folder, Duration::ZERO) {
                Ok(()) => lock.remove(),
                Err(error) => {
                    tracing::error!(session = %spec.session, %error, "a failed start left something");
                }
            }
        }
        launched
    }

    pub(super) fn stop(&self, session: &SessionRef, how: Stop) -> Result<(), RuntimeError> {
        let lock = self.lock(&session.session)?;
        self.fence.admit(session.token)?;
        let folder = self.layout.session(&session.session);
        if let Some(look) = self.look(&folder, &Scan::take().map_err(io_error("cannot read /proc"))?)?
            && look.observed.generation > session.generation
        {
            return Err(RuntimeError::StaleGeneration {
                session: session.session.clone(),
                have: look.observed.generation,
                asked: session.generation,
            });
        }
        let launch = folder
            .launch()
            .map_err(|error| incomplete(&session.session, &error))?;
        self.remove(&session.session, &folder, how.grace)?;
        if let Some(Launch { spec, .. }) =
            launch.filter(|launch| how.delete_home && launch.spec.persistent_home)
        {
            self.delete_home(&spec)?;
        }
        lock.remove();
        Ok(())
    }

    /// Deletes a persistent home, unless another session has it.
    fn delete_home(&self, spec: &StartSpec) -> Result<(), RuntimeError> {
        let failed = io_error("cannot delete the session's home");
        let delete = || {
            for entry in fs::read_dir(self.layout.sessions())? {
                let other = SessionFolder { path: entry?.path() };
                let same = |other: Launch| {
                    let other = other.spec;
                    other.persistent_home
                        && (other.user, &other.template) == (spec.user.clone(), &spec.template)
                };
                if other.launch()?.is_some_and(same) {
                    tracing::info!(session = %spec.session, "its home stays: another session has it too");
                    return Ok(());
                }
            }
            match fs::remove_dir_all(self.layout.home(&spec.user, &spec.template)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            }
        };
        delete().map_err(failed)
    }

    pub(super) fn hibernate(&self, session: &SessionRef) -> Result<Observed, RuntimeError> {
        let _lock = self.lock(&session.session)?;
        self.fence.admit(session.token)?;
        let folder = self.layout.session(&session.session);
        let look = self.existing(session, &folder)?;
        let mut observed = look.observed;
        if let ObservedState::Exited(exit) = observed.state {
            return Err(RuntimeError::WrongState {
                session: session.session.clone(),
                action: "hibernate",
                state: exit.to_string(),
            });
        }
        // Marked first: a crash in between leaves a session that is told as hibernated, and the command
        // comes again and does the rest.
        if observed.state == ObservedState::Running {
            files::write_json(&folder.hibernated_file(), &Hibernated { at_ms: now_ms() })
                .map_err(io_error("cannot mark the session as hibernated"))?;
        }
        match mode(look.launch.as_ref()) {
            HibernateMode::Stop => end::freeze(&folder.path),
            HibernateMode::Restart => end::end_members(&folder.path, REPLACE_GRACE, None)
                .and_then(|()| end::end_shims(&folder.path, SHIM_WAIT)),
        }
        .map_err(|error| incomplete(&session.session, &error))?;
        observed.state = ObservedState::Hibernated;
        Ok(observed)
    }

    pub(super) fn wake(&self, session: &SessionRef) -> Result<Launched, RuntimeError> {
        let _lock = self.lock(&session.session)?;
        self.fence.admit(session.token)?;
        let folder = self.layout.session(&session.session);
        let look = self.existing(session, &folder)?;
        let Look {
            mut observed,
            watch,
            launch,
        } = look;
        let unmark = || {
            files::remove_synced(&folder.hibernated_file())
                .map_err(io_error("cannot remove the mark of a hibernated session"))
        };
        match (observed.state, mode(launch.as_ref())) {
            (ObservedState::Exited(exit), _) => Err(RuntimeError::WrongState {
                session: session.session.clone(),
                action: "wake",
                state: exit.to_string(),
            }),
            (ObservedState::Hibernated, HibernateMode::Restart) => {
                let mut spec = launch.expect("the mode was read from it").spec;
                spec.token = session.token;
                // A hibernate or a wake that was cut off may have left processes; they would run twice.
                end::end_shims(&folder.path, Duration::ZERO)
                    .and_then(|()| end::end_members(&folder.path, Duration::ZERO, None))
                    .map_err(|error| incomplete(&session.session, &error))?;
                for old in [folder.process_file(), folder.exit_file()] {
                    files::remove_synced(&old).map_err(io_error("cannot remove an old record"))?;
                }
                let launched = self.launch(&spec, &folder).inspect_err(|_| {
                    // Back to hibernated: the mark and the files are still there.
                    let ended = end::end_shims(&folder.path, Duration::ZERO)
                        .and_then(|()| end::end_members(&folder.path, Duration::ZERO, None));
                    if let Err(error) = ended {
                        tracing::error!(session = %session.session, %error, "a failed wake left something");
                    }
                })?;
                unmark()?;
                Ok(launched)
            }
            (ObservedState::Running | ObservedState::Hibernated, _) => {
                // Also when it runs: a wake that was cut off may have continued only a part.
                end::thaw(&folder.path).map_err(io_error("cannot continue the session's processes"))?;
                unmark()?;
                observed.state = ObservedState::Running;
                Ok(Launched {
                    observed,
                    shim: watch,
                    child: None,
                    ready_within: None,
                })
            }
        }
    }

    /// All sessions, with the process to watch for each that is not over.
    pub(super) fn list(&self) -> Result<Vec<(Observed, Option<ProcessId>)>, RuntimeError> {
        let mut folders = BTreeSet::new();
        let sessions = self.layout.sessions();
        for entry in fs::read_dir(&sessions).map_err(io_error("cannot read the sessions folder"))? {
            folders.insert(entry.map_err(io_error("cannot read the sessions folder"))?.path());
        }
        let scan = Scan::take().map_err(io_error("cannot read /proc"))?;
        folders.extend(scan.folders(&sessions));
        let mut found = Vec::with_capacity(folders.len());
        let mut doubtful = Vec::new();
        for path in folders {
            let folder = SessionFolder { path };
            match self.look(&folder, &scan)? {
                Some(look) if look.is_gone_without_a_word() => doubtful.push((folder, look.observed.pid)),
                Some(look) => found.push((look.observed, look.watch)),
                None => {}
            }
        }
        // No lock keeps the sessions still here: one that was started after the scan has a record already
        // and no process yet to be seen. Only a scan that is younger than the record can miss a process.
        for _ in 0..LOOKS_AGAIN {
            if doubtful.is_empty() {
                break;
            }
            let scan = Scan::take().map_err(io_error("cannot read /proc"))?;
            for (folder, before) in std::mem::take(&mut doubtful) {
                match self.look(&folder, &scan)? {
                    Some(look) if look.is_gone_without_a_word() && look.observed.pid != before => {
                        doubtful.push((folder, look.observed.pid));
                    }
                    Some(look) => found.push((look.observed, look.watch)),
                    None => {}
                }
            }
        }
        found.sort_by(|(a, _), (b, _)| a.session.cmp(&b.session));
        Ok(found)
    }

    /// Decides what the end of a watched process means.
    pub(super) fn after_end(
        &self,
        session: &SessionName,
        generation: Generation,
        process: ProcessId,
    ) -> Result<AfterEnd, RuntimeError> {
        let lock = self.lock(session)?;
        let folder = self.layout.session(session);
        let Some(look) = self.look(&folder, &Scan::take().map_err(io_error("cannot read /proc"))?)? else {
            if !folder.path.exists() {
                lock.remove();
            }
            return Ok(AfterEnd::Nothing);
        };
        let Look { observed, watch, .. } = look;
        let recorded = folder
            .running()
            .map_err(io_error("cannot read the process record"))?;
        if observed.generation != generation
            || recorded.is_some_and(|r| r.shim != process && r.program != process)
        {
            return Ok(AfterEnd::Nothing);
        }
        Ok(match (observed.state, watch) {
            (ObservedState::Exited(exit), _) => AfterEnd::Tell {
                token: observed.token,
                exit,
            },
            (ObservedState::Running | ObservedState::Hibernated, Some(next)) if next != process => {
                AfterEnd::GoesOn { program: next }
            }
            (ObservedState::Running | ObservedState::Hibernated, _) => AfterEnd::Nothing,
        })
    }

    fn lock(&self, session: &SessionName) -> Result<layout::SessionLock, RuntimeError> {
        self.layout
            .lock(session)
            .map_err(io_error("cannot lock the session"))
    }

    fn existing(&self, session: &SessionRef, folder: &SessionFolder) -> Result<Look, RuntimeError> {
        let scan = Scan::take().map_err(io_error("cannot read /proc"))?;
        let look = self.look(folder, &scan)?.ok_or_else(|| RuntimeError::NotFound {
            session: session.session.clone(),
        })?;
        let (have, asked) = (look.observed.generation, session.generation);
        let session = session.session.clone();
        match have.cmp(&asked) {
            std::cmp::Ordering::Equal => Ok(look),
            std::cmp::Ordering::Greater => Err(RuntimeError::StaleGeneration { session, have, asked }),
            std::cmp::Ordering::Less => Err(RuntimeError::OtherGeneration { session, have, asked }),
        }
    }

    /// What there is of a session; `None` if nothing was ever started or only remains of a start are left.
    fn look(&self, folder: &SessionFolder, scan: &Scan) -> Result<Option<Look>, RuntimeError> {
        let read = |what| io_error(format!("cannot read {what} of {}", folder.path.display()));
        let launch = folder.launch().map_err(read("the launch record"))?;
        let running = folder.running().map_err(read("the process record"))?;
        let ended = folder.ended().map_err(read("the exit record"))?;
        let hibernated = folder.is_hibernated().map_err(read("the hibernation mark"))?;
        let running = running.filter(|_| launch.is_some());

        let Some(launch) = launch else {
            return Ok(scan.by_environment(&folder.path).map(|found| {
                let observed = Observed {
                    session: found.session,
                    generation: found.generation,
                    token: found.token,
                    state: if hibernated {
                        ObservedState::Hibernated
                    } else {
                        ObservedState::Running
                    },
                    pid: Some(found.process.pid),
                    port: found.port,
                    url: found.port.map(url),
                    started_at_ms: None,
                    metadata: BTreeMap::from([("found".to_owned(), "by its environment".to_owned())]),
                };
                let watch = scan.shims(&folder.path).first().copied().or(Some(found.process));
                Look {
                    observed,
                    watch,
                    launch: None,
                }
            }));
        };
        let same_boot = running.as_ref().is_some_and(|running| running.boot == self.boot);
        let program = running.as_ref().map(|running| running.program);
        let program_alive = program.filter(|p| same_boot && scan.has_member(&folder.path, *p));
        let shim_alive = scan.shims(&folder.path).first().copied();
        let exit = ended
            .filter(|ended| Some(ended.program) == program)
            .map(|ended| ended.exit);

        let (state, watch) = match (program, exit) {
            (_, None) if program_alive.is_some() => {
                let state = if hibernated {
                    ObservedState::Hibernated
                } else {
                    ObservedState::Running
                };
                (state, shim_alive.or(program_alive))
            }
            _ if hibernated && mode(Some(&launch)) == HibernateMode::Restart => {
                (ObservedState::Hibernated, None)
            }
            (Some(_), Some(exit)) => (ObservedState::Exited(exit), None),
            // The program has ended and the shim is about to say how.
            (Some(_), None) if shim_alive.is_some() => (ObservedState::Running, shim_alive),
            (Some(_), None) => (ObservedState::Exited(Self::last_word(folder, program)), None),
            // Started, but the record was never written: the agent or the machine went down just then.
            (None, _) => match scan.by_environment(&folder.path) {
                Some(found) => {
                    let mut look = Look {
                        observed: describe(&launch, None, ObservedState::Running, folder),
                        watch: shim_alive.or(Some(found.process)),
                        launch: Some(launch),
                    };
                    look.observed.pid = Some(found.process.pid);
                    return Ok(Some(look));
                }
                None => return Ok(None),
            },
        };
        let observed = describe(&launch, running.as_ref(), state, folder);
        Ok(Some(Look {
            observed,
            watch,
            launch: Some(launch),
        }))
    }

    /// How it ended, when neither program nor shim were there any more: the shim may have written it
    /// between our reading of the file and our look at the processes.
    fn last_word(folder: &SessionFolder, program: Option<ProcessId>) -> Exit {
        let ended = folder.ended().ok().flatten();
        ended
            .filter(|ended| Some(ended.program) == program)
            .map_or(Exit::Unknown, |ended| ended.exit)
    }

    /// Ends all processes of a session and removes its folder; persistent homes stay.
    fn remove(
        &self,
        session: &SessionName,
        folder: &SessionFolder,
        grace: Duration,
    ) -> Result<(), RuntimeError> {
        let incomplete = |error: io::Error| incomplete(session, &error);
        let launch = folder.launch().map_err(incomplete)?;
        let cgroup = launch.as_ref().and_then(|launch| launch.cgroup.as_deref());
        if !folder.process_file().try_exists().map_err(incomplete)? {
            // It was never told to have started, and must not start anything from here on.
            end::end_shims(&folder.path, Duration::ZERO).map_err(incomplete)?;
        }
        end::end_members(&folder.path, grace, cgroup).map_err(incomplete)?;
        end::end_shims(&folder.path, SHIM_WAIT).map_err(incomplete)?;
        if let Some(cgroup) = cgroup {
            limits::remove_cgroup(cgroup).map_err(incomplete)?;
        }
        match fs::remove_dir_all(&folder.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(incomplete(error)),
            _ => files::sync_folder(&self.layout.sessions()).map_err(incomplete)?,
        }
        self.ports
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(session);
        Ok(())
    }
}

pub(super) fn describe(
    launch: &Launch,
    running: Option<&Running>,
    state: ObservedState,
    folder: &SessionFolder,
) -> Observed {
    let spec = &launch.spec;
    let mut metadata = spec.metadata.clone();
    metadata.insert("log".to_owned(), folder.log_file().to_string_lossy().into_owned());
    if let Some(running) = running {
        metadata.insert("cpuLimit".to_owned(), running.limits.cpu.clone());
        metadata.insert("memoryLimit".to_owned(), running.limits.memory.clone());
    }
    Observed {
        session: spec.session.clone(),
        generation: spec.generation,
        token: spec.token,
        state,
        pid: running.map(|running| running.program.pid),
        port: launch.port,
        url: launch.port.map(url),
        started_at_ms: running.map(|running| running.started_at_ms),
        metadata,
    }
}

fn url(port: u16) -> String {
    format!("http://127.0.0.1:{port}/")
}

/// A session without a record (its file was damaged) can only be frozen.
fn mode(launch: Option<&Launch>) -> HibernateMode {
    launch
        .and_then(|launch| launch.spec.hibernate)
        .unwrap_or(HibernateMode::Stop)
}

fn incomplete(session: &SessionName, error: &io::Error) -> RuntimeError {
    RuntimeError::StopIncomplete {
        session: session.clone(),
        left: error.to_string(),
    }
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> RuntimeError {
    let what = what.into();
    move |source| RuntimeError::Io { what, source }
}
