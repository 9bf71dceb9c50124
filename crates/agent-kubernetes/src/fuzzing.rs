//! What becomes of a specification, for the fuzz targets and the property tests (`tests/decoders`). Not a part of what
//! this crate offers.

use k8s_openapi::api::core::v1::PodSpec;
use regent_agent::runtime::StartSpec;

use crate::options::KubernetesOptions;
use crate::template::{pod, ports};

/// Plans a pod. What an agent that allows nothing refuses it must refuse in words, and what it plans must be a pod.
pub fn pod_of(spec: &StartSpec) {
    let options = KubernetesOptions::new(spec.agent.clone());
    let planned = ports(spec).and_then(|ports| pod(&options, spec, &ports, "claim"));
    let planned = match planned {
        Ok(planned) => planned,
        Err(error) => return assert!(!error.is_empty(), "a refusal says nothing"),
    };
    let pod: PodSpec = serde_json::from_value(planned).expect("what is planned is a pod");
    let container = pod.containers.first().expect("it has a container");
    let names = |names: Vec<&str>| {
        let mut unique = names.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(
            unique.len(),
            names.len(),
            "two things of a pod have one name: {names:?}"
        );
        assert!(names.iter().all(|name| !name.is_empty() && name.len() <= 63));
    };
    names(
        pod.volumes
            .iter()
            .flatten()
            .map(|volume| volume.name.as_str())
            .collect(),
    );
    let ports = container.ports.iter().flatten();
    names(ports.filter_map(|port| port.name.as_deref()).collect());
    let mounts = container.volume_mounts.iter().flatten();
    let mut paths: Vec<_> = mounts.map(|mount| &mount.mount_path).collect();
    paths.sort_unstable();
    let before = paths.len();
    paths.dedup();
    assert_eq!(before, paths.len(), "two volumes are mounted at one path");
    assert!(
        pod.volumes
            .iter()
            .flatten()
            .all(|volume| volume.host_path.is_none())
    );
}
