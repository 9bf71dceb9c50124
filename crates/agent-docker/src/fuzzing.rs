//! What becomes of a specification, for the fuzz targets and the property tests (`tests/decoders`). Not a part of what
//! this crate offers.

use regent_agent::runtime::StartSpec;
use regent_types::{AgentId, ClusterId};

use crate::names::Scope;
use crate::options::DockerOptions;
use crate::spec::{Site, plan};

/// Plans a container. What an agent that allows nothing refuses it must refuse in words, and what it plans must be
/// confined.
pub fn container(spec: &StartSpec) {
    let options = DockerOptions::new(spec.agent.clone(), "/nowhere");
    let scope = Scope {
        agent: AgentId::new("a").expect("it is one"),
        cluster: ClusterId::new("c").expect("it is one"),
    };
    let planned = plan(&options, &Site::default(), &scope, spec, "image", "network");
    let plan = match planned {
        Ok(plan) => plan,
        Err(error) => return assert!(!error.is_empty(), "a refusal says nothing"),
    };
    let host = plan.container.host_config.expect("every container has limits");
    assert_eq!(host.privileged, Some(false));
    assert!(
        host.cap_add.is_some_and(|added| added.is_empty()),
        "a capability was given"
    );
    assert!(host.binds.is_none(), "a folder of the host was given");
    let mounts = host.mounts.expect("every session has a home");
    assert!(
        mounts
            .iter()
            .all(|mount| mount.typ == Some(bollard::models::MountType::VOLUME)),
        "a folder of the host was given"
    );
    let env = plan.container.env.unwrap_or_default();
    for (name, value) in spec.regent_env() {
        let given: Vec<_> = env
            .iter()
            .filter(|one| one.split('=').next() == Some(name))
            .collect();
        assert_eq!(
            given,
            [&format!("{name}={value}")],
            "a template replaced what is Regent's"
        );
    }
}
