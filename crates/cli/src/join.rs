//! Joining: a node's first start in a cluster that is there already, and an agent that fetches its token.
//!
//! Both bring a join token, once, and keep what they got for it in their data folder. A start that finds it there asks
//! nobody.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use regent_client::backoff::FullJitter;
use regent_client::{Client, Error, Trust};
use regent_server::Joining;
use regent_types::AgentId;

use crate::args::trust;
use crate::config::{ServerConfig, UsageError, required, secret_file};
use crate::noun::explained;
use crate::secrets;
use crate::server::tls;

/// Where a node that joined keeps the cluster's secret.
const CLUSTER_SECRET: &str = "cluster-secret";
/// Where an agent keeps the token that it fetched.
const AGENT_TOKEN: &str = "token";
/// How long the cluster may take to admit a node.
const ADMIT_WITHIN: Duration = Duration::from_mins(1);
/// Between an agent's attempts to get its token.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Joins, if that is asked for and not done already; gives where the cluster's secret is kept. `None`: this node
/// founds its cluster.
pub(crate) async fn run(config: &ServerConfig) -> anyhow::Result<Option<PathBuf>> {
    let Some(servers) = &config.join else {
        if config.join_token_file.is_some() {
            return Err(UsageError(
                "join-token-file is set, but not whom to join: give --join URL,URL".to_owned(),
            )
            .into());
        }
        return Ok(None);
    };
    if config.members.is_some() {
        return Err(UsageError(
            "members and join are both set: the first founds a cluster, the second joins one; keep one"
                .to_owned(),
        )
        .into());
    }
    let node = required(config.node_id, "node-id")?;
    let data = required(config.data.clone(), "data")?;
    let (http, peer) = (required(config.http, "http")?, required(config.peer, "peer")?);
    // What would be refused later is refused before anything is asked.
    tls(config, node)?;
    secrets::check_folder(&data)?;
    let (http, peer) = (config.advertised_http(http), config.advertised_peer(peer));
    let trust = trust(
        config.tls_ca.as_ref(),
        config.tls_cert.as_ref(),
        config.tls_key.as_ref(),
    )?;
    for server in servers.split(',').map(str::trim).filter(|_| !config.plaintext) {
        if !is_private(server) {
            return Err(UsageError(format!(
                "join {server}: the join token and the cluster's secret would cross the network in plain text; give https \
                 URLs, or --plaintext to have it so"
            ))
            .into());
        }
    }
    let store = config.log_store.unwrap_or_default().into();
    let kept = data.join(CLUSTER_SECRET);

    let mut joining = Joining::open(&data, store, node)
        .await
        .with_context(|| format!("node {node} cannot join"))?;
    if joining.cluster().is_none() {
        let token = required(config.join_token_file.as_deref(), "join-token-file")?;
        let client = Client::with_trust(servers.split(','), Some(secret_file(token)?), &trust)?
            .with_deadline(ADMIT_WITHIN);
        let joined = client
            .join(&joining.request(&peer, &http))
            .await
            .map_err(|error| explained(error.into(), "--tls-ca"))
            .with_context(|| format!("node {node} was not admitted"))?;
        // The secret first: what is settled asks nobody again.
        secrets::write(&kept, &joined.cluster_secret)?;
        joining.admitted(&joined).await?;
    }
    joining.close().await;
    Ok(Some(kept))
}

/// Whether what is said to this server stays private: over TLS, or within this machine.
fn is_private(server: &str) -> bool {
    let Some(rest) = server.strip_prefix("http://") else {
        return true;
    };
    let authority = rest.split('/').next().unwrap_or_default();
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
    let address = host.trim_start_matches('[').trim_end_matches(']');
    address == "localhost" || address.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
}

/// The token of an agent that was given a join token: fetched at its first start, kept from then on. Replicas that
/// share a data folder share it.
pub(crate) async fn agent_token(
    servers: &[String],
    agent: &AgentId,
    data: &Path,
    join_token: &Path,
    trust: &Trust,
) -> anyhow::Result<String> {
    let kept = data.join(AGENT_TOKEN);
    if kept.exists() {
        return secret_file(&kept);
    }
    secrets::folder(data)?;
    let client = Client::with_trust(servers, Some(secret_file(join_token)?), trust)?;
    let mut pauses = FullJitter::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        match client.enrol_agent(agent).await {
            Ok(token) => {
                let secret = token.token.context("the answer holds no token")?;
                secrets::write(&kept, &secret)?;
                return Ok(secret);
            }
            // Another replica of this host was first.
            Err(Error::Problem(_)) if kept.exists() => return secret_file(&kept),
            // An agent may be started before its cluster is. What may be done is not done twice.
            Err(error) if error.is_retryable() && !error.is_in_doubt() => {
                let error = explained(error.into(), "--ca-file (REGENT_CA_FILE)");
                tracing::warn!(
                    error = format!("{error:#}"),
                    "no token for the join token yet; it is asked for again"
                );
                tokio::time::sleep(pauses.next_delay()).await;
            }
            Err(error) if error.is_in_doubt() => {
                return Err(error).with_context(|| {
                    format!(
                        "agent {agent} does not know its token: the answer was lost, and the join token may be spent; \
                         start it again, and if that is refused give it a new one (`regent token create --join agent:{agent}`)"
                    )
                });
            }
            Err(error) => {
                return Err(error).with_context(|| format!("agent {agent} got no token for its join token"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::is_private;

    #[test]
    fn plain_text_is_private_within_this_machine_only() {
        for private in [
            "https://10.0.0.1:8000",
            "http://127.7.0.1:8000/",
            "http://[::1]:8000",
            "http://localhost:80",
        ] {
            assert!(is_private(private), "{private}");
        }
        for open in [
            "http://10.0.0.1:8000",
            "http://node-1:8000",
            "http://[fd00::1]:1",
            "http://127.evil.example",
        ] {
            assert!(!is_private(open), "{open}");
        }
    }
}
