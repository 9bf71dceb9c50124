//! Recorded histories, and what must be true of them.
//!
//! The fault suite and the simulation record what their clients saw; the checkers here judge it afterwards and know
//! nothing of Regent. Each says what it saw in a [`Violation`] that names the checker, so that a seeded fault can be
//! held to the checker that is meant for it.
//!
//! Times are whatever clock the recorder has, as long as it is one clock.

pub mod digest;
pub mod effects;
pub mod fencing;
pub mod forward;
pub mod lease;
pub mod quota;
pub mod register;
pub mod watch;

use std::fmt;

/// What a checker holds against a history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which checker it is.
    pub checker: &'static str,
    /// What is wrong, in a sentence.
    pub what: String,
    /// The part of the history that shows it, a line each.
    pub history: Vec<String>,
}

impl Violation {
    /// One with nothing but a sentence.
    pub fn new(checker: &'static str, what: impl Into<String>) -> Self {
        Self {
            checker,
            what: what.into(),
            history: Vec::new(),
        }
    }

    /// With the lines that show it.
    #[must_use]
    pub fn with(mut self, history: impl IntoIterator<Item = String>) -> Self {
        self.history.extend(history);
        self
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.checker, self.what)?;
        for line in &self.history {
            write!(f, "\n    {line}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Violation {}
