//! What a pod says of its container, in the words that a person needs.
//!
//! Pure, and the only place that knows the reasons of kubelets and schedulers. A container's end counts as the
//! session's; a pod's end never does, since Kubernetes makes another.

use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, ContainerStatus, Pod};
use regent_agent::runtime::{Exit, Generation};

use crate::names::{CONTAINER, label};
use crate::record::Ended;

/// What a shell and every container engine add to the number of a signal.
const SIGNAL_BASE: i32 = 128;
/// The highest number of a signal that ends programs (Linux; real-time signals are not told apart from codes).
const MAX_SIGNAL: i32 = 31;

/// Reasons for which a container waits that do not pass by themselves.
const HOPELESS: [&str; 3] = [
    "InvalidImageName",
    "ErrImageNeverPull",
    "CreateContainerConfigError",
];

/// In every word about a pull that fails.
pub(crate) const CANNOT_BE_PULLED: &str = "cannot be pulled";

/// What an engine says when it cannot make a container and never will. All else may be the engine's own trouble.
const WRONG: [&str; 4] = [
    "executable file not found",
    "no such file or directory",
    "permission denied",
    "exec format error",
];

/// What a registry says of an image that it does not have or does not give, whoever the registry is.
const NO_SUCH_IMAGE: [&str; 5] = [
    "not found",
    "manifest unknown",
    "does not exist",
    "denied",
    "invalid reference",
];

/// Reasons with which a container ends that never ran: its program is missing or cannot be executed.
const NEVER_RAN: [&str; 2] = ["ContainerCannotRun", "StartError"];

/// What a pod's container does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Condition {
    /// It ended by itself.
    Ended(Ended),
    /// It runs, and answers if it has a port.
    Ready,
    /// It runs, and does not answer on its port.
    NotReady,
    /// It is being created.
    Coming,
    /// It cannot run.
    Stuck {
        /// Why.
        why: String,
        /// Whether it cannot help to wait.
        hopeless: bool,
        /// Whether this is a pull that was tried, with the registry's own words in `why`.
        pull: bool,
    },
}

/// The pod that stands for its session: of this generation, not on its way out, the newest if there are two.
pub(crate) fn current(pods: &[Pod], generation: Generation) -> Option<&Pod> {
    pods.iter()
        .filter(|pod| self::generation(pod) == Some(generation) && !is_going(pod))
        .max_by_key(|pod| {
            pod.metadata
                .creation_timestamp
                .as_ref()
                .map(|time| time.0.as_millisecond())
        })
}

/// Which generation of its session a pod is of.
pub(crate) fn generation(pod: &Pod) -> Option<Generation> {
    let labels = pod.metadata.labels.as_ref();
    let number = labels.and_then(|labels| labels.get(label::GENERATION));
    number.and_then(|number| number.parse().ok())
}

/// Whether a pod is being deleted or is done for. The containers of a Deployment's pod are always started again,
/// so a pod that failed was failed by Kubernetes: evicted, refused by its node, lost with it.
fn is_going(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    pod.metadata.deletion_timestamp.is_some() || phase == Some("Failed")
}

/// Whether nothing of a pod runs any more, nor will: it is being deleted and its container has ended, or Kubernetes has
/// failed it. One that was evicted is not deleted by anybody.
pub(crate) fn is_at_rest(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    let statuses = status.and_then(|status| status.container_statuses.as_ref());
    let phase = status.and_then(|status| status.phase.as_deref());
    let running = statuses.is_some_and(|statuses| {
        let runs = |container: &ContainerStatus| {
            container
                .state
                .as_ref()
                .is_some_and(|state| state.running.is_some())
        };
        statuses.iter().any(runs)
    });
    if matches!(phase, Some("Failed" | "Succeeded")) && !running {
        return true;
    }
    let ended = statuses.is_some_and(|statuses| {
        statuses.iter().all(|container| {
            let state = container.state.as_ref();
            state.is_some_and(|state| state.terminated.is_some())
        })
    });
    pod.metadata.deletion_timestamp.is_some() && ended
}

/// What the container of a pod does.
pub(crate) fn condition(pod: &Pod) -> Condition {
    let Some(status) = &pod.status else {
        return Condition::Coming;
    };
    let container = status
        .container_statuses
        .iter()
        .flatten()
        .find(|container| container.name == CONTAINER);
    if let Some(container) = container {
        return of_container(container);
    }
    let unschedulable = status
        .conditions
        .iter()
        .flatten()
        .find(|condition| condition.type_ == "PodScheduled" && condition.status == "False");
    match unschedulable {
        Some(condition) => Condition::Stuck {
            why: told(
                "unschedulable",
                condition.message.as_deref().or(condition.reason.as_deref()),
            ),
            hopeless: false,
            pull: false,
        },
        None => Condition::Coming,
    }
}

fn of_container(container: &ContainerStatus) -> Condition {
    let terminated =
        |state: &Option<ContainerState>| state.as_ref().and_then(|state| state.terminated.clone());
    // Of a container that was started again already the last state tells.
    let ends = [terminated(&container.state), terminated(&container.last_state)];
    if let Some(condition) = ends.iter().flatten().find_map(of_end) {
        return condition;
    }
    let state = container.state.as_ref();
    if state.is_some_and(|state| state.running.is_some()) {
        return if container.ready {
            Condition::Ready
        } else {
            Condition::NotReady
        };
    }
    let Some(waiting) = state.and_then(|state| state.waiting.as_ref()) else {
        return Condition::Coming;
    };
    let reason = waiting.reason.as_deref().unwrap_or_default();
    let message = waiting.message.as_deref();
    match reason {
        "" | "ContainerCreating" | "PodInitializing" => Condition::Coming,
        "ErrImagePull" | "ImagePullBackOff" | "RegistryUnavailable" => {
            let pull = reason != "ImagePullBackOff";
            let gone = message.is_some_and(|message| {
                let message = message.to_ascii_lowercase();
                NO_SUCH_IMAGE.iter().any(|words| message.contains(words))
            });
            Condition::Stuck {
                why: told(
                    &format!("the image {:?} {CANNOT_BE_PULLED}", container.image),
                    message,
                ),
                hopeless: gone || HOPELESS.contains(&reason),
                pull,
            }
        }
        _ => Condition::Stuck {
            why: told(reason, message),
            hopeless: HOPELESS.contains(&reason)
                || message.is_some_and(|message| WRONG.iter().any(|words| message.contains(words))),
            pull: false,
        },
    }
}

fn of_end(ended: &ContainerStateTerminated) -> Option<Condition> {
    let reason = ended.reason.as_deref().unwrap_or_default();
    let message = ended.message.as_deref().map(str::trim);
    if NEVER_RAN.contains(&reason) {
        return Some(Condition::Stuck {
            why: told("its program cannot be run", message.or(Some(reason))),
            hopeless: true,
            pull: false,
        });
    }
    // Kubelets tell of a container that is created and not started yet as of one that ended with code 0, and of one
    // that was lost with its node as of one that was killed.
    ended
        .started_at
        .as_ref()
        .filter(|started| started.0.as_millisecond() > 0)?;
    let exit = match (reason, ended.signal, ended.exit_code) {
        ("OOMKilled", _, _) => Exit::OutOfMemory,
        (_, Some(signal), _) if signal > 0 => Exit::Signal(signal),
        (_, _, code) if (1..=MAX_SIGNAL).contains(&(code - SIGNAL_BASE)) => Exit::Signal(code - SIGNAL_BASE),
        (_, _, code) => Exit::Code(code),
    };
    Some(Condition::Ended(Ended {
        exit,
        message: message.unwrap_or_default().to_owned(),
    }))
}

fn told(what: &str, message: Option<&str>) -> String {
    match message.map(str::trim).filter(|message| !message.is_empty()) {
        Some(message) => format!("{what}: {message}"),
        None => what.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(status: &Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": { "name": "p", "labels": { "regent.dev/generation": "1" } }, "status": status,
        }))
        .unwrap()
    }

    fn with(container: &Value) -> Pod {
        let mut status = json!({
            "name": CONTAINER, "image": "demo:1", "imageID": "", "ready": false, "restartCount": 0,
        });
        status
            .as_object_mut()
            .unwrap()
            .extend(container.as_object().unwrap().clone());
        pod(&json!({ "phase": "Running", "containerStatuses": [status] }))
    }

    const STARTED: &str = "2026-01-01T00:00:00Z";

    fn exit(terminated: &Value) -> Exit {
        let mut terminated = terminated.clone();
        terminated["startedAt"] = STARTED.into();
        match condition(&with(&json!({ "state": { "terminated": terminated } }))) {
            Condition::Ended(ended) => ended.exit,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_evicted_pod_is_at_rest_though_nobody_deletes_it() {
        let evicted = pod(&json!({ "phase": "Failed", "reason": "Evicted" }));
        assert!(is_at_rest(&evicted));
        let running = json!([{ "name": CONTAINER, "image": "i", "imageID": "", "ready": true, "restartCount": 0,
            "state": { "running": {} } }]);
        assert!(!is_at_rest(&pod(
            &json!({ "phase": "Failed", "containerStatuses": running })
        )));
        assert!(!is_at_rest(&pod(
            &json!({ "phase": "Running", "containerStatuses": running })
        )));
    }

    #[test]
    fn how_a_container_ended() {
        assert_eq!(
            exit(&json!({ "exitCode": 0, "reason": "Completed" })),
            Exit::Code(0)
        );
        assert_eq!(exit(&json!({ "exitCode": 7, "reason": "Error" })), Exit::Code(7));
        assert_eq!(
            exit(&json!({ "exitCode": 137, "reason": "OOMKilled" })),
            Exit::OutOfMemory
        );
        assert_eq!(
            exit(&json!({ "exitCode": 137, "reason": "Error" })),
            Exit::Signal(9)
        );
        assert_eq!(exit(&json!({ "exitCode": 0, "signal": 15 })), Exit::Signal(15));
        assert_eq!(exit(&json!({ "exitCode": 255 })), Exit::Code(255));
    }

    #[test]
    fn an_end_counts_also_when_the_container_was_started_again() {
        let again = with(&json!({
            "restartCount": 1, "ready": true, "state": { "running": {} },
            "lastState": { "terminated": { "exitCode": 7, "startedAt": STARTED } },
        }));
        assert!(matches!(condition(&again), Condition::Ended(ended) if ended.exit == Exit::Code(7)));
        let backing_off = with(&json!({
            "restartCount": 2, "state": { "waiting": { "reason": "CrashLoopBackOff" } },
            "lastState": { "terminated": { "exitCode": 1, "startedAt": STARTED } },
        }));
        assert!(matches!(condition(&backing_off), Condition::Ended(ended) if ended.exit == Exit::Code(1)));
    }

    #[test]
    fn a_container_that_was_not_started_yet_has_not_ended() {
        for started in [Value::Null, "1970-01-01T00:00:00Z".into()] {
            let created = json!({ "state": { "terminated": { "exitCode": 0, "startedAt": started } } });
            assert_eq!(condition(&with(&created)), Condition::Coming);
        }
    }

    #[test]
    fn a_program_that_does_not_exist_never_ran() {
        let Condition::Stuck { why, hopeless, .. } = condition(&with(&json!({
            "state": { "waiting": { "reason": "CrashLoopBackOff" } },
            "lastState": { "terminated": {
                "exitCode": 127, "reason": "ContainerCannotRun", "message": "\"nope\": executable file not found" } },
        }))) else {
            panic!("counted as an end");
        };
        assert!(hopeless && why.contains("nope"), "{why}");
    }

    #[test]
    fn what_waits_and_whether_that_passes() {
        let waits = |reason: &str, message: &str| {
            condition(&with(
                &json!({ "state": { "waiting": { "reason": reason, "message": message } } }),
            ))
        };
        assert_eq!(waits("ContainerCreating", ""), Condition::Coming);
        let stuck = |reason: &str, message: &str| match waits(reason, message) {
            Condition::Stuck { why, hopeless, .. } => (why, hopeless),
            other => panic!("{other:?}"),
        };
        let (why, hopeless) = stuck("ErrImagePull", "dial tcp: lookup registry: server misbehaving");
        assert!(
            why.contains("demo:1") && why.contains("misbehaving") && !hopeless,
            "{why}"
        );
        assert!(stuck("ErrImagePull", "manifest for demo:1 Not Found").1);
        assert!(
            !stuck("ImagePullBackOff", "Back-off pulling image").1,
            "the registry may be back"
        );
        let (why, hopeless) = stuck(
            "CreateContainerConfigError",
            "container has runAsNonRoot and image will run as root",
        );
        assert!(
            hopeless
                && why == "CreateContainerConfigError: container has runAsNonRoot and image will run as root"
        );
        assert!(!stuck("SomethingNew", "").1);
    }

    #[test]
    fn a_pod_without_a_node_says_why() {
        let waiting = pod(&json!({ "phase": "Pending", "conditions": [{
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": "0/1 nodes are available: 1 Insufficient memory." }] }));
        assert_eq!(
            condition(&waiting),
            Condition::Stuck {
                why: "unschedulable: 0/1 nodes are available: 1 Insufficient memory.".to_owned(),
                hopeless: false,
                pull: false
            }
        );
    }

    #[test]
    fn a_pod_is_at_rest_when_it_goes_and_its_container_has_ended() {
        let going = |mut pod: Pod| {
            pod.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
            pod
        };
        let ended = with(&json!({ "state": { "terminated": { "exitCode": 0 } } }));
        let running = with(&json!({ "state": { "running": {} } }));
        assert!(is_at_rest(&going(ended.clone())) && !is_at_rest(&ended));
        assert!(!is_at_rest(&going(running)) && !is_at_rest(&going(pod(&json!({})))));
    }

    #[test]
    fn pods_that_go_and_older_generations_do_not_stand_for_a_session() {
        let named = |name: &str, change: &dyn Fn(&mut Pod)| {
            let mut pod = with(&json!({ "ready": true, "state": { "running": {} } }));
            pod.metadata.name = Some(name.to_owned());
            change(&mut pod);
            pod
        };
        let evicted = named("evicted", &|pod| {
            pod.status.as_mut().unwrap().phase = Some("Failed".to_owned());
        });
        let deleted = named("deleted", &|pod| {
            pod.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        });
        let older = named("older", &|pod| {
            pod.metadata
                .labels
                .as_mut()
                .unwrap()
                .insert(label::GENERATION.to_owned(), "0".to_owned());
        });
        let pods = [evicted, deleted, older, named("it", &|_| {})];
        let name = |pods: &[Pod]| current(pods, 1).map(|pod| pod.metadata.name.clone().unwrap());
        assert_eq!(name(&pods).as_deref(), Some("it"));
        assert_eq!(name(&pods[..3]), None);
    }
}
