//! What was measured, as text.

use std::fmt::Write as _;

use crate::cluster::System;
use crate::measure::{Measured, Metric, Row, median};

/// A line on stdout.
#[allow(clippy::print_stdout, reason = "printing is what this program is for")]
pub(crate) fn say(line: impl std::fmt::Display) {
    println!("{line}");
}

/// One measurement, as it is made.
pub(crate) fn line(row: &Row, measured: &Measured) -> String {
    let mut text = format!(
        "{:>2} {:6} {:28}",
        measured.round + 1,
        measured.system.name(),
        row.title
    );
    for (metric, value) in &measured.values {
        let _ = write!(text, " {}={}", metric.label().replace(' ', "_"), number(*value));
    }
    if let Some(failure) = &measured.failure {
        let _ = write!(text, " FAILED: {failure}");
    }
    text
}

/// The medians, and the ratios.
pub(crate) fn table(rows: &[Row], all: &[Measured]) -> String {
    let mut text = String::new();
    for row in rows {
        let value = |system: System, metric: Metric| {
            let of_row = all.iter().filter(|m| m.system == system && m.row == row.id);
            let values: Vec<f64> = of_row.filter_map(|m| m.values.get(&metric).copied()).collect();
            (!values.is_empty()).then(|| median(&values))
        };
        let _ = write!(text, "{:28}", row.title);
        for metric in [
            Metric::Rate,
            Metric::P50,
            Metric::P99,
            Metric::Cores,
            Metric::GeneratorCores,
        ] {
            let (etcd, regent) = (value(System::Etcd, metric), value(System::Regent, metric));
            let ratio = etcd.zip(regent).map(|(etcd, regent)| regent / etcd);
            let [etcd, regent, ratio] = [etcd, regent, ratio].map(|v| v.map_or("-".to_owned(), number));
            let _ = write!(text, " | {} {etcd} {regent} {ratio}x", metric.label());
        }
        text.push('\n');
    }
    text
}

/// A number with about three digits.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
