//! The runs of commands that an agent knows: those that wait, those being done, and what came of the rest.
//!
//! Invariants: a run that is known is never begun a second time; commands of one line are done one after the
//! other, oldest first; each of the collections is bounded.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use regent_types::frame::CommandFrame;
use regent_types::{SessionName, Token};

use crate::action::Line;
use crate::journal::{Outcome, RunKey};

/// So many commands are worked on side by side, unless the agent is told otherwise: enough that slow starts do not hold up the rest, few
/// enough for one machine.
pub const MAX_PARALLEL: usize = 16;
/// So many commands wait for their turn. More are not acknowledged and come again; the control plane
/// hands out at most 64 at once.
pub const MAX_QUEUED: usize = 256;
/// So many outcomes are remembered for redeliveries. A redelivery of one that is forgotten is done again,
/// which for a session converges.
pub const MAX_REMEMBERED: usize = 4096;

/// The dedupe key of a command.
pub fn key_of(command: &CommandFrame) -> RunKey {
    RunKey {
        command: command.command_id.clone(),
        run: command.run,
    }
}

#[derive(Debug)]
enum Phase {
    Queued,
    Working {
        token: Token,
        /// The command as a newer leadership sent it while it was being done.
        again: Option<Box<CommandFrame>>,
    },
    Done(Outcome),
}

/// What is known of a run that comes.
#[derive(Debug)]
pub(crate) enum Seen {
    /// Nothing.
    New,
    /// It waits, or is being done.
    UnderWay,
    /// It is done.
    Done(Outcome),
}

/// All runs that are known.
#[derive(Debug)]
pub(crate) struct Runs {
    /// How many are worked on side by side.
    parallel: usize,
    phases: BTreeMap<RunKey, Phase>,
    /// The keys of all that are done, in the order in which they are forgotten.
    done: VecDeque<RunKey>,
    queue: VecDeque<CommandFrame>,
    /// Which line each running command occupies.
    working: BTreeMap<RunKey, Line>,
    /// Done, and to be reported once that is allowed. Nothing is begun while it is not, so it is as bounded
    /// as what can be under way.
    owed: BTreeSet<RunKey>,
}

impl Runs {
    /// None are known; so many will be worked on side by side.
    pub(crate) fn new(parallel: usize) -> Self {
        Self {
            parallel,
            phases: BTreeMap::new(),
            done: VecDeque::new(),
            queue: VecDeque::new(),
            working: BTreeMap::new(),
            owed: BTreeSet::new(),
        }
    }

    /// The run that is being done about this session.
    pub(crate) fn working_on(&self, session: &SessionName) -> Option<RunKey> {
        let about = |line: &Line| matches!(line, Line::Session(name) if name == session);
        let found = self.working.iter().find(|(_, line)| about(line));
        found.map(|(key, _)| key.clone())
    }

    /// What is known of the run of a command that came.
    pub(crate) fn seen(&mut self, command: &CommandFrame) -> Seen {
        match self.phases.get_mut(&key_of(command)) {
            None => Seen::New,
            Some(Phase::Queued) => Seen::UnderWay,
            Some(Phase::Working { token, again }) => {
                if command.token > *token {
                    *again = Some(Box::new(command.clone()));
                }
                Seen::UnderWay
            }
            Some(Phase::Done(outcome)) => Seen::Done(outcome.clone()),
        }
    }

    /// Puts a new command behind those that wait; `false` if too many do.
    #[must_use]
    pub(crate) fn enqueue(&mut self, command: CommandFrame) -> bool {
        if self.queue.len() >= MAX_QUEUED {
            return false;
        }
        self.phases.insert(key_of(&command), Phase::Queued);
        self.queue.push_back(command);
        true
    }

    /// Puts a command whose line was just left before all that wait: it came before them.
    pub(crate) fn enqueue_first(&mut self, command: CommandFrame) {
        self.phases.insert(key_of(&command), Phase::Queued);
        self.queue.push_front(command);
    }

    /// The oldest that waits and whose line is free; it counts as being done from here on.
    pub(crate) fn next(&mut self) -> Option<CommandFrame> {
        if self.working.len() >= self.parallel {
            return None;
        }
        let busy: BTreeSet<&Line> = self.working.values().collect();
        let at = self
            .queue
            .iter()
            .position(|command| !busy.contains(&Line::of(command)))?;
        let command = self.queue.remove(at).expect("`at` is below the length");
        let key = key_of(&command);
        let phase = Phase::Working {
            token: command.token,
            again: None,
        };
        self.phases.insert(key.clone(), phase);
        self.working.insert(key, Line::of(&command));
        Some(command)
    }

    /// A run is not being done any more. Gives the command as a newer leadership has sent it meanwhile. What
    /// came of it is to be remembered or forgotten next.
    pub(crate) fn ended(&mut self, key: &RunKey) -> Option<CommandFrame> {
        self.working.remove(key);
        match self.phases.get_mut(key) {
            Some(Phase::Working { again, .. }) => again.take().map(|command| *command),
            Some(Phase::Queued | Phase::Done(_)) | None => None,
        }
    }

    /// Remembers an outcome, and gives the oldest ones that are forgotten for it.
    pub(crate) fn remember(&mut self, key: RunKey, outcome: Outcome) -> Vec<RunKey> {
        if !matches!(
            self.phases.insert(key.clone(), Phase::Done(outcome)),
            Some(Phase::Done(_))
        ) {
            self.done.push_back(key);
        }
        let surplus = self.done.len().saturating_sub(MAX_REMEMBERED);
        let forgotten: Vec<RunKey> = self.done.drain(..surplus).collect();
        for oldest in &forgotten {
            self.phases.remove(oldest);
            self.owed.remove(oldest);
        }
        forgotten
    }

    /// A run that came to nothing: when it comes again it is new.
    pub(crate) fn forget(&mut self, key: &RunKey) {
        self.working.remove(key);
        self.phases.remove(key);
    }

    /// What waits will come again.
    pub(crate) fn drop_queued(&mut self) {
        for command in self.queue.drain(..) {
            self.phases.remove(&key_of(&command));
        }
    }

    /// The outcome of this run is to be reported later.
    pub(crate) fn owe(&mut self, key: RunKey) {
        self.owed.insert(key);
    }

    /// What was to be reported later.
    pub(crate) fn take_owed(&mut self) -> Vec<(RunKey, Outcome)> {
        let owed = std::mem::take(&mut self.owed);
        owed.into_iter()
            .filter_map(|key| match self.phases.get(&key) {
                Some(Phase::Done(outcome)) => Some((key, outcome.clone())),
                Some(Phase::Queued | Phase::Working { .. }) | None => None,
            })
            .collect()
    }

    /// Nobody is owed a report any more: who asks again is answered from the record.
    pub(crate) fn drop_owed(&mut self) {
        self.owed.clear();
    }

    /// Whether this run is being done.
    pub(crate) fn is_working(&self, key: &RunKey) -> bool {
        self.working.contains_key(key)
    }

    /// Whether nothing is being done.
    pub(crate) fn is_idle(&self) -> bool {
        self.working.is_empty()
    }
}
