//! `regent cluster`.

use clap::Subcommand;
use regent_client::Client;
use regent_types::NodeId;
use regent_types::cluster::{Cluster, Member};

use crate::output::{self, Format, or_dash};
use crate::recovery::{self, Backup};

/// See the variants.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the members, and who leads.
    Status,
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

const COLUMNS: [&str; 8] = [
    "ID",
    "ROLE",
    "REACHABLE",
    "APPLIED",
    "DIGEST",
    "LAG MS",
    "HTTP",
    "PEER",
];

fn row(m: &Member) -> Vec<String> {
    vec![
        m.id.to_string(),
        m.role.clone(),
        m.reachable.to_string(),
        or_dash(m.applied_index.as_ref()),
        or_dash(m.digest.as_ref()),
        or_dash(m.lag_ms.as_ref()),
        m.http.clone(),
        m.peer.clone(),
    ]
}

/// Runs it.
pub(crate) async fn run(client: &Client, command: Command, format: Format) -> anyhow::Result<()> {
    match command {
        // Also without a quorum: that is when it is needed most.
        Command::Status => show(&client.cluster().await?, format),
        Command::Transfer { to } => show(&client.transfer(to).await?, format),
        Command::Backup(args) => recovery::backup(client, args, format).await,
        Command::Restore(_) | Command::Recover(_) => {
            unreachable!("these do not ask a cluster and are taken before")
        }
    }
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
            output::records(format, &cluster.members, &COLUMNS, row)
        }
    }
}
