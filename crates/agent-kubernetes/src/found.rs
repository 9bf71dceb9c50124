//! A session as it is found: its Deployment and its pods together.

use k8s_openapi::api::core::v1::Pod;
use regent_agent::runtime::{Exit, Observed, ObservedState, RuntimeError, SessionRef};

use crate::pods::{self, Condition};
use crate::record::{Phase, Record};

/// A Deployment and the pods of its session, of any generation.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) record: Record,
    pub(crate) pods: Vec<Pod>,
}

impl Found {
    /// The pod that stands for the session.
    pub(crate) fn current(&self) -> Option<&Pod> {
        pods::current(&self.pods, self.record.generation)
    }

    /// What its pod does; none without a pod.
    pub(crate) fn condition(&self) -> Option<Condition> {
        self.current().map(pods::condition)
    }

    pub(crate) fn state(&self) -> ObservedState {
        match &self.record.phase {
            Phase::Ended(ended) => ObservedState::Exited(ended.exit),
            // A removal that was cut off: nothing of it runs for long any more.
            Phase::Stopping => ObservedState::Exited(Exit::Unknown),
            Phase::Hibernated => ObservedState::Hibernated,
            Phase::Starting | Phase::Started | Phase::Waking => match self.condition() {
                Some(Condition::Ended(ended)) => ObservedState::Exited(ended.exit),
                _ if self.record.replicas == 0 => ObservedState::Hibernated,
                _ => ObservedState::Running,
            },
        }
    }

    /// Whether it is worth telling of: a start that never ran is left to the command that comes again, unless
    /// nobody can be waiting for it any more.
    pub(crate) fn is_told(&self, now_ms: u64, start_within_ms: u64) -> bool {
        let abandoned = self
            .record
            .created_at_ms
            .is_none_or(|created| now_ms.saturating_sub(created) > start_within_ms);
        let ran = match self.condition() {
            Some(Condition::Ended(_) | Condition::Ready | Condition::NotReady) => true,
            Some(Condition::Coming | Condition::Stuck { .. }) | None => false,
        };
        !self.record.going && (self.record.phase != Phase::Starting || ran || abandoned)
    }

    pub(crate) fn observed(&self, namespace: &str) -> Observed {
        let record = &self.record;
        let mut metadata = record.metadata.clone();
        metadata.insert("namespace".to_owned(), namespace.to_owned());
        if let Some(pod) = self.current() {
            let status = pod.status.as_ref();
            let spec = pod.spec.as_ref();
            let facts = [
                ("pod", pod.metadata.name.as_ref()),
                ("podIP", status.and_then(|status| status.pod_ip.as_ref())),
                ("node", spec.and_then(|spec| spec.node_name.as_ref())),
            ];
            for (name, fact) in facts {
                if let Some(fact) = fact {
                    metadata.insert(name.to_owned(), fact.clone());
                }
            }
        }
        Observed {
            session: record.session.clone(),
            generation: record.generation,
            token: record.started_token,
            state: self.state(),
            pid: None,
            port: record.port,
            url: record
                .port
                .map(|port| format!("http://{}.{namespace}.svc:{port}/", record.name)),
            started_at_ms: record.created_at_ms,
            metadata,
        }
    }

    /// Refuses an action that is meant for another generation.
    pub(crate) fn is_meant_by(&self, session: &SessionRef) -> Result<(), RuntimeError> {
        let (have, asked) = (self.record.generation, session.generation);
        let session = session.session.clone();
        match have.cmp(&asked) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => Err(RuntimeError::StaleGeneration { session, have, asked }),
            std::cmp::Ordering::Less => Err(RuntimeError::OtherGeneration { session, have, asked }),
        }
    }
}
