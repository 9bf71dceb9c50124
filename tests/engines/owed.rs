//! What every runtime owes: StreamSpace's tests 3.1 and 3.2, a leader that dies in the middle, starts side by side.

use std::time::Instant;

use regent_types::agent::AgentStatus;
use regent_types::session::{Session, SessionState};

use crate::harness::{eventually, session_state};
use crate::stage::{Play, Stage, wish};

/// Sessions of StreamSpace's tests.
const FIVE: usize = 5;

/// StreamSpace's test 3.1: the agent is killed and started again while five sessions live. All survive as they are, and
/// a new one works at once.
pub(crate) async fn an_agent_restart_keeps_its_sessions(stage: &impl Stage) {
    let mut play = Play::alone(stage, &[]).await;
    let began = Instant::now();
    let sessions = running(&play, FIVE).await;
    eprintln!("{FIVE} sessions ready after {:?}", began.elapsed());
    let before: Vec<_> = sessions.iter().map(|session| only(stage, session)).collect();
    play.dev.kill_agent(play.processes[0]);
    play.dev.agent_status(&play.id, AgentStatus::Offline).await;
    let restarted = Instant::now();
    play.dev.restart_agent(play.processes[0]);
    play.dev.agent_online(&play.id).await;
    eprintln!("the agent is back after {:?}", restarted.elapsed());
    running(&play, 1).await;
    eprintln!("a new session runs {:?} after the restart", restarted.elapsed());
    for (session, before) in sessions.iter().zip(before) {
        let now = play.client.session(&session.name).await.unwrap();
        assert_eq!(
            (now.state, now.generation),
            (SessionState::Running, session.generation),
            "{}",
            now.reason
        );
        assert_eq!(only(stage, session), before, "{} was started again", session.name);
    }
    // They are not only shown: the new agent has them in hand.
    end(&play, stage, &sessions).await;
}

/// StreamSpace's test 3.2: commands that are sent while the agent is away wait, and all are done when it is back.
pub(crate) async fn commands_sent_while_the_agent_is_away_are_done_when_it_is_back(stage: &impl Stage) {
    let mut play = Play::alone(stage, &[]).await;
    let sessions = running(&play, FIVE).await;
    play.dev.kill_agent(play.processes[0]);
    play.dev.agent_status(&play.id, AgentStatus::Offline).await;
    let (stopped, asleep) = sessions.split_at(3);
    for session in stopped {
        play.client.stop_session(&session.name).await.unwrap();
    }
    for session in asleep {
        play.client.hibernate_session(&session.name).await.unwrap();
    }
    let restarted = Instant::now();
    play.dev.restart_agent(play.processes[0]);
    for session in stopped {
        session_state(&play.client, &session.name, SessionState::Terminated).await;
        assert_eq!(
            stage.left(&session.name),
            Vec::<String>::new(),
            "{}",
            session.name
        );
    }
    for session in asleep {
        session_state(&play.client, &session.name, SessionState::Hibernated).await;
        play.client.wake_session(&session.name).await.unwrap();
    }
    eprintln!(
        "all commands are done {:?} after the restart",
        restarted.elapsed()
    );
    for session in asleep {
        session_state(&play.client, &session.name, SessionState::Running).await;
    }
    end(&play, stage, asleep).await;
}

/// The window in which a session has been started and nobody was told: the leader dies in the middle of ten starts. The
/// next one adopts all, and none is started twice.
pub(crate) async fn sessions_that_start_while_the_leader_is_killed_start_once(stage: &impl Stage) {
    let mut play = Play::replicas(stage).await;
    let before = play.led_after(None, 3).await;
    let sessions = play.create("sleeper", 10).await;
    eventually("the first container", || async {
        sessions
            .iter()
            .any(|session| !stage.running(&session.name).is_empty())
            .then_some(())
    })
    .await;
    let leader = play.leader(&before);
    let killed = Instant::now();
    play.dev.kill_agent(leader);
    let after = play.led_after(before.token, 2).await;
    eprintln!("the next replica leads {:?} after the kill", killed.elapsed());
    assert_ne!(play.leader(&after), leader);
    for session in &sessions {
        let now = session_state(&play.client, &session.name, SessionState::Running).await;
        assert_eq!(
            now.generation, 1,
            "{} was started again: {}",
            now.name, now.reason
        );
        only(stage, session);
    }
    eprintln!("all ten run {:?} after the kill", killed.elapsed());
    // The killed one comes back as a standby, and whoever leads has all in hand.
    play.dev.restart_agent(leader);
    let again = play.led_after(before.token, 3).await;
    assert_eq!(again.token, after.token);
    // StreamSpace's figure: from the leader's death to the next command served, with nothing else to do.
    let killed = Instant::now();
    play.dev.kill_agent(play.leader(&again));
    play.client.stop_session(&sessions[0].name).await.unwrap();
    session_state(&play.client, &sessions[0].name, SessionState::Terminated).await;
    eprintln!(
        "a stop was served {:?} after the leader was killed",
        killed.elapsed()
    );
    end(&play, stage, &sessions[1..]).await;
}

/// Twenty at once are started side by side, and one whose start does not end delays none of them, nor their ends.
pub(crate) async fn starts_go_side_by_side_and_a_slow_one_delays_nothing(stage: &impl Stage) {
    let play = Play::alone(stage, &["--parallel", "8"]).await;
    play.template("slow", stage.endless_start()).await;
    let slow = play.client.create_session(&wish("slow")).await.unwrap();
    eventually("the start that does not end", || async {
        let session = play.client.session(&slow.name).await.ok()?;
        // Whoever asks is told why.
        (session.state == SessionState::Starting && session.reason.contains(stage.slow_because()))
            .then_some(())
    })
    .await;
    let began = Instant::now();
    let sessions = running(&play, 20).await;
    eprintln!("twenty sessions run after {:?}, eight at a time", began.elapsed());
    end(&play, stage, &sessions[..5]).await;
    let agent = play.client.agent(&play.id).await.unwrap();
    assert_eq!(agent.status, AgentStatus::Online);
    let still = play.client.session(&slow.name).await.unwrap();
    assert_eq!(
        still.state,
        SessionState::Starting,
        "it was to be slow: {}",
        still.reason
    );
    end(&play, stage, &sessions[5..]).await;
}

/// So many sessions of the sleeper, running.
pub(crate) async fn running(play: &Play, count: usize) -> Vec<Session> {
    let mut sessions = Vec::new();
    for session in play.create("sleeper", count).await {
        sessions.push(session_state(&play.client, &session.name, SessionState::Running).await);
    }
    sessions
}

/// Stops these, and sees that nothing is left of them.
pub(crate) async fn end(play: &Play, stage: &impl Stage, sessions: &[Session]) {
    for session in sessions {
        play.client.stop_session(&session.name).await.unwrap();
    }
    for session in sessions {
        session_state(&play.client, &session.name, SessionState::Terminated).await;
        assert_eq!(
            stage.left(&session.name),
            Vec::<String>::new(),
            "{}",
            session.name
        );
    }
}

/// The one thing that runs for a session, which was started once.
fn only(stage: &impl Stage, session: &Session) -> String {
    let running = stage.running(&session.name);
    assert_eq!(running.len(), 1, "{} runs as {running:?}", session.name);
    assert_eq!(running[0].1, 1, "{} was started more than once", session.name);
    running[0].0.clone()
}
