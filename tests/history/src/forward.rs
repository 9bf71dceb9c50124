//! What only grows: a node's term and applied index, cluster time, a record's revision as one client sees it.

use std::collections::BTreeMap;

use crate::Violation;

/// The name in [`Violation::checker`].
pub const CHECKER: &str = "never backwards";

/// Judges one quantity: whose, when it was seen, what it was; in the order of being seen.
pub fn check<K: Ord + Clone + std::fmt::Debug>(what: &str, seen: &[(K, u64, u64)]) -> Result<(), Violation> {
    let mut last: BTreeMap<K, (u64, u64)> = BTreeMap::new();
    for (whose, at, value) in seen {
        if let Some((before_at, before)) = last.insert(whose.clone(), (*at, *value))
            && before > *value
        {
            return Err(Violation::new(CHECKER, format!("{what} of {whose:?} went back"))
                .with([format!("{before} at {before_at}"), format!("{value} at {at}")]));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_goes_forward_by_itself() {
        assert!(check("term", &[(1, 0, 5), (2, 1, 3), (1, 2, 5), (2, 3, 4)]).is_ok());
        assert!(check("term", &[(1, 0, 5), (2, 1, 3), (1, 2, 4)]).is_err());
    }
}
