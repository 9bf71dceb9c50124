//! The objects that a start asks for: pure, from the specification and the agent's options. What runs in the pod is
//! in `template`.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::Deployment;
use regent_agent::runtime::StartSpec;
use regent_types::Token;
use serde_json::{Value, json};

use crate::KubernetesOptions;
use crate::names::{Scope, annotation, label};
use crate::record::{Phase, Record};
use crate::template::{self, Port};

/// All that a start creates.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) name: String,
    pub(crate) deployment: Deployment,
    /// None without a port: a Service must have one.
    service: Option<Value>,
    claim: Value,
    /// Whether the home outlives the session: then nothing owns its claim.
    persistent: bool,
}

impl Plan {
    /// Makes the objects, or says what of the specification no cluster could run.
    pub(crate) fn new(scope: &Scope, options: &KubernetesOptions, spec: &StartSpec) -> Result<Self, String> {
        let name = scope.object(&spec.session);
        let home = scope.home(&spec.user, &spec.template);
        let claim_name = if spec.persistent_home { &home } else { &name };
        let ports = template::ports(spec)?;
        let common = labels(scope);
        let mut of_session = common.clone();
        of_session.insert(label::SESSION, spec.session.to_string());
        of_session.insert(label::GENERATION, spec.generation.to_string());
        let words = words(scope, spec);

        let service = (!ports.is_empty()).then(|| {
            let ports: Vec<Value> = ports.iter().map(Port::of_service).collect();
            json!({
                "apiVersion": "v1", "kind": "Service",
                "metadata": { "name": name, "labels": of_session, "annotations": words },
                "spec": { "type": "ClusterIP", "selector": of_session, "ports": ports },
            })
        });
        let claim_labels = if spec.persistent_home {
            &common
        } else {
            &of_session
        };
        let claim_words = if spec.persistent_home {
            without_session(&words)
        } else {
            words.clone()
        };
        let mut claim = json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim",
            "metadata": { "name": claim_name, "labels": claim_labels, "annotations": claim_words },
            "spec": {
                "accessModes": ["ReadWriteOnce"],
                "resources": { "requests": { "storage": options.home_size } },
            },
        });
        if let Some(class) = &options.storage_class {
            claim["spec"]["storageClassName"] = class.as_str().into();
        }
        let pod = template::pod(options, spec, &ports, claim_name)?;
        let mut deployment_labels = of_session.clone();
        if spec.persistent_home {
            deployment_labels.insert(label::HOME, home.clone());
        }
        let mut record = words.clone();
        let (phase, starting) = Phase::Starting.annotation();
        let ready_within = spec.port.as_ref().map_or(0, |port| port.ready_within.as_millis());
        record.extend([
            (phase, starting.to_owned()),
            (annotation::STARTED_TOKEN, spec.token.to_string()),
            (annotation::READY_WITHIN, ready_within.to_string()),
            (
                annotation::METADATA,
                serde_json::to_string(&spec.metadata).map_err(|error| error.to_string())?,
            ),
        ]);
        let deployment = json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": { "name": name, "labels": deployment_labels, "annotations": record },
            "spec": {
                "replicas": Phase::Starting.replicas(),
                "revisionHistoryLimit": 0,
                // Two pods of one session would write to one home.
                "strategy": { "type": "Recreate" },
                "selector": { "matchLabels": of_session },
                // What changes (token, phase) is not on the template: a change there restarts the pod.
                "template": {
                    "metadata": { "labels": of_session, "annotations": without_token(&words) },
                    "spec": pod,
                },
            },
        });
        Ok(Self {
            deployment: serde_json::from_value(deployment).map_err(|error| error.to_string())?,
            name,
            service,
            claim,
            persistent: spec.persistent_home,
        })
    }

    /// The claim of the home: its name, and what to apply.
    pub(crate) fn claim(&self, owner: &Record) -> (&str, Value) {
        let claim = if self.persistent {
            self.claim.clone()
        } else {
            owned(&self.claim, owner)
        };
        (self.claim["metadata"]["name"].as_str().unwrap_or_default(), claim)
    }

    /// What to apply as the Service, if there is a port.
    pub(crate) fn service(&self, owner: &Record) -> Option<Value> {
        self.service.as_ref().map(|service| owned(service, owner))
    }
}

/// Makes the Deployment the owner, so that one delete removes all. It does not block the owner's deletion: asking
/// for that may need a right of its own, and a stop looks for itself.
fn owned(object: &Value, owner: &Record) -> Value {
    let mut object = object.clone();
    object["metadata"]["ownerReferences"] = json!([{
        "apiVersion": "apps/v1", "kind": "Deployment", "name": owner.name, "uid": owner.uid,
        "controller": false, "blockOwnerDeletion": false,
    }]);
    object
}

fn labels(scope: &Scope) -> BTreeMap<&'static str, String> {
    BTreeMap::from([
        (label::MANAGED_BY, "regent".to_owned()),
        (label::AGENT, scope.agent_label()),
        (label::CLUSTER, scope.cluster_label()),
    ])
}

/// The true names, and the token under which the object is made.
fn words(scope: &Scope, spec: &StartSpec) -> BTreeMap<&'static str, String> {
    BTreeMap::from([
        (annotation::AGENT, scope.agent.to_string()),
        (annotation::CLUSTER, scope.cluster.to_string()),
        (annotation::SESSION, spec.session.to_string()),
        (annotation::USER, spec.user.to_string()),
        (annotation::TEMPLATE, spec.template.to_string()),
        (annotation::TOKEN, spec.token.to_string()),
    ])
}

fn without_session(words: &BTreeMap<&'static str, String>) -> BTreeMap<&'static str, String> {
    let mut words = words.clone();
    words.remove(annotation::SESSION);
    words
}

fn without_token(words: &BTreeMap<&'static str, String>) -> BTreeMap<&'static str, String> {
    let mut words = words.clone();
    words.remove(annotation::TOKEN);
    words
}

/// The token on an object, zero if there is none.
pub(crate) fn token_of(annotations: Option<&BTreeMap<String, String>>) -> Token {
    annotations
        .and_then(|all| all.get(annotation::TOKEN))
        .and_then(|token| token.parse().ok())
        .unwrap_or(Token(0))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use regent_agent::runtime::{ContainerSpec, PortSpec};
    use regent_types::template::ManifestPort;
    use regent_types::{AgentId, ClusterId, SessionName, TemplateName, UserName};

    use super::*;

    fn scope() -> Scope {
        Scope {
            agent: AgentId::new("k8s").unwrap(),
            cluster: ClusterId::new("c1").unwrap(),
        }
    }

    pub(crate) fn options() -> KubernetesOptions {
        KubernetesOptions {
            run_as_user: Some(1000),
            ..KubernetesOptions::new(AgentId::new("k8s").unwrap())
        }
    }

    pub(crate) fn spec() -> StartSpec {
        StartSpec {
            session: SessionName::new("alice-demo-1").unwrap(),
            generation: 3,
            token: Token(7),
            agent: AgentId::new("k8s").unwrap(),
            user: UserName::new("Alice@example.com").unwrap(),
            template: TemplateName::new("demo").unwrap(),
            image: Some("demo:1".to_owned()),
            command: String::new(),
            args: Vec::new(),
            env: BTreeMap::new(),
            cpu_milli: Some(250),
            memory_bytes: Some(64 << 20),
            persistent_home: false,
            port: None,
            hibernate: None,
            container: ContainerSpec::default(),
            metadata: BTreeMap::from([("colour".to_owned(), "blue".to_owned())]),
        }
    }

    pub(crate) fn deployment(spec: &StartSpec) -> Value {
        serde_json::to_value(Plan::new(&scope(), &options(), spec).unwrap().deployment).unwrap()
    }

    pub(crate) fn container(spec: &StartSpec) -> Value {
        deployment(spec)["spec"]["template"]["spec"]["containers"][0].clone()
    }

    fn record(spec: &StartSpec) -> Record {
        let mut deployment = Plan::new(&scope(), &options(), spec).unwrap().deployment;
        deployment.metadata.uid = Some("u1".to_owned());
        Record::read(&deployment).unwrap()
    }

    #[test]
    fn a_deployment_says_all_that_is_known_of_its_session() {
        let record = record(&spec());
        assert_eq!(record.session, spec().session);
        assert_eq!(
            (record.generation, record.started_token, record.replicas),
            (3, Token(7), 1)
        );
        assert_eq!(record.phase, Phase::Starting);
        assert_eq!(record.metadata["colour"], "blue");
        assert_eq!(record.metadata["cpuLimit"], "250m");
        assert_eq!(record.metadata["memoryLimit"], "67108864");
        let deployment = deployment(&spec());
        assert_eq!(
            deployment["metadata"]["annotations"][annotation::USER],
            "Alice@example.com"
        );
        // The template must not change when a token does.
        let pod = &deployment["spec"]["template"];
        assert_eq!(pod["metadata"]["annotations"].get(annotation::TOKEN), None);
        assert_eq!(pod["spec"]["automountServiceAccountToken"], false);
        assert_eq!(pod["spec"]["enableServiceLinks"], false);
        let resources = &pod["spec"]["containers"][0]["resources"];
        assert_eq!(resources["limits"], resources["requests"]);
    }

    #[test]
    fn a_home_belongs_to_the_session_unless_it_is_persistent() {
        let plan = Plan::new(&scope(), &options(), &spec()).unwrap();
        let (name, claim) = plan.claim(&record(&spec()));
        assert_eq!(name, plan.name);
        assert_eq!(claim["metadata"]["ownerReferences"][0]["uid"], "u1");
        let persistent = StartSpec {
            persistent_home: true,
            ..spec()
        };
        let plan = Plan::new(&scope(), &options(), &persistent).unwrap();
        let owner = record(&persistent);
        let (name, claim) = plan.claim(&owner);
        assert_eq!(Some(name), owner.home.as_deref());
        assert_eq!(claim["metadata"].get("ownerReferences"), None);
        assert_eq!(claim["metadata"]["labels"].get(label::SESSION), None);
        assert_eq!(claim["metadata"]["annotations"].get(annotation::SESSION), None);
    }

    #[test]
    fn the_port_that_a_session_is_opened_by_is_the_first() {
        let port = |number, protocol: &str| ManifestPort {
            name: "a name that is much too long".to_owned(),
            container_port: number,
            protocol: protocol.to_owned(),
        };
        let mut spec = spec();
        assert!(
            Plan::new(&scope(), &options(), &spec)
                .unwrap()
                .service(&record(&spec))
                .is_none()
        );
        spec.container.ports = vec![
            port(53, "udp"),
            port(80, ""),
            port(3000, "TCP"),
            port(3000, "TCP"),
        ];
        spec.port = Some(PortSpec {
            container_port: Some(3000),
            ready_within: Duration::from_secs(5),
        });
        let ports = container(&spec)["ports"].clone();
        let numbers: Vec<&Value> = ports
            .as_array()
            .unwrap()
            .iter()
            .map(|port| &port["containerPort"])
            .collect();
        assert_eq!(numbers, [3000, 53, 80]);
        assert_eq!(container(&spec)["readinessProbe"]["tcpSocket"]["port"], 3000);
        assert_eq!(record(&spec).ready_within, Duration::from_secs(5));
        let service = Plan::new(&scope(), &options(), &spec)
            .unwrap()
            .service(&record(&spec));
        assert_eq!(service.unwrap()["spec"]["ports"][1]["name"], "udp-53");
        spec.container.ports = vec![port(80, "carrier pigeon")];
        assert!(
            Plan::new(&scope(), &options(), &spec)
                .unwrap_err()
                .contains("CARRIER PIGEON")
        );
    }
}
