//! A full disk: one node has its data on a file system of a few megabytes.
//!
//! Full is like failed: the node ends and says which place has no room, nothing that it could not write counts, and
//! nobody else is disturbed. The way back is room: the same file system is made larger, the node started again.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use regent_types::template::Manifest;
use rustix::process::Signal;
use serde_json::json;

use crate::failing_sync::ends;
use crate::harness::{Dev, eventually, is_alive, lacks};
use crate::ledger::{Ledger, Outcome, same_digest_everywhere, serves};

/// Which node's disk is small: its index.
const SMALL: usize = 2;
/// Room of the small file system, in bytes, and what it is made later.
const ROOM: u64 = 4 << 20;
const MORE_ROOM: u64 = 64 << 20;
/// Acknowledged writes before and after.
const WRITES: usize = 20;

#[tokio::test]
async fn a_node_whose_disk_is_full_stops_and_comes_back_when_there_is_room() {
    disk_is_full("sled").await;
}

#[tokio::test]
async fn a_node_whose_disk_is_full_stops_and_comes_back_when_there_is_room_with_segments() {
    disk_is_full("segments").await;
}

async fn disk_is_full(store: &str) {
    let folder = tempfile::Builder::new().prefix("regent-test-").tempdir().unwrap();
    let data = folder.path().join(format!("node-{}", SMALL + 1));
    let mount = Tmpfs::mount(&data, ROOM);
    if lacks("mount", mount.is_some()) {
        return;
    }
    let mount = mount.expect("it is there");
    let mut dev = Dev::start_in(folder, &["--log-store", store]);
    let ledger = Ledger::new(&dev);
    ledger.write_some(&[0, 1, 2], WRITES).await;

    // Large entries fill it, while others go on writing small ones.
    let load = ledger.load(&[0, 1, 2]);
    fill(&dev).await;
    let said = ends(&dev, SMALL).await;
    assert!(
        said.contains(data.to_str().unwrap()),
        "the place is named: {said}"
    );
    assert!(
        said.contains("No space left on device"),
        "and what happened: {said}"
    );
    ledger.more(WRITES).await;
    load.end().await;
    ledger.check(&dev, &[0, 1]).await;

    // Started on what is still full it says so again, at once or when the room that is left is used up, and changes
    // nothing.
    dev.restart_node(SMALL);
    serves_or_ended(&dev).await;
    fill(&dev).await;
    let said = last_words(&dev, SMALL);
    assert!(
        said.contains(data.to_str().unwrap()),
        "the place is named: {said}"
    );
    assert!(
        said.contains("No space left on device"),
        "and what happened: {said}"
    );

    // It counts for nothing: without another one there is no quorum.
    dev.kill_node(1);
    for _ in 0..WRITES {
        assert_ne!(ledger.write(0).await, Outcome::Acknowledged);
    }

    mount.grow(MORE_ROOM);
    dev.restart_node(SMALL);
    serves(&dev, SMALL).await;
    ledger.write_some(&[0, SMALL], WRITES).await;
    ledger.check(&dev, &[0, SMALL]).await;
    dev.restart_node(1);
    serves(&dev, 1).await;
    ledger.check(&dev, &[0, 1, 2]).await;
    same_digest_everywhere(&dev, &ledger).await;

    // The folder can be removed once nothing is mounted in it.
    let folder = dev.end(Signal::TERM);
    drop(mount);
    folder.close().unwrap();
}

/// Waits until the node with the small disk takes entries again, or has ended for want of room.
async fn serves_or_ended(dev: &Dev) {
    eventually("service or end of the node on the full disk", || async {
        let ended = !is_alive(dev.file.nodes[SMALL].pid);
        (ended || dev.client_of(SMALL).readyz().await.is_ok()).then_some(())
    })
    .await;
}

/// Writes large entries through the other nodes until the small disk has ended its node.
async fn fill(dev: &Dev) {
    let client = dev.client_of(0);
    let argument = "x".repeat(8_000);
    for number in 0.. {
        if !is_alive(dev.file.nodes[SMALL].pid) {
            return;
        }
        assert!(number < 10 * ROOM / 50_000, "it has long been full");
        let manifest: Manifest = serde_json::from_value(json!({
            "metadata": { "name": "large" },
            "spec": {
                "command": ["sleep"], "args": vec![argument.as_str(); 7], "env": [{ "name": "N", "value": number.to_string() }],
                "defaultResources": { "cpu": "10m", "memory": "16Mi" }
            }
        }))
        .unwrap();
        // Refused or unknown only while there is an election, when that node led.
        eventually("large write", || async {
            client.apply_template(&manifest).await.ok()
        })
        .await;
    }
}

/// The last line of a node that was started again and has ended.
fn last_words(dev: &Dev, node: usize) -> String {
    let log = std::fs::read_to_string(dev.path().join(format!("node-{node}.again.log"))).unwrap();
    log.lines().next_back().unwrap_or_default().to_owned()
}

/// A small file system in memory; unmounted when it is dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    /// `None` when this process may not mount.
    fn mount(at: &Path, bytes: u64) -> Option<Self> {
        std::fs::create_dir(at).unwrap();
        let size = format!("size={bytes},mode=700");
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "regent-test"])
            .arg(at))
        .then(|| Self(at.to_owned()))
    }

    fn grow(&self, bytes: u64) {
        let size = format!("remount,size={bytes}");
        assert!(run(Command::new("mount").args(["-o", &size]).arg(&self.0)));
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: when the test fails its processes may still be ending.
        run(Command::new("umount").arg("-l").arg(&self.0));
    }
}

fn run(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
