//! The program's place before the terminal.
//!
//! The program runs in a group of its own, and only one group at a time may read from a terminal. So `hold`
//! lends its place, if it has it, and the watchdog sees to it that it comes back. `hold` itself could not take it:
//! who is not before the terminal is stopped for trying.

use std::io::{IsTerminal as _, stdin};
use std::process::ExitCode;

use rustix::process::{Pid, Signal, getpgrp};
use rustix::termios::{tcgetpgrp, tcsetpgrp};

use super::group::Group;

/// Lends the place before the terminal to a group, if this process has it; gives who is to get it back.
pub(super) fn lend(to: Group) -> Option<Pid> {
    let stdin = stdin();
    let own = getpgrp();
    if !stdin.is_terminal() || tcgetpgrp(&stdin) != Ok(own) {
        return None;
    }
    tcsetpgrp(&stdin, to.pid()).ok()?;
    // It may have tried to read too early, and was stopped for it.
    let _ = to.signal(Signal::CONT);
    Some(own)
}

/// `regent internal terminal`: gives the place of this process's own group to another.
pub(crate) fn give_back(group: i32) -> ExitCode {
    let given = Group::of(group).is_some_and(|group| tcsetpgrp(stdin(), group.pid()).is_ok());
    if given {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
