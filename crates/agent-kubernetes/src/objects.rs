//! The objects that a start asks for: pure, from the specification and the agent's options.
//!
//! The number of processes is not limited: a pod cannot ask for that, it is a setting of the node
//! (`podPidsLimit` of the kubelet).

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::apps::v1::Deployment;
use regent_agent::names::{MAX_LABEL, dns_label};
use regent_agent::runtime::StartSpec;
use regent_types::Token;
use serde_json::{Value, json};

use crate::KubernetesOptions;
use crate::names::{CONTAINER, HOME_VOLUME, Scope, annotation, label};
use crate::record::{Phase, Record};
use crate::security;

/// How long Kubernetes lets a container end that it was told to, when nobody shortens it: the longest grace that a
/// stop can ask for.
pub(crate) const TERMINATION_GRACE_SECONDS: u32 = 60;

/// What `HOME_VOLUME` cannot be the name of.
const VOLUME_PREFIX: &str = "volume-";

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
        let ports = ports(spec)?;
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
        let pod = pod(options, spec, &ports, claim_name)?;
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

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Port {
    number: u16,
    protocol: String,
}

impl Port {
    /// Names must be unique and short, and templates promise neither.
    fn name(&self) -> String {
        format!("{}-{}", self.protocol.to_ascii_lowercase(), self.number)
    }

    fn of_service(&self) -> Value {
        json!({ "name": self.name(), "port": self.number, "targetPort": self.number, "protocol": self.protocol })
    }

    fn of_container(&self) -> Value {
        json!({ "name": self.name(), "containerPort": self.number, "protocol": self.protocol })
    }
}

/// The ports, the one that the session is opened by first.
fn ports(spec: &StartSpec) -> Result<Vec<Port>, String> {
    let first = spec.port.as_ref().and_then(|port| port.container_port);
    let mut ports: Vec<Port> = Vec::new();
    for port in &spec.container.ports {
        let protocol = match port.protocol.to_ascii_uppercase() {
            protocol if protocol.is_empty() => "TCP".to_owned(),
            protocol => protocol,
        };
        if !matches!(protocol.as_str(), "TCP" | "UDP" | "SCTP") {
            return Err(format!(
                "its port {} has the unknown protocol {protocol:?}",
                port.container_port
            ));
        }
        let port = Port {
            number: port.container_port,
            protocol,
        };
        if port.number > 0 && !ports.contains(&port) {
            ports.push(port);
        }
    }
    if let Some(number) = first {
        match ports.iter().position(|port| port.number == number) {
            Some(place) => ports[..=place].rotate_right(1),
            None => ports.insert(
                0,
                Port {
                    number,
                    protocol: "TCP".to_owned(),
                },
            ),
        }
    }
    Ok(ports)
}

fn pod(options: &KubernetesOptions, spec: &StartSpec, ports: &[Port], claim: &str) -> Result<Value, String> {
    let image = spec.image.as_deref().filter(|image| !image.is_empty());
    let image = image.ok_or("its template names no image")?;
    let contexts = security::contexts(options, &spec.container.security)?;
    let (volumes, mounts) = volumes(options, spec, claim)?;
    let mut container = json!({
        "name": CONTAINER,
        "image": image,
        "env": environment(spec)?,
        "ports": ports.iter().map(Port::of_container).collect::<Vec<_>>(),
        "volumeMounts": mounts,
        "securityContext": contexts.container,
        "resources": resources(spec),
    });
    if !spec.command.is_empty() {
        container["command"] = json!([literal(&spec.command)]);
    }
    if !spec.args.is_empty() {
        container["args"] = spec.args.iter().map(|arg| literal(arg)).collect();
    }
    if let Some(policy) = &options.image_pull_policy {
        container["imagePullPolicy"] = policy.as_str().into();
    }
    if let Some(port) = ports.first().filter(|port| port.protocol == "TCP") {
        container["readinessProbe"] =
            json!({ "tcpSocket": { "port": port.number }, "periodSeconds": 1, "timeoutSeconds": 1 });
    }
    let secrets: Vec<Value> = spec
        .container
        .image_pull_secrets
        .iter()
        .map(|name| json!({ "name": name }))
        .collect();
    Ok(json!({
        "containers": [container],
        "volumes": volumes,
        "securityContext": contexts.pod,
        // A session is no client of the cluster, and its environment is its template's alone.
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "terminationGracePeriodSeconds": TERMINATION_GRACE_SECONDS,
        "nodeSelector": spec.container.node_selector,
        "tolerations": tolerations(spec),
        "imagePullSecrets": secrets,
    }))
}

/// What is asked for is also the limit: nobody gets more by luck, and nobody less.
fn resources(spec: &StartSpec) -> Value {
    let mut amounts = BTreeMap::new();
    if let Some(milli) = spec.cpu_milli {
        amounts.insert("cpu", format!("{milli}m"));
    }
    if let Some(bytes) = spec.memory_bytes {
        amounts.insert("memory", bytes.to_string());
    }
    json!({ "limits": amounts, "requests": amounts })
}

fn tolerations(spec: &StartSpec) -> Vec<Value> {
    let tolerations = spec.container.tolerations.iter().map(|toleration| {
        let mut value = json!({});
        for (name, text) in [
            ("key", &toleration.key),
            ("operator", &toleration.operator),
            ("value", &toleration.value),
            ("effect", &toleration.effect),
        ] {
            if !text.is_empty() {
                value[name] = text.as_str().into();
            }
        }
        // Without a key it stands all taints, and there is only one operator that says so.
        if toleration.key.is_empty() && toleration.operator.is_empty() {
            value["operator"] = "Exists".into();
        }
        value
    });
    tolerations.collect()
}

fn environment(spec: &StartSpec) -> Result<Vec<Value>, String> {
    let valid = |name: &str| {
        name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    if let Some(name) = spec.env.keys().find(|name| !valid(name)) {
        return Err(format!("{name:?} cannot be the name of an environment variable"));
    }
    let mut env: BTreeMap<&str, String> = spec
        .env
        .iter()
        .map(|(name, value)| (name.as_str(), literal(value)))
        .collect();
    // Last: what Regent sets cannot be replaced by a template.
    env.extend([
        ("REGENT_SESSION", spec.session.to_string()),
        ("REGENT_GENERATION", spec.generation.to_string()),
        ("REGENT_AGENT", spec.agent.to_string()),
        ("REGENT_USER", spec.user.to_string()),
        ("REGENT_FENCING_TOKEN", spec.token.to_string()),
    ]);
    Ok(env
        .into_iter()
        .map(|(name, value)| json!({ "name": name, "value": value }))
        .collect())
}

/// Kubernetes replaces `$(NAME)` in commands, arguments and variables, and takes `$$` for a dollar. A template
/// means what it says, so that `echo $$` stays what it is.
fn literal(text: &str) -> String {
    text.replace('$', "$$")
}

/// The pod's volumes, and where its container has them.
fn volumes(
    options: &KubernetesOptions,
    spec: &StartSpec,
    claim: &str,
) -> Result<(Vec<Value>, Vec<Value>), String> {
    let home = spec.container.home_path(&options.home_path);
    let mut volumes = vec![json!({ "name": HOME_VOLUME, "persistentVolumeClaim": { "claimName": claim } })];
    let mut mounts = vec![json!({ "name": HOME_VOLUME, "mountPath": home })];
    let (mut paths, mut names) = (BTreeSet::from([home]), BTreeSet::new());
    for mount in spec.container.other_mounts() {
        if let Some(path) = &mount.host_path {
            return Err(format!(
                "it mounts {path:?} of the host, which sessions on Kubernetes may not"
            ));
        }
        if !paths.insert(&mount.mount_path) {
            return Err(format!("it mounts two volumes at {:?}", mount.mount_path));
        }
        let name = dns_label(&format!("{VOLUME_PREFIX}{}", mount.name), MAX_LABEL);
        mounts.push(json!({ "name": name, "mountPath": mount.mount_path, "readOnly": mount.read_only }));
        if names.insert(name.clone()) {
            volumes.push(json!({ "name": name, "emptyDir": {} }));
        }
    }
    if spec.container.security.read_only_root_filesystem && paths.insert("/tmp") {
        mounts.push(json!({ "name": "tmp", "mountPath": "/tmp" }));
        volumes.push(json!({ "name": "tmp", "emptyDir": {} }));
    }
    if let Some(path) = paths.iter().find(|path| !path.starts_with('/')) {
        return Err(format!("{path:?} is no absolute path to mount at"));
    }
    Ok((volumes, mounts))
}

/// The token on an object, zero if there is none.
pub(crate) fn token_of(annotations: Option<&BTreeMap<String, String>>) -> Token {
    annotations
        .and_then(|all| all.get(annotation::TOKEN))
        .and_then(|token| token.parse().ok())
        .unwrap_or(Token(0))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use regent_agent::runtime::{ContainerSpec, PortSpec};
    use regent_types::template::{ManifestMount, ManifestPort, ManifestToleration};
    use regent_types::{AgentId, ClusterId, SessionName, TemplateName, UserName};

    use super::*;

    fn scope() -> Scope {
        Scope {
            agent: AgentId::new("k8s").unwrap(),
            cluster: ClusterId::new("c1").unwrap(),
        }
    }

    fn options() -> KubernetesOptions {
        KubernetesOptions {
            run_as_user: Some(1000),
            ..KubernetesOptions::new(AgentId::new("k8s").unwrap())
        }
    }

    fn spec() -> StartSpec {
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

    fn deployment(spec: &StartSpec) -> Value {
        serde_json::to_value(Plan::new(&scope(), &options(), spec).unwrap().deployment).unwrap()
    }

    fn container(spec: &StartSpec) -> Value {
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

    #[test]
    fn a_template_means_what_it_says_and_cannot_pose_as_another_session() {
        let mut spec = spec();
        spec.args = vec!["-c".to_owned(), "echo $$ $(REGENT_USER)".to_owned()];
        assert_eq!(container(&spec).get("command"), None);
        assert_eq!(
            container(&spec)["args"],
            json!(["-c", "echo $$$$ $$(REGENT_USER)"])
        );
        spec.command = "sh".to_owned();
        assert_eq!(container(&spec)["command"], json!(["sh"]));
        spec.env = BTreeMap::from([("REGENT_USER".to_owned(), "root".to_owned())]);
        let env = container(&spec)["env"].clone();
        let users: Vec<&Value> = env
            .as_array()
            .unwrap()
            .iter()
            .filter(|one| one["name"] == "REGENT_USER")
            .collect();
        assert_eq!(
            users,
            [&json!({ "name": "REGENT_USER", "value": "Alice@example.com" })]
        );
        spec.env = BTreeMap::from([("A=B".to_owned(), String::new())]);
        Plan::new(&scope(), &options(), &spec).unwrap_err();
    }

    #[test]
    fn volumes_are_empty_ones_and_never_the_hosts() {
        let mount = |name: &str, path: &str| ManifestMount {
            name: name.to_owned(),
            mount_path: path.to_owned(),
            read_only: false,
            host_path: None,
        };
        let mut spec = spec();
        spec.container.mounts = vec![mount("user-home", "/home/user"), mount("Shared Cache", "/cache")];
        spec.container.security.read_only_root_filesystem = true;
        let mounts = container(&spec)["volumeMounts"].clone();
        let paths: Vec<&Value> = mounts
            .as_array()
            .unwrap()
            .iter()
            .map(|mount| &mount["mountPath"])
            .collect();
        assert_eq!(paths, ["/home/user", "/cache", "/tmp"]);
        spec.container.mounts[1].host_path = Some("/etc".to_owned());
        assert!(
            Plan::new(&scope(), &options(), &spec)
                .unwrap_err()
                .contains("/etc")
        );
        spec.container.mounts[1] = mount("twice", "/home/user");
        Plan::new(&scope(), &options(), &spec).unwrap_err();
        spec.container.mounts[1] = mount("relative", "cache");
        Plan::new(&scope(), &options(), &spec).unwrap_err();
    }

    #[test]
    fn where_it_may_run_is_handed_on() {
        let mut spec = spec();
        spec.container.node_selector = BTreeMap::from([("gpu".to_owned(), "yes".to_owned())]);
        spec.container.image_pull_secrets = vec!["registry".to_owned()];
        spec.container.tolerations = vec![
            ManifestToleration {
                key: "gpu".to_owned(),
                ..ManifestToleration::default()
            },
            ManifestToleration::default(),
        ];
        let pod = deployment(&spec)["spec"]["template"]["spec"].clone();
        assert_eq!(pod["nodeSelector"], json!({ "gpu": "yes" }));
        assert_eq!(pod["imagePullSecrets"], json!([{ "name": "registry" }]));
        assert_eq!(
            pod["tolerations"],
            json!([{ "key": "gpu" }, { "operator": "Exists" }])
        );
        spec.image = None;
        Plan::new(&scope(), &options(), &spec).unwrap_err();
    }
}
