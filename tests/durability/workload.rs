//! What a log is given to do before it crashes, and what it may hold after that.
//!
//! The operations are the same each time. What is right comes from the same operations on the in-memory twin.

use regent_raft::MemoryDisk;
use regent_raft::workbench::{Held, HeldEntry, Workbench};

use crate::crash_points::rounds;

/// How many there are, for each round.
const OPERATIONS: usize = 160;

#[derive(Clone, Debug)]
enum Operation {
    Append {
        term: u64,
        first: u64,
        lengths: Vec<usize>,
    },
    Vote {
        term: u64,
        node: u64,
    },
    Truncate {
        after: u64,
    },
    Purge {
        upto: u64,
    },
    Committed {
        index: u64,
    },
    /// Closes the log in order and opens it again.
    Reopen,
}

impl Operation {
    /// Whether it is durable when it is done.
    fn is_promise(&self) -> bool {
        !matches!(self, Self::Purge { .. } | Self::Committed { .. })
    }
}

/// Does all operations; says when each begins and when it is done.
pub(crate) async fn workload(open: impl Fn() -> Workbench, say: impl Fn(&str)) {
    let mut log = open();
    for (number, operation) in operations().into_iter().enumerate() {
        say(&format!("begin {number}"));
        log = done(log, operation, &open).await;
        say(&format!("done {number}"));
    }
    log.close().await;
}

/// What the log holds before the first operation and after each.
pub(crate) async fn expected() -> Vec<Held> {
    let disk = MemoryDisk::default();
    let open = || Workbench::on(&disk).unwrap();
    let mut log = open();
    let mut states = vec![log.held().await.unwrap()];
    for operation in operations() {
        log = done(log, operation, &open).await;
        states.push(log.held().await.unwrap());
    }
    states
}

/// Whether a log may hold this after a crash, when so many operations were done and so many had begun.
pub(crate) fn is_possible(states: &[Held], done: usize, begun: usize, held: &Held) -> Result<(), String> {
    let (before, after) = (&states[done], &states[begun]);
    if held.vote != before.vote && held.vote != after.vote {
        return Err(format!(
            "the vote is {:?}, promised was {:?}",
            held.vote, before.vote
        ));
    }

    // A purge is durable with the promise that follows it, at the latest.
    let operations = operations();
    let purges: Vec<Option<u64>> = states[..=begun].iter().map(|state| state.purged).collect();
    let promise = operations[..done]
        .iter()
        .rposition(Operation::is_promise)
        .map_or(0, |last| last + 1);
    if !purges.contains(&held.purged) || held.purged < purges[promise] {
        return Err(format!(
            "purged is {:?}, promised was {:?}",
            held.purged, purges[promise]
        ));
    }

    // What an operation changes that was cut short may be there in part.
    let last = |state: &Held| state.entries.last().map(|entry| entry.index).max(state.purged);
    let (least, most) = (last(before).min(last(after)), last(before).max(last(after)));
    if last(held) < least || last(held) > most {
        return Err(format!("it ends at {:?}, promised was {least:?}", last(held)));
    }
    // An entry is what it was when it was last there: what is purged may still be there.
    let newest = |states: &[Held], entry: &HeldEntry| {
        let known = states.iter().rev().flat_map(|state| &state.entries);
        known.copied().find(|known| known.index == entry.index)
    };
    let wrong = held.entries.iter().find(|entry| {
        let right = [newest(&states[..=done], entry), newest(&states[..=begun], entry)];
        !right.contains(&Some(**entry))
    });
    match wrong {
        None => Ok(()),
        Some(wrong) => Err(format!("{wrong:?} is not what was appended")),
    }
}

async fn done(mut log: Workbench, operation: Operation, open: impl Fn() -> Workbench) -> Workbench {
    match operation {
        Operation::Append { term, first, lengths } => {
            let bodies = (first..)
                .zip(lengths)
                .map(|(index, len)| body(term, index, len))
                .collect();
            log.append(term, first, bodies).await.unwrap();
        }
        Operation::Vote { term, node } => log.vote(term, node).await.unwrap(),
        Operation::Truncate { after } => log.truncate_after(after).await.unwrap(),
        Operation::Purge { upto } => log.purge(upto).await.unwrap(),
        Operation::Committed { index } => log.committed(index).await.unwrap(),
        Operation::Reopen => {
            log.close().await;
            log = open();
        }
    }
    log
}

/// Bytes that are different for each entry, and do not compress.
fn body(term: u64, index: u64, len: usize) -> Vec<u8> {
    let mut random = Random(term << 32 | index);
    (0..len).map(|_| random.below(256).to_le_bytes()[0]).collect()
}

fn operations() -> Vec<Operation> {
    let mut random = Random(rounds() as u64);
    let (mut term, mut first, mut next) = (1, 0, 0);
    let mut operations = Vec::new();
    while operations.len() < OPERATIONS * rounds() {
        let held = next - first;
        operations.push(match random.below(20) {
            0 | 1 => {
                term += 1;
                Operation::Vote {
                    term,
                    node: 1 + random.below(3),
                }
            }
            2 if held > 10 => {
                next -= 1 + random.below(6);
                term += 1;
                Operation::Truncate { after: next - 1 }
            }
            3 if held > 30 => {
                first += 1 + random.below(held / 2);
                Operation::Purge { upto: first - 1 }
            }
            4 if held > 0 => Operation::Committed {
                index: first + random.below(held),
            },
            5 if random.below(2) == 0 => Operation::Reopen,
            _ => {
                // Now and then more than sled's segments hold before it is synced, when there is time for it.
                let large = rounds() > 1 && random.below(40) == 0;
                let count = 1 + random.below(if large { 60 } else { 8 });
                let lengths = (0..count)
                    .map(|_| {
                        let (at_least, more) = match random.below(30) {
                            _ if large => (20_000, 20_000),
                            0 => (20_000, 1_000),
                            1 | 2 => (3_000, 6_000),
                            _ => (0, 400),
                        };
                        usize::try_from(at_least + random.below(more)).unwrap()
                    })
                    .collect();
                let append = Operation::Append {
                    term,
                    first: next,
                    lengths,
                };
                next += count;
                append
            }
        });
    }
    operations
}

/// `splitmix64`.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}
