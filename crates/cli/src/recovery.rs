//! `regent cluster backup`, `restore` and `recover`.
//!
//! A backup is checked where it arrived before it has its name. The other two work on folders while no node runs on
//! them; everything that they do is in `regent-raft` (`offline`), here it is asked for and told.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use futures::StreamExt as _;
use regent_client::{Client, Consistency};
use regent_server::recovery::{
    self, BackupInfo, Founded, Founder, OfflineError, Position, Survivor, Survivors, Terms,
};
use regent_types::{NodeId, Revision, Time};
use serde::Serialize;

use crate::config::{LogStore, UsageError, secret_file};
use crate::output::{self, Format, or_dash};

/// A stream of which nothing comes for so long is given up.
const STALLED: Duration = Duration::from_mins(1);

/// See [`backup`].
#[derive(Debug, clap::Args)]
pub(crate) struct Backup {
    /// The file to be written; it must not exist yet.
    file: PathBuf,
    /// Take what the node that answers has, perhaps not the latest; works without a quorum.
    #[arg(long)]
    stale: bool,
}

/// The new cluster's only member, and what the operator states.
#[derive(Debug, clap::Args)]
pub(crate) struct NewCluster {
    /// The id of the new cluster's only node.
    #[arg(long, value_name = "N", required_unless_present = "dry_run")]
    node_id: Option<NodeId>,
    /// Where the other nodes will reach it: `host:port`, as for `regent server --advertise-peer`.
    #[arg(long, value_name = "ADDR", required_unless_present = "dry_run")]
    peer: Option<String>,
    /// Where its REST API will be reached: `host:port` or a URL.
    #[arg(long, value_name = "ADDR", required_unless_present = "dry_run")]
    http: Option<String>,
    /// What keeps its log [default: sled].
    #[arg(long, value_name = "STORE", value_enum, hide_possible_values = true)]
    log_store: Option<LogStore>,
    /// Leave API tokens valid, also those that were revoked since. Without it all are revoked.
    #[arg(long)]
    keep_tokens: bool,
    /// State that no node, agent or program of the old cluster runs any more. Without it no lease is granted and no
    /// agent connects for an hour, the longest that somebody may act under an old lease.
    #[arg(long)]
    old_cluster_is_dead: bool,
    /// File with a new API token for an administrator; at least 16 characters, readable by its owner only.
    #[arg(long, value_name = "FILE")]
    bootstrap_token_file: Option<PathBuf>,
    /// The last revision of a cluster that was restored from the same backup before and has run.
    #[arg(long, value_name = "REVISION")]
    above_revision: Option<Revision>,
}

/// See [`restore`].
#[derive(Debug, clap::Args)]
pub(crate) struct Restore {
    /// The backup. A snapshot from a node's data folder is one too.
    file: PathBuf,
    /// The new node's data folder, absent or empty.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    #[command(flatten)]
    new: NewCluster,
    /// Check the backup and say what is in it; make nothing.
    #[arg(long)]
    dry_run: bool,
}

/// See [`recover`].
#[derive(Debug, clap::Args)]
pub(crate) struct Recover {
    /// The data folder of a surviving node; give all that there are. They are only read.
    #[arg(long, value_name = "DIR", required = true)]
    data: Vec<PathBuf>,
    /// The new node's data folder, absent or empty.
    #[arg(long, value_name = "NEWDIR", required_unless_present = "dry_run")]
    into: Option<PathBuf>,
    #[command(flatten)]
    new: NewCluster,
    /// Look into the folders and say what would be done and lost; make nothing.
    #[arg(long)]
    dry_run: bool,
    /// Where a folder is copied to while it is looked into [default: beside NEWDIR, or the system's folder for
    /// temporary files].
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
}

/// Takes a backup from a node. The file has its name only when all of it arrived and was checked.
pub(crate) async fn backup(client: &Client, args: Backup, format: Format) -> anyhow::Result<()> {
    let output = &args.file;
    if output.exists() {
        return Err(UsageError(format!(
            "{} exists already: a backup does not replace another; choose another name",
            output.display()
        ))
        .into());
    }
    let folder = parent(output);
    // Only its owner may read it: it holds password hashes.
    let mut aside = tempfile::Builder::new()
        .prefix(".regent-backup-")
        .tempfile_in(folder)
        .with_context(|| format!("no file can be made in {}", folder.display()))?;
    let client = if args.stale {
        client.with_consistency(Consistency::Stale)
    } else {
        client.clone()
    };
    let mut pieces = client.backup().await?;
    let writing = || format!("{} cannot be written", output.display());
    let mut size = 0;
    loop {
        let next = tokio::time::timeout(STALLED, pieces.next()).await;
        let next =
            next.with_context(|| format!("nothing has come for {STALLED:?}; no backup was written"))?;
        let Some(piece) = next else { break };
        let piece = piece.context("the backup broke off; nothing was written")?;
        aside.write_all(&piece).with_context(writing)?;
        size += piece.len();
    }
    aside.as_file().sync_all().with_context(writing)?;
    let info =
        BackupInfo::read(aside.path()).context("what arrived is not a whole backup; nothing was written")?;
    aside
        .persist_noclobber(output)
        .map_err(|error| error.error)
        .with_context(writing)?;
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .with_context(writing)?;
    let written = Written {
        file: output.clone(),
        bytes: size,
        content: Content::of(&info),
    };
    told(format, &written, || {
        output::line(format!(
            "{} is whole: {size} bytes, {}",
            output.display(),
            said(&info)
        ));
    })
}

/// Makes a new cluster from a backup.
pub(crate) async fn restore(args: Restore, format: Format) -> anyhow::Result<()> {
    let info = BackupInfo::read(&args.file)?;
    if args.dry_run {
        return told(format, &Content::of(&info), || {
            output::line(format!("{} is whole: {}", args.file.display(), said(&info)));
        });
    }
    let (founder, terms) = args.new.plan(args.data)?;
    let founded = recovery::restore(&args.file, &founder, &terms).await?;
    told(format, &Made::of(&founded), || {
        say_founded(&founded, &founder, &args.new);
    })
}

/// Makes a new cluster from what survived.
pub(crate) async fn recover(args: Recover, format: Format) -> anyhow::Result<()> {
    // Before any folder is copied.
    let plan = match &args.into {
        Some(into) if !args.dry_run => Some(args.new.plan(into.clone())?),
        Some(_) | None => None,
    };
    if let Some((founder, _)) = &plan {
        let used = std::fs::read_dir(&founder.data).is_ok_and(|mut items| items.next().is_some());
        if used {
            return Err(OfflineError::NotEmpty(founder.data.clone()).into());
        }
    }
    let scratch = match (&args.scratch, &args.into) {
        (Some(scratch), _) => scratch.clone(),
        (None, Some(into)) => parent(into).to_owned(),
        (None, None) => std::env::temp_dir(),
    };
    std::fs::create_dir_all(&scratch).with_context(|| format!("{} cannot be made", scratch.display()))?;
    let mut all = Vec::new();
    for data in &args.data {
        let survivor = Survivor::inspect(data, &scratch).await.with_context(|| {
            format!(
                "{} cannot be used; what its log holds alone is lost without it: mend it, restore from the newest \
                 snapshot in its folder snapshots, or leave out this --data",
                data.display()
            )
        });
        all.push(survivor?);
    }
    let survivors = Survivors::new(all)?;
    let losses = survivors.losses();
    if format == Format::Table {
        say_survivors(&survivors, &losses)?;
    }
    let founded = match &plan {
        Some((founder, terms)) => Some(survivors.recover(founder, terms).await?),
        None => None,
    };
    let record = Recovered {
        survivors: survivors.all().iter().map(Found::of).collect(),
        chosen: survivors.chosen().node,
        losses,
        made: founded.as_ref().map(Made::of),
    };
    told(format, &record, || match (&plan, &founded) {
        (Some((founder, _)), Some(founded)) => say_founded(founded, founder, &args.new),
        _ => output::line("nothing was made (--dry-run)"),
    })
}

impl NewCluster {
    fn plan(&self, data: PathBuf) -> anyhow::Result<(Founder, Terms)> {
        let (Some(node), Some(peer), Some(http)) = (self.node_id, &self.peer, &self.http) else {
            unreachable!("clap demands them unless it is a dry run");
        };
        if node.0 == 0 {
            return Err(UsageError("node ids begin at 1".to_owned()).into());
        }
        if !peer
            .rsplit_once(':')
            .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
        {
            return Err(
                UsageError(format!("--peer {peer:?} is not host:port, such as 10.0.0.1:7000")).into(),
            );
        }
        let http = if http.contains("://") {
            http.clone()
        } else {
            format!("http://{http}")
        };
        let admin_token = match &self.bootstrap_token_file {
            None => None,
            Some(file) => Some(recovery::admin_token(&secret_file(file)?).map_err(UsageError)?),
        };
        let founder = Founder {
            node,
            data,
            peer: peer.clone(),
            http,
            log_store: self.log_store.unwrap_or_default().into(),
        };
        let terms = Terms {
            at: recovery::wall_ms(),
            above: self.above_revision.unwrap_or(Revision(0)),
            keep_tokens: self.keep_tokens,
            old_cluster_is_dead: self.old_cluster_is_dead,
            admin_token,
        };
        Ok((founder, terms))
    }
}

fn say_survivors(survivors: &Survivors, losses: &[String]) -> anyhow::Result<()> {
    const COLUMNS: [&str; 8] = [
        "NODE",
        "CLUSTER",
        "VOTED",
        "LAST ENTRY",
        "ACKNOWLEDGED",
        "SNAPSHOT",
        "REVISION",
        "DATA",
    ];
    let found: Vec<Found> = survivors.all().iter().map(Found::of).collect();
    output::records(Format::Table, &found, &COLUMNS, |found| {
        vec![
            found.node.to_string(),
            found.cluster.clone(),
            found.vote.as_ref().map_or("-".to_owned(), |vote| {
                format!("term {} for {}", vote.term, vote.node)
            }),
            or_dash(found.last.as_ref().map(Place::short).as_ref()),
            or_dash(found.committed.as_ref().map(Place::short).as_ref()),
            or_dash(found.snapshot.as_ref().map(Place::short).as_ref()),
            found.revision.to_string(),
            found.data.display().to_string(),
        ]
    })?;
    let chosen = survivors.chosen();
    output::line("");
    output::line(format!(
        "Node {} has the last entry of the latest leadership and is chosen: {}.",
        chosen.node,
        chosen.data.display()
    ));
    losses.iter().for_each(output::line);
    Ok(())
}

fn say_founded(founded: &Founded, founder: &Founder, new: &NewCluster) {
    output::line(format!(
        "cluster {} is made of cluster {}: {}; it begins at revision {}",
        founded.cluster,
        founded.former,
        counts(&founded.content),
        founded.revision
    ));
    output::line(match (new.keep_tokens, &new.bootstrap_token_file) {
        (true, _) => "API tokens are kept; those that were revoked since are valid again".to_owned(),
        (false, Some(file)) => format!(
            "all API tokens are revoked; the token in {} is an administrator's",
            file.display()
        ),
        (false, None) => {
            "all API tokens are revoked; an administrator with a password gets in by `regent login`"
                .to_owned()
        }
    });
    if let Some(until) = founded.no_lease_before {
        output::line(format!(
            "no lease is granted and no agent connects before {}: until then somebody may act under a lease of the old \
             cluster",
            Time(until)
        ));
    }
    output::line(format!(
        "start it with: regent server --node-id {} --data {} --members {}={} ...",
        founder.node,
        founder.data.display(),
        founder.node,
        founder.peer
    ));
}

fn told(format: Format, record: &impl Serialize, words: impl FnOnce()) -> anyhow::Result<()> {
    match format {
        Format::Json => output::json(record),
        Format::Table => {
            words();
            Ok(())
        }
    }
}

fn said(info: &BackupInfo) -> String {
    format!(
        "cluster {} at revision {}, {}: {}",
        or_dash(info.cluster.as_ref()),
        info.revision,
        Time(info.at),
        counts(info)
    )
}

fn counts(info: &BackupInfo) -> String {
    let BackupInfo {
        sessions,
        agents,
        users,
        ..
    } = info;
    format!("{sessions} sessions, {agents} agents, {users} users")
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    }
}

/// What was written, for programs.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Written {
    file: PathBuf,
    bytes: usize,
    #[serde(flatten)]
    content: Content,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Content {
    cluster_id: Option<String>,
    revision: Revision,
    at: Time,
    sessions: usize,
    agents: usize,
    users: usize,
}

impl Content {
    fn of(info: &BackupInfo) -> Self {
        Self {
            cluster_id: info.cluster.as_ref().map(ToString::to_string),
            revision: info.revision,
            at: Time(info.at),
            sessions: info.sessions,
            agents: info.agents,
            users: info.users,
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Made {
    cluster_id: String,
    former_cluster_id: String,
    revision: Revision,
    no_lease_before: Option<Time>,
    content: Content,
}

impl Made {
    fn of(founded: &Founded) -> Self {
        Self {
            cluster_id: founded.cluster.to_string(),
            former_cluster_id: founded.former.to_string(),
            revision: founded.revision,
            no_lease_before: founded.no_lease_before.map(Time),
            content: Content::of(&founded.content),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Recovered {
    survivors: Vec<Found>,
    chosen: NodeId,
    losses: Vec<String>,
    made: Option<Made>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Found {
    data: PathBuf,
    node: NodeId,
    cluster: String,
    log_store: &'static str,
    vote: Option<Voted>,
    last: Option<Place>,
    committed: Option<Place>,
    snapshot: Option<Place>,
    revision: Revision,
    voters: Vec<Vec<NodeId>>,
}

#[derive(Serialize)]
struct Voted {
    term: u64,
    node: NodeId,
}

#[derive(Serialize)]
struct Place {
    term: u64,
    leader: NodeId,
    index: u64,
}

impl Place {
    fn of(position: Position) -> Self {
        Self {
            term: position.term,
            leader: position.leader,
            index: position.index,
        }
    }

    fn short(&self) -> String {
        format!("{} of term {}", self.index, self.term)
    }
}

impl Found {
    fn of(survivor: &Survivor) -> Self {
        Self {
            data: survivor.data.clone(),
            node: survivor.node,
            cluster: survivor.cluster.clone(),
            log_store: survivor.log_store.as_str(),
            vote: survivor.vote.map(|(term, node)| Voted { term, node }),
            last: survivor.last.map(Place::of),
            committed: survivor.committed.map(Place::of),
            snapshot: survivor.snapshot.map(Place::of),
            revision: survivor.revision,
            voters: survivor
                .voters
                .iter()
                .map(|set| set.iter().copied().collect())
                .collect(),
        }
    }
}
