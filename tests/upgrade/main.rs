//! A rolling upgrade, by real processes: the program of an earlier commit (`previous`, built from git by `build`) and
//! this one serve one cluster together, one node is put back, and only when all are new does the feature level rise.

// All of it is a test. What is measured goes to stderr.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use regent_client::{Client, Error};
use regent_types::auth::{ApiToken, CreateToken};
use regent_types::duration::Span;
use regent_types::session::SessionState;
use rustix::process::Signal;

use crate::harness::{Dev, REGENT, eventually, findings, send, session_of, session_state};
use crate::program::previous;
use crate::writers::Writers;

#[path = "../blackbox/harness.rs"]
#[allow(dead_code, unreachable_pub)] // the black-box tests use the rest
mod harness;
mod program;
#[path = "../blackbox/writers.rs"]
#[allow(dead_code)]
mod writers;

#[tokio::test]
async fn nodes_are_upgraded_and_put_back_one_by_one_and_no_write_fails() {
    let Some(old) = previous() else { return };
    let new = PathBuf::from(REGENT);
    let mut dev = Dev::start_program(&old);
    let client = dev.client();
    let session = client.create_session(&session_of("sleep")).await.unwrap();
    let running = session_state(&client, &session.name, SessionState::Running).await;
    let writers = Writers::start(&client);

    // Up, one back, up again: what the newer wrote the older one reads.
    for (node, program) in [(0, &new), (1, &new), (0, &old), (0, &new)] {
        exchange(&mut dev, node, program).await;
        writers.go_on().await;
        // What the older program could not read is not even written.
        let newer = dev.client_of(if program == &new { node } else { 1 });
        let refused = join_token(&newer).await.unwrap_err().to_string();
        assert!(refused.contains("older program"), "{refused}");
        eventually("what a mixture of programs means, in words", || async {
            let cluster = newer.cluster().await.ok()?;
            let told = cluster
                .findings
                .iter()
                .any(|found| found.contains("an older one"));
            (told && cluster.feature_level == 1).then_some(())
        })
        .await;
    }

    exchange(&mut dev, 2, &new).await;
    // What one node knows of the programs of the others, another one may hear a moment later.
    eventually(
        "the feature level of the new program, with nothing else to be said",
        || async {
            let cluster = client.cluster().await.ok()?;
            let known = cluster.members.iter().all(|member| member.since.is_some());
            (cluster.feature_level == 2 && known && findings(&cluster).is_empty()).then_some(())
        },
    )
    .await;
    join_token(&client).await.expect("all can let nodes join now");
    writers.go_on().await;
    let (done, failed) = writers.end().await;
    eprintln!("{done} writes were acknowledged meanwhile");
    assert_eq!(failed, Vec::<String>::new(), "no write fails");

    // The agent is still the old one; then it is new too. The session never noticed.
    let agent = dev.agent_id();
    dev.agent_online(&agent).await;
    dev.kill_agent(0);
    new.display()
        .to_string()
        .clone_into(&mut dev.file.agents[0].command[0]);
    dev.restart_agent(0);
    dev.agent_online(&agent).await;
    let still = session_state(&client, &session.name, SessionState::Running).await;
    assert_eq!(still.updated_at, running.updated_at);
}

/// What a cluster has begun to write, a program that cannot read it does not guess at.
#[tokio::test]
async fn an_older_program_refuses_to_run_once_the_level_has_risen() {
    let Some(old) = previous() else { return };
    let mut dev = Dev::start();
    let client = dev.client();
    eventually("the members written down", || async {
        let cluster = client.cluster().await.ok()?;
        cluster
            .members
            .iter()
            .all(|member| member.since.is_some())
            .then_some(())
    })
    .await;
    stop(&dev, 2).await;
    old.display()
        .to_string()
        .clone_into(&mut dev.file.nodes[2].command[0]);
    dev.restart_node(2);
    let pid = dev.file.nodes[2].pid;
    eventually("end of the older program", || async {
        dev.has_ended("node-2", pid).then_some(())
    })
    .await;
    let log = std::fs::read_to_string(dev.path().join("node-2.again.log")).unwrap();
    assert!(log.contains("cannot be decoded"), "{log}");
    // Nothing was lost by the attempt.
    REGENT.clone_into(&mut dev.file.nodes[2].command[0]);
    dev.restart_node(2);
    eventually("the node is back", || async {
        dev.client_of(2).readyz().await.ok()
    })
    .await;
}

/// Ends a node in order and starts it with another program on its data.
async fn exchange(dev: &mut Dev, node: usize, program: &Path) {
    stop(dev, node).await;
    // The older program left it open to others; the newer one refuses that and says `chmod 700`.
    let owner_only = std::fs::Permissions::from_mode(0o700);
    std::fs::set_permissions(&dev.file.nodes[node].data, owner_only).unwrap();
    program
        .display()
        .to_string()
        .clone_into(&mut dev.file.nodes[node].command[0]);
    dev.restart_node(node);
    eventually("the node serves again", || async {
        dev.client_of(node).readyz().await.ok()
    })
    .await;
}

async fn stop(dev: &Dev, node: usize) {
    let pid = dev.file.nodes[node].pid;
    send(pid, Signal::TERM);
    eventually("end of a node", || async {
        (dev.has_ended(&format!("node-{node}"), pid) && !harness::is_alive(pid)).then_some(())
    })
    .await;
}

async fn join_token(client: &Client) -> Result<ApiToken, Error> {
    let wanted = CreateToken {
        join: Some("node".to_owned()),
        expires_in: Some(Span(60_000)),
        ..CreateToken::default()
    };
    client.create_token(&wanted).await
}
