//! Nodes that have applied the same entries have the same state.

use std::collections::BTreeMap;

use crate::Violation;

/// The name in [`Violation::checker`].
pub const CHECKER: &str = "equal state at an equal index";

/// Judges what nodes said: who, at which index, which digest.
pub fn check(told: &[(u64, u64, u64)]) -> Result<(), Violation> {
    let mut first: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    for (node, index, digest) in told {
        let (other, expected) = *first.entry(*index).or_insert((*node, *digest));
        if expected != *digest {
            return Err(
                Violation::new(CHECKER, format!("the states at index {index} differ")).with([
                    format!("node {other}: {expected:016x}"),
                    format!("node {node}: {digest:016x}"),
                ]),
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_counts_only_at_the_same_index() {
        assert!(check(&[(1, 5, 7), (2, 5, 7), (1, 6, 8), (2, 7, 9)]).is_ok());
        assert!(check(&[(1, 5, 7), (2, 6, 8), (3, 5, 8)]).is_err());
    }
}
