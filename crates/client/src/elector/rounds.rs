//! Which server gets the next renewal, and when. Pure: it is told the time.
//!
//! A renewal is hedged ("The Tail at Scale", Dean and Barroso, 2013): one that is not answered within a part
//! of the interval is also sent to the next server, and the earlier one stays open. A node that is frozen or
//! cut off then costs that part and not the lease. Invariant: a server that failed is not asked again before
//! every other one was, and between two rounds that nobody answered there is a pause.

use crate::guard::Guard;

/// A renewal that is unanswered after this part of the interval goes to the next server too.
const HEDGE_PART: u64 = 4;
/// The longest that a hedge waits, in milliseconds: with a long TTL there is no reason to find out late.
const LONGEST_HEDGE_MS: u64 = 1_000;
/// The shortest, in milliseconds: below it, every renewal would be sent twice.
const SHORTEST_HEDGE_MS: u64 = 10;
/// The pause between renewals once the guard has lapsed, in milliseconds, at least: the hurry is over.
const LAPSED_PAUSE_MS: u64 = 500;

/// The order of asking.
#[derive(Debug)]
pub(super) struct Rounds {
    servers: usize,
    /// Where the next round begins: the server that answered last.
    first: usize,
    /// How many were asked in this round; 0 when none is under way.
    asked: usize,
    /// The number of the first renewal of this round, or of the last one.
    began: u64,
    /// When the next server is asked, while a round is under way.
    hedge_at: u64,
}

impl Rounds {
    pub(super) fn new(servers: usize, first: usize) -> Self {
        Self {
            servers,
            first,
            asked: 0,
            began: 0,
            hedge_at: 0,
        }
    }

    /// When the next renewal is to be sent.
    pub(super) fn due(&self, guard: &Guard) -> u64 {
        if self.asked == 0 {
            guard.next_keepalive()
        } else {
            self.hedge_at
        }
    }

    /// The renewal of this number is sent now: to which server.
    pub(super) fn next(&mut self, now: u64, seq: u64, guard: &Guard) -> usize {
        if self.asked == 0 {
            self.began = seq;
        }
        if self.asked == self.servers {
            self.asked = 0;
        }
        let server = (self.first + self.asked) % self.servers;
        self.asked += 1;
        self.hedge_at = now + pause(now, guard);
        server
    }

    /// This server acknowledged: the round is over, the next one begins with it after an interval. Late news
    /// of an earlier round leaves this one to go on.
    pub(super) fn acknowledged(&mut self, server: usize, seq: u64) {
        if seq >= self.began {
            self.first = server;
            self.asked = 0;
        }
    }

    /// A renewal failed. If it is the one that was sent last, the next server is asked at once.
    pub(super) fn failed(&mut self, server: usize, now: u64) {
        let last = self.asked > 0 && (self.first + self.asked - 1) % self.servers == server;
        if last && self.asked < self.servers {
            self.hedge_at = now;
        }
    }
}

fn pause(now: u64, guard: &Guard) -> u64 {
    let hedge = (guard.interval() / HEDGE_PART).clamp(SHORTEST_HEDGE_MS, LONGEST_HEDGE_MS);
    if guard.valid_until() == 0 || guard.is_valid(now) {
        hedge
    } else {
        hedge.max(LAPSED_PAUSE_MS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guard of 5 s whose last renewal was sent at 0 and acknowledged.
    fn guard() -> Guard {
        let mut guard = Guard::new(5_000);
        let seq = guard.sending(0);
        guard.acknowledged(seq, 5_000);
        guard
    }

    #[test]
    fn an_unanswered_renewal_goes_to_the_next_server_after_a_quarter_of_the_interval() {
        let guard = guard();
        let mut rounds = Rounds::new(3, 2);
        assert_eq!(rounds.due(&guard), 1_000, "an interval after the last one");
        let asked: Vec<(u64, usize)> = (2..7)
            .map(|seq| {
                let now = rounds.due(&guard);
                (now, rounds.next(now, seq, &guard))
            })
            .collect();
        assert_eq!(
            asked,
            [(1_000, 2), (1_250, 0), (1_500, 1), (1_750, 2), (2_000, 0)]
        );
        rounds.acknowledged(1, 1);
        assert_eq!(rounds.due(&guard), 2_250, "late news of an earlier round");
        rounds.acknowledged(1, 4);
        assert_eq!((rounds.due(&guard), rounds.next(9_000, 7, &guard)), (1_000, 1));
    }

    #[test]
    fn a_server_that_refuses_is_passed_over_at_once_but_all_together_not_in_a_loop() {
        let guard = guard();
        let mut rounds = Rounds::new(3, 0);
        for (now, server) in [(1_000, 0), (1_001, 1), (1_002, 2)] {
            assert_eq!(rounds.next(now, now, &guard), server);
            rounds.failed(server, now + 1);
            assert_eq!(rounds.due(&guard), if server == 2 { 1_252 } else { now + 1 });
        }
        // Late news of one that was passed over already changes nothing.
        assert_eq!(rounds.next(1_252, 1_252, &guard), 0);
        rounds.failed(1, 1_260);
        assert_eq!(rounds.due(&guard), 1_502);
    }

    #[test]
    fn after_the_guard_has_lapsed_there_is_no_hurry() {
        let guard = guard();
        let mut rounds = Rounds::new(1, 0);
        rounds.next(4_000, 2, &guard);
        assert_eq!(rounds.due(&guard), 4_250);
        rounds.next(5_000, 3, &guard);
        assert_eq!(rounds.due(&guard), 5_500);
    }
}
