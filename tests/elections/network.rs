//! A network of hosts for one test: a namespace each, on a bridge in a namespace of its own, and links that can
//! be cut in one direction.
//!
//! Nothing of it is in the machine's own network: the ends of all cables are made in the namespaces, the
//! addresses mean nothing outside, and the bridge is not subject to whatever rules the machine has for
//! forwarding (dockerd's drop everything). The names hold the pid and a number, so that tests do not meet; all
//! of it is gone with the value. Needs root, `ip` and `iptables`.

use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Networks of this process so far.
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// What a host that is cut off from others does not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Nothing that it sends arrives.
    Sending,
    /// Nothing arrives at it.
    Receiving,
    Both,
}

impl Cut {
    /// The chains of its rules, and which address they look at.
    fn rules(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Sending => &[("OUTPUT", "--destination")],
            Self::Receiving => &[("INPUT", "--source")],
            Self::Both => &[("OUTPUT", "--destination"), ("INPUT", "--source")],
        }
    }
}

/// Hosts that reach one another, by their index from 0.
pub(crate) struct Network {
    name: String,
    /// The namespaces that were made.
    made: Vec<String>,
}

impl Network {
    /// So many hosts; an error says what this machine lacks for it.
    pub(crate) fn new(hosts: usize) -> Result<Self, String> {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let mut network = Self {
            name: format!("regent-test-{}-{count}", std::process::id()),
            made: Vec::new(),
        };
        let hub = network.hub();
        network.add(hub.clone())?;
        ip(&["-n", &hub, "link", "add", "hub", "type", "bridge"])?;
        ip(&["-n", &hub, "link", "set", "hub", "up"])?;
        for host in 0..hosts {
            let namespace = network.namespace(host);
            let address = format!("{}/24", network.address(host));
            let port = format!("port{host}");
            network.add(namespace.clone())?;
            ip(&[
                "-n", &namespace, "link", "add", "eth0", "type", "veth", "peer", "name", &port, "netns", &hub,
            ])?;
            ip(&["-n", &hub, "link", "set", &port, "master", "hub", "up"])?;
            ip(&["-n", &namespace, "address", "add", &address, "dev", "eth0"])?;
            ip(&["-n", &namespace, "link", "set", "lo", "up"])?;
            ip(&["-n", &namespace, "link", "set", "eth0", "up"])?;
            // Whether rules can be made is known before anything depends on it.
            network.rule(host, &["--list-rules"])?;
        }
        Ok(network)
    }

    /// Where the others reach a host.
    #[allow(clippy::unused_self)] // all networks have the same addresses, and nobody needs to know
    pub(crate) fn address(&self, host: usize) -> String {
        format!("10.77.0.{}", host + 1)
    }

    /// The command, to run on a host. It replaces what starts it, so the pid is its own.
    pub(crate) fn on(&self, host: usize, command: &Command) -> Command {
        let mut there = Command::new("ip");
        there
            .args(["netns", "exec", &self.namespace(host)])
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => there.env(name, value),
                None => there.env_remove(name),
            };
        }
        there
    }

    /// A host, for a thread that wants to be there.
    pub(crate) fn inside(&self, host: usize) -> Inside {
        Inside(format!("/run/netns/{}", self.namespace(host)))
    }

    /// Cuts a host off from some others, until it is healed.
    pub(crate) fn cut(&self, host: usize, others: &[usize], cut: Cut) {
        let others: Vec<String> = others.iter().map(|other| self.address(*other)).collect();
        for (chain, side) in cut.rules() {
            let rule = ["--append", chain, side, &others.join(","), "--jump", "DROP"];
            self.rule(host, &rule).expect("rules were made before");
        }
    }

    /// Takes all cuts of a host back.
    pub(crate) fn heal(&self, host: usize) {
        self.rule(host, &["--flush"]).expect("rules were made before");
    }

    fn rule(&self, host: usize, rule: &[&str]) -> Result<(), String> {
        // Waits for whoever else changes rules.
        ip(&[
            &["netns", "exec", &self.namespace(host), "iptables", "--wait"],
            rule,
        ]
        .concat())
    }

    fn add(&mut self, namespace: String) -> Result<(), String> {
        ip(&["netns", "add", &namespace])?;
        self.made.push(namespace);
        Ok(())
    }

    fn hub(&self) -> String {
        format!("{}-hub", self.name)
    }

    fn namespace(&self, host: usize) -> String {
        format!("{}-{host}", self.name)
    }
}

/// See [`Network::inside`].
pub(crate) struct Inside(String);

impl Inside {
    /// From now on this thread, and every thread and process that it starts, is on that host.
    pub(crate) fn enter(&self) {
        let namespace = std::fs::File::open(&self.0).expect("the namespace was made before");
        rustix::thread::move_into_link_name_space(
            std::os::fd::AsFd::as_fd(&namespace),
            Some(rustix::thread::LinkNameSpaceType::Network),
        )
        .expect("who made a namespace may enter it");
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for namespace in self.made.drain(..) {
            if let Err(error) = ip(&["netns", "delete", &namespace]) {
                eprintln!("{error}");
            }
        }
    }
}

fn ip(args: &[&str]) -> Result<(), String> {
    let told = |why: &dyn std::fmt::Display| format!("`ip {}` failed: {why}", args.join(" "));
    let done = Command::new("ip").args(args).stdin(Stdio::null()).output();
    match done {
        Ok(Output { status, .. }) if status.success() => Ok(()),
        Ok(Output { stderr, .. }) => Err(told(&String::from_utf8_lossy(&stderr).trim())),
        Err(error) => Err(told(&error)),
    }
}
