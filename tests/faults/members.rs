//! Nodes join and are taken out while everything else goes on.
//!
//! What is refused, as it may be while the network is cut, is asked for again, until it is done. Who calls this gives up
//! in the end: with nothing in the way it must come about.

use std::time::Duration;

use regent_client::{Client, Error};
use regent_types::auth::CreateToken;
use regent_types::duration::Span;
use regent_types::{Code, NodeId};

use tokio::time::Instant;

use crate::cluster::Cluster;
use crate::harness::restrict;
use crate::plan::{FEWEST_MEMBERS, MOST_MEMBERS};
use crate::seats::Standing;

/// What was done, as the cluster counts it.
pub(crate) const JOINED: &str = "nodes that joined";
pub(crate) const LEFT: &str = "members taken out";
pub(crate) const LED: &str = "of them leaders";
pub(crate) const LOST: &str = "lost members replaced";

/// How often it is looked or asked again.
const AGAIN: Duration = Duration::from_millis(100);
/// How long the members may take to agree.
const AGREED_WITHIN: Duration = Duration::from_secs(25);
/// How long one call may take.
const CALL_WITHIN: Duration = Duration::from_secs(2);
/// How long a join token is good: longer than a run is cut.
const TOKEN_FOR: Span = Span(600_000);

/// A node joins, and has a vote. With as many members as there may be, the leader is taken out first.
pub(crate) async fn join(cluster: &Cluster) -> Result<(), String> {
    if cluster.members().len() >= MOST_MEMBERS {
        let leader = cluster.leader().await;
        let first = cluster.members().first().copied();
        leave(cluster, leader.or(first).ok_or("there are no members")?).await?;
    }
    add(cluster).await
}

/// One is taken out. With as few as there must be, another one joins first.
pub(crate) async fn leave(cluster: &Cluster, node: usize) -> Result<(), String> {
    if cluster.members().len() <= FEWEST_MEMBERS {
        add(cluster).await?;
    }
    if cluster.leader().await == Some(node) {
        cluster.has_changed(LED);
    }
    take_out(cluster, node).await?;
    cluster.has_changed(LEFT);
    Ok(())
}

/// One is lost; another one joins, and the lost one is taken out. Where it comes back it is told so, and ends.
pub(crate) async fn replace(cluster: &Cluster, node: usize) -> Result<(), String> {
    let full = cluster.members().len() >= MOST_MEMBERS;
    cluster
        .seats
        .change(node, |seat| seat.standing = Standing::Leaving);
    cluster.kill(&cluster.name(node));
    if full {
        take_out(cluster, node).await?;
        add(cluster).await?;
    } else {
        add(cluster).await?;
        take_out(cluster, node).await?;
    }
    cluster.has_changed(LOST);
    Ok(())
}

/// Starts a node on a free host and waits until it votes.
async fn add(cluster: &Cluster) -> Result<(), String> {
    let client = client(cluster);
    let wanted = CreateToken {
        join: Some("node".to_owned()),
        expires_in: Some(TOKEN_FOR),
        ..CreateToken::default()
    };
    let token = loop {
        match client.create_token(&wanted).await {
            Ok(token) => break token.token.expect("a new token is shown"),
            Err(_) => tokio::time::sleep(AGAIN).await,
        }
    };
    let node = cluster.seats.add().ok_or("no host is free")?;
    let seat = cluster.seats.at(node).expect("it has just got it");
    let file = cluster.join_token(seat);
    std::fs::write(&file, token).unwrap();
    restrict(&file);
    cluster.make_disk(node);
    cluster.start_node(node);
    let name = cluster.name(node);
    loop {
        if cluster.pid(&name).is_none() {
            // Nobody may have admitted it so far; then it is started again, with the same token.
            let log = cluster.log(&name);
            if !log.trim_end().lines().next_back().is_some_and(may_try_again) {
                return Err(format!("{name} has ended while it joined: {}", end_of(&log)));
            }
            cluster.start_node(node);
        }
        let votes = |member: &regent_types::cluster::Member| {
            member.id == NodeId(seat.id) && member.voter && member.since.is_some()
        };
        if client
            .cluster()
            .await
            .is_ok_and(|seen| seen.members.iter().any(votes))
        {
            break;
        }
        tokio::time::sleep(AGAIN).await;
    }
    cluster
        .seats
        .change(node, |seat| seat.standing = Standing::Member);
    cluster.has_changed(JOINED);
    Ok(())
}

/// Whether it was not admitted, and may be later.
fn may_try_again(last_line: &str) -> bool {
    last_line.contains("was not admitted")
}

/// Removes a member and waits until consensus has let it go and its process has ended for that reason.
async fn take_out(cluster: &Cluster, node: usize) -> Result<(), String> {
    let client = client(cluster);
    let (name, id) = (cluster.name(node), NodeId(cluster.id(node).expect("it is there")));
    cluster
        .seats
        .change(node, |seat| seat.standing = Standing::Leaving);
    cluster.may_end(&name);
    loop {
        match client.remove_member(id).await {
            Ok(_) => break,
            Err(Error::Problem(problem)) if problem.code == Code::MemberNotFound => break,
            Err(_) => tokio::time::sleep(AGAIN).await,
        }
    }
    let is_there = |member: &regent_types::cluster::Member| member.id == id;
    while !client
        .cluster()
        .await
        .is_ok_and(|seen| !seen.members.iter().any(is_there))
    {
        tokio::time::sleep(AGAIN).await;
    }
    // One that is away hears of it when it comes back.
    if cluster.pid(&name).is_none() && !cluster.log(&name).contains(&why_it_ends(id)) {
        cluster.start_node(node);
        cluster.may_end(&name);
    }
    while cluster.pid(&name).is_some() {
        tokio::time::sleep(AGAIN).await;
    }
    let log = cluster.log(&name);
    if !log.contains(&why_it_ends(id)) {
        return Err(format!(
            "{name} was taken out and has ended otherwise: {}",
            end_of(&log)
        ));
    }
    cluster.kill(&name);
    cluster.seats.clear(node);
    Ok(())
}

fn why_it_ends(id: NodeId) -> String {
    format!("node {id} is not a member")
}

/// Waits until all agree on who is a member.
pub(crate) async fn agreed(cluster: &Cluster) -> Result<(), String> {
    let deadline = Instant::now() + AGREED_WITHIN;
    loop {
        match agree(cluster).await {
            Err(why) if Instant::now() > deadline => return Err(why),
            Err(_) => tokio::time::sleep(AGAIN).await,
            Ok(()) => return Ok(()),
        }
    }
}

/// What each member says: these vote, nobody else is there, and all of them stand in the table.
async fn agree(cluster: &Cluster) -> Result<(), String> {
    let nodes = cluster.members();
    let mut wanted: Vec<u64> = nodes.iter().filter_map(|node| cluster.id(*node)).collect();
    wanted.sort_unstable();
    for node in nodes {
        let name = cluster.name(node);
        let Some(seen) = cluster.seen_by(node).await else {
            return Err(format!("{name} does not say who is a member"));
        };
        let members = seen.members.iter();
        let said =
            |member: &regent_types::cluster::Member| (member.id.0, member.voter, member.since.is_some());
        let said: Vec<_> = members.map(said).collect();
        let right: Vec<_> = wanted.iter().map(|id| (*id, true, true)).collect();
        if said != right {
            return Err(format!(
                "{name} says of members, of their votes and of whether they are in the table {said:?}, not {right:?}"
            ));
        }
    }
    Ok(())
}

fn client(cluster: &Cluster) -> Client {
    let first = cluster.members().first().copied().unwrap_or_default();
    cluster.client(first).with_deadline(CALL_WITHIN)
}

fn end_of(log: &str) -> &str {
    log.trim_end().lines().next_back().unwrap_or("it has no log")
}
