//! Connections that the state has at this node and whose sockets it does not have.
//!
//! A node that died left its own behind; a join may have been applied after its socket was gone; a disconnect
//! may not have come through. The lease of an agent without replicas runs out and takes its connection along,
//! but nothing else would ever end that of a replica, and the agent would be shown online for ever. So each
//! node looks now and then, and ends what it finds twice. The epoch makes it safe: it names a socket, and this
//! node knows that it has none.

use std::collections::BTreeSet;
use std::time::Duration;

use regent_state::{Operation, State};
use regent_types::{AgentId, Epoch, NodeId, ReplicaName};
use tokio_util::sync::CancellationToken;

use crate::service::Service;

/// How often a node looks. What was found twice is ended, so one of these is what a join may take.
const EVERY: Duration = Duration::from_secs(10);
/// So many are ended at a time.
const MOST: usize = 256;

type Key = (AgentId, ReplicaName, Epoch);

/// Runs until `stop`.
pub(crate) async fn run(service: Service, stop: CancellationToken) {
    let mut before = BTreeSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
        let view = service.node().view();
        let here = |agent: &AgentId, epoch| service.registry().is_here(agent, epoch);
        let found = without_socket(&view.state, service.id(), here);
        for (agent, replica, epoch) in found.intersection(&before).take(MOST) {
            tracing::info!(%agent, %replica, %epoch, "a connection without a socket is ended");
            let operation = Operation::AgentDisconnected {
                agent: agent.clone(),
                replica: replica.clone(),
                epoch: *epoch,
                reason: "its node has lost the connection".to_owned(),
            };
            if let Err(error) = service.propose_own(operation).await {
                tracing::debug!(%error, "it is tried again");
                break;
            }
        }
        before = found;
    }
}

fn without_socket(state: &State, node: NodeId, is_here: impl Fn(&AgentId, Epoch) -> bool) -> BTreeSet<Key> {
    let agents = state.agents().values();
    let connections = agents.flat_map(|agent| {
        let of_agent = agent.connections.iter();
        of_agent.map(|(replica, connection)| (&agent.id, replica, connection))
    });
    connections
        .filter(|(agent, _, connection)| connection.node == node && !is_here(agent, connection.epoch))
        .map(|(agent, replica, connection)| (agent.clone(), replica.clone(), connection.epoch))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use regent_state::operation::{AgentConnected, InitCluster, RegisterAgent};
    use regent_state::record::{Capacity, WaitsAt};
    use regent_state::{Caller, Leadership, Meta, Request};
    use regent_types::{ClusterId, CommandId, Revision, TokenId, UserName};

    fn apply(state: &mut State, operation: Operation) {
        let meta = Meta {
            revision: Revision(state.revision().0 + 1),
            leadership: Leadership::default(),
            at: 1,
        };
        let request = Request {
            caller: Caller::Node(NodeId(1)),
            idempotency: None,
            operation,
        };
        state.apply(&meta, &request).unwrap();
    }

    #[test]
    fn only_connections_of_this_node_without_a_socket_are_found() {
        let mut state = State::new();
        let token = TokenId::new("t").unwrap();
        apply(
            &mut state,
            Operation::InitCluster(InitCluster {
                cluster_id: ClusterId::new("c").unwrap(),
                feature_level: 1,
                admin: UserName::new("admin").unwrap(),
                password_hash: None,
                token: Some((token.clone(), [1; 32])),
            }),
        );
        let agent = AgentId::new("a").unwrap();
        apply(
            &mut state,
            Operation::RegisterAgent(RegisterAgent {
                id: agent.clone(),
                platform: String::new(),
                region: String::new(),
                capacity: Capacity::default(),
                labels: std::collections::BTreeMap::new(),
                metadata: "{}".to_owned(),
            }),
        );
        for (replica, node) in [("here", 1), ("gone", 1), ("elsewhere", 2)] {
            let connected = AgentConnected {
                agent: agent.clone(),
                replica: ReplicaName::new(replica).unwrap(),
                node: NodeId(node),
                token: token.clone(),
                protocol: 3,
                stale_ms: 4_000,
                runtime_id: String::new(),
                sessions: None,
                command_seed: CommandId::new("seed").unwrap(),
            };
            let at = WaitsAt {
                node: NodeId(node),
                start: 1,
            };
            apply(
                &mut state,
                Operation::ReplicaConnected {
                    connected,
                    holds: None,
                    at,
                },
            );
        }
        let connections = &state.agent(&agent).unwrap().connections;
        let epoch = |replica: &str| connections[&ReplicaName::new(replica).unwrap()].epoch;
        let here = epoch("here");
        let found = without_socket(&state, NodeId(1), |_, epoch| epoch == here);
        let gone = (agent.clone(), ReplicaName::new("gone").unwrap(), epoch("gone"));
        assert_eq!(found, BTreeSet::from([gone]));
    }
}
