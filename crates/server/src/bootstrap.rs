//! The very first operation: identity, first admin, first token.
//!
//! The identity of the cluster is settled by the members among themselves before consensus begins
//! (`regent-raft`); the first operation writes it into the state. Every node that was given the first
//! token or password proposes it until somebody's was applied; apply takes only the first. A cluster
//! that nobody could log in to is never made.

use std::time::Duration;

use regent_state::operation::InitCluster;
use regent_state::{Caller, FIRST_LEVEL, Operation, Rejection, Request};
use regent_types::UserName;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::http::passwords;
use crate::ids;
use crate::service::Service;

/// The first user.
const ADMIN: &str = "admin";
/// What this version supports; see the feature level in `regent-state`.
pub(crate) const FEATURE_LEVEL: u32 = 2;
/// How long one try takes at most.
const TRY_WITHIN: Duration = Duration::from_secs(5);
/// Pause between tries.
const PAUSE: Duration = Duration::from_millis(50);
/// How often a node that cannot help says what is missing.
const REMIND_EVERY: Duration = Duration::from_secs(15);

/// Ends once the cluster is initialised, by whichever node.
pub(crate) async fn run(service: Service, stop: CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = initialise(&service) => {}
    }
}

async fn initialise(service: &Service) {
    let options = service.options();
    let mut reminded = Instant::now();
    let mut password_hash = None;
    while service.node().view().state.cluster_id().is_none() {
        tokio::time::sleep(PAUSE).await;
        let Some(cluster_id) = service.node().cluster_id() else {
            continue;
        };
        if service.node().leadership().borrow().leader.is_none() {
            continue;
        }
        if options.bootstrap_token.is_none() && options.admin_password.is_none() {
            if reminded.elapsed() >= REMIND_EVERY {
                reminded = Instant::now();
                tracing::warn!(
                    "the cluster has no administrator yet: start one of its nodes with --bootstrap-token-file"
                );
            }
            continue;
        }
        if let (None, Some(password)) = (&password_hash, &options.admin_password) {
            match passwords::hash(password.clone()).await {
                Ok(hash) => password_hash = Some(hash),
                Err(failure) => {
                    tracing::warn!(
                        ?failure,
                        "the first password could not be hashed; it is tried again"
                    );
                    continue;
                }
            }
        }
        let token = options
            .bootstrap_token
            .as_deref()
            .map(|token| (ids::token_id(), ids::secret_hash(token.trim())));
        let operation = Operation::InitCluster(InitCluster {
            cluster_id,
            // Raised once all members have said that they can (`membership`).
            feature_level: FIRST_LEVEL,
            admin: UserName::new(ADMIN).expect("a word"),
            password_hash: password_hash.clone(),
            token,
        });
        let request = Request {
            caller: Caller::Node(service.id()),
            idempotency: None,
            operation,
        };
        match service
            .node()
            .propose(&request, Instant::now() + TRY_WITHIN)
            .await
            .map(|done| done.applied)
        {
            Ok(Ok(_)) => tracing::info!("the cluster is initialised"),
            // Another node was first; its entry is on its way here.
            Ok(Err(Rejection::Identity(why))) => tracing::debug!(why, "initialised by another node"),
            Ok(Err(rejection)) => tracing::error!(%rejection, "the first operation was rejected"),
            Err(error) => tracing::debug!(%error, "the first operation was not written; it is tried again"),
        }
    }
}
