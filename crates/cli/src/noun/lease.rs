//! `regent lease`.

use clap::Subcommand;
use futures::StreamExt as _;
use regent_client::{Client, LeaseState};
use regent_types::duration::Span;
use regent_types::lease::{AcquireLease, Lease, LeaseConfirmed};
use regent_types::{LeaseName, Token};
use serde_json::json;

use crate::hold::HoldArgs;
use crate::output::{self, Format, or_dash};

/// See the variants.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List leases that are held.
    List,
    /// Show a lease.
    Get {
        /// Its name.
        name: LeaseName,
    },
    /// Take a lease, waiting for it if that is asked for.
    ///
    /// Nobody renews it afterwards; to run a program while holding a lease, use `hold`.
    Acquire {
        /// Its name.
        name: LeaseName,
        /// Who holds it, for people.
        #[arg(long)]
        holder: String,
        /// How long it lasts without a renewal.
        #[arg(long, default_value = "15s")]
        ttl: Span,
        /// How long to wait for it in the queue; not at all without this.
        #[arg(long)]
        wait: Option<Span>,
    },
    /// Run a program while holding a lease, and end it before the lease can be another's.
    Hold(HoldArgs),
    /// Renew a lease.
    Renew(Held),
    /// Give a lease back.
    Release(Held),
    /// Check whether a lease is held under a token.
    Verify(Held),
    /// Follow who holds a lease.
    Watch {
        /// Its name.
        name: LeaseName,
    },
    /// Take a lease from its holder; for operators.
    ForceRelease {
        /// Its name.
        name: LeaseName,
        /// Why, for those who see the event.
        #[arg(long)]
        reason: Option<String>,
    },
}

/// A lease and the token of its grant.
#[derive(Debug, clap::Args)]
pub(crate) struct Held {
    /// Its name.
    name: LeaseName,
    /// The token of the grant.
    #[arg(long)]
    token: Token,
}

const COLUMNS: [&str; 8] = [
    "NAME",
    "HOLDER",
    "OWNER",
    "TOKEN",
    "TTL",
    "REMAINING",
    "CANDIDATES",
    "GRANTED AT",
];

fn row(l: &Lease) -> Vec<String> {
    vec![
        l.name.to_string(),
        l.holder.clone(),
        l.owner.clone(),
        l.token.to_string(),
        Span(l.ttl_ms).to_string(),
        or_dash(l.remaining_ms.map(Span).as_ref()),
        l.candidates.len().to_string(),
        l.granted_at.to_string(),
    ]
}

/// Runs it.
pub(crate) async fn run(client: &Client, command: Command, format: Format) -> anyhow::Result<()> {
    match command {
        Command::List => output::records(format, &client.all_leases().await?, &COLUMNS, row),
        Command::Get { name } => output::record(format, &client.lease(&name).await?, &COLUMNS, row),
        Command::Acquire {
            name,
            holder,
            ttl,
            wait,
        } => {
            let grant = client
                .acquire_lease(
                    &name,
                    &AcquireLease {
                        holder,
                        ttl_ms: ttl.millis(),
                        wait_ms: wait.map(Span::millis),
                    },
                )
                .await?;
            if grant.waited {
                // Otherwise it would be taken back before anybody could have typed that.
                client.renew_lease(&grant.name, grant.token).await?;
            }
            output::record(
                format,
                &grant,
                &["NAME", "HOLDER", "TOKEN", "TTL", "WAITED"],
                |g| {
                    vec![
                        g.name.to_string(),
                        g.holder.clone(),
                        g.token.to_string(),
                        Span(g.ttl_ms).to_string(),
                        if g.waited { "yes" } else { "no" }.to_owned(),
                    ]
                },
            )
        }
        Command::Renew(held) => confirmed(format, &client.renew_lease(&held.name, held.token).await?),
        Command::Release(held) => Ok(client.release_lease(&held.name, held.token).await?),
        Command::Verify(held) => confirmed(format, &client.verify_lease(&held.name, held.token).await?),
        Command::Watch { name } => watch(client, &name, format).await,
        Command::ForceRelease { name, reason } => {
            Ok(client.force_release_lease(&name, reason.as_deref()).await?)
        }
        Command::Hold(_) => unreachable!("it has exit codes of its own and is taken before"),
    }
}

/// One line for each change, until it is ended; goes to the next node when one goes away.
async fn watch(client: &Client, name: &LeaseName, format: Format) -> anyhow::Result<()> {
    let mut states = client.watch_lease(name);
    while let Some(state) = states.next().await {
        let LeaseState { leader, revision } = state?;
        output::line(match (format, leader) {
            (Format::Json, leader) => {
                let leader =
                    leader.map(|l| json!({ "holder": l.holder, "owner": l.owner, "token": l.token }));
                json!({ "name": name, "revision": revision, "leader": leader }).to_string()
            }
            (Format::Table, Some(l)) => {
                format!("{revision:<10} held    {:<10} {}", l.token.to_string(), l.holder)
            }
            (Format::Table, None) => format!("{revision:<10} free"),
        });
    }
    Ok(())
}

fn confirmed(format: Format, confirmed: &LeaseConfirmed) -> anyhow::Result<()> {
    output::record(format, confirmed, &["TOKEN", "TTL"], |c| {
        vec![c.token.to_string(), Span(c.ttl_ms).to_string()]
    })
}
