//! What the candidates recorded, and what must be true of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use regent_history::Violation;
use regent_history::lease::{self, Tenure};

/// For how much of this time a guard was valid. Milliseconds of the machine's boot clock.
fn covered(tenure: &Tenure, from: u64, to: u64) -> u64 {
    let mut covered = 0;
    let mut seen = from;
    for (at, until) in &tenure.valid {
        let until = tenure.ended.map_or(*until, |ended| ended.min(*until)).min(to);
        let at = (*at).max(seen);
        if until > at {
            covered += until - at;
            seen = until;
        }
    }
    covered
}

/// All tenures of one lease, by token.
#[derive(Debug, Default)]
pub(crate) struct Timeline {
    pub(crate) tenures: BTreeMap<u64, Tenure>,
}

impl Timeline {
    /// Reads what the candidates have written so far; a line that is being written is left out.
    pub(crate) fn read(records: &[(String, PathBuf)]) -> Self {
        let mut timeline = Self::default();
        for (holder, path) in records {
            timeline.add(holder, path);
        }
        timeline
    }

    fn add(&mut self, holder: &str, path: &Path) {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        for line in text
            .split_inclusive('\n')
            .filter_map(|line| line.strip_suffix('\n'))
        {
            let mut words = line.split(' ');
            let what = words.next().unwrap_or_default();
            let numbers: Vec<u64> = words.map(|word| word.parse().unwrap()).collect();
            let tenure = self.tenures.entry(numbers[0]).or_default();
            assert!(
                tenure.holder.is_empty() || tenure.holder == holder,
                "token {} is {}'s and {holder}'s",
                numbers[0],
                tenure.holder
            );
            holder.clone_into(&mut tenure.holder);
            tenure.token = numbers[0];
            match what {
                "valid" => tenure.valid.push((numbers[1], numbers[2])),
                "end" => tenure.ended = Some(numbers[1]),
                "over" => {}
                other => panic!("unknown line {other:?} of {holder}"),
            }
        }
        self.tenures.retain(|_, tenure| !tenure.valid.is_empty());
    }

    /// Who may act at this moment.
    pub(crate) fn holder_at(&self, now: u64) -> Option<(u64, &Tenure)> {
        self.tenures
            .iter()
            .find(|(_, tenure)| tenure.from() <= now && now < tenure.until())
            .map(|(token, tenure)| (*token, tenure))
    }

    /// At no time may two act; and who acts later has the larger token.
    pub(crate) fn check_exclusive(&self) -> Result<(), Violation> {
        let tenures: Vec<Tenure> = self.tenures.values().cloned().collect();
        lease::check("the lease", &tenures)
    }

    /// One held the lease all the time, and might act all the time.
    pub(crate) fn check_unbroken(&self) -> Result<(), String> {
        if self.tenures.len() != 1 {
            return Err(format!("the lease changed hands: {self:#?}"));
        }
        let pairs = self.tenures.values().flat_map(|tenure| tenure.valid.windows(2));
        let gaps: Vec<_> = pairs.filter(|pair| pair[1].0 > pair[0].1).collect();
        if gaps.is_empty() {
            Ok(())
        } else {
            Err(format!("the guard lapsed: {gaps:?}"))
        }
    }

    /// The longest time between two renewals of one tenure.
    pub(crate) fn longest_pause(&self) -> u64 {
        let pauses = self.tenures.values().flat_map(|tenure| {
            tenure
                .valid
                .windows(2)
                .map(|pair| pair[1].0.saturating_sub(pair[0].0))
        });
        pauses.max().unwrap_or(0)
    }

    /// For how much of this time somebody could act.
    pub(crate) fn covered(&self, from: u64, to: u64) -> u64 {
        self.tenures
            .values()
            .map(|tenure| covered(tenure, from, to))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(lines: &[(&str, &str)]) -> Timeline {
        let folder = tempfile::tempdir().unwrap();
        let mut records = Vec::new();
        for (holder, text) in lines {
            let path = folder.path().join(holder);
            std::fs::write(&path, text).unwrap();
            records.push(((*holder).to_owned(), path));
        }
        Timeline::read(&records)
    }

    #[test]
    fn what_candidates_wrote_is_what_is_checked() {
        let a = "valid 1 100 200\nvalid 1 150 250\n";
        let b = |at| format!("valid 2 {at} 400\n");
        assert!(timeline(&[("a", a), ("b", &b(250))]).check_exclusive().is_ok());
        assert!(timeline(&[("a", a), ("b", &b(249))]).check_exclusive().is_err());
        let given_back = format!("{a}end 1 160\n");
        assert!(
            timeline(&[("a", &given_back), ("b", &b(160))])
                .check_exclusive()
                .is_ok()
        );
    }

    #[test]
    fn time_is_covered_once_and_gaps_are_not() {
        let seen = timeline(&[(
            "a",
            "valid 1 100 200\nvalid 1 150 250\nvalid 1 300 350\nvalid 1 90",
        )]);
        assert_eq!(seen.covered(0, 1_000), 200);
        assert_eq!(seen.covered(120, 320), 150);
        assert_eq!(seen.holder_at(240).unwrap().0, 1);
        assert!(seen.holder_at(350).is_none());
    }
}
