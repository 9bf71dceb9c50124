//! Is a register linearizable: is there one order of all its operations, each at some moment between its call and
//! its answer, in which every read sees the last write before it?
//!
//! The search is that of Wing and Gong with Lowe's memory of what was tried ("Testing for linearizability", 2017),
//! as in Porcupine. Values are unique, so an operation whose outcome is unknown is no guess here: when somebody saw
//! its value it has happened, before the first who saw it was answered; when nobody did, whether it happened makes
//! no difference to anybody, and it is left out.

use std::collections::{BTreeMap, HashSet};

use crate::Violation;

/// The name in [`Violation::checker`].
pub const CHECKER: &str = "linearizable register";

/// What a register holds before the first write.
pub const INITIAL: u64 = 0;

/// One call of a client. Calls that certainly did nothing are not recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Who called; for people.
    pub client: u32,
    /// When it was called.
    pub invoked: u64,
    /// When it was answered; none if the outcome is unknown.
    pub returned: Option<u64>,
    /// What was asked for.
    pub op: Op,
    /// What a read saw.
    pub seen: Option<u64>,
}

/// What is asked of a register. A written value is written by one call only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// What it holds.
    Read,
    /// Holds this from now on.
    Write(u64),
    /// The same, if it holds what is expected.
    Cas {
        /// What it must hold.
        expected: u64,
        /// What it holds then.
        new: u64,
    },
}

impl Call {
    fn writes(&self) -> Option<u64> {
        match self.op {
            Op::Read => None,
            Op::Write(value) | Op::Cas { new: value, .. } => Some(value),
        }
    }

    /// The value that it depends on.
    fn sees(&self) -> Option<u64> {
        match self.op {
            Op::Read => self.seen,
            Op::Write(_) => None,
            Op::Cas { expected, .. } => Some(expected),
        }
    }

    fn line(&self) -> String {
        let what = match self.op {
            Op::Read => format!(
                "read {}",
                self.seen.map_or("?".to_owned(), |seen| seen.to_string())
            ),
            Op::Write(value) => format!("write {value}"),
            Op::Cas { expected, new } => format!("write {new} if it is {expected}"),
        };
        let returned = self.returned.map_or("unknown".to_owned(), |at| at.to_string());
        format!("client {} [{} .. {returned}] {what}", self.client, self.invoked)
    }
}

/// Judges one register. The history that is told is a short one that is wrong already.
pub fn check(key: &str, calls: &[Call]) -> Result<(), Violation> {
    let Err(why) = linearizes(calls) else {
        return Ok(());
    };
    let mut calls = shortest_prefix(calls);
    thin_out(&mut calls);
    calls.sort_by_key(|call| call.invoked);
    let why = linearizes(&calls).err().unwrap_or(why);
    Err(Violation::new(CHECKER, format!("{key}: {why}")).with(calls.iter().map(Call::line)))
}

/// The history up to the first moment at which it is wrong.
fn shortest_prefix(calls: &[Call]) -> Vec<Call> {
    let mut ends: Vec<u64> = calls.iter().filter_map(|call| call.returned).collect();
    ends.sort_unstable();
    let until = |end: u64| -> Vec<Call> {
        let begun = calls.iter().filter(|call| call.invoked <= end);
        begun
            .filter(|call| call.writes().is_some() || call.returned.is_some_and(|at| at <= end))
            .map(|call| Call {
                returned: call.returned.filter(|at| *at <= end),
                ..call.clone()
            })
            .collect()
    };
    // Once wrong, it stays wrong.
    let first = ends.partition_point(|end| linearizes(&until(*end)).is_ok());
    ends.get(first).map_or_else(|| calls.to_vec(), |end| until(*end))
}

/// Takes out what is not needed to see that it is wrong: reads, and whole values with all who saw them.
fn thin_out(calls: &mut Vec<Call>) {
    /// Beyond this the history is told as it is; each try is a search.
    const TRIES: usize = 5_000;
    let mut at = 0;
    let mut tries = 0;
    while at < calls.len() && tries < TRIES {
        tries += 1;
        let mut fewer = calls.clone();
        let gone = fewer.remove(at);
        if let Some(value) = gone.writes() {
            fewer.retain(|call| call.op != Op::Read || call.seen != Some(value));
            if fewer.iter().any(|call| call.sees() == Some(value)) {
                at += 1;
                continue;
            }
        }
        if linearizes(&fewer).is_err() {
            *calls = fewer;
        } else {
            at += 1;
        }
    }
}

/// One operation that has happened.
struct Done {
    invoked: u64,
    returned: u64,
    sees: Option<u64>,
    writes: Option<u64>,
}

impl Done {
    /// What the register holds after it, if it can be done now.
    fn step(&self, holds: u64) -> Option<u64> {
        match self.sees {
            Some(sees) if sees != holds => None,
            _ => Some(self.writes.unwrap_or(holds)),
        }
    }
}

/// The calls that have happened for certain.
fn happened(calls: &[Call]) -> Result<Vec<Done>, String> {
    let mut written = BTreeMap::new();
    for call in calls {
        if let Some(value) = call.writes()
            && (value == INITIAL || written.insert(value, call.invoked).is_some())
        {
            return Err(format!("value {value} is written twice: the recorder is wrong"));
        }
    }
    // A call that was not answered has happened if somebody depends on it who has happened.
    let mut seen_until: BTreeMap<u64, u64> = BTreeMap::new();
    loop {
        let mut changed = false;
        for call in calls {
            let happened = call
                .returned
                .or_else(|| call.writes().and_then(|value| seen_until.get(&value).copied()));
            if let (Some(returned), Some(value)) = (happened, call.sees()) {
                let known = seen_until.entry(value).or_insert(u64::MAX);
                if returned < *known {
                    *known = returned;
                    changed = true;
                }
            }
        }
        if !changed {
            break;
        }
    }
    for value in seen_until.keys() {
        if *value != INITIAL && !written.contains_key(value) {
            return Err(format!("value {value} was seen, and nobody ever wrote it"));
        }
    }
    let done = calls.iter().filter_map(|call| {
        let seen = call.writes().and_then(|value| seen_until.get(&value).copied());
        let returned = match (call.returned, seen) {
            (Some(returned), Some(seen)) => Some(returned.min(seen)),
            (returned, seen) => returned.or(seen),
        };
        // Who saw a value before it was asked for makes the end lie before the begin: found below.
        returned.map(|returned| Done {
            invoked: call.invoked,
            returned,
            sees: call.sees(),
            writes: call.writes(),
        })
    });
    let done: Vec<Done> = done.collect();
    match done.iter().find(|done| done.returned < done.invoked) {
        Some(early) => Err(format!(
            "value {} was seen before anybody asked to write it",
            early.writes.unwrap_or(INITIAL)
        )),
        None => Ok(done),
    }
}

/// The search. `Ok` when there is an order.
fn linearizes(calls: &[Call]) -> Result<(), String> {
    let mut done = happened(calls)?;
    done.sort_by_key(|done| done.invoked);
    let mut search = Search::new(&done);
    search.run()
}

/// What is not yet in the order, by when it was called; and what is, to take back.
struct Search<'a> {
    done: &'a [Done],
    /// Which are in the order.
    taken: Vec<u64>,
    /// The order, with what the register held before each.
    order: Vec<(usize, u64)>,
    /// Where all before are taken.
    first: usize,
    tried: HashSet<Tried>,
}

/// What was taken, and what the register held then. Before the first word everything is taken and after the last nothing:
/// what remains is as long as calls overlap, however long the history is.
type Tried = (usize, Vec<u64>, u64);

impl<'a> Search<'a> {
    fn new(done: &'a [Done]) -> Self {
        Self {
            done,
            taken: vec![0; done.len().div_ceil(64)],
            order: Vec::new(),
            first: 0,
            tried: HashSet::new(),
        }
    }

    fn is_taken(&self, at: usize) -> bool {
        self.taken[at / 64] >> (at % 64) & 1 == 1
    }

    fn tried(&self, holds: u64) -> Tried {
        let first = (self.first / 64).min(self.taken.len());
        let end = self
            .taken
            .iter()
            .rposition(|word| *word != 0)
            .map_or(0, |last| last + 1);
        (first, self.taken[first..end.max(first)].to_vec(), holds)
    }

    fn flip(&mut self, at: usize) {
        self.taken[at / 64] ^= 1 << (at % 64);
        self.first = self.first.min(at);
        while self.first < self.done.len() && self.is_taken(self.first) {
            self.first += 1;
        }
    }

    /// The next one at or after `from` that may come now: it was called before anything that is left was answered.
    fn candidate(&self, from: usize, deadline: u64, holds: u64) -> Option<(usize, u64)> {
        (from.max(self.first)..self.done.len())
            .take_while(|at| self.done[*at].invoked <= deadline)
            .filter(|at| !self.is_taken(*at))
            .find_map(|at| self.done[at].step(holds).map(|next| (at, next)))
    }

    /// Until when the next one must have been called.
    fn deadline(&self) -> u64 {
        let mut deadline = u64::MAX;
        for at in self.first..self.done.len() {
            if self.done[at].invoked > deadline {
                break;
            }
            if !self.is_taken(at) {
                deadline = deadline.min(self.done[at].returned);
            }
        }
        deadline
    }

    fn run(&mut self) -> Result<(), String> {
        let mut holds = INITIAL;
        let mut from = 0;
        let mut longest = 0;
        let mut stuck_at = 0;
        loop {
            if self.order.len() == self.done.len() {
                return Ok(());
            }
            if self.order.len() >= longest {
                longest = self.order.len();
                stuck_at = holds;
            }
            if let Some((at, next)) = self.candidate(from, self.deadline(), holds) {
                self.flip(at);
                if self.tried.insert(self.tried(next)) {
                    self.order.push((at, holds));
                    holds = next;
                    from = 0;
                } else {
                    self.flip(at);
                    from = at + 1;
                }
            } else if let Some((at, before)) = self.order.pop() {
                self.flip(at);
                holds = before;
                from = at + 1;
            } else {
                return Err(format!(
                    "no order explains it: at most {longest} of {} operations fit, up to value {stuck_at}",
                    self.done.len()
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn call(invoked: u64, returned: impl Into<Option<u64>>, op: Op) -> Call {
        Call {
            client: 1,
            invoked,
            returned: returned.into(),
            op,
            seen: None,
        }
    }

    fn read(invoked: u64, returned: u64, seen: u64) -> Call {
        Call {
            seen: Some(seen),
            ..call(invoked, returned, Op::Read)
        }
    }

    #[test]
    fn a_stale_read_is_seen_and_a_concurrent_one_is_not() {
        let wrote = call(0, 10, Op::Write(1));
        assert!(check("k", &[wrote.clone(), read(5, 12, 0)]).is_ok());
        let found = check("k", &[wrote.clone(), read(11, 12, 0)]).unwrap_err();
        assert_eq!((found.checker, found.history.len()), (CHECKER, 2));
        // Two readers one after the other do not go back in time, though both are concurrent with the write.
        assert!(check("k", &[call(0, 100, Op::Write(1)), read(1, 5, 1), read(6, 9, 0)]).is_err());
        assert!(check("k", &[call(0, 100, Op::Write(1)), read(1, 5, 1), read(4, 9, 0)]).is_ok());
    }

    #[test]
    fn an_unknown_outcome_may_come_late_or_never_but_not_twice() {
        let unknown = call(0, None, Op::Write(1));
        assert!(check("k", &[unknown.clone(), read(50, 60, 0), read(70, 80, 1)]).is_ok());
        assert!(check("k", &[unknown.clone(), read(50, 60, 0)]).is_ok());
        assert!(check("k", &[unknown.clone(), read(50, 60, 1), read(70, 80, 0)]).is_err());
        let twice = [
            unknown,
            read(20, 21, 1),
            call(30, 31, Op::Write(2)),
            read(40, 41, 1),
        ];
        assert!(check("k", &twice).is_err());
    }

    #[test]
    fn of_two_conditional_writes_on_one_value_only_one_succeeds() {
        let cas = |invoked, returned: Option<u64>, new| call(invoked, returned, Op::Cas { expected: 0, new });
        assert!(check("k", &[cas(0, Some(10), 1), cas(5, Some(15), 2)]).is_err());
        assert!(check("k", &[cas(0, Some(10), 1), cas(5, None, 2)]).is_ok());
        assert!(check("k", &[cas(0, Some(10), 1), cas(5, None, 2), read(20, 21, 2)]).is_err());
    }

    #[test]
    fn what_nobody_wrote_or_not_yet_is_seen() {
        assert!(check("k", &[read(0, 1, 7)]).is_err());
        assert!(check("k", &[read(0, 1, 7), call(2, 3, Op::Write(7))]).is_err());
        // The one who saw it was answered before the writer was: it has happened by then.
        assert!(check("k", &[call(0, 100, Op::Write(7)), read(1, 2, 7), read(3, 4, 0)]).is_err());
    }

    #[test]
    fn a_lost_write_is_told_by_the_few_calls_that_show_it() {
        let mut calls: Vec<Call> = Vec::new();
        for value in 1..200 {
            calls.push(call(value * 10, value * 10 + 5, Op::Write(value)));
            calls.push(read(value * 10 + 6, value * 10 + 8, value));
        }
        calls.push(read(2_100, 2_101, 198));
        let found = check("k", &calls).unwrap_err();
        assert!(found.history.len() <= 4, "{found}");
    }

    /// Every order of every choice of what happened: slow, and plainly right.
    fn by_all_orders(calls: &[Call]) -> bool {
        fn search(left: &[Call], holds: u64) -> bool {
            if left.iter().all(|call| call.returned.is_none()) {
                return true;
            }
            let deadline = left
                .iter()
                .filter_map(|call| call.returned)
                .min()
                .unwrap_or(u64::MAX);
            (0..left.len()).any(|at| {
                let call = &left[at];
                if call.invoked > deadline || call.sees().is_some_and(|sees| sees != holds) {
                    return false;
                }
                let mut rest = left.to_vec();
                rest.remove(at);
                search(&rest, call.writes().unwrap_or(holds))
            })
        }
        search(calls, INITIAL)
    }

    fn a_call(value: u64) -> impl Strategy<Value = Call> {
        let times = (0u64..30, 0u64..12, prop::bool::weighted(0.2));
        (times, 0u8..4, 0u64..5).prop_map(move |((invoked, long, unknown), kind, other)| {
            let returned = Some(invoked + long).filter(|_| !unknown || kind > 1);
            match kind {
                0 => call(invoked, returned, Op::Write(value)),
                1 if other != value => call(
                    invoked,
                    returned,
                    Op::Cas {
                        expected: other,
                        new: value,
                    },
                ),
                _ => Call {
                    seen: Some(other),
                    ..call(invoked, returned.or(Some(invoked + long)), Op::Read)
                },
            }
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4_000))]

        #[test]
        fn it_agrees_with_the_search_through_all_orders(
            calls in (1u64..7).prop_flat_map(|many| (1..=many).map(a_call).collect::<Vec<_>>())
        ) {
            prop_assert_eq!(check("k", &calls).is_ok(), by_all_orders(&calls));
        }
    }
}
