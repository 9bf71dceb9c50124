//! Ports on loopback for the nodes of `regent dev`.

use std::collections::BTreeMap;
use std::net::{TcpListener, UdpSocket};

use anyhow::Context as _;
use rand::RngExt as _;

/// Where ports are chosen from: below those that systems give to outgoing connections (from 32768 on
/// Linux, 49152 elsewhere). A port among those is taken by anybody's connection before its node listens.
const RANGE: std::ops::Range<u16> = 10_000..32_768;
/// Ports that are tried before it is given up; a machine with so many taken in a row has none.
const TRIES: usize = 1_000;

/// Ports that were free for TCP when they were chosen, all different, and that no other `dev` chooses
/// while this lives: the UDP port of the same number is held, which nobody's TCP listener minds.
/// So a node may start late, or be killed and started again, and finds its port free.
pub(super) struct Ports(BTreeMap<u16, UdpSocket>);

impl Ports {
    /// Chooses at random, but none of `taken`.
    pub(super) fn choose(count: usize, taken: &[u16]) -> anyhow::Result<Self> {
        let mut rng = rand::rng();
        let mut chosen = BTreeMap::new();
        for _ in 0..TRIES {
            if chosen.len() == count {
                break;
            }
            let address = ("127.0.0.1", rng.random_range(RANGE));
            if !taken.contains(&address.1)
                && let Ok(held) = UdpSocket::bind(address)
                && TcpListener::bind(address).is_ok()
            {
                chosen.insert(address.1, held);
            }
        }
        anyhow::ensure!(
            chosen.len() == count,
            "no free port on loopback from {} to {}",
            RANGE.start,
            RANGE.end
        );
        Ok(Self(chosen))
    }

    /// The ports, in order.
    pub(super) fn numbers(&self) -> impl Iterator<Item = u16> {
        self.0.keys().copied()
    }
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::Ports;

    /// HTTP ports and peer ports once came from two draws, and now and then one was drawn twice.
    #[test]
    fn no_port_is_chosen_twice_while_it_is_held() {
        let draws: Vec<Ports> = (0..40).map(|_| Ports::choose(100, &[]).unwrap()).collect();
        let all: BTreeSet<u16> = draws.iter().flat_map(Ports::numbers).collect();
        assert_eq!(all.len(), 4_000);
    }
}
