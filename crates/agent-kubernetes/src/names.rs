//! What objects are called and how they are labelled.
//!
//! Names of users, agents and clusters are freer than Kubernetes allows, so labels and names are made of them
//! and the true ones stand in annotations. Names tell the agent and the cluster apart as well: two clusters
//! may share a namespace, and a session may move from one agent to another before it is gone at the first.

use std::fmt::Write as _;

use regent_agent::names::{MAX_LABEL, dns_label};
use regent_types::{AgentId, ClusterId, SessionName, TemplateName, UserName};
use sha2::{Digest, Sha256};

/// The one field manager of all that is written.
pub(crate) const MANAGER: &str = "regent-agent";
/// The container of a session's pod.
pub(crate) const CONTAINER: &str = "session";
/// The volume of a session's home.
pub(crate) const HOME_VOLUME: &str = "home";

/// Labels: by these things are found.
pub(crate) mod label {
    pub(crate) const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
    pub(crate) const AGENT: &str = "regent.dev/agent";
    pub(crate) const CLUSTER: &str = "regent.dev/cluster";
    pub(crate) const SESSION: &str = "regent.dev/session";
    pub(crate) const GENERATION: &str = "regent.dev/generation";
    /// The claim of a persistent home, on the Deployments that use it.
    pub(crate) const HOME: &str = "regent.dev/home";
}

/// Annotations: what is known of a session.
pub(crate) mod annotation {
    pub(crate) const AGENT: &str = "regent.dev/agent";
    pub(crate) const CLUSTER: &str = "regent.dev/cluster";
    pub(crate) const SESSION: &str = "regent.dev/session";
    pub(crate) const USER: &str = "regent.dev/user";
    pub(crate) const TEMPLATE: &str = "regent.dev/template";
    /// The highest token under which the object was changed or adopted.
    pub(crate) const TOKEN: &str = "regent.dev/token";
    /// The token under which the session was started.
    /// The session and generation that last began to use a claim or a Service.
    pub(crate) const USED_BY: &str = "regent.dev/used-by";
    pub(crate) const STARTED_TOKEN: &str = "regent.dev/started-token";
    pub(crate) const PHASE: &str = "regent.dev/phase";
    /// How it ended, as JSON.
    pub(crate) const EXIT: &str = "regent.dev/exit";
    /// The free words of the start, as JSON.
    pub(crate) const METADATA: &str = "regent.dev/metadata";
    /// How long a port may take to answer, in milliseconds.
    pub(crate) const READY_WITHIN: &str = "regent.dev/ready-within-ms";
    /// The highest token of a cluster, on the fence; the cluster's label follows.
    pub(crate) const FENCE: &str = "fence.regent.dev/";
}

/// Hexadecimal digits that tell agents and clusters apart in the names of objects.
const SHORT: usize = 8;
/// Hexadecimal digits that tell persistent homes apart: one user must never get another's.
const LONG: usize = 16;

/// The agent and the cluster whose objects are meant.
#[derive(Debug, Clone)]
pub(crate) struct Scope {
    pub(crate) agent: AgentId,
    pub(crate) cluster: ClusterId,
}

impl Scope {
    pub(crate) fn agent_label(&self) -> String {
        dns_label(self.agent.as_str(), MAX_LABEL)
    }

    pub(crate) fn cluster_label(&self) -> String {
        dns_label(self.cluster.as_str(), MAX_LABEL)
    }

    /// Selects all that is this agent's.
    pub(crate) fn selector(&self) -> String {
        format!(
            "{}={},{}={}",
            label::AGENT,
            self.agent_label(),
            label::CLUSTER,
            self.cluster_label()
        )
    }

    /// Selects what belongs to a session, of any generation.
    pub(crate) fn session_selector(&self, session: &SessionName) -> String {
        format!("{},{}={session}", self.selector(), label::SESSION)
    }

    /// The name of a session's Deployment, Service and claim.
    pub(crate) fn object(&self, session: &SessionName) -> String {
        let owner = hash(&[self.cluster.as_str(), self.agent.as_str()], SHORT);
        // A Service's name must begin with a letter, a session's need not.
        dns_label(&format!("regent-{session}-{owner}"), MAX_LABEL)
    }

    /// The name of the claim of a persistent home. The hash keeps apart what dashes would join: the template `b-c`
    /// of `a`, and the template `c` of `a-b`.
    pub(crate) fn home(&self, user: &UserName, template: &TemplateName) -> String {
        let parts = [
            self.cluster.as_str(),
            self.agent.as_str(),
            user.as_str(),
            template.as_str(),
        ];
        let label = dns_label(&format!("home-{user}-{template}"), MAX_LABEL - LONG - 1);
        format!("{label}-{}", hash(&parts, LONG))
    }
}

/// The name of the `ConfigMap` that identifies an agent's target and is its fence.
pub(crate) fn fence(agent: &AgentId) -> String {
    dns_label(&format!("regent-agent-{agent}"), MAX_LABEL)
}

/// The annotation of the fence that belongs to a cluster.
pub(crate) fn fence_annotation(scope: &Scope) -> String {
    format!("{}{}", annotation::FENCE, scope.cluster_label())
}

/// None of the parts has a slash in it, so joined by slashes they stay apart.
fn hash(parts: &[&str], digits: usize) -> String {
    let digest = Sha256::digest(parts.join("/").as_bytes());
    let mut text = String::with_capacity(digits);
    for byte in &digest[..digits / 2] {
        write!(text, "{byte:02x}").expect("writing to a string never fails");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(agent: &str, cluster: &str) -> Scope {
        Scope {
            agent: AgentId::new(agent).unwrap(),
            cluster: ClusterId::new(cluster).unwrap(),
        }
    }

    fn is_service_name(name: &str) -> bool {
        name.len() <= MAX_LABEL
            && name.starts_with(|c: char| c.is_ascii_lowercase())
            && dns_label(name, MAX_LABEL) == name
    }

    #[test]
    fn whatever_session_and_user_are_called_the_names_are_valid_fault_17() {
        let scope = scope("Agent.With_Odd-Letters", "0123.ABC");
        for session in ["1", "1-alice", &"9".repeat(63), "alice-demo-0a1b2c3d"] {
            let name = scope.object(&SessionName::new(session).unwrap());
            assert!(is_service_name(&name), "{name}");
        }
        for user in ["Alice", "alice@example.com", "a+b_c", &"x".repeat(128), "1"] {
            for template in ["demo", &"t".repeat(63)] {
                let name = scope.home(
                    &UserName::new(user).unwrap(),
                    &TemplateName::new(template).unwrap(),
                );
                assert!(is_service_name(&name), "{name}");
            }
        }
        for label in [scope.agent_label(), scope.cluster_label()] {
            assert_eq!(dns_label(&label, MAX_LABEL), label);
        }
        assert!(is_service_name(&fence(&scope.agent)));
    }

    #[test]
    fn agents_clusters_users_and_templates_never_meet() {
        let session = SessionName::new("alice-demo-1").unwrap();
        let names = [
            scope("a", "1").object(&session),
            scope("b", "1").object(&session),
            scope("a", "2").object(&session),
        ];
        assert!(names[0] != names[1] && names[0] != names[2] && names[1] != names[2]);
        let home = |user: &str, template: &str| {
            scope("a", "1").home(
                &UserName::new(user).unwrap(),
                &TemplateName::new(template).unwrap(),
            )
        };
        assert_ne!(home("a", "b-c"), home("a-b", "c"));
        assert_ne!(home("a.b", "c"), home("a-b", "c"));
        assert_ne!(home("A", "c"), home("a", "c"));
    }
}
