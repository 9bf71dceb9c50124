//! A process whose spans are sent to a collector, if one is set: `--otlp-endpoint`.

use regent_trace::OtlpEndpoint;

use crate::agent_config::AgentConfig;
use crate::config::ServerConfig;

/// Where spans are sent, and as whose.
pub(crate) struct Traced {
    endpoint: Option<OtlpEndpoint>,
    service: &'static str,
    instance: String,
}

impl Traced {
    /// A node: its id.
    pub(crate) fn node(config: &ServerConfig) -> Self {
        Self {
            endpoint: config.otlp_endpoint.clone(),
            service: "regent-server",
            instance: config.node_id.map(|id| id.to_string()).unwrap_or_default(),
        }
    }

    /// An agent: its id, and its replica's name if it has one.
    pub(crate) fn agent(config: &AgentConfig) -> Self {
        let names = [
            config.agent_id.as_ref().map(ToString::to_string),
            config.replica.as_ref().map(ToString::to_string),
        ];
        Self {
            endpoint: config.otlp_endpoint.clone(),
            service: "regent-agent",
            instance: names.into_iter().flatten().collect::<Vec<_>>().join("/"),
        }
    }

    /// Runs the process, and at its end sends the spans that wait.
    pub(crate) async fn around<T>(self, run: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        let export = self
            .endpoint
            .map(|endpoint| regent_trace::export(&endpoint, self.service, self.instance))
            .transpose()?;
        let ended = run.await;
        if let Some(export) = export {
            // The requests are made by the runtime's other threads, so this one may wait for them.
            export.end();
        }
        ended
    }
}
