//! Nothing is accepted under a token or an epoch once a newer one was given out.

use crate::Violation;

/// The name in [`Violation::checker`].
pub const CHECKER: &str = "fencing";

/// A token (or an epoch) was given out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// To whom; for people.
    pub to: String,
    /// The larger, the newer.
    pub token: u64,
    /// When somebody knew it.
    pub known: u64,
}

/// Something that was done under a token, and accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    /// By whom, and what; for people.
    pub by: String,
    /// Under which one.
    pub token: u64,
    /// When it was asked for.
    pub invoked: u64,
}

/// Judges what was accepted for one thing that is fenced.
pub fn check(what: &str, grants: &[Grant], accepted: &[Use]) -> Result<(), Violation> {
    for used in accepted {
        let newer = grants
            .iter()
            .find(|grant| grant.token > used.token && grant.known < used.invoked);
        if let Some(newer) = newer {
            let found = format!(
                "{what}: accepted under {}, when {} was out",
                used.token, newer.token
            );
            return Err(Violation::new(CHECKER, found).with([
                format!("{} to {}, known at {}", newer.token, newer.to, newer.known),
                format!("{} by {}, asked at {}", used.token, used.by, used.invoked),
            ]));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_asked_after_a_newer_grant_is_wrong() {
        let grant = |token, known| Grant {
            to: "b".to_owned(),
            token,
            known,
        };
        let used = |token, invoked| Use {
            by: "a".to_owned(),
            token,
            invoked,
        };
        let grants = [grant(1, 0), grant(5, 100)];
        assert!(check("l", &grants, &[used(1, 100), used(5, 101)]).is_ok());
        assert!(check("l", &grants, &[used(5, 101), used(1, 101)]).is_err());
    }
}
