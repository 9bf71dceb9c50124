//! What a Deployment says of its session: the phase, how it ended, what it was started with.
//!
//! The Deployment is the one record of a session. Invariant: the phase decides how many pods there are, and
//! both are written by one patch, so whoever reads it after a crash knows what was meant.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use regent_agent::runtime::{Exit, Generation};
use regent_types::{SessionName, Token};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::names::{annotation, label};

/// How far a session is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Created; no start has seen it run yet. One that fails from here is taken back whole.
    Starting,
    /// It ran. What goes wrong from here on is told, and Kubernetes mends it.
    Started,
    /// Put to sleep.
    Hibernated,
    /// Woken; not seen running yet. A wake that fails from here puts it back to sleep.
    Waking,
    /// Its container ended by itself.
    Ended(Ended),
    /// Being removed by an agent. That it vanishes is no news.
    Stopping,
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ended {
    pub(crate) exit: Exit,
    /// What Kubernetes said of it, if anything.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) message: String,
}

impl Phase {
    fn word(&self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Started => "started",
            Self::Hibernated => "hibernated",
            Self::Waking => "waking",
            Self::Ended(_) => "ended",
            Self::Stopping => "stopping",
        }
    }

    fn read(word: &str, exit: Option<&str>) -> Option<Self> {
        Some(match word {
            "starting" => Self::Starting,
            "started" => Self::Started,
            "hibernated" => Self::Hibernated,
            "waking" => Self::Waking,
            "ended" => Self::Ended(
                exit.and_then(|exit| serde_json::from_str(exit).ok())
                    .unwrap_or(Ended {
                        exit: Exit::Unknown,
                        message: String::new(),
                    }),
            ),
            "stopping" => Self::Stopping,
            _ => return None,
        })
    }

    /// How many pods a session has in this phase.
    pub(crate) fn replicas(&self) -> i32 {
        match self {
            Self::Starting | Self::Started | Self::Waking => 1,
            Self::Hibernated | Self::Ended(_) | Self::Stopping => 0,
        }
    }

    /// The patch that puts a Deployment into this phase.
    pub(crate) fn patch(&self) -> Value {
        let exit = match self {
            Self::Ended(ended) => json!(serde_json::to_string(ended).unwrap_or_default()),
            Self::Starting | Self::Started | Self::Hibernated | Self::Waking | Self::Stopping => Value::Null,
        };
        json!({
            "metadata": { "annotations": { annotation::PHASE: self.word(), annotation::EXIT: exit } },
            "spec": { "replicas": self.replicas() },
        })
    }

    /// The annotations of a Deployment that is created in this phase.
    pub(crate) fn annotation(&self) -> (&'static str, &'static str) {
        (annotation::PHASE, self.word())
    }
}

/// What is read from a Deployment.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) name: String,
    pub(crate) uid: String,
    /// The version that was read.
    pub(crate) version: String,
    pub(crate) session: SessionName,
    pub(crate) generation: Generation,
    pub(crate) started_token: Token,
    pub(crate) phase: Phase,
    /// Whether somebody is deleting it.
    pub(crate) going: bool,
    /// How many pods are asked for; not the phase's number if somebody scaled it by hand.
    pub(crate) replicas: i32,
    /// Why Kubernetes cannot make its pod, for example a quota.
    pub(crate) failure: Option<String>,
    /// The claim of its persistent home.
    pub(crate) home: Option<String>,
    pub(crate) port: Option<u16>,
    pub(crate) ready_within: Duration,
    pub(crate) created_at_ms: Option<u64>,
    pub(crate) metadata: BTreeMap<String, String>,
}

impl Record {
    /// Reads a Deployment; the error says what it lacks.
    pub(crate) fn read(deployment: &Deployment) -> Result<Self, String> {
        let meta = &deployment.metadata;
        let annotation = |name: &str| {
            let found = meta.annotations.as_ref().and_then(|all| all.get(name));
            found.map(String::as_str)
        };
        let label = |name: &str| {
            let found = meta.labels.as_ref().and_then(|all| all.get(name));
            found.map(String::as_str)
        };
        let lacks = |what: &str| format!("{what} is missing or cannot be read");
        let spec = deployment.spec.as_ref().ok_or_else(|| lacks("its spec"))?;
        let container = spec.template.spec.as_ref().and_then(|pod| pod.containers.first());
        let mut metadata: BTreeMap<String, String> = annotation(annotation::METADATA)
            .and_then(|text| serde_json::from_str(text).ok())
            .unwrap_or_default();
        let limits = container
            .and_then(|container| container.resources.as_ref())
            .and_then(|resources| resources.limits.as_ref());
        for (name, limit) in [("cpuLimit", "cpu"), ("memoryLimit", "memory")] {
            let limit = limits.and_then(|limits| limits.get(limit));
            let limit = limit.map_or("unlimited", |Quantity(limit)| limit);
            metadata.insert(name.to_owned(), limit.to_owned());
        }
        let failure = deployment
            .status
            .iter()
            .flat_map(|status| status.conditions.iter().flatten())
            .find(|condition| condition.type_ == "ReplicaFailure" && condition.status == "True");
        Ok(Self {
            name: meta.name.clone().ok_or_else(|| lacks("its name"))?,
            uid: meta.uid.clone().ok_or_else(|| lacks("its uid"))?,
            version: meta.resource_version.clone().unwrap_or_default(),
            session: annotation(annotation::SESSION)
                .and_then(|name| SessionName::new(name).ok())
                .ok_or_else(|| lacks(annotation::SESSION))?,
            generation: label(label::GENERATION)
                .and_then(|number| number.parse().ok())
                .ok_or_else(|| lacks(label::GENERATION))?,
            started_token: annotation(annotation::STARTED_TOKEN)
                .and_then(|number| number.parse().ok())
                .ok_or_else(|| lacks(annotation::STARTED_TOKEN))?,
            phase: annotation(annotation::PHASE)
                .and_then(|word| Phase::read(word, annotation(annotation::EXIT)))
                .ok_or_else(|| lacks(annotation::PHASE))?,
            going: meta.deletion_timestamp.is_some(),
            replicas: spec.replicas.unwrap_or(1),
            failure: failure.map(|condition| condition.message.clone().unwrap_or_default()),
            home: label(label::HOME).map(str::to_owned),
            port: container
                .and_then(|container| container.ports.as_ref())
                .and_then(|ports| ports.first())
                .and_then(|port| u16::try_from(port.container_port).ok()),
            ready_within: annotation(annotation::READY_WITHIN)
                .and_then(|number| number.parse().ok())
                .map(Duration::from_millis)
                .unwrap_or_default(),
            created_at_ms: meta
                .creation_timestamp
                .as_ref()
                .and_then(|time| u64::try_from(time.0.as_millisecond()).ok()),
            metadata,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_is_read_back() {
        let ended = Ended {
            exit: Exit::Code(7),
            message: "Error".to_owned(),
        };
        for phase in [
            Phase::Starting,
            Phase::Started,
            Phase::Hibernated,
            Phase::Waking,
            Phase::Ended(ended),
            Phase::Stopping,
        ] {
            let patch = phase.patch();
            let annotations = &patch["metadata"]["annotations"];
            let read = Phase::read(
                annotations[annotation::PHASE].as_str().unwrap(),
                annotations[annotation::EXIT].as_str(),
            );
            assert_eq!(read.as_ref(), Some(&phase));
        }
        assert_eq!(Phase::read("dancing", None), None);
    }
}
