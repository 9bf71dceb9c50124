//! A disk that fails: from some moment on every sync of one node gives EIO, as strace has it.
//!
//! After a failed sync nobody knows what the disk holds, so the node must never sync again and never promise again:
//! it ends, and says why. Nobody else is disturbed, and started again on a disk that works it is a member as before.

use regent_types::NodeId;

use crate::harness::{Dev, PATIENCE, eventually, is_alive};
use crate::ledger::{Ledger, Outcome, same_digest_everywhere, serves};
use crate::strace::{self, Tracer};

/// Acknowledged writes before and after each fault.
const WRITES: usize = 20;

#[tokio::test]
async fn a_node_whose_disk_fails_stops_and_the_others_go_on() {
    disk_fails("sled").await;
}

#[tokio::test]
async fn a_node_whose_disk_fails_stops_and_the_others_go_on_with_segments() {
    disk_fails("segments").await;
}

async fn disk_fails(store: &str) {
    if strace::is_missing() {
        return;
    }
    let mut dev = Dev::start_with(&["--log-store", store]);
    let ledger = Ledger::new(&dev);
    let load = ledger.load(&[0, 1, 2]);
    let leader = dev.leader().await;
    for (victim, calls) in [
        ((leader + 1) % 3, "fdatasync,fsync"),
        (leader, "fdatasync"),
        ((leader + 2) % 3, "pwrite64"),
    ] {
        ledger.more(WRITES).await;
        let tracer = fail_calls(&dev, victim, calls);
        let said = ends(&dev, victim).await;
        let place = &dev.file.nodes[victim].data;
        assert!(
            said.contains(place.to_str().unwrap()),
            "the place is named: {said}"
        );
        assert!(said.contains("Input/output error"), "and what happened: {said}");
        drop(tracer);

        ledger.more(WRITES).await;
        let others: Vec<usize> = (0..3).filter(|node| *node != victim).collect();
        ledger.check(&dev, &others).await;
        dev.restart_node(victim);
        serves(&dev, victim).await;
    }
    load.end().await;
    ledger.check(&dev, &[0, 1, 2]).await;
    same_digest_everywhere(&dev, &ledger).await;
}

#[tokio::test]
async fn nothing_is_acknowledged_on_the_strength_of_a_sync_that_failed() {
    sync_fails_without_a_spare("sled").await;
}

#[tokio::test]
async fn nothing_is_acknowledged_on_the_strength_of_a_sync_that_failed_with_segments() {
    sync_fails_without_a_spare("segments").await;
}

/// Two of three are left, so each must have a write durable before it is acknowledged; and one of them cannot.
async fn sync_fails_without_a_spare(store: &str) {
    if strace::is_missing() {
        return;
    }
    let mut dev = Dev::start_with(&["--log-store", store]);
    let ledger = Ledger::new(&dev);
    for leads in [false, true] {
        ledger.write_some(&[0, 1, 2], WRITES).await;
        let leader = dev.leader().await;
        let (victim, other, third) = if leads {
            (leader, (leader + 1) % 3, (leader + 2) % 3)
        } else {
            ((leader + 1) % 3, leader, (leader + 2) % 3)
        };
        dev.kill_node(third);
        ledger.write_some(&[victim, other], WRITES).await;

        let tracer = fail_calls(&dev, victim, "fdatasync");
        // From here on the victim has nothing durable, and without it there is no quorum.
        let mut tried = 0;
        while is_alive(dev.file.nodes[victim].pid) || tried < WRITES {
            for node in [other, victim] {
                let outcome = ledger.write(node).await;
                assert_ne!(outcome, Outcome::Acknowledged, "by node {node} (leader: {leads})");
                tried += 1;
            }
        }
        ends(&dev, victim).await;
        drop(tracer);

        dev.restart_node(victim);
        serves(&dev, victim).await;
        ledger.write_some(&[victim, other], WRITES).await;
        ledger.check(&dev, &[victim, other]).await;
        dev.restart_node(third);
        serves(&dev, third).await;
    }
    ledger.check(&dev, &[0, 1, 2]).await;
    same_digest_everywhere(&dev, &ledger).await;
}

/// From now on these calls of a node fail.
fn fail_calls(dev: &Dev, node: usize, calls: &str) -> Tracer {
    let file = dev.path().join(format!("trace-{node}-{calls}"));
    let trace = format!("trace={calls}");
    let inject = format!("inject={calls}:error=EIO");
    Tracer::attach(dev.file.nodes[node].pid, &file, &["-e", &trace, "-e", &inject])
        .expect("strace attached before")
}

/// Waits until a node has ended by itself, with a failure; gives its last words.
pub(crate) async fn ends(dev: &Dev, node: usize) -> String {
    let NodeId(id) = dev.file.nodes[node].id;
    let pid = dev.file.nodes[node].pid;
    eventually(&format!("end of node {id} within {PATIENCE:?}"), || async {
        (!is_alive(pid)).then_some(())
    })
    .await;
    let begins = format!("regent: node {id} stopped: ");
    // The newer one first: it is there once the test has started the node again.
    let logs = [format!("node-{node}.again.log"), format!("node-{id}.log")];
    let last = logs.iter().find_map(|log| {
        let text = std::fs::read_to_string(dev.path().join(log)).ok()?;
        let last = text.lines().rfind(|line| line.starts_with(&begins))?;
        Some(last.to_owned())
    });
    last.unwrap_or_else(|| panic!("node {id} said no last words in {}", dev.path().display()))
}
