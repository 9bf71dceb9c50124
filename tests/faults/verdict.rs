//! All checkers on all that was recorded.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use regent_client::{CommandFilter, Consistency, SessionFilter};
use regent_history::quota::Change;
use regent_history::{Violation, digest, effects, fencing, forward, lease, quota, register, retry, watch};

use crate::cluster::Cluster;
use crate::harness::eventually;
use crate::run::Records;
use crate::workload::sessions::{QUOTA, Sessions};

/// The name in [`Violation::checker`] for what was accepted and is gone.
const LOST: &str = "nothing accepted is lost";
/// The name in [`Violation::checker`] for a run in which too little happened to judge.
const VACUOUS: &str = "something happened";

/// A run in which nothing happened is green too: every kind of record must have something in it.
pub(crate) fn vacuous(cluster: &Cluster, records: &Records) -> Option<Violation> {
    let sessions = &records.sessions;
    let (effects, losses) = sessions.effects();
    let started: BTreeSet<&str> = effects.iter().map(|effect| effect.session.as_str()).collect();
    let ran = sessions.record(|record| record.running.clone());
    let watched = records.watches.watched();
    let connections = records
        .reports
        .known()
        .iter()
        .map(|(_, grants, _)| grants.len())
        .sum();
    let counts = [
        (
            "calls of registers",
            records.registers.calls().values().map(Vec::len).sum(),
            200,
        ),
        (
            "tenures of leases",
            records
                .leases
                .all()
                .values()
                .map(|lease| lease.tenures.len())
                .sum(),
            6,
        ),
        (
            "uses of tokens",
            records
                .leases
                .all()
                .values()
                .map(|lease| lease.accepted.len())
                .sum(),
            1,
        ),
        ("second connections of agents", connections, 5),
        ("starts of sessions", effects.len(), 5),
        (
            "starts in a later generation",
            effects.iter().filter(|effect| effect.generation > 1).count(),
            losses.len().min(1),
        ),
        ("sessions that were seen running", ran.len(), 5),
        ("commands", sessions.record(|record| record.commands.len()), 5),
        (
            "events of watches",
            watched.iter().map(|watched| watched.events.len()).sum(),
            50,
        ),
        ("terms", records.watches.terms().len(), 5),
        ("digests", records.watches.digests().len(), 2),
    ];
    let few = counts.iter().filter(|(_, count, least)| count < least);
    let mut few: Vec<String> = few
        .map(|(what, count, least)| format!("{what}: {count}, not {least}"))
        .collect();
    // What a plan named was done.
    let changes = cluster.changes();
    let undone = changes.iter().filter(|(_, count)| **count == 0);
    few.extend(undone.map(|(what, _)| format!("{what}: none")));
    // What was said to run did so.
    few.extend(
        ran.iter()
            .filter(|name| !started.contains(name.as_str()))
            .map(|name| format!("{name} ran without a start")),
    );
    (!few.is_empty())
        .then(|| Violation::new(VACUOUS, "too little to judge, or said without being done").with(few))
}

/// What can be judged while the clients go on.
pub(crate) fn so_far(records: &Records) -> Vec<Violation> {
    let mut all = Vec::new();
    for (name, calls) in records.registers.calls() {
        all.push(register::check(&name, &calls));
    }
    for (name, lease) in records.leases.all() {
        all.push(lease::check(name, &lease.tenures));
        all.push(fencing::check(name, &lease.grants, &lease.accepted));
    }
    for (agent, grants, accepted) in records.reports.known() {
        let name = format!("the connection of {agent}");
        all.push(fencing::check(&name, &grants, &accepted));
    }
    let (effects, losses) = records.sessions.effects();
    all.push(effects::once_in_order(&effects, &losses));
    all.push(effects::one_at_a_time(&records.sessions.ran()));
    all.push(retry::check(
        &records.sessions.record(|record| record.answers.clone()),
    ));
    all.push(watch::check(&records.watches.watched()));
    all.push(records.watches.broken());
    all.push(forward::check("the term", &records.watches.terms()));
    all.push(digest::check(&records.watches.digests()));
    for user in Sessions::users() {
        all.push(quota::check(user, QUOTA, &changes(records, user)));
    }
    all.into_iter().filter_map(Result::err).collect()
}

/// What counted against a user's quota, as all watches together saw it.
fn changes(records: &Records, user: &str) -> Vec<Change> {
    let watched = records.watches.watched();
    let events: BTreeMap<_, _> = watched
        .iter()
        .flat_map(|watched| watched.events.iter().map(|event| (event.id, event)))
        .collect();
    let change = |event: &watch::Event| {
        let content: serde_json::Value = serde_json::from_str(&event.content).ok()?;
        let record = &content["record"];
        if !content["kind"].as_str()?.starts_with("session.") || record["user"] != user {
            return None;
        }
        Some(Change {
            revision: event.id.0,
            name: record["name"].as_str()?.to_owned(),
            counts: !matches!(record["state"].as_str()?, "terminated" | "failed" | "lost"),
        })
    };
    events.into_values().filter_map(change).collect()
}

/// The same, and what is true only once everything has come to rest.
pub(crate) async fn at_the_end(cluster: &Cluster, records: &Records) -> Vec<Violation> {
    let mut all = so_far(records);
    let commands = cluster
        .client(0)
        .all_commands(&CommandFilter::default())
        .await
        .unwrap();
    let known: BTreeSet<String> = commands
        .iter()
        .map(|command| command.command_id.to_string())
        .collect();
    let lost = records.sessions.record(|record| {
        let lost = record.commands.difference(&known);
        lost.map(|command| (format!("{command} is not known"), None))
            .collect::<Vec<_>>()
    });
    let open = commands
        .iter()
        .map(|command| {
            let ended = command.status.is_final().then(|| format!("{:?}", command.status));
            (format!("{command:?}"), ended)
        })
        .chain(lost)
        .collect::<Vec<_>>();
    all.extend(effects::ended(&open).err());
    all.extend(lost_sessions(cluster, records).await);
    all.extend(digest::check(&contents(cluster).await).err());
    all
}

/// Every session that was accepted is there.
async fn lost_sessions(cluster: &Cluster, records: &Records) -> Option<Violation> {
    let sessions = cluster
        .client(0)
        .all_sessions(&SessionFilter::default())
        .await
        .unwrap();
    let known: BTreeSet<String> = sessions.iter().map(|session| session.name.to_string()).collect();
    let lost: Vec<String> = records
        .sessions
        .record(|record| record.sessions.difference(&known).cloned().collect());
    (!lost.is_empty()).then(|| Violation::new(LOST, "accepted sessions are not there").with(lost))
}

/// A hash of what each node itself has, all at one index.
async fn contents(cluster: &Cluster) -> Vec<(u64, u64, u64)> {
    let nodes = cluster.members();
    eventually("all nodes at one index", || async {
        let mut found = Vec::new();
        for node in &nodes {
            let client = cluster.client_of(*node).with_consistency(Consistency::Stale);
            let index = client.index().await.ok()??;
            let mut hash = DefaultHasher::new();
            format!("{:?}", client.all_sessions(&SessionFilter::default()).await.ok()?).hash(&mut hash);
            format!("{:?}", client.all_commands(&CommandFilter::default()).await.ok()?).hash(&mut hash);
            format!("{:?}", client.all_users().await.ok()?).hash(&mut hash);
            format!("{:?}", client.all_templates().await.ok()?).hash(&mut hash);
            for lease in client.all_leases().await.ok()? {
                (lease.name, lease.token).hash(&mut hash);
            }
            if client.index().await.ok()?? != index {
                return None;
            }
            found.push((cluster.id(*node)?, index.0, hash.finish()));
        }
        found.iter().all(|one| one.1 == found[0].1).then_some(found)
    })
    .await
}
