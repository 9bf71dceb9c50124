//! StreamSpace's test 3.2: commands that are sent while the agent is down. There they were taken with 202
//! and never delivered, because a NULL error message broke loading every pending command.

use std::collections::BTreeMap;

use futures::StreamExt as _;
use regent_client::CommandFilter;
use regent_client::EventFilter;
use regent_types::agent::AgentStatus;
use regent_types::command::{Command, CommandStatus, CreateCommand};
use regent_types::session::{Session, SessionState};
use regent_types::{CommandId, Revision};
use serde_json::json;

use crate::harness::{Dev, PATIENCE, eventually, session_state};
use crate::process::Process;
use crate::workload::{Recorder, process_of, running_sessions};

/// Sessions that are stopped while the agent is away.
const STOPPED: usize = 50;
/// Sessions that are put to sleep.
const ASLEEP: usize = 5;

#[tokio::test]
async fn commands_sent_while_the_agent_is_down_are_done_once_and_in_order_when_it_is_back() {
    let mut dev = Dev::start();
    let client = dev.client();
    let recorder = Recorder::new(&dev).await;
    let sessions = running_sessions(&client, Recorder::TEMPLATE, STOPPED + ASLEEP).await;
    let processes: Vec<Process> = sessions.iter().map(process_of).collect();
    let (stopped, asleep) = sessions.split_at(STOPPED);

    dev.kill_agent(0);
    dev.agent_status(&dev.agent_id(), AgentStatus::Offline).await;
    let began = client.index().await.unwrap().unwrap();

    // One for no session, one for every tenth session before its stop, and the rest; through all nodes.
    let mut queued: Vec<CommandId> = Vec::new();
    queued.push(custom(&dev, None, 0).await);
    for (n, session) in stopped.iter().enumerate() {
        if n % 10 == 0 {
            queued.push(custom(&dev, Some(session), n).await);
        }
        let answer = dev.client_of(n % 3).stop_session(&session.name).await.unwrap();
        queued.push(answer.command_id.expect("a stop has a command"));
    }
    for (n, session) in asleep.iter().enumerate() {
        let answer = dev
            .client_of(n % 3)
            .hibernate_session(&session.name)
            .await
            .unwrap();
        queued.push(answer.command_id.expect("a hibernation has a command"));
    }
    queued.push(custom(&dev, None, 1).await);

    for node in 0..3 {
        for id in &queued {
            let shown = raw(&dev, node, id).await;
            assert_eq!(shown["status"], "pending", "{shown}");
            assert!(
                shown.get("error").is_some_and(serde_json::Value::is_null),
                "{shown}"
            );
            assert!(shown["sentAt"].is_null(), "{shown}");
        }
    }
    let shown = client.all_commands(&filter(&dev)).await.unwrap();
    let pending = shown.iter().filter(|c| c.status == CommandStatus::Pending);
    let pending: Vec<&CommandId> = pending.map(|c| &c.command_id).collect();
    assert_eq!(
        pending,
        queued.iter().collect::<Vec<_>>(),
        "listed in the order of the queue"
    );

    dev.restart_agent(0);
    let done = eventually("end of all commands", || async {
        let all = client.all_commands(&filter(&dev)).await.ok()?;
        let mine: Vec<Command> = all
            .into_iter()
            .filter(|c| queued.contains(&c.command_id))
            .collect();
        mine.iter().all(|c| c.status.is_final()).then_some(mine)
    })
    .await;
    assert_eq!(done.len(), queued.len());
    for command in &done {
        assert_eq!(command.run, 1, "{command:?}");
        if command.action == ACTION {
            // The process agent has no actions of its own: it says so, and the queue goes on.
            assert_eq!(command.status, CommandStatus::Failed);
            assert!(command.error.as_ref().unwrap().contains(ACTION), "{command:?}");
        } else {
            assert_eq!(
                (command.status, &command.error),
                (CommandStatus::Completed, &None),
                "{command:?}"
            );
        }
    }
    in_order(&dev, began, &queued, &done).await;

    for (session, process) in stopped.iter().zip(&processes) {
        session_state(&client, &session.name, SessionState::Terminated).await;
        assert!(!process.is_alive(), "{} still runs", session.name);
        assert_eq!(
            recorder.count("end", session),
            1,
            "{} was told to end once",
            session.name
        );
    }
    for (session, process) in asleep.iter().zip(&processes[STOPPED..]) {
        session_state(&client, &session.name, SessionState::Hibernated).await;
        assert!(process.is_alive(), "{} is asleep, not gone", session.name);
        assert_eq!(recorder.count("end", session), 0);
    }
    for session in &sessions {
        assert_eq!(
            recorder.count("start", session),
            1,
            "{} was started once",
            session.name
        );
    }
}

/// Checks by the log, which no clock can blur: the commands were sent in the order of the queue among those
/// that had nothing before them, and within a session each only after the one before was done. A command may
/// be sent again when the connection breaks; it ends once.
async fn in_order(dev: &Dev, began: Revision, queued: &[CommandId], done: &[Command]) {
    let kinds = [
        "command.sent",
        "command.acknowledged",
        "command.completed",
        "command.failed",
    ];
    let events = dev.client().events(EventFilter {
        after: Some(format!("{began}.0")),
        kinds: kinds.map(str::to_owned).to_vec(),
    });
    let wanted = queued.len();
    let mut over = 0;
    let mut events = events.map(Result::unwrap).filter(|event| {
        let mine = queued.iter().any(|id| id.as_str() == event.subject);
        std::future::ready(mine)
    });
    let mut story: Vec<(String, String)> = Vec::new();
    while over < wanted {
        let event = tokio::time::timeout(PATIENCE, events.next())
            .await
            .expect("the stream tells all")
            .unwrap();
        over += usize::from(matches!(
            event.kind.as_str(),
            "command.completed" | "command.failed"
        ));
        story.push((event.kind, event.subject));
    }

    let place = |kind: &str, id: &CommandId| {
        let mut places = story
            .iter()
            .enumerate()
            .filter(|(_, (k, s))| k == kind && s == id.as_str());
        let place = places.next().unwrap_or_else(|| panic!("{id} has no {kind}")).0;
        assert!(
            kind == "command.sent" || places.next().is_none(),
            "{id} has two of {kind}"
        );
        place
    };
    let by_id: BTreeMap<&CommandId, &Command> = done.iter().map(|c| (&c.command_id, c)).collect();
    let mut last_of_session = BTreeMap::new();
    let mut last_sent = 0;
    for id in queued {
        let sent = place("command.sent", id);
        let session = by_id[id].session_id.clone();
        if let Some(before) = session.and_then(|session| last_of_session.insert(session, id)) {
            let before = by_id[before];
            let end = format!("command.{}", before.status.as_str());
            assert!(
                place(&end, &before.command_id) < sent,
                "{id} was sent before its session was free"
            );
        } else {
            assert!(
                last_sent <= sent,
                "{id} was sent before one that was queued earlier"
            );
            last_sent = sent;
        }
    }
}

const ACTION: &str = "say_hello";

async fn custom(dev: &Dev, session: Option<&Session>, n: usize) -> CommandId {
    let command = CreateCommand {
        action: ACTION.to_owned(),
        session_id: session.map(|session| session.name.clone()),
        payload: json!({ "n": n }),
        expires_in: None,
    };
    let command = dev
        .client_of(n % 3)
        .create_command(&dev.agent_id(), &command)
        .await
        .unwrap();
    assert_eq!(command.status, CommandStatus::Pending);
    command.command_id
}

fn filter(dev: &Dev) -> CommandFilter {
    CommandFilter {
        agent: Some(dev.agent_id()),
        ..CommandFilter::default()
    }
}

/// A command as a script sees it, where absent and `null` are two things.
async fn raw(dev: &Dev, node: usize, id: &CommandId) -> serde_json::Value {
    let url = format!("{}/api/v1/commands/{id}", dev.file.nodes[node].http);
    let request = reqwest::Client::new().get(url).bearer_auth(&dev.file.admin_token);
    request.send().await.unwrap().json().await.unwrap()
}
