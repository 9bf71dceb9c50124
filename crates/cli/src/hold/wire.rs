//! What `hold` and its watchdog tell each other: one line each, over a Unix socket.
//!
//! Invariant: the watchdog starts the program only after an `until`, and ends it when this socket does. A line
//! that cannot be read ends the conversation, as both ends are the same program.

use std::fmt;
use std::str::FromStr;

/// No line is longer.
pub(super) const MAX_LINE: usize = 200;

/// What `hold` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// The guard ends then, by `clock::boot_ms`.
    Until(u64),
    /// The lease is lost.
    Lost,
    /// Pass this signal on to the program's group.
    Signal(i32),
    /// The answer to `started`: this group has lent the program's its place before the terminal and gets it
    /// back at the end; 0 when there is no terminal to lend.
    Terminal(i32),
}

/// What the watchdog says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// The program runs under this pid, which is its group's too.
    Started(i32),
    /// It could not be started, for this reason of the system's.
    Failed(i32),
    /// The guard was too short to start it.
    Late,
    /// It has ended with this code of exit, and its group with it.
    Exited {
        /// As a shell gives it: 128 + N for signal N.
        code: u8,
        /// Whether the watchdog ended it because of the lease.
        for_the_lease: bool,
    },
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Until(until) => write!(f, "until {until}"),
            Self::Lost => f.write_str("lost"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::Terminal(group) => write!(f, "terminal {group}"),
        }
    }
}

impl FromStr for Order {
    type Err = ();
    fn from_str(line: &str) -> Result<Self, ()> {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["until", until] => Ok(Self::Until(parse(until)?)),
            ["lost"] => Ok(Self::Lost),
            ["signal", signal] => Ok(Self::Signal(parse(signal)?)),
            ["terminal", group] => Ok(Self::Terminal(parse(group)?)),
            _ => Err(()),
        }
    }
}

impl fmt::Display for News {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Started(pid) => write!(f, "started {pid}"),
            Self::Failed(errno) => write!(f, "failed {errno}"),
            Self::Late => f.write_str("late"),
            Self::Exited { code, for_the_lease } => write!(f, "exited {code} {for_the_lease}"),
        }
    }
}

impl FromStr for News {
    type Err = ();
    fn from_str(line: &str) -> Result<Self, ()> {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["started", pid] => Ok(Self::Started(parse(pid)?)),
            ["failed", errno] => Ok(Self::Failed(parse(errno)?)),
            ["late"] => Ok(Self::Late),
            ["exited", code, for_the_lease] => Ok(Self::Exited {
                code: parse(code)?,
                for_the_lease: parse(for_the_lease)?,
            }),
            _ => Err(()),
        }
    }
}

fn parse<T: FromStr>(word: &str) -> Result<T, ()> {
    word.parse().map_err(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_understood() {
        for order in [
            Order::Until(u64::MAX),
            Order::Lost,
            Order::Signal(15),
            Order::Terminal(0),
        ] {
            assert_eq!(order.to_string().parse(), Ok(order));
            assert!(order.to_string().len() < MAX_LINE);
        }
        for news in [
            News::Started(7),
            News::Failed(2),
            News::Late,
            News::Exited {
                code: 143,
                for_the_lease: true,
            },
        ] {
            assert_eq!(news.to_string().parse(), Ok(news));
        }
        for bad in [
            "",
            "until",
            "until x",
            "until 1 2",
            "LOST",
            "signal -",
            "exited 300 true",
        ] {
            assert_eq!(bad.parse::<Order>(), Err(()), "{bad:?}");
            assert_eq!(bad.parse::<News>(), Err(()), "{bad:?}");
        }
    }
}
