//! `regent events`.

use futures::StreamExt as _;
use regent_client::{Client, EventFilter};
use regent_types::event::Event;

use crate::output::{self, Format};

/// Flags of `regent events`.
#[derive(Debug, clap::Args)]
pub(crate) struct EventsArgs {
    /// Only what came after the event with this id; from now on without it.
    #[arg(long, value_name = "REVISION.N")]
    after: Option<String>,
    /// Only these kinds, such as session.created; may be repeated or comma-separated.
    #[arg(long = "kind", value_delimiter = ',')]
    kinds: Vec<String>,
}

/// Follows events until it is ended; goes to the next node when one goes away.
pub(crate) async fn run(client: &Client, args: EventsArgs, format: Format) -> anyhow::Result<()> {
    let mut events = client.events(EventFilter {
        after: args.after,
        kinds: args.kinds,
    });
    while let Some(event) = events.next().await {
        print(format, &event?)?;
    }
    Ok(())
}

/// Prints one event on one line.
pub(super) fn print(format: Format, event: &Event) -> anyhow::Result<()> {
    match format {
        Format::Json => output::line(serde_json::to_string(event)?),
        Format::Table => {
            let state = ["state", "status"]
                .iter()
                .find_map(|key| event.record.get(key)?.as_str());
            let reason = event.reason.as_deref().map(|why| format!(": {why}"));
            output::line(format!(
                "{}  {:<14} {:<22} {}  {}  by {}{}",
                event.time,
                event.id,
                event.kind,
                event.subject,
                state.unwrap_or_default(),
                event.by,
                reason.unwrap_or_default()
            ));
        }
    }
    Ok(())
}
