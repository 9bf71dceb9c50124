//! What commands print: tables for people, JSON for programs. The only place that writes to stdout.

use std::io::Write as _;

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

/// How records are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    Table,
    /// As the API gives them.
    Json,
}

/// Prints a line; a reader that has gone away is no error.
pub(crate) fn line(text: impl AsRef<str>) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{}", text.as_ref());
    let _ = out.flush();
}

/// Says something beside the output, for a person who waits.
pub(crate) fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "regent: {text}");
}

/// Prints an error with its causes, each once.
pub(crate) fn error(error: &anyhow::Error) {
    let mut err = std::io::stderr().lock();
    let _ = writeln!(err, "regent: {error:#}");
}

/// Prints records.
pub(crate) fn records<R: Serialize>(
    format: Format,
    records: &[R],
    columns: &[&str],
    row: impl Fn(&R) -> Vec<String>,
) -> anyhow::Result<()> {
    match format {
        Format::Json => line(serde_json::to_string_pretty(records)?),
        Format::Table => {
            let mut table = Table::new();
            table
                .load_style(presets::NOTHING)
                .set_content_arrangement(ContentArrangement::Disabled);
            table.set_header(columns.to_vec());
            for record in records {
                table.add_row(row(record));
            }
            // Without the style's padding at both ends.
            for text in table.to_string().lines() {
                line(text.strip_prefix(' ').unwrap_or(text).trim_end());
            }
        }
    }
    Ok(())
}

/// Prints one record: as JSON, or as its words.
pub(crate) fn record<R: Serialize>(
    format: Format,
    record: &R,
    columns: &[&str],
    row: impl Fn(&R) -> Vec<String>,
) -> anyhow::Result<()> {
    match format {
        Format::Json => line(serde_json::to_string_pretty(record)?),
        Format::Table => records(format, std::slice::from_ref(record), columns, row)?,
    }
    Ok(())
}

/// Prints one record as JSON whatever the format: for records with too much in them for a table.
pub(crate) fn json(record: &impl Serialize) -> anyhow::Result<()> {
    line(serde_json::to_string_pretty(record)?);
    Ok(())
}

/// Text for what may be absent.
pub(crate) fn or_dash<T: ToString>(value: Option<&T>) -> String {
    value.map_or_else(|| "-".to_owned(), ToString::to_string)
}

/// Prints the version of this program.
pub(crate) fn version(format: Format) -> anyhow::Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    match format {
        Format::Table => line(format!("regent {version}")),
        Format::Json => line(serde_json::to_string(&serde_json::json!({
            "version": version,
            "protocol": regent_types::frame::PROTOCOL,
        }))?),
    }
    Ok(())
}
