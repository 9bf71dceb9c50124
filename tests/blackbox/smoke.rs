//! The thinnest true slice: a session asked for at any node ends in a real running process.

use regent_types::session::SessionState;

use crate::harness::{Dev, session_of, session_state};

#[tokio::test]
async fn a_session_asked_for_at_any_node_is_a_running_process() {
    let dev = Dev::start();
    for node in 0..3 {
        let session = dev
            .client_of(node)
            .create_session(&session_of("demo"))
            .await
            .unwrap();
        assert_eq!(session.state, SessionState::Pending);
        let session = session_state(
            &dev.client_of((node + 1) % 3),
            &session.name,
            SessionState::Running,
        )
        .await;
        let url = session.status.url.expect("a running demo has a URL");
        let page = reqwest::get(&url).await.unwrap().text().await.unwrap();
        assert!(page.contains(session.name.as_str()), "{page}");
    }
}
