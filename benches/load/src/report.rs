//! What was measured, for people: a table of medians, and what became of each goal. Both are Markdown with
//! columns that are aligned, so that they read as text too. And for programs: all of it as JSON.

use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;
use serde::Serialize;

use crate::cluster::System;
use crate::machine::Machine;
use crate::measure::{Bound, Goal, Measured, Metric, Row, median};
use crate::plot;
use crate::works::Settings;

/// Everything about a run.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Seconds since 1970.
    pub(crate) time: u64,
    pub(crate) machine: Machine,
    /// The version of each system that was measured.
    pub(crate) versions: Vec<(System, String)>,
    /// What was added to Regent's command line.
    pub(crate) regent_args: Vec<String>,
    pub(crate) settings: Settings,
    pub(crate) rows: Vec<Row>,
    pub(crate) measured: Vec<Measured>,
}

/// The rounds of one value: the median, the least, the most.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    rounds: usize,
}

impl Report {
    /// Writes `bench.json`, `bench.md` and `bench.svg`.
    pub(crate) fn write(&self, folder: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(folder)?;
        std::fs::write(folder.join("bench.json"), serde_json::to_string_pretty(self)?)?;
        std::fs::write(folder.join("bench.md"), self.text())?;
        plot::draw(self, &folder.join("bench.svg")).context("the plot")
    }

    /// The whole report.
    pub(crate) fn text(&self) -> String {
        let versions: Vec<String> = self
            .versions
            .iter()
            .map(|(system, version)| format!("{} {version}", system.name()))
            .collect();
        let mut text = format!("{}\n{}", self.machine.text(), versions.join(", "));
        for arg in &self.regent_args {
            text.push_str(&format!(" {arg}"));
        }
        text.push_str("\n\n");
        text.push_str(&self.figures());
        text.push('\n');
        text.push_str(&self.goals());
        for failure in self.failures() {
            text.push_str(&format!("\nFAILED: {failure}"));
        }
        text
    }

    /// The rounds of a value.
    pub(crate) fn spread(&self, row: &Row, system: System, metric: Metric) -> Option<Spread> {
        let of_row = self
            .measured
            .iter()
            .filter(|m| m.system == system && m.row == row.id);
        let values: Vec<f64> = of_row.filter_map(|m| m.values.get(&metric).copied()).collect();
        Some(Spread {
            median: median(&values),
            min: values.iter().copied().min_by(f64::total_cmp)?,
            max: values.iter().copied().max_by(f64::total_cmp)?,
            rounds: values.len(),
        })
    }

    /// How many measurements had a failure.
    pub(crate) fn failures_of_measured(&self) -> usize {
        self.measured.iter().filter(|m| m.failure.is_some()).count()
    }

    /// What went wrong: requests that failed, and works that gave nothing.
    pub(crate) fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        for measured in &self.measured {
            let place = || {
                format!(
                    "{}, {}, round {}",
                    measured.row,
                    measured.system.name(),
                    measured.round + 1
                )
            };
            let failed = measured.values.get(&Metric::Failed).copied().unwrap_or_default();
            if failed > 0.0 || measured.failure.is_some() {
                let failure = measured.failure.as_deref().unwrap_or("no reason was given");
                failures.push(format!(
                    "{}: {failed:.0} requests failed; the first: {failure}",
                    place()
                ));
            }
            if measured.values.is_empty()
                || measured
                    .values
                    .get(&Metric::Rate)
                    .is_some_and(|rate| *rate <= 0.0)
            {
                failures.push(format!("{}: nothing was answered", place()));
            }
        }
        for row in &self.rows {
            for (system, _) in &self.versions {
                if row.regent_only && *system == System::Etcd {
                    continue;
                }
                if !self
                    .measured
                    .iter()
                    .any(|m| m.row == row.id && m.system == *system)
                {
                    failures.push(format!("{}, {}: not measured", row.id, system.name()));
                }
            }
        }
        failures
    }

    /// Rates, latencies and CPU: medians.
    fn figures(&self) -> String {
        const PAIRS: [Metric; 7] = [
            Metric::P50,
            Metric::P99,
            Metric::Max,
            Metric::Cores,
            Metric::MemberMb,
            Metric::GeneratorCores,
            Metric::OtherCores,
        ];
        let mut head = vec![
            "etcd / Regent".to_owned(),
            "rate/s".to_owned(),
            "ratio".to_owned(),
        ];
        head.extend(PAIRS.map(|metric| metric.label().to_owned()));
        let mut lines = vec![head];
        for row in &self.rows {
            let value = |system, metric| self.spread(row, system, metric).map(|spread| spread.median);
            let pair = |metric| {
                let [etcd, regent] = [System::Etcd, System::Regent].map(|system| value(system, metric));
                if etcd.is_none() && regent.is_none() {
                    return String::new();
                }
                format!("{} / {}", or_dash(etcd), or_dash(regent))
            };
            let rates = pair(Metric::Rate);
            if rates.is_empty() {
                continue;
            }
            let ratio = value(System::Etcd, Metric::Rate).zip(value(System::Regent, Metric::Rate));
            let ratio = ratio.map_or(String::new(), |(etcd, regent)| {
                format!("{} x", number(regent / etcd))
            });
            let mut line = vec![row.title.clone(), rates, ratio];
            line.extend(PAIRS.map(pair));
            lines.push(line);
        }
        if lines.len() == 1 {
            return String::new();
        }
        markdown(&lines)
    }

    /// What became of each goal.
    fn goals(&self) -> String {
        let head = ["work", "measure", "etcd", "Regent", "ratio", "goal", "result"];
        let mut lines = vec![head.map(str::to_owned).to_vec()];
        for row in &self.rows {
            for goal in &row.goals {
                let etcd = self.spread(row, System::Etcd, goal.metric);
                let regent = self.spread(row, System::Regent, goal.metric);
                let ratio = etcd.zip(regent).map(|(etcd, regent)| regent.median / etcd.median);
                let ratio = ratio.filter(|ratio| ratio.is_finite());
                lines.push(vec![
                    row.title.clone(),
                    goal.metric.label().to_owned(),
                    etcd.map_or("-".to_owned(), Spread::text),
                    regent.map_or("-".to_owned(), Spread::text),
                    ratio.map_or(String::new(), |ratio| format!("{} x", number(ratio))),
                    goal.bound.text(),
                    result(goal, etcd, regent).to_owned(),
                ]);
            }
        }
        markdown(&lines)
    }
}

impl Spread {
    /// The median, with the range where there is one.
    fn text(self) -> String {
        if self.rounds < 2 {
            return number(self.median);
        }
        format!(
            "{} ({} to {})",
            number(self.median),
            number(self.min),
            number(self.max)
        )
    }
}

/// In a word, by the medians.
pub(crate) fn result(goal: &Goal, etcd: Option<Spread>, regent: Option<Spread>) -> &'static str {
    let Some(regent) = regent else {
        return "not measured";
    };
    match goal.bound.reached(etcd.map(|etcd| etcd.median), regent.median) {
        None if goal.bound == Bound::Shown => "",
        None => "no etcd",
        Some(true) => "reached",
        Some(false) => {
            // Would it be reached with the luckiest rounds on one side and the unluckiest on the other?
            let (etcd, regent) = match goal.bound {
                Bound::AtLeastTimes(_) => (etcd.map(|etcd| etcd.min), regent.max),
                Bound::AtMostTimes(_) | Bound::AtMost(_) | Bound::Shown => {
                    (etcd.map(|etcd| etcd.max), regent.min)
                }
            };
            if goal.bound.reached(etcd, regent) == Some(true) {
                "missed, within the spread"
            } else {
                "MISSED"
            }
        }
    }
}

/// One measurement, as it is made.
pub(crate) fn line(row: &Row, measured: &Measured) -> String {
    let mut text = format!(
        "round {} {:6} {:30}",
        measured.round + 1,
        measured.system.name(),
        row.title
    );
    for (metric, value) in &measured.values {
        if *metric != Metric::Failed {
            text.push_str(&format!(" {} {},", number(*value), metric.label()));
        }
    }
    text.pop();
    if let Some(failure) = &measured.failure {
        let failed = measured.values.get(&Metric::Failed).copied().unwrap_or_default();
        text.push_str(&format!(" FAILED {failed}: {failure}"));
    }
    text
}

/// A line on stdout. That nobody reads it any more does not end a measurement.
pub(crate) fn say(line: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Lines of cells, the first of them the head; all but the first column to the right.
fn markdown(lines: &[Vec<String>]) -> String {
    let columns = lines.first().map_or(0, Vec::len);
    let width = |column: usize| {
        lines
            .iter()
            .map(|line| line[column].chars().count())
            .max()
            .unwrap_or(0)
            .max(3)
    };
    let mut text = String::new();
    for (n, line) in lines.iter().enumerate() {
        for (column, cell) in line.iter().enumerate() {
            let width = width(column);
            let cell = if column == 0 {
                format!("| {cell:width$} ")
            } else {
                format!("| {cell:>width$} ")
            };
            text.push_str(&cell);
        }
        text.push_str("|\n");
        if n == 0 {
            for column in 0..columns {
                let dashes = "-".repeat(width(column));
                text.push_str(&if column == 0 {
                    format!("| {dashes} ")
                } else {
                    format!("| {}: ", &dashes[1..])
                });
            }
            text.push_str("|\n");
        }
    }
    text
}

fn or_dash(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), number)
}

/// A number with about three digits.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 10_000.0 => {
            let whole = format!("{value:.0}");
            let (thousands, rest) = whole.split_at(whole.len() - 3);
            format!("{thousands},{rest}")
        }
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(min: f64, median: f64, max: f64) -> Spread {
        Spread {
            median,
            min,
            max,
            rounds: 3,
        }
    }

    #[test]
    fn a_goal_is_judged_by_medians_and_near_misses_are_said() {
        let goal = Goal {
            metric: Metric::Rate,
            bound: Bound::AtLeastTimes(3.0),
        };
        let etcd = Some(spread(90.0, 100.0, 110.0));
        assert_eq!(result(&goal, etcd, Some(spread(200.0, 300.0, 310.0))), "reached");
        assert_eq!(
            result(&goal, etcd, Some(spread(200.0, 290.0, 295.0))),
            "missed, within the spread"
        );
        assert_eq!(result(&goal, etcd, Some(spread(200.0, 250.0, 260.0))), "MISSED");
        assert_eq!(result(&goal, None, Some(spread(200.0, 250.0, 260.0))), "no etcd");
        assert_eq!(result(&goal, etcd, None), "not measured");
        let goal = Goal {
            metric: Metric::P99,
            bound: Bound::AtMostTimes(1.0),
        };
        assert_eq!(result(&goal, etcd, Some(spread(50.0, 99.0, 300.0))), "reached");
        assert_eq!(
            result(&goal, etcd, Some(spread(105.0, 115.0, 300.0))),
            "missed, within the spread"
        );
        assert_eq!(result(&goal, etcd, Some(spread(111.0, 115.0, 300.0))), "MISSED");
    }

    #[test]
    fn numbers_have_about_three_digits() {
        assert_eq!(
            [0.123, 4.567, 45.67, 456.7, 4567.0, 45678.9].map(number),
            ["0.12", "4.57", "45.7", "457", "4567", "45,679"]
        );
    }

    #[test]
    fn tables_are_aligned() {
        let lines = [["work", "n"], ["a", "1000"]].map(|line| line.map(str::to_owned).to_vec());
        assert_eq!(
            markdown(&lines),
            "| work |    n |\n| ---- | ---: |\n| a    | 1000 |\n"
        );
    }
}
