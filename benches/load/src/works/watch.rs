//! From a write at one member to its event at another: a client writes at a steady pace at one follower, and a
//! watcher at the other follower gets all events of all records. The latency counts from when the write was due.
//!
//! Both at followers, since that is the longest way: to the leader, to a majority, and on to the watcher's member.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use tokio::task::JoinHandle;

use super::write::{EVERYWHERE, channels, patches, puts};
use super::{Result, Settings};
use crate::cluster::{Cluster, MEMBERS};
use crate::grpc::Channel;
use crate::http::Connection;
use crate::load::{self, Client, Plan, Seen};
use crate::measure::{Latencies, Metric};
use crate::rpc::{WatchCreateRequest, WatchRequest, WatchResponse};

/// Connections of the client whose writes are watched for: one slow write must not delay the next.
const CONNECTIONS: usize = 4;
/// What its writes begin with, in hexadecimal; no other write does.
const MARK: u64 = 0xfeed << 48;
const MARK_TEXT: &[u8] = b"feed";
/// How long the last events are waited for.
const LAST_WITHIN: Duration = Duration::from_secs(3);

/// The marked writes whose events came, and when.
type Arrivals = Vec<(u64, Instant)>;

pub(super) async fn run(
    cluster: &Cluster,
    writers: usize,
    settings: &Settings,
) -> anyhow::Result<Vec<Result>> {
    let leader = cluster.leader().await?;
    let (at, watched) = ((leader + 1) % MEMBERS, (leader + 2) % MEMBERS);
    let paced = Plan {
        rate: Some(settings.watched),
        ..settings.plan
    };
    let closed = Plan {
        rate: None,
        ..settings.plan
    };
    let (seen, beside, arrivals) = match cluster {
        Cluster::Etcd(etcd) => {
            let (events, watcher) = watch_etcd(Channel::open(etcd.members[watched].address).await?).await?;
            let mut channels_at = Vec::new();
            for _ in 0..CONNECTIONS {
                channels_at.push(Channel::open(etcd.members[at].address).await?);
            }
            let mut marked = puts(&channels_at, CONNECTIONS, 0..CONNECTIONS)?;
            for put in &mut marked {
                put.mark = MARK;
            }
            let others = puts(
                &channels(etcd, writers.max(1)).await?,
                writers,
                CONNECTIONS..etcd.records,
            )?;
            let (seen, beside) = both(cluster, (marked, paced), (others, closed)).await?;
            let arrivals = collect(events, watcher, seen.done).await?;
            (seen, beside, arrivals)
        }
        Cluster::Regent(regent) => {
            let (events, watcher) = watch_regent(regent.connect(watched).await?).await?;
            let mut marked = patches(regent, &[at], CONNECTIONS, 0..CONNECTIONS).await?;
            for patch in &mut marked {
                patch.mark = MARK;
            }
            let others = patches(regent, &EVERYWHERE, writers, CONNECTIONS..regent.sessions.len()).await?;
            let (seen, beside) = both(cluster, (marked, paced), (others, closed)).await?;
            let arrivals = collect(events, watcher, seen.done).await?;
            (seen, beside, arrivals)
        }
    };
    Ok(vec![result(&seen, beside.as_ref(), &arrivals, settings)])
}

/// Drives both at a time; the second only if there is anybody.
async fn both<C: Client>(
    cluster: &Cluster,
    (marked, paced): (Vec<C>, Plan),
    (others, closed): (Vec<C>, Plan),
) -> anyhow::Result<(Seen, Option<Seen>)> {
    let beside = async {
        if others.is_empty() {
            return anyhow::Ok(None);
        }
        Ok(Some(load::drive(cluster, others, 1, closed).await?))
    };
    tokio::try_join!(load::drive(cluster, marked, 1, paced), beside)
}

fn result(seen: &Seen, beside: Option<&Seen>, arrivals: &Arrivals, settings: &Settings) -> Result {
    let (begin, end) = (seen.begin, seen.begin + settings.plan.measure);
    let mut latencies = Latencies::new();
    for (word, came) in arrivals {
        let due = seen.start + Duration::from_secs_f64(*word as f64 / settings.watched);
        if due >= begin && due < end {
            latencies.record(came.saturating_duration_since(due));
        }
    }
    let mut result = Result::new(0, seen);
    latencies.write(&mut result.values);
    result.values.insert(
        Metric::Rate,
        latencies.count() as f64 / settings.plan.measure.as_secs_f64(),
    );
    // An event of a write that was acknowledged must come.
    let missing = seen.latencies[0].count().saturating_sub(latencies.count());
    let mut failed = seen.failed + missing;
    if missing > 0 {
        result
            .failure
            .get_or_insert_with(|| format!("{missing} events did not come"));
    }
    if let Some(beside) = beside {
        failed += beside.failed;
        result.failure = result.failure.or_else(|| beside.failure.clone());
        result
            .values
            .insert(Metric::BesideRate, beside.values(0)[&Metric::Rate]);
    }
    result.values.insert(Metric::Failed, failed as f64);
    result
}

type Events = tokio::sync::mpsc::UnboundedReceiver<(u64, Instant)>;
type Watcher = JoinHandle<anyhow::Result<()>>;

/// What the watcher saw, once all came or nothing did for a while. Its queue is as long as there were marked
/// writes.
async fn collect(mut events: Events, watcher: Watcher, expected: u64) -> anyhow::Result<Arrivals> {
    let mut arrivals = Vec::new();
    while (arrivals.len() as u64) < expected {
        match tokio::time::timeout(LAST_WITHIN, events.recv()).await {
            Ok(Some(event)) => arrivals.push(event),
            // The watcher ended by itself, and says why.
            Ok(None) => {
                watcher.await??;
                anyhow::bail!("the watch ended");
            }
            Err(_silence) => break,
        }
    }
    watcher.abort();
    Ok(arrivals)
}

async fn watch_etcd(channel: Channel) -> anyhow::Result<(Events, Watcher)> {
    let create = WatchCreateRequest {
        key: Bytes::from_static(b"bench/"),
        // The first key after all that begin with "bench/".
        range_end: Bytes::from_static(b"bench0"),
    };
    let first = WatchRequest { create: Some(create) };
    let (sender, mut receiver) = channel
        .stream::<_, WatchResponse>("/etcdserverpb.Watch/Watch", &first)
        .await?;
    ensure!(receiver.next().await?.created, "the watch was not created");
    let (events, seen) = tokio::sync::mpsc::unbounded_channel();
    let watcher = tokio::spawn(async move {
        loop {
            let answer = receiver.next().await?;
            let now = Instant::now();
            ensure!(
                !answer.canceled,
                "the watch was cancelled: {}",
                answer.cancel_reason
            );
            for kv in answer.events.into_iter().filter_map(|event| event.kv) {
                if let Some(word) = word(&kv.value) {
                    events.send((word, now))?;
                }
            }
            // Held open: a watch ends when its requests do.
            let _ = &sender;
        }
    });
    Ok((seen, watcher))
}

async fn watch_regent(connection: Connection) -> anyhow::Result<(Events, Watcher)> {
    let mut stream = connection.stream("/api/v1/events?kinds=session").await?;
    let (events, seen) = tokio::sync::mpsc::unbounded_channel();
    let watcher = tokio::spawn(async move {
        let tags = memchr::memmem::Finder::new(b"\"tags\":[\"");
        loop {
            let line = stream.line().await?.context("the stream of events ended")?;
            if let Some(at) = tags.find(line)
                && let Some(word) = word(&line[at + tags.needle().len()..])
            {
                events.send((word, Instant::now()))?;
            }
        }
    });
    Ok((seen, watcher))
}

/// The number of a marked write, from its value.
fn word(value: &[u8]) -> Option<u64> {
    let digits = value.get(..16).filter(|digits| digits.starts_with(MARK_TEXT))?;
    let word = u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    Some(word & !MARK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_marked_writes_have_a_number() {
        let text = format!("{:016x}{:016x}", MARK | 0x2a, 7);
        assert_eq!(word(text.as_bytes()), Some(42));
        assert_eq!(word(format!("{:016x}", 42).as_bytes()), None);
        assert_eq!(word(b"feed"), None);
    }
}
