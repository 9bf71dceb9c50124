//! What goes wrong: drawn from the seed, one after the other and several at once.

use rand::RngExt;
use rand::rngs::StdRng;
use std::time::Duration;

use crate::cluster::Cluster;
use crate::machine::Machine;
use crate::network::{Host, Link, Network};
use crate::run::AGENT_MACHINES;
use crate::trace::Trace;

/// Pause between two troubles, in milliseconds.
const PAUSE_MS: std::ops::Range<u64> = 200..3_000;
/// How long one lasts.
const LASTS_MS: std::ops::Range<u64> = 100..9_000;

/// What makes trouble.
pub struct Trouble {
    rng: StdRng,
    next: u64,
    /// What ends by itself, and when.
    ends: Vec<(u64, Ends)>,
    /// Machines of agents to be switched on again, and when.
    pub agents_on: Vec<(u64, usize)>,
    /// How many there were, by name.
    pub made: std::collections::BTreeMap<&'static str, u64>,
}

#[derive(Debug, Clone)]
enum Ends {
    Links(Vec<(Host, Host)>),
    SlowDisk(Host),
    Frozen(Host),
    FrozenClient(usize),
    /// Of all machines.
    Power,
}

impl Trouble {
    /// The first one comes after `from`.
    pub fn new(rng: StdRng, from: u64) -> Self {
        Self {
            rng,
            next: from,
            ends: Vec::new(),
            agents_on: Vec::new(),
            made: std::collections::BTreeMap::new(),
        }
    }

    /// Makes what is due, and ends what has lasted.
    pub fn step(
        &mut self,
        cluster: &mut Cluster,
        clients: &mut [Machine],
        network: &Network,
        trace: &Trace,
        now: u64,
    ) {
        let over: Vec<Ends> = self
            .ends
            .extract_if(.., |(at, _)| *at <= now)
            .map(|(_, ends)| ends)
            .collect();
        for ends in over {
            trace.note(now, format_args!("over: {ends:?}"));
            if matches!(ends, Ends::Power) {
                for place in 0..cluster.len() {
                    self.switch_off(cluster, place, true, now);
                }
                continue;
            }
            end(ends, cluster, clients, network, now);
        }
        if self.next > now {
            return;
        }
        self.next = now + self.rng.random_range(PAUSE_MS);
        let what = self.make(cluster, clients, network, now);
        *self.made.entry(what).or_default() += 1;
        trace.note(now, format_args!("trouble: {what}"));
        tracing::info!(now, what, "trouble");
    }

    /// Ends everything: whole links, quick disks, all machines on.
    pub fn end(&mut self, cluster: &mut Cluster, clients: &mut [Machine], network: &Network, now: u64) {
        for (_, ends) in std::mem::take(&mut self.ends) {
            end(ends, cluster, clients, network, now);
        }
        network.heal();
        for place in 0..cluster.len() {
            let member = &cluster.members[place];
            member.disk.set_sync_takes(member.sync_takes);
            if cluster.members[place].disk_failed {
                cluster.switch_off(place, true, |_| 0);
            }
            cluster.switch_on(place, now);
        }
    }

    fn make(
        &mut self,
        cluster: &mut Cluster,
        clients: &mut [Machine],
        network: &Network,
        now: u64,
    ) -> &'static str {
        let size = cluster.len();
        let until = now + self.rng.random_range(LASTS_MS);
        let one = self.rng.random_range(0..size);
        // The leader is worth more trouble than others.
        let one = match cluster.leader() {
            Some(leader) if self.rng.random_bool(0.5) => leader,
            Some(_) | None => one,
        };
        match self.rng.random_range(0..100) {
            0..10 => {
                self.switch_off(cluster, one, false, now);
                "kill"
            }
            10..20 => {
                self.switch_off(cluster, one, true, now);
                "power cut"
            }
            20..24 => {
                let power = self.rng.random_bool(0.7);
                for place in 0..size {
                    self.switch_off(cluster, place, power, now);
                }
                "all machines off"
            }
            24..28 => {
                for place in 0..size {
                    if self.rng.random_bool(0.5) {
                        let power = self.rng.random_bool(0.5);
                        self.switch_off(cluster, place, power, now);
                    }
                }
                "some machines off"
            }
            28..40 => {
                let others = (0..size).filter(|other| *other != one);
                self.cut(
                    network,
                    others.flat_map(|other| [(one, other), (other, one)]).collect(),
                    until,
                );
                "one node is cut off"
            }
            40..45 => {
                let others = (0..size).filter(|other| *other != one);
                self.cut(network, others.map(|other| (other, one)).collect(), until);
                "one node hears nothing"
            }
            45..50 => {
                let others = (0..size).filter(|other| *other != one);
                self.cut(network, others.map(|other| (one, other)).collect(), until);
                "one node is not heard"
            }
            50..54 => {
                let other = (one + 1 + self.rng.random_range(0..size - 1)) % size;
                self.cut(network, vec![(one, other), (other, one)], until);
                "two nodes do not see each other"
            }
            54..57 => {
                // Also from the clients: nobody knows where they are.
                let mut cut = Vec::new();
                for from in 0..size + clients.len() {
                    for to in 0..size + clients.len() {
                        if from != to && self.rng.random_bool(0.25) {
                            cut.push((from, to));
                        }
                    }
                }
                self.cut(network, cut, until);
                "links are cut at random"
            }
            57..62 => {
                let (delay, jitter) = (self.rng.random_range(1..150), self.rng.random_range(0..300));
                let mut slow = Vec::new();
                for other in (0..size + clients.len()).filter(|other| *other != one) {
                    for link in [(one, other), (other, one)] {
                        network.set(link.0, link.1, |link| {
                            link.delay_ms = delay;
                            link.jitter_ms = jitter;
                        });
                        slow.push(link);
                    }
                }
                self.ends.push((until, Ends::Links(slow)));
                "a slow network"
            }
            62..65 => {
                let other = (one + 1 + self.rng.random_range(0..size - 1)) % size;
                network.reset(one, other);
                "connections are reset"
            }
            65..71 => {
                // Storage that is shared is slow for all; and then the power goes.
                let all = self.rng.random_bool(0.5);
                for place in (0..size).filter(|place| all || *place == one) {
                    let takes = Duration::from_millis(self.rng.random_range(1..600));
                    cluster.members[place].disk.set_sync_takes(takes);
                    self.ends.push((until, Ends::SlowDisk(place)));
                }
                if all && self.rng.random_bool(0.5) {
                    let at = self.rng.random_range(now..until);
                    self.ends.push((at, Ends::Power));
                }
                "slow disks"
            }
            71..73 => {
                cluster.members[one].disk.set_failing(true);
                cluster.members[one].disk_failed = true;
                "a disk fails"
            }
            73..83 => {
                if cluster.members[one].machine.is_frozen() {
                    return "nothing";
                }
                cluster.members[one].machine.freeze();
                self.ends.push((until, Ends::Frozen(one)));
                "a node is frozen"
            }
            83..85 => {
                let client = self.rng.random_range(0..clients.len());
                if clients[client].is_frozen() {
                    return "nothing";
                }
                clients[client].freeze();
                self.ends.push((until, Ends::FrozenClient(client)));
                "a client is frozen"
            }
            85..93 => {
                transfer(cluster);
                "leadership is handed over"
            }
            93..98 => {
                // The last machines are those of agents.
                let agent = clients.len() - 1 - self.rng.random_range(0..AGENT_MACHINES);
                if !clients[agent].is_on() {
                    return "nothing";
                }
                if self.rng.random_bool(0.5) {
                    network.go_dark(size + agent);
                }
                clients[agent].switch_off();
                self.agents_on.push((until, agent));
                "an agent's machine goes off"
            }
            _ => {
                let by = self.rng.random_range(-3_600_000..3_600_000);
                cluster.members[one].machine.jump_wall_clock(by);
                "a wall clock jumps"
            }
        }
    }

    fn switch_off(&mut self, cluster: &mut Cluster, place: Host, power: bool, now: u64) {
        let rng = &mut self.rng;
        cluster.switch_off(place, power, |all| rng.random_range(0..=all));
        cluster.members[place].on_at = Some(now + self.rng.random_range(LASTS_MS));
    }

    fn cut(&mut self, network: &Network, links: Vec<(Host, Host)>, until: u64) {
        for (from, to) in &links {
            network.set(*from, *to, |link| link.cut = true);
        }
        self.ends.push((until, Ends::Links(links)));
    }
}

fn end(ends: Ends, cluster: &mut Cluster, clients: &mut [Machine], network: &Network, now: u64) {
    match ends {
        Ends::Links(links) => {
            for (from, to) in links {
                network.set(from, to, |link| *link = Link::default());
            }
        }
        Ends::SlowDisk(place) => {
            let member = &cluster.members[place];
            member.disk.set_sync_takes(member.sync_takes);
        }
        Ends::Frozen(place) => cluster.members[place].machine.thaw(now),
        Ends::FrozenClient(client) => clients[client].thaw(now),
        // It comes back by itself; one that has not gone by the end does not go any more.
        Ends::Power => {}
    }
}

/// Has the leader hand over, to anybody.
fn transfer(cluster: &Cluster) {
    let Some(leader) = cluster.leader() else {
        return;
    };
    if let (Some(node), Some(handle)) = (cluster.node(leader), cluster.members[leader].machine.handle()) {
        handle.spawn(async move {
            let within = tokio::time::Instant::now() + Duration::from_secs(2);
            let _ = node.transfer(None, within).await;
        });
    }
}
