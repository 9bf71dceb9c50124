//! Data folders that must not be used: a node that came back with less than it had promised could lose
//! acknowledged writes or vote twice, so it refuses to start and says what to do.

use std::path::Path;
use std::process::{Command, Stdio};

use regent_types::session::SessionState;

use crate::harness::{Dev, eventually, is_alive, session_of, session_state};
use crate::workload::running_sessions;

#[tokio::test]
async fn a_damaged_log_is_refused_with_the_place_and_the_others_go_on() {
    let mut dev = Dev::start();
    let client = dev.client();
    running_sessions(&client, "sleep", 3).await;
    dev.kill_node(1);
    let folder = dev.file.nodes[1].data.clone();
    overwrite_middle(&folder.join("log/db"));

    let refused = ends(&dev, 1);
    assert!(refused.contains("damaged"), "{refused}");
    assert!(
        refused.contains(folder.to_str().unwrap()),
        "the place is named: {refused}"
    );
    let session = client.create_session(&session_of("sleep")).await.unwrap();
    session_state(&client, &session.name, SessionState::Running).await;
}

#[tokio::test]
async fn a_wiped_folder_is_refused_with_the_way_back() {
    let mut dev = Dev::start();
    dev.kill_node(2);
    std::fs::remove_dir_all(&dev.file.nodes[2].data).unwrap();

    let refused = ends(&dev, 2);
    assert!(refused.contains("the data of node 3 is gone"), "{refused}");
    assert!(
        refused.contains("under a node id that was never used"),
        "how to come back: {refused}"
    );
    let client = dev.client();
    running_sessions(&client, "sleep", 1).await;
}

#[tokio::test]
async fn a_folder_is_refused_under_another_node_id() {
    let mut dev = Dev::start();
    dev.kill_node(1);
    dev.kill_node(2);
    // Node 2's command, ports and all, with the folder of node 3.
    let folder = dev.file.nodes[2].data.display().to_string();
    set(&mut dev.file.nodes[1].command, "--data", &folder);
    let refused = ends(&dev, 1);
    assert!(refused.contains("belongs to node 3"), "{refused}");
    assert!(refused.contains("node 2"), "{refused}");
}

#[tokio::test]
async fn a_second_process_on_the_same_folder_is_refused_and_the_first_goes_on() {
    let mut dev = Dev::start();
    let running = dev.file.nodes[0].pid;
    // Ports of its own, so that it is the folder that is refused.
    for flag in ["--http", "--peer"] {
        set(&mut dev.file.nodes[0].command, flag, "127.0.0.1:0");
    }
    let refused = ends(&dev, 0);
    assert!(refused.contains("in use by another process"), "{refused}");
    assert!(refused.contains(&running.to_string()), "which one: {refused}");
    assert!(is_alive(running));
    eventually("answer of the first", || async {
        dev.client_of(0).readyz().await.ok()
    })
    .await;

    let second = Command::new(crate::harness::REGENT)
        .args(["dev", "--http-port", "0", "--data"])
        .arg(dev.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    let refused = String::from_utf8_lossy(&second.stderr);
    assert!(refused.contains("another `regent dev` uses"), "{refused}");
    running_sessions(&dev.client(), "sleep", 1).await;
}

#[tokio::test]
async fn the_files_of_the_first_start_may_be_removed_after_it() {
    let mut dev = Dev::start();
    dev.kill_node(0);
    let command = &dev.file.nodes[0].command;
    for flag in ["--bootstrap-token-file", "--bootstrap-password-file"] {
        let at = command.iter().position(|word| word == flag).unwrap();
        std::fs::remove_file(&command[at + 1]).unwrap();
    }
    dev.restart_node(0);
    eventually("service without the files", || async {
        dev.client_of(0).readyz().await.ok()
    })
    .await;
    dev.client_of(0).cluster().await.unwrap();
}

/// Starts a node by its command, which must end by itself and with a failure; gives what it said.
fn ends(dev: &Dev, node: usize) -> String {
    let command = &dev.file.nodes[node].command;
    let output = Command::new(&command[0])
        .args(&command[1..])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(output.status.code(), Some(1), "{said}");
    said
}

fn set(command: &mut [String], flag: &str, value: &str) {
    let at = command
        .iter()
        .position(|word| word == flag)
        .expect("the command has this flag");
    value.clone_into(&mut command[at + 1]);
}

/// Writes over a part of what a file holds, past its head: as a disk does that returns other bytes.
fn overwrite_middle(file: &Path) {
    let mut bytes = std::fs::read(file).unwrap();
    let used = bytes
        .iter()
        .rposition(|byte| *byte != 0)
        .expect("something was written")
        + 1;
    for byte in &mut bytes[used / 3..used * 2 / 3] {
        *byte ^= 0x5a;
    }
    std::fs::write(file, bytes).unwrap();
}
