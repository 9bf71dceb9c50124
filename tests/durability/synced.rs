//! No acknowledged entry depends on a byte that is not synced.
//!
//! All three nodes are traced. Each write carries a tag that is nowhere else, so its bytes can be found where they
//! are written to the log's file, and in the answer that acknowledges it. On a quorum of the nodes a sync of that
//! file must lie between the two: begun after the bytes were written, and done before the answer was.
//!
//! The clock is one, and strace makes the order strict: it holds a thread when a call is entered and when it is
//! left, so what one process does because of another's sync has a later time than the end of that sync.

use std::path::Path;

use regent_types::session::CreateSession;
use serde_json::json;

use crate::harness::Dev;
use crate::strace::{self, Call, Trace, Tracer};

/// Writes of each phase.
const WRITES: usize = 12;
/// What is traced: what makes durable, what writes to files, what writes to sockets.
const CALLS: &str = "trace=fdatasync,fsync,pwrite64,write,writev,sendto,sendmsg";

/// By how much the syncs of each node are delayed, in microseconds: it parts an acknowledgement that waits for a
/// sync from one that does not. Nothing is measured by it.
struct Slow {
    what: &'static str,
    leader: u32,
    followers: [u32; 2],
}

#[tokio::test]
async fn a_write_is_acknowledged_after_a_quorum_has_synced_it() {
    acknowledged_after_sync("sled").await;
}

#[tokio::test]
async fn a_write_is_acknowledged_after_a_quorum_has_synced_it_in_segments() {
    acknowledged_after_sync("segments").await;
}

async fn acknowledged_after_sync(store: &str) {
    if strace::is_missing() {
        return;
    }
    let dev = Dev::start_with(&["--log-store", store]);
    let wish: CreateSession = serde_json::from_value(json!({
        "template": "sleep", "whenFull": "queue", "placement": { "region": "nowhere" }
    }))
    .unwrap();
    let session = dev.client().create_session(&wish).await.unwrap().name.to_string();
    for slow in [
        // A follower that answers before its own sync is found out.
        Slow {
            what: "the followers' disks are slow",
            leader: 0,
            followers: [40_000, 40_000],
        },
        // A leader that counts itself before its own sync is found out: the quorum is it and the fast follower.
        Slow {
            what: "the leader's disk is slow",
            leader: 40_000,
            followers: [0, 80_000],
        },
    ] {
        let traces = traced_writes(&dev, &session, &slow).await;
        for number in 0..WRITES {
            check(&dev, &traces, &tag(slow.what, number), slow.what);
        }
    }
}

/// Attaches to all nodes, writes through each of them in turn, and gives the traces.
async fn traced_writes(dev: &Dev, session: &str, slow: &Slow) -> Vec<Trace> {
    let leader = dev.leader().await;
    let mut delays = slow.followers.into_iter();
    let tracers: Vec<Tracer> = (0..dev.file.nodes.len())
        .map(|node| {
            let delay = if node == leader {
                slow.leader
            } else {
                delays.next().expect("two follow")
            };
            let inject = format!("inject=fdatasync:delay_enter={delay}");
            let mut flags = vec!["-e", CALLS];
            if delay > 0 {
                flags.extend(["-e", &inject]);
            }
            let file = dev.path().join(format!("trace-{}-{node}", slow.leader));
            Tracer::attach(dev.file.nodes[node].pid, &file, &flags).expect("strace attached before")
        })
        .collect();
    let client = reqwest::Client::new();
    for number in 0..WRITES {
        let url = format!(
            "{}/api/v1/sessions/{session}",
            dev.file.nodes[number % tracers.len()].http
        );
        let answer = client
            .patch(url)
            .bearer_auth(&dev.file.admin_token)
            .json(&json!({ "tags": [tag(slow.what, number)] }))
            .send()
            .await
            .unwrap();
        assert!(answer.status().is_success(), "{answer:?}");
    }
    tracers.into_iter().map(Tracer::end).collect()
}

/// A tag that is nowhere else.
fn tag(phase: &str, number: usize) -> String {
    format!("while {phase}, write number {number:04}")
}

fn check(dev: &Dev, traces: &[Trace], tag: &str, what: &str) {
    let answers: Vec<&Call> = traces
        .iter()
        .flat_map(|trace| &trace.calls)
        .filter(|call| call.path.to_string_lossy().starts_with("socket:"))
        .filter(|call| call.bytes().starts_with(b"HTTP/1.1 200") && call.has(tag.as_bytes()))
        .collect();
    let [answer] = answers[..] else {
        panic!("{what}: {} answers have {tag}", answers.len());
    };
    let synced: Vec<bool> = traces
        .iter()
        .zip(&dev.file.nodes)
        .map(|(trace, node)| synced_before(trace, &node.data, tag, answer.entered_at))
        .collect();
    let count = synced.iter().filter(|synced| **synced).count();
    assert!(
        count >= 2,
        "{what}: {tag} was acknowledged when only these of the nodes had synced it: {synced:?}"
    );
}

/// Whether a sync of the log's file was begun after the tag was written to it, and was done at that time.
fn synced_before(trace: &Trace, data: &Path, tag: &str, at: u64) -> bool {
    let of_the_log = |call: &&Call| {
        ["log", "log-segments"]
            .iter()
            .any(|log| call.path.parent() == Some(&data.join(log)))
    };
    let Some(written) = trace
        .calls
        .iter()
        .filter(of_the_log)
        .find(|call| call.name == "pwrite64" && call.has(tag.as_bytes()))
    else {
        return false;
    };
    trace.calls.iter().any(|call| {
        call.is_sync_of(&written.path)
            && written.left.is_some_and(|written| written < call.entered)
            && call.left_at.is_some_and(|left| left < at)
    })
}
