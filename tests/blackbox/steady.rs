//! An idle cluster writes nothing: heartbeats and keepalives do not go through the log.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use regent_types::Revision;
use regent_types::agent::AgentStatus;

use crate::harness::{Dev, eventually};
use crate::workload::running_sessions;

/// Long against every interval of `dev`: 30 heartbeats.
const STEADY: Duration = Duration::from_secs(30);
/// After this long without an entry, whatever the start left to do is done.
const SETTLED: Duration = Duration::from_secs(3);

#[tokio::test]
async fn with_idle_agents_the_log_does_not_grow() {
    let mut dev = Dev::start();
    let second = dev.add_agent("second", &[]).await;
    dev.agent_online(&dev.file.agents[second].id).await;
    let client = dev.client();
    running_sessions(&client, "sleep", 4).await;
    dev.written_down().await;

    let seen = RefCell::new((applied(&dev).await, Instant::now()));
    let before = eventually("cluster at rest", || async {
        let now = applied(&dev).await;
        let mut seen = seen.borrow_mut();
        if now != seen.0 {
            *seen = (now, Instant::now());
        }
        let agree = seen.0.windows(2).all(|two| two[0] == two[1]);
        (agree && seen.1.elapsed() > SETTLED).then(|| seen.0.clone())
    })
    .await;
    let agents = client.all_agents().await.unwrap();

    // The one wait for time in these tests: that nothing happens can be seen in no other way.
    tokio::time::sleep(STEADY).await;

    assert_eq!(
        applied(&dev).await,
        before,
        "entries were written while nothing happened"
    );
    for (then, now) in agents.iter().zip(client.all_agents().await.unwrap()) {
        assert_eq!(now.status, AgentStatus::Online);
        assert!(
            now.last_heartbeat > then.last_heartbeat,
            "{} was heard meanwhile",
            now.agent_id
        );
    }
    // The reading can change: otherwise it proves nothing.
    running_sessions(&client, "sleep", 1).await;
    eventually("growth of the log", || async {
        (applied(&dev).await != before).then_some(())
    })
    .await;
}

/// What each node has applied, by its header.
async fn applied(dev: &Dev) -> Vec<Option<Revision>> {
    let mut all = Vec::new();
    for node in 0..3 {
        all.push(dev.client_of(node).index().await.unwrap());
    }
    all
}
