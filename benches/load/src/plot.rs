//! The same medians as a picture: rates, p99 and CPU of both, a bar each, on logarithmic scales, with a thin line
//! from the least to the most of the rounds, and the ratio; green where its goal is reached, red where not.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::{
    Color as _, DrawingArea, IntoDrawingArea as _, IntoFont as _, PathElement, RGBColor, Rectangle,
    SVGBackend, Text, WHITE,
};
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::cluster::System;
use crate::measure::{Bound, Metric, Row};
use crate::report::{Report, Spread, number};

/// In pixels.
const LABELS: u32 = 240;
const PANEL: u32 = 430;
const ROW: u32 = 42;
const HEAD: u32 = 64;
const FOOT: u32 = 36;
/// To the right of a panel's scale, for the numbers of the longest bars.
const MARGIN: u32 = 150;
/// The height of a bar.
const BAR: i32 = 16;

const ETCD: RGBColor = RGBColor(0xb0, 0xb7, 0xc3);
const REGENT: RGBColor = RGBColor(0x1f, 0x6f, 0xb2);
const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
const REACHED: RGBColor = RGBColor(0x1b, 0x7f, 0x3b);
const MISSED: RGBColor = RGBColor(0xc0, 0x39, 0x2b);
const FONT: &str = "sans-serif";

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// What each panel shows.
const PANELS: [(Metric, &str); 3] = [
    (Metric::Rate, "requests a second (more is better; log scale)"),
    (Metric::P99, "p99 in ms (less is better; log scale)"),
    (Metric::Cores, "cores of the 3 members (log scale)"),
];

/// Draws it.
pub(crate) fn draw(report: &Report, path: &Path) -> anyhow::Result<()> {
    let rows: Vec<&Row> = report
        .rows
        .iter()
        .filter(|row| {
            let rate = |system| report.spread(row, system, Metric::Rate);
            rate(System::Etcd).or(rate(System::Regent)).is_some()
        })
        .collect();
    let size = (LABELS + PANEL * 3, HEAD + FOOT + ROW * u32::try_from(rows.len())?);
    let root = SVGBackend::new(path, size).into_drawing_area();
    root.fill(&WHITE)?;
    let (labels, mut rest) = root.split_horizontally(LABELS);
    titles(report, &labels, &rows)?;
    for (metric, title) in PANELS {
        let (area, right) = rest.split_horizontally(PANEL);
        panel(report, &area, &rows, metric, title)?;
        rest = right;
    }
    root.present()?;
    Ok(())
}

fn titles(report: &Report, area: &Area<'_>, rows: &[&Row]) -> anyhow::Result<()> {
    let legend = (FONT, 14).into_font().color(&INK);
    for (n, (system, colour)) in [(System::Etcd, ETCD), (System::Regent, REGENT)]
        .into_iter()
        .enumerate()
    {
        let y = 16 + 20 * i32::try_from(n)?;
        let version = report.versions.iter().find(|(measured, _)| *measured == system);
        let version = version.map_or("not measured", |(_, version)| version.as_str());
        area.draw(&Rectangle::new([(12, y), (26, y + 12)], colour.filled()))?;
        area.draw(&Text::new(
            format!("{} {version}", system.name()),
            (32, y),
            legend.clone(),
        ))?;
    }
    let right = (FONT, 14)
        .into_font()
        .color(&INK)
        .pos(Pos::new(HPos::Right, VPos::Center));
    for (n, row) in rows.iter().enumerate() {
        let y = i32::try_from(HEAD + ROW * u32::try_from(n)? + ROW / 2)?;
        area.draw(&Text::new(
            row.title.clone(),
            (i32::try_from(LABELS)? - 10, y),
            right.clone(),
        ))?;
    }
    Ok(())
}

/// One panel: a bar for each system and row.
fn panel(report: &Report, area: &Area<'_>, rows: &[&Row], metric: Metric, title: &str) -> anyhow::Result<()> {
    let spreads = |system| rows.iter().map(move |row| report.spread(row, system, metric));
    let all: Vec<Spread> = spreads(System::Etcd)
        .chain(spreads(System::Regent))
        .flatten()
        .collect();
    let Some(scale) = Scale::of(&all) else {
        return Ok(());
    };
    let ink = (FONT, 13).into_font().color(&INK);
    let centred = ink.pos(Pos::new(HPos::Center, VPos::Center));
    let beside = ink.pos(Pos::new(HPos::Left, VPos::Center));
    let middle = i32::try_from((PANEL - MARGIN) / 2)?;
    area.draw(&Text::new(
        title,
        (middle, 24),
        (FONT, 15).into_font().color(&INK).pos(centred.pos),
    ))?;
    let bottom = i32::try_from(HEAD + ROW * u32::try_from(rows.len())?)?;
    for power in scale.low..=scale.high {
        let x = scale.x(10_f64.powi(power));
        let line = [(x, i32::try_from(HEAD)?), (x, bottom)];
        area.draw(&PathElement::new(
            line,
            RGBColor(0xdd, 0xdd, 0xdd).stroke_width(1),
        ))?;
        area.draw(&Text::new(short(power), (x, bottom + 14), centred.clone()))?;
    }
    for (n, row) in rows.iter().enumerate() {
        let top = i32::try_from(HEAD + ROW * u32::try_from(n)?)?;
        let etcd = report.spread(row, System::Etcd, metric);
        let regent = report.spread(row, System::Regent, metric);
        for (spread, colour, top) in [(etcd, ETCD, top + 5), (regent, REGENT, top + 5 + BAR)] {
            let Some(spread) = spread else { continue };
            let bar = [(scale.x(0.0), top), (scale.x(spread.median), top + BAR - 1)];
            area.draw(&Rectangle::new(bar, colour.filled()))?;
            let middle = top + BAR / 2;
            let range = [(scale.x(spread.min), middle), (scale.x(spread.max), middle)];
            area.draw(&PathElement::new(range, INK.stroke_width(1)))?;
            let (mut text, mut style) = (number(spread.median), beside.clone());
            if let Some(etcd) = etcd.filter(|etcd| colour == REGENT && etcd.median > 0.0) {
                text.push_str(&format!(" / {} x", number(spread.median / etcd.median)));
                let goal = row
                    .goals
                    .iter()
                    .find(|goal| goal.metric == metric)
                    .filter(|goal| !matches!(goal.bound, Bound::Shown | Bound::AtMost(_)));
                if let Some(goal) = goal {
                    text.push_str(&format!(", goal {}", goal.bound.short()));
                    let reached = goal.bound.reached(Some(etcd.median), spread.median) == Some(true);
                    style = style.color(if reached { &REACHED } else { &MISSED });
                }
            }
            area.draw(&Text::new(text, (scale.x(spread.max) + 5, middle), style))?;
        }
    }
    Ok(())
}

/// A logarithmic scale between whole powers of ten.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Scale {
    low: i32,
    high: i32,
}

impl Scale {
    /// For all of these; `None` when there is nothing to show.
    fn of(all: &[Spread]) -> Option<Self> {
        let least = all
            .iter()
            .map(|spread| spread.min)
            .filter(|min| *min > 0.0)
            .min_by(f64::total_cmp)?;
        let most = all.iter().map(|spread| spread.max).max_by(f64::total_cmp)?;
        // A bar of no length shows nothing: the least begins below its value.
        #[expect(
            clippy::cast_possible_truncation,
            reason = "powers of ten of finite numbers are small"
        )]
        let (low, high) = ((least * 0.8).log10().floor() as i32, most.log10().ceil() as i32);
        Some(Self {
            low,
            high: high.max(low + 1),
        })
    }

    /// In pixels from the left of the panel; what is below the scale is at its edge.
    fn x(self, value: f64) -> i32 {
        let share = (value.log10() - f64::from(self.low)) / f64::from(self.high - self.low);
        #[expect(clippy::cast_possible_truncation, reason = "between 0 and the panel's width")]
        let x = (share.clamp(0.0, 1.0) * f64::from(PANEL - MARGIN)) as i32;
        x
    }
}

/// A power of ten, short.
fn short(power: i32) -> String {
    match power {
        3..=5 => format!("{}k", 10_u32.pow(power.unsigned_abs() - 3)),
        0..=2 => format!("{}", 10_u32.pow(power.unsigned_abs())),
        -3..=-1 => format!("{}", 10_f64.powi(power)),
        _ => format!("1e{power}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_spans_whole_powers_and_keeps_within_the_panel() {
        let scale = Scale { low: -1, high: 3 };
        assert_eq!(scale.x(0.1), 0);
        assert_eq!(scale.x(0.0), 0);
        assert_eq!(scale.x(1000.0), i32::try_from(PANEL - MARGIN).unwrap());
        assert_eq!(scale.x(10.0), i32::try_from(PANEL - MARGIN).unwrap() / 2);
        assert_eq!(Scale::of(&[]), None);
        assert_eq!([-2, 0, 2, 4, 7].map(short), ["0.01", "1", "100", "10k", "1e7"]);
    }
}
