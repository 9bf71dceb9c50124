//! Finds the processes of sessions in `/proc`, whoever started them and whether or not it was recorded.
//!
//! A process belongs to a session if its environment carries the session's folder, or if it is in the
//! kernel session (`setsid`) that the shim made, which covers programs that overwrite their environment.
//! Invariant: nothing else is ever taken for a session's process. A kernel session counts only while
//! its shim lives, since only then its number cannot have been given to somebody else; and every
//! process is held as pid with start time.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use regent_types::{SessionName, Token};

use super::super::{ENV_GENERATION, ENV_SESSION, ENV_TOKEN, Generation};
use super::layout::{ENV_FOLDER, ENV_SHIM};
use crate::lifeline::{ProcessId, Stat};

/// The most of an environment that is read. Linux allows more; a marker hidden behind this much is found
/// through the kernel session instead.
const MAX_ENVIRON: u64 = 1024 * 1024;

/// A live process of this machine.
#[derive(Debug, Clone)]
struct Seen {
    process: ProcessId,
    sid: u32,
    state: char,
    mark: Option<Mark>,
}

#[derive(Debug, Clone)]
struct Mark {
    folder: PathBuf,
    is_shim: bool,
    session: Option<SessionName>,
    generation: Generation,
    token: Token,
    port: Option<u16>,
}

/// All live processes at one moment.
#[derive(Debug)]
pub(crate) struct Scan {
    seen: Vec<Seen>,
}

/// What the environment of an unrecorded session's first process tells.
#[derive(Debug, Clone)]
pub(crate) struct FromEnvironment {
    pub(crate) process: ProcessId,
    pub(crate) session: SessionName,
    pub(crate) generation: Generation,
    pub(crate) token: Token,
    pub(crate) port: Option<u16>,
}

impl Scan {
    /// Looks at every process that this user may look at.
    pub(crate) fn take() -> io::Result<Self> {
        let mut seen = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            // Gone meanwhile, or not ours to see: not a process of ours either way.
            if let Ok(Some(process)) = look(pid) {
                seen.push(process);
            }
        }
        Ok(Self { seen })
    }

    /// The folders directly under `sessions` that processes carry in their environment.
    pub(crate) fn folders(&self, sessions: &Path) -> BTreeSet<PathBuf> {
        let marks = self.seen.iter().filter_map(|seen| seen.mark.as_ref());
        marks
            .filter(|mark| mark.folder.parent() == Some(sessions))
            .map(|mark| mark.folder.clone())
            .collect()
    }

    /// The processes of the session in this folder, without the shim.
    pub(crate) fn members(&self, folder: &Path) -> Vec<ProcessId> {
        self.members_seen(folder)
            .into_iter()
            .map(|seen| seen.process)
            .collect()
    }

    /// Those of its processes that are not stopped by a signal, and whether they sleep where no signal reaches them.
    pub(crate) fn unstopped(&self, folder: &Path) -> Vec<(ProcessId, bool)> {
        let members = self.members_seen(folder).into_iter();
        members
            .filter(|seen| seen.state != 'T' && seen.state != 't')
            .map(|seen| (seen.process, seen.state == 'D'))
            .collect()
    }

    /// Its shim, and what the shim has forked but not yet turned into the program.
    pub(crate) fn shims(&self, folder: &Path) -> Vec<ProcessId> {
        let shims = self.seen.iter().filter(|seen| seen.is_shim_of(folder));
        shims.map(|seen| seen.process).collect()
    }

    /// Whether this process, as recorded, is alive and really of this session.
    pub(crate) fn has_member(&self, folder: &Path, process: ProcessId) -> bool {
        self.members(folder).contains(&process)
    }

    /// Reads a session off its processes, when no record tells: the oldest marked one is the program.
    pub(crate) fn by_environment(&self, folder: &Path) -> Option<FromEnvironment> {
        let marked = self.seen.iter().filter(|seen| seen.is_member_of(folder));
        let oldest = marked.min_by_key(|seen| (seen.process.start, seen.process.pid))?;
        let mark = oldest.mark.as_ref()?;
        Some(FromEnvironment {
            process: oldest.process,
            session: mark.session.clone()?,
            generation: mark.generation,
            token: mark.token,
            port: mark.port,
        })
    }

    fn members_seen(&self, folder: &Path) -> Vec<&Seen> {
        // The shim leads the kernel session that it made, so its pid is that session's number.
        let sids: BTreeSet<u32> = self
            .seen
            .iter()
            .filter(|seen| seen.is_shim_of(folder) && seen.sid == seen.process.pid)
            .map(|seen| seen.sid)
            .collect();
        let marked = |seen: &&Seen| seen.is_member_of(folder);
        let in_session = |seen: &&Seen| sids.contains(&seen.sid) && seen.mark.is_none();
        self.seen
            .iter()
            .filter(|seen| marked(seen) || in_session(seen))
            .collect()
    }
}

impl Seen {
    fn is_shim_of(&self, folder: &Path) -> bool {
        self.mark
            .as_ref()
            .is_some_and(|mark| mark.is_shim && mark.folder == folder)
    }

    fn is_member_of(&self, folder: &Path) -> bool {
        self.mark
            .as_ref()
            .is_some_and(|mark| !mark.is_shim && mark.folder == folder)
    }
}

fn look(pid: u32) -> io::Result<Option<Seen>> {
    let stat = Stat::read(pid)?;
    if stat.is_dead() {
        return Ok(None);
    }
    let mark = read_mark(pid)?;
    // The environment must be that of the process whose start time was read.
    if Stat::read(pid)?.start != stat.start {
        return Ok(None);
    }
    Ok(Some(Seen {
        process: ProcessId {
            pid,
            start: stat.start,
        },
        sid: stat.sid,
        state: stat.state,
        mark,
    }))
}

fn read_mark(pid: u32) -> io::Result<Option<Mark>> {
    let mut environ = Vec::new();
    match File::open(format!("/proc/{pid}/environ")) {
        Ok(file) => file.take(MAX_ENVIRON).read_to_end(&mut environ)?,
        // Another user's: it may still be of a session by its kernel session.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
        Err(error) => return Err(error),
    };
    let variable = |name: &str| {
        environ.split(|byte| *byte == 0).find_map(|entry| {
            entry
                .strip_prefix(name.as_bytes())
                .and_then(|rest| rest.strip_prefix(b"="))
        })
    };
    let number =
        |name: &str| variable(name).and_then(|value| str::from_utf8(value).ok()?.parse::<u64>().ok());
    let (folder, is_shim) = match (variable(ENV_FOLDER), variable(ENV_SHIM)) {
        (Some(folder), _) => (folder, false),
        (None, Some(folder)) => (folder, true),
        (None, None) => return Ok(None),
    };
    Ok(Some(Mark {
        folder: PathBuf::from(OsStr::from_bytes(folder)),
        is_shim,
        session: variable(ENV_SESSION).and_then(|value| SessionName::new(str::from_utf8(value).ok()?).ok()),
        generation: number(ENV_GENERATION).unwrap_or(0),
        token: Token(number(ENV_TOKEN).unwrap_or(0)),
        port: number("PORT").and_then(|port| u16::try_from(port).ok()),
    }))
}
