//! A request that is repeated under its idempotency key is one request: whatever is answered is the same.

use std::collections::BTreeMap;

use crate::Violation;

/// The name in [`Violation::checker`].
pub const CHECKER: &str = "a retry is the same request";

/// Judges what was answered to each key.
pub fn check(answers: &BTreeMap<String, Vec<String>>) -> Result<(), Violation> {
    for (key, answers) in answers {
        if answers.windows(2).any(|pair| pair[0] != pair[1]) {
            let found = format!("the requests with key {key} had different effects");
            return Err(Violation::new(CHECKER, found).with(answers.clone()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_effects_of_one_key_are_seen() {
        let answers = |all: &[&str]| {
            let all = all.iter().map(|one| (*one).to_owned()).collect();
            check(&BTreeMap::from([("k".to_owned(), all)]))
        };
        assert!(answers(&[]).is_ok());
        assert!(answers(&["a", "a"]).is_ok());
        assert!(answers(&["a", "b"]).is_err());
    }
}
