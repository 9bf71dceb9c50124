//! At no time may two act under one lease, and who acts later has the larger token.

use crate::Violation;

/// The name in [`Violation::checker`].
pub const CHECKER: &str = "one holder of a lease";

/// What was recorded of one token, by whoever held it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tenure {
    /// Who held it.
    pub holder: String,
    /// Its fencing token.
    pub token: u64,
    /// When the guard became valid, or lasted longer, and until when.
    pub valid: Vec<(u64, u64)>,
    /// When it gave the lease back.
    pub ended: Option<u64>,
}

impl Tenure {
    /// When it could act first.
    pub fn from(&self) -> u64 {
        self.valid.first().map_or(u64::MAX, |(at, _)| *at)
    }

    /// The end of its last guard. One that was frozen may have believed until then, whatever it wrote when.
    pub fn until(&self) -> u64 {
        let until = self.valid.iter().map(|(_, until)| *until).max().unwrap_or(0);
        self.ended.map_or(until, |ended| until.min(ended))
    }

    fn line(&self) -> String {
        let Self { holder, token, .. } = self;
        format!(
            "{holder} under token {token} from {} until {}",
            self.from(),
            self.until()
        )
    }
}

/// Judges all tenures of one lease, in any order.
pub fn check(lease: &str, tenures: &[Tenure]) -> Result<(), Violation> {
    let mut acted: Vec<&Tenure> = tenures.iter().filter(|tenure| !tenure.valid.is_empty()).collect();
    acted.sort_by_key(|tenure| tenure.token);
    // Not only neighbours: a short tenure may lie within a long one.
    let mut longest: Option<&Tenure> = None;
    for tenure in acted {
        if let Some(before) = longest {
            let what = if before.token == tenure.token {
                Some("one token has two holders")
            } else if tenure.from() < before.until() {
                Some("two act at the same time, or the later one has the smaller token")
            } else {
                None
            };
            if let Some(what) = what {
                return Err(
                    Violation::new(CHECKER, format!("{lease}: {what}")).with([before.line(), tenure.line()])
                );
            }
        }
        if longest.is_none_or(|longest| tenure.until() >= longest.until()) {
            longest = Some(tenure);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenure(token: u64, from: u64, until: u64) -> Tenure {
        Tenure {
            holder: format!("h{token}"),
            token,
            valid: vec![(from, until)],
            ended: None,
        }
    }

    #[test]
    fn two_that_act_at_once_are_seen_and_one_after_the_other_are_not() {
        assert!(check("l", &[tenure(2, 250, 400), tenure(1, 100, 250)]).is_ok());
        assert!(check("l", &[tenure(2, 249, 400), tenure(1, 100, 250)]).is_err());
        // A larger token that acts before a smaller one is wrong, also when they are apart.
        assert!(check("l", &[tenure(1, 100, 250), tenure(2, 10, 90)]).is_err());
        // One that is short within one that is long hides nothing.
        assert!(
            check(
                "l",
                &[tenure(1, 0, 500), tenure(2, 500, 600), tenure(3, 550, 700)]
            )
            .is_err()
        );
        assert!(check("l", &[tenure(1, 0, 500), tenure(1, 600, 700)]).is_err());
    }

    #[test]
    fn one_that_was_given_back_ends_there() {
        let ended = Tenure {
            ended: Some(160),
            ..tenure(1, 100, 250)
        };
        assert!(check("l", &[ended.clone(), tenure(2, 160, 400)]).is_ok());
        assert!(check("l", &[ended, tenure(2, 159, 400)]).is_err());
    }
}
