//! Limits on processor time and memory, as far as the machine lets us set them, and in words.
//!
//! With a control group (v2) of our own to put sessions in, both limits hold for the whole session. Without
//! one there is `RLIMIT_DATA`, which bounds the private writable memory of each process by itself, and
//! nothing that bounds processor time. Invariant: what is reported is what was applied, not what was asked.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::process::{Resource, Rlimit, setrlimit};
use serde::{Deserialize, Serialize};

/// The period over which the kernel shares out processor time, in microseconds: its own default.
const CPU_PERIOD_US: u64 = 100_000;

/// The smallest quota that the kernel takes, in microseconds.
const CPU_QUOTA_MIN_US: u64 = 1_000;

/// A memory limit below this would end the shim itself, which lives under it too without a control group.
const MEMORY_MIN: u64 = 16 * 1024 * 1024;

/// What was applied, in words for the session's metadata.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Applied {
    pub(crate) cpu: String,
    pub(crate) memory: String,
}

/// The control group under which sessions may get groups of their own: one above this process's, if
/// whoever manages the machine says that it is ours (`Delegate=yes` and a `DelegateSubgroup=` in systemd).
pub(crate) fn delegated_cgroup() -> Option<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let parent = Path::new("/sys/fs/cgroup").join(own).parent()?.to_owned();
    let delegated = ["trusted.delegate", "user.delegate"].into_iter().any(|name| {
        let mut value = [0; 8];
        rustix::fs::getxattr(&parent, name, &mut value).is_ok_and(|n| value.get(..n) == Some(b"1".as_slice()))
    });
    let controllers = fs::read_to_string(parent.join("cgroup.controllers")).ok()?;
    (delegated
        && controllers
            .split_ascii_whitespace()
            .any(|c| c == "memory" || c == "cpu"))
    .then_some(parent)
}

/// Puts this process, and what it will start, under the limits.
pub(crate) fn apply(
    cgroup: Option<&Path>,
    cpu_milli: Option<u64>,
    memory_bytes: Option<u64>,
) -> io::Result<Applied> {
    if let Some(cgroup) = cgroup {
        match enter_cgroup(cgroup, cpu_milli, memory_bytes) {
            Ok(applied) => return Ok(applied),
            Err(_) => remove_cgroup(cgroup)?,
        }
    }
    let memory = match memory_bytes.map(|bytes| bytes.max(MEMORY_MIN)) {
        Some(bytes) => {
            setrlimit(
                Resource::Data,
                Rlimit {
                    current: Some(bytes),
                    maximum: Some(bytes),
                },
            )?;
            format!("{bytes} bytes for each process (RLIMIT_DATA)")
        }
        None => "none asked for".to_owned(),
    };
    let cpu = match cpu_milli {
        Some(_) => "not applied: no control group (v2) is delegated to the agent".to_owned(),
        None => "none asked for".to_owned(),
    };
    Ok(Applied { cpu, memory })
}

fn enter_cgroup(group: &Path, cpu_milli: Option<u64>, memory_bytes: Option<u64>) -> io::Result<Applied> {
    if let Some(parent) = group.parent() {
        // Refused when they are on already by somebody else's hand; then the writes below decide.
        let _ = fs::write(parent.join("cgroup.subtree_control"), "+cpu +memory");
    }
    match fs::create_dir(group) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let memory = match memory_bytes {
        Some(bytes) => {
            fs::write(group.join("memory.max"), bytes.to_string())?;
            // Absent where the kernel has no swap accounting.
            let _ = fs::write(group.join("memory.swap.max"), "0");
            format!("{bytes} bytes for the session (cgroup)")
        }
        None => "none asked for".to_owned(),
    };
    let cpu = match cpu_milli {
        Some(milli) => {
            let quota = (milli.saturating_mul(CPU_PERIOD_US) / 1000).max(CPU_QUOTA_MIN_US);
            fs::write(group.join("cpu.max"), format!("{quota} {CPU_PERIOD_US}"))?;
            format!("{milli}m for the session (cgroup)")
        }
        None => "none asked for".to_owned(),
    };
    fs::write(group.join("cgroup.procs"), "0")?;
    Ok(Applied { cpu, memory })
}

/// Ends whatever is in the group, also what hid from every other search.
pub(crate) fn kill_cgroup(group: &Path) {
    // Absent before Linux 5.14; the removal tells if something is left.
    let _ = fs::write(group.join("cgroup.kill"), "1");
}

/// Removes the group; an error if processes are left in it.
pub(crate) fn remove_cgroup(group: &Path) -> io::Result<()> {
    match fs::remove_dir(group) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_group_gets_the_limits_in_the_kernels_words() {
        // A plain folder takes the same writes; the kernel's own makes the files itself.
        let parent = tempfile::tempdir().unwrap();
        let group = parent.path().join("regent-a-1");
        let applied = apply(Some(&group), Some(250), Some(64 << 20)).unwrap();
        assert_eq!(fs::read_to_string(group.join("cpu.max")).unwrap(), "25000 100000");
        assert_eq!(
            fs::read_to_string(group.join("memory.max")).unwrap(),
            (64 << 20).to_string()
        );
        assert_eq!(fs::read_to_string(group.join("cgroup.procs")).unwrap(), "0");
        assert!(
            applied.cpu.starts_with("250m") && applied.memory.contains("cgroup"),
            "{applied:?}"
        );
    }

    #[test]
    fn what_cannot_be_applied_is_not_claimed() {
        let applied = apply(None, Some(250), None).unwrap();
        assert!(applied.cpu.starts_with("not applied"), "{applied:?}");
        assert_eq!(applied.memory, "none asked for");
    }
}
