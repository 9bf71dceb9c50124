//! What runs in a session's pod: its container, ports, environment, volumes and limits.
//!
//! The number of processes is not limited: a pod cannot ask for that, it is a setting of the node
//! (`podPidsLimit` of the kubelet).

use std::collections::{BTreeMap, BTreeSet};

use regent_agent::names::{MAX_LABEL, dns_label};
use regent_agent::runtime::StartSpec;
use serde_json::{Value, json};

use crate::KubernetesOptions;
use crate::names::{CONTAINER, HOME_VOLUME};
use crate::security;

/// How long Kubernetes lets a container end that it was told to, when nobody shortens it: the longest grace that a
/// stop can ask for.
pub(crate) const TERMINATION_GRACE_SECONDS: u32 = 60;

/// What `HOME_VOLUME` cannot begin with.
const VOLUME_PREFIX: &str = "volume-";

/// A port of the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Port {
    number: u16,
    protocol: String,
}

impl Port {
    /// Names must be unique and short, and templates promise neither.
    fn name(&self) -> String {
        format!("{}-{}", self.protocol.to_ascii_lowercase(), self.number)
    }

    pub(crate) fn of_service(&self) -> Value {
        json!({ "name": self.name(), "port": self.number, "targetPort": self.number, "protocol": self.protocol })
    }

    fn of_container(&self) -> Value {
        json!({ "name": self.name(), "containerPort": self.number, "protocol": self.protocol })
    }
}

/// The ports, the one that the session is opened by first.
pub(crate) fn ports(spec: &StartSpec) -> Result<Vec<Port>, String> {
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

/// The specification of the pod.
pub(crate) fn pod(
    options: &KubernetesOptions,
    spec: &StartSpec,
    ports: &[Port],
    claim: &str,
) -> Result<Value, String> {
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

#[cfg(test)]
mod tests {
    use regent_types::template::{ManifestMount, ManifestToleration};

    use super::*;
    use crate::objects::tests::{container, deployment, options, spec};

    fn planned(spec: &StartSpec) -> Result<Value, String> {
        pod(&options(), spec, &ports(spec)?, "claim")
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
        planned(&spec).unwrap_err();
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
        assert!(planned(&spec).unwrap_err().contains("/etc"));
        spec.container.mounts[1] = mount("twice", "/home/user");
        planned(&spec).unwrap_err();
        spec.container.mounts[1] = mount("relative", "cache");
        planned(&spec).unwrap_err();
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
        planned(&spec).unwrap_err();
    }
}
