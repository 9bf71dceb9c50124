//! A process group: who is in it, and signals to all of it.
//!
//! A signal to a group reaches all members at once, also those that are being forked, so one SIGKILL leaves
//! none. Invariant: a group is only signalled by who knows that its number still means it: while its leader was
//! not reaped (the watchdog), or while one of those that were seen in it lives on (`hold`).

use std::io;

use rustix::process::{Pid, Signal, kill_process_group};

/// A process group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Group(Pid);

impl Group {
    /// The group with this number.
    pub(super) fn of(number: i32) -> Option<Self> {
        // 1 would be everybody, and less is no group.
        Some(number)
            .filter(|number| *number > 1)
            .and_then(Pid::from_raw)
            .map(Self)
    }

    /// Sends a signal to all of it; nobody there is a success.
    pub(super) fn signal(self, signal: Signal) -> io::Result<()> {
        match kill_process_group(self.0, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Asks all of it to end. A stopped process could not act on that.
    pub(super) fn terminate(self) -> io::Result<()> {
        self.signal(Signal::TERM)?;
        self.signal(Signal::CONT)
    }

    /// Whether anybody in it runs: who waits to be reaped does not.
    pub(super) fn is_alive(self) -> io::Result<bool> {
        let number = self.0.as_raw_nonzero().get();
        Ok(processes()?.any(|pid| group_of(pid) == Some(number)))
    }

    pub(super) fn pid(self) -> Pid {
        self.0
    }
}

/// The groups of the processes that were started with this in their environment, but for this one's own.
pub(super) fn groups_with(environment: &[String]) -> Vec<Group> {
    let own = rustix::process::getpgrp();
    let carries = |pid: u32| {
        std::fs::read(format!("/proc/{pid}/environ")).is_ok_and(|bytes| {
            environment.iter().all(|one| {
                bytes
                    .split(|byte| *byte == 0)
                    .any(|other| other == one.as_bytes())
            })
        })
    };
    let Ok(processes) = processes() else {
        return Vec::new();
    };
    processes
        .filter(|pid| *pid != std::process::id() && carries(*pid))
        .filter_map(|pid| Group::of(group_of(pid)?))
        .filter(|group| group.pid() != own)
        .collect()
}

fn processes() -> io::Result<impl Iterator<Item = u32>> {
    Ok(std::fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()))
}

/// The group of a process that runs.
fn group_of(pid: u32) -> Option<i32> {
    parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The second field is the program's name in parentheses and may hold anything, so fields are counted from the
/// last parenthesis: state, parent, group.
fn parse(stat: &str) -> Option<i32> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    let group = fields.nth(1)?.parse().ok()?;
    (!matches!(state, "Z" | "X" | "x")).then_some(group)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt as _;
    use std::process::Command;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn the_dead_are_in_no_group_and_names_shift_no_fields() {
        assert_eq!(parse("7 (a) Z 1 (b) S 1 42 6 0"), Some(42));
        assert_eq!(parse("7 (a) Z 1 42 6 0"), None);
        assert_eq!(parse("nonsense"), None);
    }

    #[test]
    fn a_group_is_alive_until_the_last_of_it_has_ended() {
        // What an earlier run left behind is not meant.
        let this_one = format!("this one of {}", std::process::id());
        let mut leader = Command::new("sh")
            .args(["-c", "sleep 60 & exit 0"])
            .process_group(0)
            .env("REGENT_TEST_GROUP", &this_one)
            .spawn()
            .unwrap();
        let group = Group::of(leader.id().try_into().unwrap()).unwrap();
        leader.wait().unwrap();
        assert!(group.is_alive().unwrap(), "its child is left");
        // In the moment of its exec a process shows no environment.
        let deadline = Instant::now() + Duration::from_secs(10);
        while groups_with(&[format!("REGENT_TEST_GROUP={this_one}")]) != [group] {
            assert!(Instant::now() < deadline, "the group is not found");
            std::thread::yield_now();
        }
        assert_eq!(groups_with(&["REGENT_TEST_GROUP=this".to_owned()]), []);
        group.signal(Signal::KILL).unwrap();
        while group.is_alive().unwrap() {
            std::thread::yield_now();
        }
        group.terminate().unwrap();
        assert_eq!(Group::of(1), None);
        assert_eq!(Group::of(-7), None);
    }
}
