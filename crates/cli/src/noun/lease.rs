//! `regent lease`.

use clap::Subcommand;
use regent_client::Client;
use regent_types::duration::Span;
use regent_types::lease::{AcquireLease, Lease, LeaseConfirmed};
use regent_types::{LeaseName, Token};

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
    /// Take a lease, if it is free.
    Acquire {
        /// Its name.
        name: LeaseName,
        /// Who holds it, for people.
        #[arg(long)]
        holder: String,
        /// How long it lasts without a renewal.
        #[arg(long, default_value = "15s")]
        ttl: Span,
    },
    /// Renew a lease.
    Renew(Held),
    /// Give a lease back.
    Release(Held),
    /// Check whether a lease is held under a token.
    Verify(Held),
    /// Take a lease from its holder; for operators.
    ForceRelease {
        /// Its name.
        name: LeaseName,
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

const COLUMNS: [&str; 7] = [
    "NAME",
    "HOLDER",
    "OWNER",
    "TOKEN",
    "TTL",
    "REMAINING",
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
        l.granted_at.to_string(),
    ]
}

/// Runs it.
pub(crate) async fn run(client: &Client, command: Command, format: Format) -> anyhow::Result<()> {
    match command {
        Command::List => output::records(format, &client.all_leases().await?, &COLUMNS, row),
        Command::Get { name } => output::record(format, &client.lease(&name).await?, &COLUMNS, row),
        Command::Acquire { name, holder, ttl } => {
            let grant = client
                .acquire_lease(
                    &name,
                    &AcquireLease {
                        holder,
                        ttl_ms: ttl.millis(),
                        wait_ms: None,
                    },
                )
                .await?;
            output::record(format, &grant, &["NAME", "HOLDER", "TOKEN", "TTL"], |g| {
                vec![
                    g.name.to_string(),
                    g.holder.clone(),
                    g.token.to_string(),
                    Span(g.ttl_ms).to_string(),
                ]
            })
        }
        Command::Renew(held) => confirmed(format, &client.renew_lease(&held.name, held.token).await?),
        Command::Release(held) => Ok(client.release_lease(&held.name, held.token).await?),
        Command::Verify(held) => confirmed(format, &client.verify_lease(&held.name, held.token).await?),
        Command::ForceRelease { name } => Ok(client.force_release_lease(&name).await?),
    }
}

fn confirmed(format: Format, confirmed: &LeaseConfirmed) -> anyhow::Result<()> {
    output::record(format, confirmed, &["TOKEN", "TTL"], |c| {
        vec![c.token.to_string(), Span(c.ttl_ms).to_string()]
    })
}
