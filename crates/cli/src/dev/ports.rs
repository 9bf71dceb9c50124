//! Ports on loopback for the nodes of `regent dev`.

use std::net::TcpListener;

use anyhow::Context as _;

/// Ports that were free a moment ago, all different. They are held together while choosing, so
/// that none is given twice.
pub(super) fn free(count: usize) -> anyhow::Result<Vec<u16>> {
    let listeners: Vec<TcpListener> = (0..count)
        .map(|_| TcpListener::bind(("127.0.0.1", 0)))
        .collect::<Result<_, _>>()
        .context("no free port on loopback")?;
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
