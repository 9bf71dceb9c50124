//! Ports on loopback for the nodes of `regent dev`.

use std::net::TcpListener;

use anyhow::Context as _;
use rand::RngExt as _;

/// Where ports are chosen from: below those that systems give to outgoing connections (from 32768 on
/// Linux, 49152 elsewhere). A port among those is taken by anybody's connection before its node listens.
const RANGE: std::ops::Range<u16> = 10_000..32_768;
/// Ports that are tried before it is given up; a machine with so many taken in a row has none.
const TRIES: usize = 1_000;

/// Ports that were free a moment ago, all different. They are held together while choosing, so
/// that none is given twice; at random, so that two that choose at once do not choose the same.
pub(super) fn free(count: usize) -> anyhow::Result<Vec<u16>> {
    let mut rng = rand::rng();
    let listeners: Vec<TcpListener> = (0..TRIES)
        .filter_map(|_| TcpListener::bind(("127.0.0.1", rng.random_range(RANGE))).ok())
        .take(count)
        .collect();
    anyhow::ensure!(
        listeners.len() == count,
        "no free port on loopback from {} to {}",
        RANGE.start,
        RANGE.end
    );
    listeners.iter().map(|l| Ok(l.local_addr()?.port())).collect()
}

/// Checks that ports are free, to say so before anything is started.
pub(super) fn check(ports: impl IntoIterator<Item = u16>) -> anyhow::Result<()> {
    for port in ports {
        TcpListener::bind(("127.0.0.1", port)).with_context(|| {
            format!("port {port} on 127.0.0.1 is taken; choose others with --http-port, 0 for any")
        })?;
    }
    Ok(())
}
