//! `regent ca` and `regent cert`: a CA for one cluster, and certificates of it.
//!
//! The CA is the cluster's and nobody else's, so that a certificate of it says which cluster its holder belongs to.
//! `authority` makes certificates; this file decides which, and where they go.
//!
//! Invariant: a CA, a cluster secret and an admin token that are there are never replaced; certificates are, which is
//! how they are renewed.

mod authority;

use std::path::{Path, PathBuf};

use regent_types::NodeId;
use serde::Serialize;

use crate::config::UsageError;
use crate::{output, secrets};
use authority::{Authority, Issued};

/// How long a CA is good for, in days: replacing it means new certificates for everybody.
const CA_DAYS: u32 = 3650;
/// How long a certificate is good for, in days.
const DAYS: u32 = 365;
/// More than this is no sensible lifetime, and dates have an end.
const MAX_DAYS: i64 = 36_500;

/// Flags of `regent ca`.
#[derive(Debug, clap::Args)]
pub(crate) struct CaArgs {
    /// The folder for ca.pem, which everybody gets, and ca.key, which stays here.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How many days it is good for.
    #[arg(long, default_value_t = CA_DAYS, value_parser = clap::value_parser!(u32).range(1..=MAX_DAYS))]
    days: u32,
}

/// What can be certified.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// All that the nodes of a cluster need, a folder for each: certificates, the cluster secret, the first admin
    /// token, and the CA if there is none. Again: new certificates, the rest stays.
    Cluster(ClusterArgs),
    /// A node's certificate: node.pem and node.key, and the CA beside them.
    Node(NodeArgs),
    /// A client's or an agent's certificate, for nodes that ask for one (`regent server --tls-clients`).
    Client(ClientArgs),
}

/// Flags of `regent cert cluster`.
#[derive(Debug, clap::Args)]
pub(crate) struct ClusterArgs {
    /// The folder for everything.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// A node and where clients and agents reach it; once for each node.
    #[arg(long = "node", value_name = "ID=HOST,HOST", required = true, value_parser = parse_node)]
    nodes: Vec<NodeHosts>,
    /// How many days the certificates of the nodes are good for.
    #[arg(long, default_value_t = DAYS, value_parser = clap::value_parser!(u32).range(1..=MAX_DAYS))]
    days: u32,
}

/// Flags of `regent cert node`.
#[derive(Debug, clap::Args)]
pub(crate) struct NodeArgs {
    /// The folder of the CA, as `regent ca` made it.
    #[arg(long, value_name = "DIR")]
    ca: PathBuf,
    /// The node.
    #[arg(long, value_name = "N")]
    node_id: NodeId,
    /// A name or address at which clients and agents reach it; may be repeated. This machine's own are there anyway.
    #[arg(long = "host", value_name = "HOST", value_parser = parse_host)]
    hosts: Vec<String>,
    /// The folder for what the node needs.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How many days it is good for.
    #[arg(long, default_value_t = DAYS, value_parser = clap::value_parser!(u32).range(1..=MAX_DAYS))]
    days: u32,
}

/// Flags of `regent cert client`.
#[derive(Debug, clap::Args)]
pub(crate) struct ClientArgs {
    /// The folder of the CA, as `regent ca` made it.
    #[arg(long, value_name = "DIR")]
    ca: PathBuf,
    /// Whose it is, for people; rights come from tokens.
    #[arg(long, value_name = "NAME")]
    name: String,
    /// The folder for client.pem, client.key and the CA.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How many days it is good for.
    #[arg(long, default_value_t = DAYS, value_parser = clap::value_parser!(u32).range(1..=MAX_DAYS))]
    days: u32,
}

/// A node, and where it is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
struct NodeHosts {
    node: NodeId,
    hosts: Vec<String>,
}

/// A file that is there now.
#[derive(Debug, Serialize)]
struct Made {
    file: PathBuf,
    what: String,
}

impl Made {
    fn new(file: PathBuf, what: impl Into<String>) -> Self {
        Self {
            file,
            what: what.into(),
        }
    }
}

/// `regent ca`.
pub(crate) fn make_ca(args: &CaArgs, format: output::Format) -> anyhow::Result<()> {
    if let Some(there) = Authority::key_in(&args.out) {
        return Err(UsageError(format!(
            "there is a CA in {} already; another one would make all its certificates worthless: choose another \
             folder, or remove {}",
            args.out.display(),
            there.display()
        ))
        .into());
    }
    show(format, &new_ca(&args.out, args.days)?)
}

/// `regent cert`.
pub(crate) fn make(command: Command, format: output::Format) -> anyhow::Result<()> {
    let made = match command {
        Command::Cluster(args) => cluster(args)?,
        Command::Node(args) => {
            let authority = Authority::open(&args.ca)?;
            node(&authority, args.node_id, &args.hosts, &args.out, args.days)?
        }
        Command::Client(args) => {
            let authority = Authority::open(&args.ca)?;
            if args.name.trim().is_empty() {
                return Err(UsageError("a client's name cannot be empty".to_owned()).into());
            }
            let issued = authority.client(&args.name, args.days)?;
            let what = format!("the certificate of client {}", args.name);
            write(&authority, &issued, &args.out, "client", what)?
        }
    };
    show(format, &made)
}

fn cluster(args: ClusterArgs) -> anyhow::Result<Vec<Made>> {
    let mut seen = std::collections::BTreeSet::new();
    if let Some(twice) = args.nodes.iter().find(|node| !seen.insert(node.node)) {
        return Err(UsageError(format!("node {} is given twice", twice.node)).into());
    }
    let mut made = Vec::new();
    let ca = args.out.join("ca");
    if Authority::key_in(&ca).is_none() {
        made.extend(new_ca(&ca, CA_DAYS)?);
    }
    let authority = Authority::open(&ca)?;
    let secret = kept(&args.out.join("cluster.secret"), "")?;
    let token_file = args.out.join("admin.token");
    let token = kept(&token_file, "regent_")?;
    made.push(Made::new(token_file, "the first admin's API token"));
    for NodeHosts { node: id, hosts } in args.nodes {
        let folder = args.out.join(format!("node-{id}"));
        made.extend(node(&authority, id, &hosts, &folder, args.days)?);
        for (name, text, what) in [
            ("cluster.secret", &secret, "what the nodes prove to each other"),
            ("admin.token", &token, "for the very first start"),
        ] {
            secrets::write(&folder.join(name), text)?;
            made.push(Made::new(folder.join(name), what));
        }
    }
    Ok(made)
}

/// The secret in a file; a new one if there is none.
fn kept(path: &Path, prefix: &str) -> anyhow::Result<String> {
    if !path.exists() {
        secrets::write(path, &secrets::random(prefix))?;
    }
    crate::config::secret_file(path)
}

fn new_ca(folder: &Path, days: u32) -> anyhow::Result<Vec<Made>> {
    secrets::folder(folder)?;
    let (cert, key) = Authority::create(folder, days)?;
    Ok(vec![
        Made::new(key, "the key of the CA: keep it off the nodes"),
        Made::new(
            cert,
            "the CA of the cluster: every node, agent and client gets it",
        ),
    ])
}

fn node(
    authority: &Authority,
    node: NodeId,
    hosts: &[String],
    out: &Path,
    days: u32,
) -> anyhow::Result<Vec<Made>> {
    if node.0 == 0 {
        return Err(UsageError("node ids begin at 1".to_owned()).into());
    }
    let issued = authority.node(node, hosts, days)?;
    let what = format!("the certificate of node {node}");
    write(authority, &issued, out, "node", what)
}

/// The key before the certificate, which is what a running node compares first.
fn write(
    authority: &Authority,
    issued: &Issued,
    out: &Path,
    stem: &str,
    what: String,
) -> anyhow::Result<Vec<Made>> {
    secrets::folder(out)?;
    let (cert, key, ca) = (
        out.join(format!("{stem}.pem")),
        out.join(format!("{stem}.key")),
        out.join("ca.pem"),
    );
    secrets::write(&key, &issued.key)?;
    secrets::write_public(&cert, &issued.cert)?;
    secrets::write_public(&ca, authority.pem())?;
    Ok(vec![
        Made::new(cert, what),
        Made::new(key, "its key"),
        Made::new(ca, "the CA of the cluster"),
    ])
}

fn show(format: output::Format, made: &[Made]) -> anyhow::Result<()> {
    output::records(format, made, &["FILE", "WHAT"], |made| {
        vec![made.file.display().to_string(), made.what.clone()]
    })
}

fn parse_node(text: &str) -> Result<NodeHosts, String> {
    let (id, hosts) = text
        .split_once('=')
        .ok_or_else(|| format!("{text:?} is not ID=HOST,HOST; write 1=10.0.0.1,node1.example.org"))?;
    let node = id
        .trim()
        .parse()
        .ok()
        .filter(|id| *id > 0)
        .map(NodeId)
        .ok_or_else(|| format!("{id:?} is not a node id; node ids are whole numbers from 1"))?;
    let hosts = hosts
        .split(',')
        .map(str::trim)
        .filter(|host| !host.is_empty())
        .map(parse_host)
        .collect::<Result<_, _>>()?;
    Ok(NodeHosts { node, hosts })
}

fn parse_host(text: &str) -> Result<String, String> {
    authority::check_host(text)?;
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests;
