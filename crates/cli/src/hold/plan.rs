//! When the watchdog ends the program. Pure: it is told the time and what happened.
//!
//! Invariant: the program's group is killed before the guard is over, by the last end of it that the
//! watchdog was told of, whatever else happens or does not. Once it was asked to end there is no way back: a
//! program that was told to stop does not go on because a late renewal came.

/// SIGTERM comes this part of a guard's length before its end: a second of 5 s.
const TERM_PART: u64 = 5;
/// SIGKILL comes this part before it. It must be long enough for a busy machine to run the watchdog.
const KILL_PART: u64 = 20;
/// No program needs longer than this to stop, in milliseconds, however long the TTL.
const LONGEST_TERM_LEAD_MS: u64 = 10_000;
/// And no machine this long to kill.
const LONGEST_KILL_LEAD_MS: u64 = 2_000;
/// When the lease is lost already, or nobody keeps it any more, the program has this part of the lead of
/// SIGTERM to stop: what it still does may already be against another holder.
const LOST_PART: u64 = 2;
/// What outlives the program in its group has this long to stop, in milliseconds.
const LEFTOVER_GRACE_MS: u64 = 500;

/// How long before the end of the guard what is done, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Leads {
    pub(super) term: u64,
    pub(super) kill: u64,
}

impl Leads {
    /// For guards of this length.
    pub(super) fn of(hold_ms: u64) -> Self {
        Self {
            term: (hold_ms / TERM_PART).min(LONGEST_TERM_LEAD_MS),
            kill: (hold_ms / KILL_PART).min(LONGEST_KILL_LEAD_MS),
        }
    }
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Happened {
    /// The guard lasts until then.
    Until(u64),
    /// The lease is lost.
    Lost,
    /// The process that keeps the lease is gone.
    HolderGone,
    /// The program has ended; others of its group may be left.
    ProgramEnded,
}

/// What is to be done to the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Deed {
    /// SIGTERM.
    Terminate,
    /// SIGKILL.
    Kill,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Runs,
    /// To be asked to end, now.
    Asks {
        kill_at: u64,
    },
    /// Was asked to end.
    Ends {
        kill_at: u64,
    },
    Killed,
}

/// The plan for one program.
#[derive(Debug)]
pub(super) struct Plan {
    leads: Leads,
    /// The end of the guard.
    until: u64,
    stage: Stage,
    for_the_lease: bool,
}

impl Plan {
    pub(super) fn new(leads: Leads, until: u64) -> Self {
        Self {
            leads,
            until,
            stage: Stage::Runs,
            for_the_lease: false,
        }
    }

    /// Whether the program was ended, or is to be, because of the lease.
    pub(super) fn for_the_lease(&self) -> bool {
        self.for_the_lease
    }

    pub(super) fn happened(&mut self, now: u64, what: Happened) {
        let grace = match what {
            Happened::Until(until) => {
                self.until = self.until.max(until);
                return;
            }
            Happened::Lost | Happened::HolderGone => {
                self.for_the_lease |= self.stage != Stage::Killed;
                self.leads.term / LOST_PART
            }
            Happened::ProgramEnded => LEFTOVER_GRACE_MS,
        };
        let kill_at = (now + grace).min(self.kill_at_latest());
        self.stage = match self.stage {
            Stage::Runs => Stage::Asks { kill_at },
            Stage::Asks { kill_at: before } => Stage::Asks {
                kill_at: before.min(kill_at),
            },
            Stage::Ends { kill_at: before } => Stage::Ends {
                kill_at: before.min(kill_at),
            },
            Stage::Killed => Stage::Killed,
        };
    }

    /// What is to be done now, once; ask until there is nothing.
    pub(super) fn due(&mut self, now: u64) -> Option<Deed> {
        if self.stage == Stage::Runs && now >= self.until.saturating_sub(self.leads.term) {
            self.for_the_lease = true;
            self.stage = Stage::Asks {
                kill_at: self.kill_at_latest(),
            };
        }
        match self.stage {
            Stage::Asks { kill_at } => {
                self.stage = Stage::Ends { kill_at };
                Some(Deed::Terminate)
            }
            Stage::Ends { kill_at } if now >= kill_at => {
                self.stage = Stage::Killed;
                Some(Deed::Kill)
            }
            Stage::Ends { .. } | Stage::Runs | Stage::Killed => None,
        }
    }

    /// When to ask again at the latest, if nothing happens.
    pub(super) fn wake(&self) -> Option<u64> {
        match self.stage {
            Stage::Runs => Some(self.until.saturating_sub(self.leads.term)),
            Stage::Asks { .. } => Some(0),
            Stage::Ends { kill_at } => Some(kill_at),
            Stage::Killed => None,
        }
    }

    fn kill_at_latest(&self) -> u64 {
        self.until.saturating_sub(self.leads.kill)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEADS: Leads = Leads { term: 980, kill: 245 };

    fn all_due(plan: &mut Plan, now: u64) -> Vec<Deed> {
        std::iter::from_fn(|| plan.due(now)).collect()
    }

    #[test]
    fn for_five_seconds_it_is_asked_a_second_before_and_killed_a_quarter_before() {
        assert_eq!(Leads::of(4_900), LEADS);
        let long = Leads::of(3_528_000);
        assert_eq!((long.term, long.kill), (10_000, 2_000));
    }

    #[test]
    fn without_a_renewal_it_is_gone_before_the_guard_is_over() {
        let mut plan = Plan::new(LEADS, 10_000);
        assert_eq!(plan.wake(), Some(9_020));
        assert_eq!(all_due(&mut plan, 9_019), []);
        plan.happened(9_019, Happened::Until(11_000));
        assert_eq!(all_due(&mut plan, 9_020), []);
        assert_eq!(all_due(&mut plan, 10_020), [Deed::Terminate]);
        // No way back, also when the lease was won back meanwhile.
        plan.happened(10_030, Happened::Until(15_000));
        assert_eq!(plan.wake(), Some(10_755));
        assert_eq!(all_due(&mut plan, 10_754), []);
        assert_eq!(all_due(&mut plan, 10_755), [Deed::Kill]);
        assert_eq!((all_due(&mut plan, 99_999), plan.wake()), (vec![], None));
        assert!(plan.for_the_lease());
    }

    #[test]
    fn who_wakes_after_the_end_kills_at_once() {
        let mut plan = Plan::new(LEADS, 10_000);
        assert_eq!(all_due(&mut plan, 3_600_000), [Deed::Terminate, Deed::Kill]);
    }

    #[test]
    fn a_loss_gives_half_of_the_lead_but_never_beyond_the_guard() {
        for what in [Happened::Lost, Happened::HolderGone] {
            let mut plan = Plan::new(LEADS, 10_000);
            plan.happened(6_000, what);
            assert_eq!(all_due(&mut plan, 6_000), [Deed::Terminate]);
            assert_eq!(plan.wake(), Some(6_490));
            let mut plan = Plan::new(LEADS, 10_000);
            assert_eq!(all_due(&mut plan, 9_500), [Deed::Terminate]);
            plan.happened(9_600, what);
            assert_eq!(plan.wake(), Some(9_755));
            assert!(plan.for_the_lease());
        }
    }

    #[test]
    fn what_outlives_the_program_gets_a_moment_and_that_is_not_for_the_lease() {
        let mut plan = Plan::new(LEADS, 10_000);
        plan.happened(5_000, Happened::ProgramEnded);
        assert_eq!(all_due(&mut plan, 5_000), [Deed::Terminate]);
        assert_eq!(plan.wake(), Some(5_500));
        assert!(!plan.for_the_lease());
        assert_eq!(all_due(&mut plan, 5_500), [Deed::Kill]);
        plan.happened(5_501, Happened::HolderGone);
        assert!(!plan.for_the_lease());
    }

    #[test]
    fn a_guard_that_is_short_already_is_not_exceeded_by_any_grace() {
        let mut plan = Plan::new(LEADS, 10_000);
        plan.happened(9_700, Happened::ProgramEnded);
        assert_eq!(all_due(&mut plan, 9_700), [Deed::Terminate]);
        assert_eq!(plan.wake(), Some(9_755));
    }
}
