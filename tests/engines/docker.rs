//! A Docker engine as the stage, and what only Docker has.

use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use regent_types::SessionName;
use regent_types::agent::AgentStatus;
use regent_types::session::SessionState;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::engine::Engine;
use crate::harness::{Dev, REGENT, eventually, lacks, restrict, session_of, session_state};
use crate::owed;
use crate::stage::{Play, Stage, wish};

/// Runs until it is told to end, and then ends at once.
const SLEEP: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

impl Stage for Engine {
    fn flags(&self) -> Vec<String> {
        ["--runtime", "docker", "--docker-host", &self.host]
            .map(str::to_owned)
            .to_vec()
    }

    fn sleeper(&self) -> Value {
        json!({
            "baseImage": "regent-test:1", "command": ["sh", "-c"], "args": [SLEEP],
            "defaultResources": { "cpu": "10m", "memory": "16Mi" }
        })
    }

    fn endless_start(&self) -> Value {
        // A registry that takes the connection and never answers: nobody accepts from this listener's queue.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        // For as long as the tests run.
        std::mem::forget(listener);
        json!({ "baseImage": format!("{address}/slow:1"), "defaultResources": { "cpu": "10m", "memory": "16Mi" } })
    }

    fn slow_because(&self) -> &'static str {
        "pulling"
    }

    fn running(&self, session: &SessionName) -> Vec<(String, u32)> {
        let label = format!("label=regent.session={session}");
        let running = self.docker(&["ps", "-q", "--no-trunc", "--filter", &label]);
        // By the nanosecond: a whole second would leave out what happened in it.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let now = format!("{}.{:09}", now.as_secs(), now.subsec_nanos());
        let until = ["events", "--since", "1", "--until", &now, "--filter", &label];
        let starts = self.docker(&[&until[..], &["--filter", "event=start", "--format", "{{.ID}}"]].concat());
        let started = |id: &str| u32::try_from(starts.lines().filter(|one| *one == id).count()).unwrap();
        running.lines().map(|id| (id.to_owned(), started(id))).collect()
    }

    fn left(&self, session: &SessionName) -> Vec<String> {
        let label = format!("label=regent.session={session}");
        let containers = self.docker(&["ps", "-aq", "--filter", &label]);
        let volumes = self.docker(&["volume", "ls", "-q", "--filter", &label]);
        containers
            .lines()
            .chain(volumes.lines())
            .map(str::to_owned)
            .collect()
    }
}

#[tokio::test]
async fn docker_an_agent_restart_keeps_its_sessions() {
    let Some(engine) = Engine::own("docker_an_agent_restart_keeps_its_sessions") else {
        return;
    };
    owed::an_agent_restart_keeps_its_sessions(&engine).await;
}

#[tokio::test]
async fn docker_commands_sent_while_the_agent_is_away_are_done_when_it_is_back() {
    let name = "docker_commands_sent_while_the_agent_is_away_are_done_when_it_is_back";
    let Some(engine) = Engine::own(name) else { return };
    owed::commands_sent_while_the_agent_is_away_are_done_when_it_is_back(&engine).await;
}

#[tokio::test]
async fn docker_sessions_that_start_while_the_leader_is_killed_start_once() {
    let name = "docker_sessions_that_start_while_the_leader_is_killed_start_once";
    let Some(engine) = Engine::own(name) else { return };
    owed::sessions_that_start_while_the_leader_is_killed_start_once(&engine).await;
}

#[tokio::test]
async fn docker_starts_go_side_by_side_and_a_slow_one_delays_nothing() {
    let name = "docker_starts_go_side_by_side_and_a_slow_one_delays_nothing";
    let Some(engine) = Engine::own(name) else { return };
    owed::starts_go_side_by_side_and_a_slow_one_delays_nothing(&engine).await;
}

/// `regent dev --runtime docker`: the demo opens, sleeps and wakes; nothing outlives `dev`, not even when the agent was
/// killed before.
#[tokio::test]
async fn dev_runs_the_demo_in_docker_and_leaves_nothing() {
    let Some(engine) = Engine::own("dev_runs_the_demo_in_docker_and_leaves_nothing") else {
        return;
    };
    for kill_the_agent in [false, true] {
        let mut dev = Dev::start_with_env(&["--runtime", "docker"], &[("DOCKER_HOST", &engine.host)]);
        let client = dev.client();
        let session = client.create_session(&session_of("demo")).await.unwrap();
        let running = session_state(&client, &session.name, SessionState::Running).await;
        let opens = async |url: Option<String>| {
            let page = reqwest::get(url.expect("the demo has a URL"))
                .await
                .unwrap()
                .text()
                .await
                .unwrap();
            assert!(page.contains(session.name.as_str()), "{page}");
        };
        opens(running.status.url).await;
        client.hibernate_session(&session.name).await.unwrap();
        session_state(&client, &session.name, SessionState::Hibernated).await;
        client.wake_session(&session.name).await.unwrap();
        let awake = session_state(&client, &session.name, SessionState::Running).await;
        opens(awake.status.url).await;
        // A template that is only a command cannot run here, and whoever asks is told so.
        let refused = client.create_session(&session_of("sleep")).await.unwrap_err();
        let reasons = format!("{:?}", refused.problem().expect("a problem").extra);
        assert!(reasons.contains("it runs images"), "{refused}: {reasons}");
        if kill_the_agent {
            dev.kill_agent(0);
        }
        drop(dev.end(Signal::TERM));
        assert_eq!(engine.left(&session.name), Vec::<String>::new());
    }
}

/// An engine that is restarted takes its containers along: what shall run is started again, and the agent stays.
#[tokio::test]
async fn sessions_run_again_after_the_engine_was_restarted() {
    let Some(engine) = Engine::own("sessions_run_again_after_the_engine_was_restarted") else {
        return;
    };
    let play = Play::alone(&engine, &[]).await;
    let sessions = owed::running(&play, 2).await;
    for (round, signal) in ["TERM", "KILL"].into_iter().enumerate() {
        engine.control(&format!("restart {signal}"));
        for session in &sessions {
            eventually("the next generation", || async {
                let now = play.client.session(&session.name).await.ok()?;
                assert!(!now.state.is_final(), "{}: {}", now.name, now.reason);
                let next = now.generation == u64::try_from(round).unwrap() + 2;
                (next && now.state == SessionState::Running).then_some(())
            })
            .await;
            assert_eq!(engine.running(&session.name).len(), 1);
        }
    }
    let agent = play.client.agent(&play.id).await.unwrap();
    assert_eq!(agent.status, AgentStatus::Online);
    owed::end(&play, &engine, &sessions).await;
}

/// What ends at the engine by itself or by others' hands is seen by whoever asks, with the reason.
#[tokio::test]
async fn the_reason_of_an_end_at_the_engine_reaches_the_user() {
    let Some(engine) = Engine::own("the_reason_of_an_end_at_the_engine_reaches_the_user") else {
        return;
    };
    let play = Play::alone(&engine, &[]).await;
    let resources = json!({ "cpu": "10m", "memory": "16Mi" });
    let script = |script: &str| {
        json!({
            "baseImage": "regent-test:1", "command": ["sh", "-c"], "args": [script], "defaultResources": resources
        })
    };
    play.template("greedy", script("sleep 1; exec tail /dev/zero"))
        .await;
    play.template("fails", script("exit 3")).await;
    play.template(
        "missing",
        json!({ "baseImage": "127.0.0.1:1/none:1", "defaultResources": resources }),
    )
    .await;
    let ends = async |template: &str, by_hand: Option<&[&str]>, word: &str| {
        let session = play.client.create_session(&wish(template)).await.unwrap();
        if let Some(by_hand) = by_hand {
            session_state(&play.client, &session.name, SessionState::Running).await;
            let id = &engine.running(&session.name)[0].0;
            engine.docker(&[by_hand, &[id.as_str()]].concat());
        }
        let ended = eventually(&format!("the end of a session of {template}"), || async {
            let session = play.client.session(&session.name).await.ok()?;
            (session.state == SessionState::Failed).then_some(session)
        })
        .await;
        assert!(ended.reason.contains(word), "{template}: {}", ended.reason);
    };
    ends("greedy", None, "ran out of memory").await;
    ends("fails", None, "exited with code 3").await;
    ends("sleeper", Some(&["kill"]), "ended by signal 9").await;
    ends("sleeper", Some(&["rm", "-f"]), "removed by somebody else").await;
}

/// StreamSpace's agent ran as root. Here a user of no rights but the socket's group is enough.
#[tokio::test]
async fn the_agent_runs_as_an_unprivileged_user_in_the_sockets_group() {
    let name = "the_agent_runs_as_an_unprivileged_user_in_the_sockets_group";
    let Some(engine) = Engine::own(name) else { return };
    let has_setpriv = Command::new("setpriv")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok();
    if lacks("docker", has_setpriv) {
        return;
    }
    let mut play = Play::alone(&engine, &[]).await;
    // The agent that came with it goes, and the same command runs as nobody, with all that it needs handed over.
    let index = play.processes[0];
    play.dev.stop_agent(index);
    let command = play.dev.file.agents[index].command.clone();
    let value = |flag: &str| command[command.iter().position(|word| word == flag).unwrap() + 1].clone();
    let socket = engine.host.trim_start_matches("unix://").to_owned();
    for path in [value("--data"), value("--token-file")] {
        let given = Command::new("chown")
            .args(["-R", "65534:65534", &path])
            .status()
            .unwrap();
        assert!(given.success());
    }
    restrict(std::path::Path::new(&value("--token-file")));
    for folder in [play.dev.path(), std::path::Path::new(&socket).parent().unwrap()] {
        let passable = Command::new("chmod").arg("o+x").arg(folder).status().unwrap();
        assert!(passable.success());
    }
    let group = std::fs::metadata(&socket).unwrap().gid();
    let as_nobody = |groups: &str| {
        let mut all: Vec<String> = [
            "setpriv",
            "--reuid",
            "65534",
            "--regid",
            "65534",
            "--groups",
            groups,
            "--no-new-privs",
            "--inh-caps=-all",
            "--bounding-set=-all",
        ]
        .map(str::to_owned)
        .to_vec();
        all.push(REGENT.to_owned());
        all.extend(command[1..].iter().cloned());
        all
    };
    // Without the group it says what is missing.
    let wrong = as_nobody("65534");
    let output = Command::new(&wrong[0])
        .args(&wrong[1..])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("socket's group"),
        "{said}"
    );
    play.dev.file.agents[index].command = as_nobody(&group.to_string());
    play.dev.restart_agent(index);
    play.dev.agent_online(&play.id).await;
    let pid = play.dev.file.agents[index].pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(
        status.contains("Uid:\t65534\t65534") && status.contains("CapEff:\t0000000000000000"),
        "{status}"
    );
    let sessions = owed::running(&play, 1).await;
    owed::end(&play, &engine, &sessions).await;
}
