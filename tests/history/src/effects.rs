//! Commands and what they did: every accepted one reaches a final state, what it does happens once, in the order of
//! its session, and a session runs at most once at a time.

use std::collections::BTreeMap;

use crate::Violation;

/// The name in [`Violation::checker`] for commands that never end.
pub const ENDS: &str = "every command ends";
/// The name in [`Violation::checker`] for effects.
pub const ONCE: &str = "every effect once and in order";
/// The name in [`Violation::checker`] for sessions that run twice.
pub const ONE_PROCESS: &str = "one process of a session";

/// An effect as the runtime recorded it: that a session began to run in this generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effect {
    /// Of which session.
    pub session: String,
    /// In which of its lives.
    pub generation: u64,
}

/// A session's program ran.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// Of which session.
    pub session: String,
    /// Which process it was; for people.
    pub process: String,
    /// When it was there for certain first.
    pub from: u64,
    /// When it was there for certain last.
    pub until: u64,
}

/// Judges the commands at the end: who, and the final state, if it has one.
pub fn ended(commands: &[(String, Option<String>)]) -> Result<(), Violation> {
    let open: Vec<String> = commands
        .iter()
        .filter(|(_, ended)| ended.is_none())
        .map(|(command, _)| command.clone())
        .collect();
    if open.is_empty() {
        return Ok(());
    }
    let what = format!(
        "{} of {} accepted commands have no end",
        open.len(),
        commands.len()
    );
    Err(Violation::new(ENDS, what).with(open))
}

/// Judges the effects in the order in which they happened. `losses` says after how many of them the host lost its power:
/// a start whose outcome it had not recorded by then may be done once more, for nothing of it is left.
pub fn once_in_order(effects: &[Effect], losses: &[usize]) -> Result<(), Violation> {
    let mut last: BTreeMap<&str, (u64, usize)> = BTreeMap::new();
    for (at, Effect { session, generation }) in effects.iter().enumerate() {
        if let Some((before, then)) = last.insert(session, (*generation, at))
            && before >= *generation
        {
            let lost = losses.iter().any(|loss| (then + 1..=at).contains(loss));
            if before == *generation && lost {
                continue;
            }
            let what = if before == *generation {
                format!("{session}: generation {generation} began twice")
            } else {
                format!("{session}: generation {generation} began after {before}")
            };
            let all = effects.iter().filter(|effect| effect.session == *session);
            return Err(Violation::new(ONCE, what)
                .with(all.map(|effect| format!("generation {}", effect.generation))));
        }
    }
    Ok(())
}

/// Judges which processes ran when.
pub fn one_at_a_time(ran: &[Ran]) -> Result<(), Violation> {
    let mut sorted: Vec<&Ran> = ran.iter().collect();
    sorted.sort_by_key(|ran| (ran.session.as_str(), ran.from));
    let mut longest: Option<&Ran> = None;
    for ran in sorted {
        match longest {
            Some(before) if before.session == ran.session && ran.from <= before.until => {
                let line = |ran: &Ran| format!("{} from {} until {}", ran.process, ran.from, ran.until);
                let what = format!("{} runs twice at the same time", ran.session);
                return Err(Violation::new(ONE_PROCESS, what).with([line(before), line(ran)]));
            }
            Some(before) if before.session == ran.session && ran.until < before.until => {}
            _ => longest = Some(ran),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_without_an_end_is_named() {
        let done = ("a".to_owned(), Some("completed".to_owned()));
        assert!(ended(std::slice::from_ref(&done)).is_ok());
        assert_eq!(ended(&[done, ("b".to_owned(), None)]).unwrap_err().history, ["b"]);
    }

    #[test]
    fn an_effect_that_happens_twice_or_late_is_seen() {
        let after_losses = |all: &[(&str, u64)], losses: &[usize]| {
            let effect = |(session, generation): &(&str, u64)| Effect {
                session: (*session).to_owned(),
                generation: *generation,
            };
            once_in_order(&all.iter().map(effect).collect::<Vec<_>>(), losses)
        };
        let effects = |all: &[(&str, u64)]| after_losses(all, &[]);
        assert!(effects(&[("a", 1), ("b", 1), ("a", 2)]).is_ok());
        assert!(effects(&[("a", 1), ("b", 1), ("a", 1)]).is_err());
        assert!(effects(&[("a", 2), ("b", 1), ("a", 1)]).is_err());

        let again = [("a", 1), ("b", 1), ("a", 1)];
        assert!(after_losses(&again, &[1]).is_ok());
        assert!(after_losses(&again, &[2]).is_ok());
        assert!(after_losses(&again, &[0]).is_err(), "before it began first");
        assert!(after_losses(&again, &[3]).is_err(), "after it began again");
        assert!(
            after_losses(&[("a", 2), ("a", 1)], &[1]).is_err(),
            "never backwards"
        );
        assert!(
            after_losses(&[("a", 1), ("a", 1), ("a", 1)], &[1]).is_err(),
            "once for each loss"
        );
    }

    #[test]
    fn two_processes_at_once_are_seen() {
        let ran = |session: &str, process: &str, from, until| Ran {
            session: session.to_owned(),
            process: process.to_owned(),
            from,
            until,
        };
        assert!(one_at_a_time(&[ran("a", "1", 0, 9), ran("b", "2", 5, 9), ran("a", "3", 10, 12)]).is_ok());
        assert!(one_at_a_time(&[ran("a", "1", 0, 9), ran("a", "3", 9, 12)]).is_err());
        let within = [
            ran("a", "1", 0, 90),
            ran("b", "1", 1, 2),
            ran("a", "2", 91, 92),
            ran("a", "3", 91, 95),
        ];
        assert!(one_at_a_time(&within).is_err());
    }
}
