//! The shim: the small process between the agent and a session's program.
//!
//! A program must outlive the agent, and an agent that was started again must learn how a program ended
//! that is not its child. So each program is the child of a shim, which is in nobody's way: one thread,
//! no tokio, asleep in `poll`. It leads a kernel session of its own, applies the limits, starts the
//! program in a process group of its own, records both processes, copies the output into the bounded
//! log, and at the end sweeps up what the program left and writes `exit.json`.
//!
//! Invariant: once it has answered `started`, there is either a process to be found (by record or by
//! environment) or a synced `exit.json`. If its lifeline ends, so does all of the session, and then itself,
//! without that record: the session did not end, it was taken along.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::super::Exit;
use super::layout::{Ended, Launch, Reply, Running, SessionFolder, boot_id, now_ms};
use super::log::BoundedLog;
use super::{end, limits};
use crate::files;
use crate::lifeline::{Lifeline, ProcessHandle, ProcessId, Stat, poll_for};

/// How long processes that outlive the program, or all of them when the lifeline ends, may take to end
/// after SIGTERM.
const LEFTOVER_GRACE: Duration = Duration::from_secs(2);

/// How often to look at the program and the lifeline where the kernel has no pidfd.
const POLL_WITHOUT_PIDFD: Duration = Duration::from_millis(200);

/// The pipe's size: one read empties it.
const CHUNK: usize = 64 * 1024;

/// The main function of `regent internal shim --spec FILE`. Answers on standard output with one line.
pub fn shim_main(launch_file: &Path) -> ExitCode {
    match run(launch_file) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            answer(&failure);
            ExitCode::FAILURE
        }
    }
}

fn run(launch_file: &Path) -> Result<(), Reply> {
    let launch = files::read_json::<Launch>(launch_file)
        .and_then(|launch| launch.ok_or_else(|| io::ErrorKind::NotFound.into()))
        .map_err(|error| failed("cannot read its launch file", &error))?;
    let folder = SessionFolder {
        path: launch.folder.clone(),
    };
    // Refused only if this process leads a group already, as when a shell started it.
    if let Err(error) = rustix::process::setsid()
        && rustix::process::getsid(None) != Ok(rustix::process::getpid())
    {
        return Err(failed("cannot make a kernel session", &error.into()));
    }
    let lifeline = match launch.lifeline.map(Lifeline::open).transpose() {
        Ok(Some(lifeline)) if lifeline.has_ended() => {
            return Err(failed("its lifeline", &io::Error::other("has ended already")));
        }
        Ok(lifeline) => lifeline,
        Err(error) => return Err(failed("cannot watch its lifeline", &error)),
    };
    let spec = &launch.spec;
    let limits = limits::apply(launch.cgroup.as_deref(), spec.cpu_milli, spec.memory_bytes)
        .map_err(|error| failed("cannot apply the limits", &error))?;

    let (output, writer) = io::pipe().map_err(|error| failed("cannot make a pipe", &error))?;
    let mut child = start_program(&launch, writer)?;
    let started = (|| {
        let program = ProcessId {
            pid: child.id(),
            start: Stat::read(child.id())?.start,
        };
        let shim = ProcessId::current()?;
        let running = Running {
            shim,
            program,
            boot: boot_id(),
            started_at_ms: now_ms(),
            limits,
        };
        files::write_json(&folder.process_file(), &running)?;
        Ok(running)
    })();
    let running = match started {
        Ok(running) => running,
        Err(error) => {
            sweep(&launch);
            // Reaped, so that nothing is left when the failure is told.
            let _ = child.wait();
            return Err(failed("cannot record it", &error));
        }
    };
    let program = running.program;
    answer(&Reply::Started(running));

    let mut log = BoundedLog::open(folder.log_file(), launch.log_bytes);
    let status = watch(&launch, &mut child, lifeline.as_ref(), output, &mut log);
    // Ended with `dev`, not by itself: without a record of its exit the next start finds it missing, as after
    // a loss of power, and starts it again.
    if lifeline.as_ref().is_some_and(Lifeline::has_ended) {
        return Ok(());
    }
    let exit = match status {
        Ok(status) => exit_of(status),
        Err(error) => {
            log.append(format!("regent: the program cannot be watched any more: {error}\n").as_bytes());
            Exit::Unknown
        }
    };
    if let Err(error) = files::write_json(
        &folder.exit_file(),
        &Ended {
            program,
            exit,
            at_ms: now_ms(),
        },
    ) {
        log.append(format!("regent: how the program ended cannot be recorded: {error}\n").as_bytes());
    }
    Ok(())
}

fn start_program(launch: &Launch, writer: io::PipeWriter) -> Result<Child, Reply> {
    let stderr = writer
        .try_clone()
        .map_err(|error| failed("cannot copy a descriptor", &error))?;
    Command::new(&launch.program)
        .args(&launch.args)
        .env_clear()
        .envs(&launch.env)
        .current_dir(&launch.home)
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(stderr)
        .process_group(0)
        .spawn()
        .map_err(|error| failed(&format!("cannot start {:?}", launch.program), &error))
}

/// Copies output until the program has ended, or the lifeline has and ends it. All that is left of the
/// session is gone afterwards.
fn watch(
    launch: &Launch,
    child: &mut Child,
    lifeline: Option<&Lifeline>,
    mut output: io::PipeReader,
    log: &mut BoundedLog,
) -> io::Result<ExitStatus> {
    // A child that was not waited for keeps its number, so this is certainly its pidfd.
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).ok();
    let held = lifeline.and_then(Lifeline::handle);
    let has_pidfds = pidfd.is_some() && held.is_none_or(|held| held.pidfd().is_some());
    let mut buffer = vec![0; CHUNK];
    let mut output_open = true;
    let status = loop {
        let mut fds = Vec::with_capacity(3);
        if output_open {
            fds.push(PollFd::from_borrowed_fd(output.as_fd(), PollFlags::IN));
        }
        fds.extend(
            pidfd
                .as_ref()
                .map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)),
        );
        fds.extend(
            held.and_then(ProcessHandle::pidfd)
                .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)),
        );
        poll_for(&mut fds, (!has_pidfds).then_some(POLL_WITHOUT_PIDFD))?;
        if output_open && !fds[0].revents().is_empty() {
            match output.read(&mut buffer)? {
                0 => output_open = false,
                n => log.append(&buffer[..n]),
            }
        }
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if lifeline.is_some_and(Lifeline::has_ended) {
            log.append(b"regent: ended, because the process that it was started for is gone\n");
            sweep(launch);
            break child.wait()?;
        }
    };
    sweep(launch);
    drain(&mut output, &mut buffer, log);
    Ok(status)
}

/// Ends what is left of the session. What survives even that is found again by the agent's own look.
fn sweep(launch: &Launch) {
    let _ = end::end_members(&launch.folder, LEFTOVER_GRACE, None);
}

/// Takes what is still in the pipe, without waiting for anybody who may hold its other end.
fn drain(output: &mut io::PipeReader, buffer: &mut [u8], log: &mut BoundedLog) {
    if rustix::fs::fcntl_setfl(output.as_fd(), rustix::fs::OFlags::NONBLOCK).is_err() {
        return;
    }
    // The writers are gone, so what is left is what fits a pipe; a survivor cannot hold this up for ever.
    for _ in 0..32 {
        match output.read(buffer) {
            Ok(n) if n > 0 => log.append(&buffer[..n]),
            _ => return,
        }
    }
}

fn exit_of(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::Unknown,
    }
}

fn failed(what: &str, error: &io::Error) -> Reply {
    let for_good = matches!(
        error.kind(),
        io::ErrorKind::NotFound
            | io::ErrorKind::PermissionDenied
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::ArgumentListTooLong
    ) || error.raw_os_error() == Some(rustix::io::Errno::NOEXEC.raw_os_error());
    Reply::Failed {
        reason: format!("{what}: {error}"),
        for_good,
    }
}

fn answer(reply: &Reply) {
    let mut line = serde_json::to_vec(reply).expect("a reply is always JSON");
    line.push(b'\n');
    // Who asked may be gone; the records tell the next one.
    let mut out = io::stdout().lock();
    let _ = out.write_all(&line).and_then(|()| out.flush());
}
