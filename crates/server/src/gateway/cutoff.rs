//! A node cut off lets its agents go.
//!
//! A node that cannot reach the leader, or whose leader cannot reach a quorum, can neither hand commands
//! to its agents nor renew their leases. If it kept their sockets they would be lost when their stale
//! time is over, though another node could serve them. So while it holds agents it makes sure of a
//! confirmed round now and then (outside the log), and when there was none for too long, closes them.
//! The same goes for a node that is out of service: what it would send comes from a wrong state.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::service::Service;

/// Rounds within the time after which a node counts as cut off: one or two may fail.
const ROUNDS: u32 = 5;
/// An election takes about a second; a node must not let go of its agents for every one of them, unless
/// the stale time leaves no room for that.
const ELECTION: Duration = Duration::from_secs(2);

/// How long a node may be without a confirmed round: a third of the stale time, or an election.
pub(super) fn patience(stale_after: Duration) -> Duration {
    (stale_after / 3).max(ELECTION.min(stale_after / 2))
}

/// Watches while the node holds agents; ends with `stop`.
pub(crate) async fn run(service: Service, stop: CancellationToken) {
    let patience = patience(service.options().stale_after);
    let every = patience / ROUNDS;
    let mut count = service.registry().count();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            held = count.wait_for(|count| *count > 0) => if held.is_err() { return },
        }
        // Of this stretch of holding agents: before it nobody asked for rounds.
        let began = tokio::time::Instant::now();
        while *count.borrow() > 0 {
            if let Some(why) = service.node().out_of_service() {
                tracing::warn!(
                    agents = *count.borrow(),
                    why,
                    "out of service; the agents are let go"
                );
                service
                    .registry()
                    .let_go("this node is out of service; connect to another");
            } else if silence(&service, began) > patience {
                metrics::counter!("regent_agents_let_go_total").increment(1);
                tracing::warn!(
                    agents = *count.borrow(),
                    ?patience,
                    "cut off from the quorum; the agents are let go"
                );
                service
                    .registry()
                    .let_go("this node is cut off from the others; connect to another");
            }
            let round = async {
                if silence(&service, began) > every
                    && let Err(error) = service.leases().confirm(every * 2).await
                {
                    tracing::debug!(%error, "no confirmed round");
                }
                tokio::time::sleep(every).await;
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = round => {}
            }
        }
    }
}

fn silence(service: &Service, began: tokio::time::Instant) -> Duration {
    service
        .leases()
        .since_confirmed()
        .map_or(began.elapsed(), |since| since.min(began.elapsed()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_third_of_the_stale_time_but_no_shorter_than_an_election() {
        assert_eq!(patience(Duration::from_secs(30)), Duration::from_secs(10));
        assert_eq!(patience(Duration::from_secs(4)), Duration::from_secs(2));
        assert_eq!(patience(Duration::from_secs(1)), Duration::from_millis(500));
    }
}
