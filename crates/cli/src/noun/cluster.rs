//! `regent cluster`.

use clap::Subcommand;
use regent_client::Client;
use regent_types::NodeId;
use regent_types::auth::CreateToken;
use regent_types::cluster::{Cluster, Member};
use regent_types::duration::Span;

use super::token::{JOIN_FOR, show_new};
use crate::output::{self, Format, or_dash};
use crate::recovery::{self, Backup};

/// See the variants.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the members, and who leads.
    Status,
    /// The same; the name that other systems have for it.
    Members,
    /// Let a node join: prints a join token, for one node and a short while, and how it is used.
    Add {
        /// How long the token lasts [default: 1h].
        #[arg(long)]
        expires_in: Option<Span>,
    },
    /// Give a member a vote now, if it has caught up; without this it gets one once it was healthy for a while.
    Promote {
        /// The member.
        id: NodeId,
    },
    /// Take a member out, for good. Refused when those that stay would have no quorum.
    Remove {
        /// The member.
        id: NodeId,
    },
    /// Hand the leadership over, before this node is worked on. Writes wait meanwhile, none fails.
    Transfer {
        /// The node that shall lead [default: any that has caught up].
        #[arg(long)]
        to: Option<NodeId>,
    },
    /// Write a backup: the whole state at one revision, from any node. It holds password hashes.
    Backup(Backup),
    /// Make a new cluster of one node from a backup, while no node runs on its data folder.
    Restore(recovery::Restore),
    /// Make a new cluster of one node from data folders that survived the loss of a quorum, while no node runs on them.
    Recover(recovery::Recover),
}

const COLUMNS: [&str; 11] = [
    "ID",
    "ROLE",
    "VOTER",
    "REACHABLE",
    "APPLIED",
    "DIGEST",
    "LAG MS",
    "VERSION",
    "DISK FREE",
    "HTTP",
    "PEER",
];

fn row(m: &Member) -> Vec<String> {
    vec![
        m.id.to_string(),
        m.role.clone(),
        m.voter.to_string(),
        m.reachable.to_string(),
        or_dash(m.applied_index.as_ref()),
        or_dash(m.digest.as_ref()),
        or_dash(m.lag_ms.as_ref()),
        or_dash(m.version.as_ref()),
        or_dash(disk(m).as_ref()),
        m.http.clone(),
        m.peer.clone(),
    ]
}

/// What is free, in MiB, and of how much.
fn disk(m: &Member) -> Option<String> {
    let (free, total) = (m.disk_free?, m.disk_total.filter(|total| *total > 0)?);
    Some(format!(
        "{} MiB ({} %)",
        free >> 20,
        free.saturating_mul(100) / total
    ))
}

/// Runs it.
pub(crate) async fn run(client: &Client, command: Command, format: Format) -> anyhow::Result<()> {
    match command {
        // Also without a quorum: that is when it is needed most.
        Command::Status | Command::Members => show(&client.cluster().await?, format),
        Command::Add { expires_in } => add(client, expires_in, format).await,
        Command::Promote { id } => show(&client.promote_member(id).await?, format),
        Command::Remove { id } => show(&client.remove_member(id).await?, format),
        Command::Transfer { to } => show(&client.transfer(to).await?, format),
        Command::Backup(args) => recovery::backup(client, args, format).await,
        Command::Restore(_) | Command::Recover(_) => {
            unreachable!("these do not ask a cluster and are taken before")
        }
    }
}

async fn add(client: &Client, expires_in: Option<Span>, format: Format) -> anyhow::Result<()> {
    let lasts = expires_in.unwrap_or(JOIN_FOR);
    let token = CreateToken {
        join: Some("node".to_owned()),
        description: "regent cluster add".to_owned(),
        expires_in: Some(lasts),
        ..CreateToken::default()
    };
    let token = client.create_token(&token).await?;
    let cluster = client.cluster().await?;
    let servers: Vec<String> = cluster.members.into_iter().map(|member| member.http).collect();
    let (files, tls) = if servers.iter().any(|server| server.starts_with("https://")) {
        (
            " and its certificate by `regent cert node`",
            " --tls-cert node.pem --tls-key node.key --tls-ca ca.pem",
        )
    } else {
        ("", "")
    };
    output::note(&format!(
        "the token below admits one node within {lasts}. On its machine, with the token in the file `join`{files}:\n  \
         regent server --node-id N --data DIR --http ADDR --peer ADDR{tls} --join {} --join-token-file join\n\
         A node id is never used again: take one that no node of this cluster ever had.",
        servers.join(",")
    ));
    show_new(format, &token)
}

fn show(cluster: &Cluster, format: Format) -> anyhow::Result<()> {
    match format {
        Format::Json => output::json(cluster),
        Format::Table => {
            output::line(format!(
                "cluster {}, leader {}, term {}, as node {} sees it",
                or_dash(cluster.cluster_id.as_ref()),
                or_dash(cluster.leader.as_ref()),
                cluster.term,
                cluster.node
            ));
            output::records(format, &cluster.members, &COLUMNS, row)?;
            if cluster.findings.is_empty() {
                output::line("all is well");
            }
            for finding in &cluster.findings {
                output::line(format!("! {finding}"));
            }
            Ok(())
        }
    }
}
