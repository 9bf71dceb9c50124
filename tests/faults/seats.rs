//! Which node is on which host.
//!
//! Hosts are numbered from 0 and stay; nodes come and go. A node's id is never used twice, so a host whose node was
//! taken out gets one with another id, as a machine would that is put to use again.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Which program a node runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    /// That of the commit named in `tests/upgrade/previous`.
    Previous,
    This,
}

/// What a node is to its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It was started with a join token and has no vote yet.
    Joining,
    Member,
    /// It is being taken out.
    Leaving,
}

/// A node on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seat {
    pub(crate) id: u64,
    /// It is of the list by which the cluster was founded.
    pub(crate) founder: bool,
    pub(crate) program: Program,
    pub(crate) standing: Standing,
}

/// All hosts that can have a node.
pub(crate) struct Seats(Mutex<All>);

struct All {
    hosts: Vec<Option<Seat>>,
    next: u64,
}

impl Seats {
    /// The founders, each with its program, and so many hosts in all.
    pub(crate) fn new(founders: &[Program], hosts: usize) -> Self {
        let founder = |(program, id): (&Program, u64)| {
            Some(Seat {
                id,
                founder: true,
                program: *program,
                standing: Standing::Member,
            })
        };
        let mut all = All {
            hosts: founders.iter().zip(1..).map(founder).collect(),
            next: u64::try_from(founders.len()).unwrap() + 1,
        };
        all.hosts.resize(hosts, None);
        Self(Mutex::new(all))
    }

    pub(crate) fn at(&self, host: usize) -> Option<Seat> {
        self.lock().hosts[host]
    }

    /// The hosts of nodes that are members and stay so.
    pub(crate) fn members(&self) -> Vec<usize> {
        self.of(|seat| seat.standing == Standing::Member)
    }

    /// The hosts that have a node, whatever it is to the cluster.
    pub(crate) fn taken(&self) -> Vec<usize> {
        self.of(|_| true)
    }

    fn of(&self, which: impl Fn(&Seat) -> bool) -> Vec<usize> {
        let all = self.lock();
        let hosts = all.hosts.iter().enumerate();
        hosts
            .filter(|(_, seat)| seat.as_ref().is_some_and(&which))
            .map(|(host, _)| host)
            .collect()
    }

    /// Where the node of that id is.
    pub(crate) fn host_of(&self, id: u64) -> Option<usize> {
        self.of(|seat| seat.id == id).first().copied()
    }

    /// A new node, on a host that is free.
    pub(crate) fn add(&self) -> Option<usize> {
        let mut all = self.lock();
        let host = all.hosts.iter().position(Option::is_none)?;
        all.hosts[host] = Some(Seat {
            id: all.next,
            founder: false,
            program: Program::This,
            standing: Standing::Joining,
        });
        all.next += 1;
        Some(host)
    }

    pub(crate) fn change(&self, host: usize, change: impl FnOnce(&mut Seat)) {
        if let Some(seat) = &mut self.lock().hosts[host] {
            change(seat);
        }
    }

    pub(crate) fn clear(&self, host: usize) {
        self.lock().hosts[host] = None;
    }

    fn lock(&self) -> MutexGuard<'_, All> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
