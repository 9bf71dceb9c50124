//! What a session's container may, as its template asks and the agent allows.
//!
//! In both profiles a container has the default seccomp profile, no capability that it did not ask for, and no
//! way to gain privileges. `restricted` adds that it is not root, and that `NET_BIND_SERVICE` is all that it may
//! ask for; so says the pod security standard of that name.

use regent_types::template::ManifestSecurity;
use serde_json::{Value, json};

use crate::KubernetesOptions;

/// The one capability that the `restricted` standard lets a pod add.
const RESTRICTED_CAPABILITY: &str = "NET_BIND_SERVICE";

/// The security contexts of a pod and of its container.
#[derive(Debug)]
pub(crate) struct Contexts {
    pub(crate) pod: Value,
    pub(crate) container: Value,
}

/// Makes the contexts, or says what is not allowed.
pub(crate) fn contexts(options: &KubernetesOptions, asked: &ManifestSecurity) -> Result<Contexts, String> {
    let user = asked.run_as_user.or(options.run_as_user);
    if options.restricted && user == Some(0) {
        return Err("it asks to run as root, which restricted pods may not".to_owned());
    }
    let add = asked
        .capabilities
        .iter()
        .map(|name| capability(options, name))
        .collect::<Result<Vec<_>, _>>()?;
    let mut pod = json!({ "seccompProfile": { "type": "RuntimeDefault" } });
    let mut container = json!({
        "allowPrivilegeEscalation": false,
        "privileged": false,
        "readOnlyRootFilesystem": asked.read_only_root_filesystem,
        "capabilities": { "drop": ["ALL"], "add": add },
    });
    if options.restricted {
        pod["runAsNonRoot"] = true.into();
        container["runAsNonRoot"] = true.into();
    }
    if let Some(user) = user {
        pod["runAsUser"] = user.into();
        // So that it can write to its volumes.
        pod["fsGroup"] = user.into();
    }
    Ok(Contexts { pod, container })
}

fn capability(options: &KubernetesOptions, asked: &str) -> Result<String, String> {
    let plain = |name: &str| {
        let name = name.to_ascii_uppercase();
        name.strip_prefix("CAP_").unwrap_or(&name).to_owned()
    };
    let name = plain(asked);
    if !options
        .allowed_capabilities
        .iter()
        .any(|allowed| plain(allowed) == name)
    {
        return Err(format!(
            "it asks for the capability {name}, which this agent's kubernetes-allow-capability does not list"
        ));
    }
    if options.restricted && name != RESTRICTED_CAPABILITY {
        return Err(format!(
            "it asks for the capability {name}, and restricted pods may have {RESTRICTED_CAPABILITY} only"
        ));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use regent_types::AgentId;

    use super::*;

    fn options(restricted: bool, allowed: &[&str]) -> KubernetesOptions {
        KubernetesOptions {
            restricted,
            allowed_capabilities: allowed.iter().map(|&name| name.to_owned()).collect(),
            run_as_user: Some(1000),
            ..KubernetesOptions::new(AgentId::new("a").unwrap())
        }
    }

    fn asks_for(capability: &str) -> ManifestSecurity {
        ManifestSecurity {
            capabilities: vec![capability.to_owned()],
            ..ManifestSecurity::default()
        }
    }

    #[test]
    fn nothing_is_allowed_that_was_not_asked_for() {
        let contexts = contexts(
            &options(true, &["NET_BIND_SERVICE"]),
            &ManifestSecurity::default(),
        )
        .unwrap();
        assert_eq!(contexts.container["capabilities"]["drop"], json!(["ALL"]));
        assert_eq!(contexts.container["capabilities"]["add"], json!([]));
        assert_eq!(contexts.container["allowPrivilegeEscalation"], json!(false));
        assert_eq!(contexts.pod["runAsNonRoot"], json!(true));
        assert_eq!(
            (&contexts.pod["runAsUser"], &contexts.pod["fsGroup"]),
            (&json!(1000), &json!(1000))
        );
    }

    #[test]
    fn a_capability_needs_the_agents_leave_and_the_standards() {
        let bind = contexts(
            &options(true, &["cap_net_bind_service"]),
            &asks_for("NET_BIND_SERVICE"),
        );
        assert_eq!(
            bind.unwrap().container["capabilities"]["add"],
            json!(["NET_BIND_SERVICE"])
        );
        let refused = contexts(&options(true, &[]), &asks_for("NET_BIND_SERVICE")).unwrap_err();
        assert!(
            refused.contains("NET_BIND_SERVICE") && refused.contains("allow-capability"),
            "{refused}"
        );
        let refused = contexts(&options(true, &["CHOWN"]), &asks_for("CHOWN")).unwrap_err();
        assert!(
            refused.contains("CHOWN") && refused.contains("restricted"),
            "{refused}"
        );
        contexts(&options(false, &["CHOWN"]), &asks_for("CAP_CHOWN")).unwrap();
    }

    #[test]
    fn root_is_for_baseline_pods_only() {
        let root = ManifestSecurity {
            run_as_user: Some(0),
            ..ManifestSecurity::default()
        };
        contexts(&options(true, &[]), &root).unwrap_err();
        let allowed = contexts(&options(false, &[]), &root).unwrap();
        assert_eq!(allowed.pod["runAsUser"], json!(0));
        assert_eq!(allowed.pod.get("runAsNonRoot"), None);
    }
}
