//! `regent agent run`: one replica of an agent, until a signal ends it. Its sessions go on.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use regent_agent::{LEASE_TTL, Options, machine_capacity};
use regent_types::agent::Capacity;
use regent_types::duration::Span;
use regent_types::lease::{MAX_TTL_MS, MIN_TTL_DEV_MS};
use tokio_util::sync::CancellationToken;

use crate::agent_config::{AgentConfig, RuntimeKind};
use crate::args::trust;
use crate::config::{UsageError, required, secret_file};
use crate::join;
use crate::lifeline::Lifeline;
use crate::runtimes;
use crate::server::Signals;

/// Runs the agent.
pub(crate) async fn run(config: AgentConfig) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new()?;
    let lifeline = Lifeline::of(config.lifeline.as_deref())?;
    // It may wait for a cluster that is not there yet.
    let options = tokio::select! {
        options = options(&config) => options?,
        () = signals.end() => return Ok(ExitCode::SUCCESS),
        () = lifeline.ended() => return Ok(ExitCode::FAILURE),
    };
    let runtime = runtimes::open(&config, &options.agent_id, &options.data, lifeline).await?;
    let stop = CancellationToken::new();
    let mut running = std::pin::pin!(regent_agent::run(options, runtime, stop.clone()));
    tokio::select! {
        result = &mut running => return result.map(|()| ExitCode::SUCCESS).context("the agent stopped"),
        () = signals.end() => stop.cancel(),
        () = lifeline.ended() => match config.runtime.unwrap_or_default() {
            // The shims of the sessions watch the same lifeline and end by themselves.
            RuntimeKind::Process => return Ok(ExitCode::FAILURE),
            // Containers watch nothing.
            RuntimeKind::Docker | RuntimeKind::Kubernetes => stop.cancel(),
        },
    }
    running
        .await
        .map(|()| ExitCode::SUCCESS)
        .context("the agent stopped")
}

async fn options(config: &AgentConfig) -> anyhow::Result<Options> {
    let servers: Vec<String> = required(config.servers.as_deref(), "servers")?
        .split(',')
        .map(|s| s.trim().to_owned())
        .filter(|s| !s.is_empty())
        .collect();
    let agent_id = required(config.agent_id.clone(), "agent-id")?;
    let trust = trust(
        config.ca_file.as_ref(),
        config.cert_file.as_ref(),
        config.key_file.as_ref(),
    )?;
    let data = required(config.data.clone(), "data")?;
    let token = match (&config.token, &config.token_file) {
        (None, None) if let Some(join) = &config.join_token_file => {
            join::agent_token(&servers, &agent_id, &data, join, &trust).await?
        }
        (Some(token), None) => token.clone(),
        (None, Some(file)) => secret_file(file)?,
        (None, None) => {
            return Err(UsageError(
                "no token: give --token-file (or --token, or --join-token-file)".to_owned(),
            )
            .into());
        }
        (Some(_), Some(_)) => {
            return Err(UsageError("token and token-file are both set, one of them perhaps by REGENT_TOKEN or REGENT_TOKEN_FILE; keep one".to_owned()).into());
        }
    };
    let labels: BTreeMap<String, String> = config
        .labels
        .iter()
        .map(|label| match label.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
            _ => Err(UsageError(format!("the label {label:?} is not K=V"))),
        })
        .collect::<Result<_, _>>()?;
    let (lease_ttl, release_on_disconnect) = lease(config)?;
    let machine = machine_capacity();
    Ok(Options {
        agent_id,
        servers,
        trust,
        token,
        replica: config.replica.clone(),
        lease_ttl,
        release_on_disconnect,
        data,
        platform: config
            .platform
            .clone()
            .unwrap_or_else(|| config.runtime.unwrap_or_default().as_str().to_owned()),
        region: config.region.clone().unwrap_or_default(),
        labels,
        capacity: Capacity {
            max_sessions: config.max_sessions,
            cpu: config.cpu.or(machine.cpu),
            memory: config.memory.or(machine.memory),
        },
        parallel: config.parallel,
        stop_sessions_on_exit: config.lifeline.is_some()
            && config.runtime.unwrap_or_default() != RuntimeKind::Process,
    })
}

/// The TTL of the lease of a replica, and how soon it is given up when the connection is lost.
fn lease(config: &AgentConfig) -> Result<(Duration, Option<Duration>), UsageError> {
    let asked = [
        ("lease-ttl", config.lease_ttl),
        ("release-on-disconnect", config.release_on_disconnect),
    ];
    if config.replica.is_none()
        && let Some((key, _)) = asked.iter().find(|(_, value)| value.is_some())
    {
        return Err(UsageError(format!(
            "{key} is about the lease of replicas, and this agent has none: give --replica too, or leave {key} out"
        )));
    }
    let ttl = config.lease_ttl.map_or(LEASE_TTL, Span::duration);
    let (shortest, longest) = (Span(MIN_TTL_DEV_MS), Span(MAX_TTL_MS));
    if ttl < shortest.duration() || ttl > longest.duration() {
        return Err(UsageError(format!(
            "lease-ttl is from {shortest} to {longest}, and this is not"
        )));
    }
    let grace = config.release_on_disconnect.map(Span::duration);
    if grace.is_some_and(|grace| grace >= ttl) {
        return Err(UsageError(format!(
            "release-on-disconnect has an effect only when it is shorter than lease-ttl ({} ms)",
            ttl.as_millis()
        )));
    }
    Ok((ttl, grace))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(replica: bool, ttl: Option<u64>, grace: Option<u64>) -> AgentConfig {
        AgentConfig {
            replica: replica.then(|| "r1".parse().unwrap()),
            lease_ttl: ttl.map(Span),
            release_on_disconnect: grace.map(Span),
            ..AgentConfig::default()
        }
    }

    #[test]
    fn the_settings_of_the_lease_need_a_replica_and_sensible_lengths() {
        let taken = |ttl, grace| lease(&config(true, ttl, grace)).unwrap();
        assert_eq!(taken(None, None), (Duration::from_secs(4), None));
        assert_eq!(
            taken(Some(100), Some(50)),
            (Duration::from_millis(100), Some(Duration::from_millis(50)))
        );
        assert!(lease(&config(false, None, None)).is_ok());
        for (config, word) in [
            (config(false, Some(4_000), None), "give --replica too"),
            (config(false, None, Some(500)), "give --replica too"),
            (config(true, Some(99), None), "from 100ms to 1h"),
            (config(true, Some(3_600_001), None), "from 100ms to 1h"),
            (config(true, Some(1_000), Some(1_000)), "shorter than lease-ttl"),
            (config(true, None, Some(4_000)), "shorter than lease-ttl"),
        ] {
            let error = lease(&config).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
