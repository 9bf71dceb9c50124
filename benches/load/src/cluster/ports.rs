//! Ports on loopback for etcd's members.

use std::net::TcpListener;

use anyhow::ensure;

/// Below those that the system gives to outgoing connections: one among those may be taken by anybody's
/// connection before its member listens, or while it is started again.
const RANGE: std::ops::Range<u16> = 10_000..32_768;

/// Ports that are free now.
pub(super) fn choose(count: usize) -> anyhow::Result<Vec<u16>> {
    // Begins somewhere else in each process, so that two benches at a time do not choose the same.
    let begin = u16::try_from(std::process::id() % 20_000)?;
    let all = (RANGE.start + begin..RANGE.end).chain(RANGE.start..RANGE.start + begin);
    let free: Vec<u16> = all
        .filter(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .take(count)
        .collect();
    ensure!(free.len() == count, "no {count} free ports on loopback");
    Ok(free)
}
