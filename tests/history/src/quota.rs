//! A quota is never exceeded, at no revision.

use std::collections::BTreeSet;

use crate::Violation;

/// The name in [`Violation::checker`].
pub const CHECKER: &str = "quota";

/// Something that counts against a quota, or does not any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The revision of it.
    pub revision: u64,
    /// Of what.
    pub name: String,
    /// Whether it counts from now on.
    pub counts: bool,
}

/// Judges the changes of what counts against one quota, in the order of their revisions.
pub fn check(whose: &str, limit: usize, changes: &[Change]) -> Result<(), Violation> {
    let mut counting = BTreeSet::new();
    for change in changes {
        if change.counts {
            counting.insert(change.name.as_str());
        } else {
            counting.remove(change.name.as_str());
        }
        if counting.len() > limit {
            let what = format!(
                "{whose} has {} of {limit} at revision {}",
                counting.len(),
                change.revision
            );
            return Err(Violation::new(CHECKER, what).with(counting.iter().map(|name| (*name).to_owned())));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_too_many_is_seen_and_one_after_the_other_is_not() {
        let change = |revision, name: &str, counts| Change {
            revision,
            name: name.to_owned(),
            counts,
        };
        let mut changes = vec![change(1, "a", true), change(2, "a", true), change(3, "a", false)];
        changes.push(change(4, "b", true));
        assert!(check("u", 1, &changes).is_ok());
        changes.push(change(5, "c", true));
        assert!(check("u", 1, &changes).is_err());
        assert!(check("u", 2, &changes).is_ok());
    }
}
