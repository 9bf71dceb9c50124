//! Who uses the cluster: a few machines with a few clients each, and agents.
//!
//! What they did and what they were told is written into one [`Book`], in the time of the simulation, for the
//! checkers of `regent_history`. An answer that did not come is an outcome that nobody knows, not a failure.

pub mod agents;
pub mod http;
pub mod leases;
pub mod registers;
pub mod sessions;
pub mod watches;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use regent_history::fencing::{Grant, Use};
use regent_history::lease::Tenure;
use regent_history::register::Call;
use regent_history::watch::Watched;

use crate::machine::Rate;
use crate::network::{Host, Network};
use crate::trace::Trace;

/// What clients need to know.
#[derive(Clone)]
pub struct World {
    /// The network, which also knows the time.
    pub network: Network,
    /// What happened.
    pub trace: Trace,
    /// What was recorded.
    pub book: Arc<Mutex<Book>>,
    /// How many nodes there are.
    pub nodes: usize,
    /// Set when clients are to come to their end.
    pub ending: Arc<AtomicBool>,
}

impl World {
    /// Whether clients are to come to their end.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    /// The time of the simulation.
    pub fn now(&self) -> u64 {
        self.network.now()
    }

    /// The book.
    pub fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a client is.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Its machine.
    pub host: Host,
    /// That machine's clock.
    pub rate: Rate,
}

/// Everything that was recorded.
#[derive(Default)]
pub struct Book {
    /// Calls, by register.
    pub registers: BTreeMap<String, Vec<Call>>,
    /// Who held which lease when.
    pub leases: BTreeMap<String, Vec<Tenure>>,
    /// Which tokens were given out and used, by lease.
    pub fenced: BTreeMap<String, Fenced>,
    /// What each watcher saw.
    pub watched: Vec<Watched>,
    /// Watches that could not go on where they were, in words.
    pub broken: Vec<String>,
    /// Sessions that were made, with the key of the request.
    pub sessions: Vec<(String, String)>,
    /// How often a quota refused a session.
    pub over_quota: u64,
    /// Requests that were sent twice and made two things, in words.
    pub doubled: Vec<String>,
    /// Answers that no rule allows, in words.
    pub surprises: Vec<String>,
    /// Clients that came to their end.
    pub done: usize,
    /// Answers, by what they said.
    pub answers: BTreeMap<&'static str, u64>,
}

/// The tokens of one lease.
#[derive(Default)]
pub struct Fenced {
    /// Those that were given out.
    pub grants: Vec<Grant>,
    /// What was done under one, and accepted.
    pub accepted: Vec<Use>,
}

impl Book {
    /// Somebody knows since `known` that a token is theirs.
    pub fn granted(&mut self, lease: &str, to: &str, token: u64, known: u64) {
        let to = to.to_owned();
        let grant = Grant { to, token, known };
        self.fenced
            .entry(lease.to_owned())
            .or_default()
            .grants
            .push(grant);
    }

    /// What was asked for under a token at `invoked` was accepted.
    pub fn accepted(&mut self, lease: &str, by: String, token: u64, invoked: u64) {
        let used = Use { by, token, invoked };
        self.fenced
            .entry(lease.to_owned())
            .or_default()
            .accepted
            .push(used);
    }

    /// The record of this holder's time under this token.
    pub fn tenure(&mut self, lease: &str, holder: &str, token: u64) -> &mut Tenure {
        let tenures = self.leases.entry(lease.to_owned()).or_default();
        let known = tenures
            .iter()
            .position(|tenure| tenure.holder == holder && tenure.token == token);
        let place = known.unwrap_or_else(|| {
            tenures.push(Tenure {
                holder: holder.to_owned(),
                token,
                ..Tenure::default()
            });
            tenures.len() - 1
        });
        &mut tenures[place]
    }

    /// This holder is gone: it acts no more under any token.
    pub fn gone(&mut self, holder: &str, now: u64) {
        for tenure in self.leases.values_mut().flatten() {
            if tenure.holder == holder {
                tenure.ended.get_or_insert(now);
            }
        }
    }
}

/// A span of simulated time as a checker takes it: what happens within one millisecond counts as being at the same
/// time, so a begin is before every end of the same millisecond.
pub fn begin(now: u64) -> u64 {
    now * 2
}

/// See [`begin`].
pub fn ended(now: u64) -> u64 {
    now * 2 + 1
}
