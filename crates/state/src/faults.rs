//! Faults that are in the code on purpose, to see that the tests find them.
//!
//! A suite that stays green proves something only if it goes red when a rule is broken. Each fault here breaks one
//! rule that the design hangs on. They are compiled only with the feature `faults`, which no release has; without it
//! [`seeded`] is `false` and the compiler drops the broken branch. At most one is seeded in a process, before the
//! process begins its work.

use std::fmt;
use std::str::FromStr;

/// A rule that is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// The log tells openraft that entries are durable before they are written.
    AcknowledgedBeforeSynced,
    /// A vote is granted, and forgotten in a crash.
    VoteNotPersisted,
    /// A linearizable read is answered from what this node happens to have applied.
    StaleRead,
    /// A node that leads again goes on with the lease clock of its last leadership.
    LeaseClockLivesOn,
    /// A leader renews leases without asking a quorum whether it still leads.
    KeepaliveUnconfirmed,
    /// An expiry counts, whoever decided it and under which leadership.
    ForeignExpiry,
    /// A report counts, whichever connection it came over.
    EpochUnchecked,
    /// A request is done again, though its idempotency key has been used.
    RetryAppliedTwice,
    /// Snapshots lack the leases.
    SnapshotDropsTable,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::AcknowledgedBeforeSynced,
        Self::VoteNotPersisted,
        Self::StaleRead,
        Self::LeaseClockLivesOn,
        Self::KeepaliveUnconfirmed,
        Self::ForeignExpiry,
        Self::EpochUnchecked,
        Self::RetryAppliedTwice,
        Self::SnapshotDropsTable,
    ];

    /// Its name in a variable.
    pub fn name(self) -> &'static str {
        match self {
            Self::AcknowledgedBeforeSynced => "acknowledged-before-synced",
            Self::VoteNotPersisted => "vote-not-persisted",
            Self::StaleRead => "stale-read",
            Self::LeaseClockLivesOn => "lease-clock-lives-on",
            Self::KeepaliveUnconfirmed => "keepalive-unconfirmed",
            Self::ForeignExpiry => "foreign-expiry",
            Self::EpochUnchecked => "epoch-unchecked",
            Self::RetryAppliedTwice => "retry-applied-twice",
            Self::SnapshotDropsTable => "snapshot-drops-table",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|fault| fault.name() == name)
            .ok_or_else(|| {
                let known: Vec<&str> = Self::ALL.iter().map(|fault| fault.name()).collect();
                format!("there is no fault {name:?}; there are {}", known.join(", "))
            })
    }
}

#[cfg(any(test, feature = "faults"))]
mod seeding {
    use std::sync::atomic::{AtomicU8, Ordering};

    use super::Fault;

    const NONE: u8 = u8::MAX;
    static SEEDED: AtomicU8 = AtomicU8::new(NONE);

    /// Breaks this rule from now on, in this whole process, or none.
    pub fn seed(fault: Option<Fault>) {
        SEEDED.store(fault.map_or(NONE, |fault| fault as u8), Ordering::SeqCst);
    }

    /// Whether this rule is broken.
    pub fn seeded(fault: Fault) -> bool {
        SEEDED.load(Ordering::Relaxed) == fault as u8
    }
}

#[cfg(any(test, feature = "faults"))]
pub use seeding::{seed, seeded};

/// Whether this rule is broken: never, in this build.
#[cfg(not(any(test, feature = "faults")))]
#[inline]
pub const fn seeded(_: Fault) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_is_found_by_its_name() {
        for fault in Fault::ALL {
            assert_eq!(fault.name().parse(), Ok(fault));
        }
        assert!(
            "no-such-fault"
                .parse::<Fault>()
                .unwrap_err()
                .contains("stale-read")
        );
    }
}
