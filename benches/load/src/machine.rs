//! The machine, and how busy it is with other things: a figure without them says nothing.

use std::path::Path;

use serde::Serialize;

use crate::disk::Disk;

/// The 1-minute load average above which others are at work.
const QUIET_LOAD: f64 = 0.5;

/// Where it was measured.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    /// In units of 2^30 bytes.
    pub(crate) memory_gib: f64,
    pub(crate) kernel: String,
    pub(crate) disk: Disk,
    /// Over a minute, before anything was measured.
    pub(crate) load_before: f64,
}

impl Machine {
    pub(crate) fn of(data: &Path, disk_for: std::time::Duration) -> anyhow::Result<Self> {
        let load_before = read("/proc/loadavg")
            .split(' ')
            .next()
            .and_then(|load| load.parse().ok());
        let kib = field("/proc/meminfo", "MemTotal")
            .trim_end_matches("kB")
            .trim()
            .parse::<f64>();
        Ok(Self {
            cpu: field("/proc/cpuinfo", "model name"),
            cores: std::thread::available_parallelism()?.get(),
            memory_gib: kib.unwrap_or_default() / f64::from(1 << 20),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            disk: Disk::measure(data, disk_for)?,
            load_before: load_before.unwrap_or_default(),
        })
    }

    pub(crate) fn text(&self) -> String {
        let mut text = format!(
            "{} cores of {}, {:.0} GiB, Linux {}, {}: {:.0} appends of 4 KiB with fdatasync a second, {:.0} in place",
            self.cores,
            self.cpu,
            self.memory_gib,
            self.kernel,
            self.disk.file_system,
            self.disk.appends,
            self.disk.overwrites,
        );
        if self.load_before > QUIET_LOAD {
            text.push_str(&format!(
                "\nTHE MACHINE IS NOT QUIET: its load was {} before anything was started",
                self.load_before
            ));
        }
        text
    }
}

/// Seconds of CPU that were used on the whole machine since it started; those that a hypervisor took included.
pub(crate) fn busy() -> f64 {
    let stat = read("/proc/stat");
    let ticks = stat
        .lines()
        .next()
        .map(|line| line.split_whitespace().skip(1))
        .into_iter()
        .flatten();
    // user nice system idle iowait irq softirq steal; what guests use is in user already.
    let counted = ticks.take(8).enumerate().filter(|(n, _)| !matches!(n, 3 | 4));
    counted
        .filter_map(|(_, ticks)| ticks.parse::<f64>().ok())
        .sum::<f64>()
        / crate::process::TICKS
}

fn field(path: &str, name: &str) -> String {
    let text = read(path);
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'));
    line.unwrap_or("unknown").trim().to_owned()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_worked() {
        assert!(busy() > 0.0);
        assert_ne!(field("/proc/meminfo", "MemTotal"), "unknown");
        assert_eq!(field("/proc/meminfo", "no such thing"), "unknown");
    }
}
