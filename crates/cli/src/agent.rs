//! `regent agent run`: one replica of an agent, until a signal ends it. Its sessions go on.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use regent_agent::runtime::process::{ProcessOptions, ProcessRuntime};
use regent_agent::{Options, machine_capacity};
use regent_types::agent::Capacity;
use tokio_util::sync::CancellationToken;

use crate::config::{AgentConfig, RuntimeKind, UsageError, required, secret_file};
use crate::lifeline::Lifeline;
use crate::server::Signals;

/// Runs the agent.
pub(crate) async fn run(config: AgentConfig) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new()?;
    let lifeline = Lifeline::of(config.lifeline.as_deref())?;
    let options = options(&config)?;
    let runtime = match config.runtime.unwrap_or_default() {
        RuntimeKind::Process => {
            let mut process = ProcessOptions::new(&options.data)?;
            process.lifeline = lifeline.id();
            Arc::new(ProcessRuntime::open(process).context("the process runtime cannot start")?)
        }
    };
    let stop = CancellationToken::new();
    let mut running = std::pin::pin!(regent_agent::run(options, runtime, stop.clone()));
    tokio::select! {
        result = &mut running => return result.map(|()| ExitCode::SUCCESS).context("the agent stopped"),
        () = signals.end() => stop.cancel(),
        // The shims of the sessions watch the same lifeline and end by themselves.
        () = lifeline.ended() => return Ok(ExitCode::FAILURE),
    }
    running
        .await
        .map(|()| ExitCode::SUCCESS)
        .context("the agent stopped")
}

fn options(config: &AgentConfig) -> anyhow::Result<Options> {
    let servers: Vec<String> = required(config.servers.as_deref(), "servers")?
        .split(',')
        .map(|s| s.trim().to_owned())
        .filter(|s| !s.is_empty())
        .collect();
    let token = match (&config.token, &config.token_file) {
        (Some(token), None) => token.clone(),
        (None, Some(file)) => secret_file(file)?,
        (None, None) => return Err(UsageError("no token: give --token-file (or --token)".to_owned()).into()),
        (Some(_), Some(_)) => {
            return Err(UsageError("token and token-file are both set; keep one".to_owned()).into());
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
    let machine = machine_capacity();
    Ok(Options {
        agent_id: required(config.agent_id.clone(), "agent-id")?,
        servers,
        token,
        replica: config.replica.clone(),
        data: required(config.data.clone(), "data")?,
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
        stop_sessions_on_exit: false,
    })
}
