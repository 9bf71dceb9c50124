//! The names and labels by which containers, volumes and networks say whose they are.
//!
//! Labels cannot be changed after creation, so they hold only what never changes; what changes (asleep, a home that
//! is to go) is said by a volume that is there or not, since the engine makes and removes those atomically and all
//! replicas see them.

use std::collections::HashMap;

use bollard::models::ContainerInspectResponse;
use regent_agent::names::{MAX_LABEL, dns_label};
use regent_agent::runtime::{Generation, HibernateMode, SessionRef, StartSpec};
use regent_types::{AgentId, ClusterId, SessionName, Token, UserName};
use serde::{Deserialize, Serialize};

/// The session's name.
pub(crate) const SESSION: &str = "regent.session";
const GENERATION: &str = "regent.generation";
const TOKEN: &str = "regent.token";
/// The agent's id.
pub(crate) const AGENT: &str = "regent.agent";
/// The cluster's id.
pub(crate) const CLUSTER: &str = "regent.cluster";
/// What only Regent reads.
const RECORD: &str = "regent.record";
/// What a volume is for.
const VOLUME: &str = "regent.volume";
/// The home that a mark says is to go.
const HOME: &str = "regent.home";

/// What a container carries besides its name, for whoever finds it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) hibernate: HibernateMode,
    /// The container port whose published one is the session's.
    pub(crate) port: Option<String>,
    /// The volume of a persistent home.
    pub(crate) home: Option<String>,
    pub(crate) metadata: std::collections::BTreeMap<String, String>,
}

/// What identifies a container of ours.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Identity {
    pub(crate) session: SessionName,
    pub(crate) generation: Generation,
    pub(crate) token: Token,
}

/// What a volume is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Files of one generation; goes with it.
    Files,
    /// Says that a run of a container was ended to sleep.
    Asleep,
    /// Says that a persistent home is to go once the containers are gone.
    HomeGoes,
    /// A persistent home.
    Home,
}

impl Purpose {
    fn as_str(self) -> &'static str {
        match self {
            Self::Files => "files",
            Self::Asleep => "asleep",
            Self::HomeGoes => "home-goes",
            Self::Home => "home",
        }
    }
}

/// Names what belongs to one agent of one cluster.
#[derive(Debug, Clone)]
pub(crate) struct Scope {
    pub(crate) agent: AgentId,
    pub(crate) cluster: ClusterId,
}

impl Scope {
    /// A part of names, so that clusters with sessions of one name can share an engine.
    fn tag(&self) -> String {
        let whole = dns_label(&format!("{}/{}", self.cluster, self.agent), MAX_LABEL);
        whole[whole.len() - 8..].to_owned()
    }

    /// The unique name of one generation's container: the engine never makes a second one.
    pub(crate) fn container(&self, session: &SessionName, generation: Generation) -> String {
        format!("regent-{session}-g{generation}-{}", self.tag())
    }

    /// A volume of one generation.
    pub(crate) fn volume(&self, session: &SessionName, generation: Generation, what: &str) -> String {
        let what = dns_label(what, MAX_LABEL);
        format!("{}.{what}", self.container(session, generation))
    }

    /// The persistent home of a user's sessions of one template.
    pub(crate) fn home(&self, spec: &StartSpec) -> String {
        let owner = dns_label(&format!("{}.{}", spec.user, spec.template), 96);
        format!("regent-home-{owner}-{}", self.tag())
    }

    /// The network of the cluster's sessions.
    pub(crate) fn network(&self) -> String {
        format!("regent-{}", dns_label(self.cluster.as_str(), MAX_LABEL))
    }

    /// Selects all that is this agent's, or one session of it.
    pub(crate) fn filter(&self, session: Option<&SessionName>) -> HashMap<String, Vec<String>> {
        let mut labels = vec![
            format!("{AGENT}={}", self.agent),
            format!("{CLUSTER}={}", self.cluster),
        ];
        labels.extend(session.map(|session| format!("{SESSION}={session}")));
        HashMap::from([("label".to_owned(), labels)])
    }

    /// As [`Scope::filter`], for volumes of one purpose.
    pub(crate) fn filter_volumes(
        &self,
        session: Option<&SessionName>,
        purpose: Purpose,
    ) -> HashMap<String, Vec<String>> {
        let mut filter = self.filter(session);
        let labels = filter.entry("label".to_owned()).or_default();
        labels.push(format!("{VOLUME}={}", purpose.as_str()));
        filter
    }

    fn labels(&self) -> HashMap<String, String> {
        HashMap::from([
            (AGENT.to_owned(), self.agent.to_string()),
            (CLUSTER.to_owned(), self.cluster.to_string()),
        ])
    }

    /// The labels of a container.
    pub(crate) fn container_labels(&self, spec: &StartSpec, record: &Record) -> HashMap<String, String> {
        let mut labels = self.labels();
        let record = serde_json::to_string(record).expect("maps of texts are always JSON");
        labels.extend([
            (SESSION.to_owned(), spec.session.to_string()),
            (GENERATION.to_owned(), spec.generation.to_string()),
            (TOKEN.to_owned(), spec.token.to_string()),
            ("regent.user".to_owned(), spec.user.to_string()),
            ("regent.template".to_owned(), spec.template.to_string()),
            (RECORD.to_owned(), record),
        ]);
        labels
    }

    /// The labels of a volume of one generation.
    pub(crate) fn volume_labels(&self, session: &SessionRef, purpose: Purpose) -> HashMap<String, String> {
        let mut labels = self.labels();
        labels.extend([
            (SESSION.to_owned(), session.session.to_string()),
            (GENERATION.to_owned(), session.generation.to_string()),
            (VOLUME.to_owned(), purpose.as_str().to_owned()),
        ]);
        labels
    }

    /// The labels of the mark that says which home is to go.
    pub(crate) fn home_goes_labels(&self, session: &SessionRef, home: &str) -> HashMap<String, String> {
        let mut labels = self.volume_labels(session, Purpose::HomeGoes);
        labels.insert(HOME.to_owned(), home.to_owned());
        labels
    }

    /// The labels of a persistent home.
    pub(crate) fn home_labels(&self, user: &UserName) -> HashMap<String, String> {
        let mut labels = self.labels();
        labels.extend([
            ("regent.user".to_owned(), user.to_string()),
            (VOLUME.to_owned(), Purpose::Home.as_str().to_owned()),
        ]);
        labels
    }

    /// The labels of the network.
    pub(crate) fn network_labels(&self) -> HashMap<String, String> {
        HashMap::from([(CLUSTER.to_owned(), self.cluster.to_string())])
    }
}

/// Which generation a volume belongs to.
pub(crate) fn generation_of(labels: &HashMap<String, String>) -> Option<Generation> {
    labels.get(GENERATION)?.parse().ok()
}

/// The home that a mark says is to go.
pub(crate) fn home_of(labels: &HashMap<String, String>) -> Option<&String> {
    labels.get(HOME)
}

/// Whose a container is, by its labels; none if they are not ours.
pub(crate) fn identity(labels: &HashMap<String, String>) -> Option<Identity> {
    Some(Identity {
        session: SessionName::new(labels.get(SESSION)?).ok()?,
        generation: generation_of(labels)?,
        token: Token(labels.get(TOKEN)?.parse().ok()?),
    })
}

/// What a container carries.
pub(crate) fn record(container: &ContainerInspectResponse) -> Option<Record> {
    let labels = container.config.as_ref()?.labels.as_ref()?;
    serde_json::from_str(labels.get(RECORD)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_sessions_generations_agents_and_clusters_apart() {
        let scope = |agent: &str, cluster: &str| Scope {
            agent: AgentId::new(agent).unwrap(),
            cluster: ClusterId::new(cluster).unwrap(),
        };
        let session = |name: &str| SessionName::new(name).unwrap();
        let one = scope("a", "c1");
        let mut names = vec![
            one.container(&session("s-1"), 1),
            one.container(&session("s-1"), 2),
            one.container(&session("s-2"), 1),
            scope("b", "c1").container(&session("s-1"), 1),
            scope("a", "c2").container(&session("s-1"), 1),
            one.volume(&session("s-1"), 1, "home"),
            one.volume(&session("s-1"), 1, "Home"),
        ];
        for name in &names {
            assert!(
                name.bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.')),
                "{name}"
            );
        }
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 7);
    }
}
