//! Log lines go to stderr; `REGENT_LOG` filters them in tracing's syntax (`info`, `regent_raft=debug`).

use tracing_subscriber::EnvFilter;

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Without a filter of the user's: our own at info; openraft and sled only when a person must act.
const DEFAULT_FILTER: &str = "info,openraft=error,sled=warn,hyper=warn,tungstenite=warn";

/// Starts logging for this process.
pub(crate) fn start(format: Format) -> anyhow::Result<()> {
    let filter = std::env::var("REGENT_LOG").unwrap_or_else(|_| DEFAULT_FILTER.to_owned());
    let filter = EnvFilter::try_new(&filter)
        .map_err(|e| crate::config::UsageError(format!("REGENT_LOG={filter:?} is not a filter: {e}")))?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        Format::Text => subscriber.with_ansi(false).init(),
        Format::Json => subscriber.json().flatten_event(true).init(),
    }
    Ok(())
}
