//! The Kubernetes runtime against a real cluster, with the rights that its deployment gives it.
//!
//! `tests/kubernetes/cluster run -- cargo test -p regent-agent-kubernetes` brings the cluster. Each test has a
//! namespace of its own.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "these helpers are all of a test"
)]

mod harness;

use std::time::Duration;

use futures::future::BoxFuture;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use k8s_openapi::api::core::v1::{ConfigMap, Node, PersistentVolumeClaim, Pod, Secret, Service};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use regent_agent::fence::FenceError;
use regent_agent::runtime::conformance::{self, Target};
use regent_agent::runtime::{
    Exit, ObservedState, PortSpec, Runtime, RuntimeError, RuntimeEvent, SessionRef, StartSpec, Stop,
};
use regent_agent_kubernetes::{KubernetesOptions, KubernetesRuntime};
use regent_types::template::ManifestPort;
use regent_types::{ClusterId, SessionName, Token, UserName};
use serde_json::json;

use harness::{ExitsOnly, SLEEP, Space, event, lacks_cluster, session, shell, until};

const GRACE: Stop = Stop {
    grace: Duration::from_secs(10),
    delete_home: false,
};

struct Conformance<'a>(&'a Space);

impl Target for Conformance<'_> {
    fn open(&self) -> Box<dyn Runtime> {
        let handle = tokio::runtime::Handle::current();
        Box::new(ExitsOnly(tokio::task::block_in_place(|| {
            handle.block_on(self.0.open())
        })))
    }

    fn sleeper(&self, session: SessionName) -> StartSpec {
        shell(session, SLEEP)
    }

    fn exits_with_7(&self, session: SessionName) -> StartSpec {
        shell(session, "exit 7")
    }

    /// Its program, not its image: a kubelet of 1.20 takes a minute to forget a pod whose image it could not pull, and
    /// the suite waits for that twice. The image has a test of its own.
    fn broken(&self, session: SessionName) -> StartSpec {
        StartSpec {
            command: "no-such-program".to_owned(),
            ..shell(session, "")
        }
    }

    fn leftovers<'a>(&'a self, session: &'a SessionName) -> BoxFuture<'a, Vec<String>> {
        Box::pin(self.0.leftovers(session))
    }
}

/// The longest: by its name it is begun first.
#[tokio::test(flavor = "multi_thread")]
async fn a_conformance_suite_passes_with_the_rights_of_the_deployment() {
    if lacks_cluster() {
        return;
    }
    let space = Space::new("conformance").await;
    if let Err(violation) = conformance::check(&Conformance(&space)).await {
        panic!("{violation}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_role_allows_nothing_more() {
    if lacks_cluster() {
        return;
    }
    let space = Space::new("role").await;
    let agent = space.agent().await;
    let here = space.name.as_str();
    for (verb, group, resource) in [
        ("create", "apps", "deployments"),
        ("patch", "apps", "deployments"),
        ("delete", "", "persistentvolumeclaims"),
        ("watch", "", "pods"),
        ("patch", "", "configmaps"),
    ] {
        assert!(
            may(&agent, here, verb, group, resource).await,
            "{verb} {resource}"
        );
    }
    for (namespace, verb, group, resource) in [
        (here, "get", "", "secrets"),
        (here, "list", "", "secrets"),
        (here, "create", "", "pods"),
        (here, "create", "", "pods/exec"),
        (here, "create", "", "pods/attach"),
        (here, "create", "", "pods/portforward"),
        (here, "get", "", "pods/log"),
        (here, "list", "", "configmaps"),
        (here, "delete", "", "configmaps"),
        (here, "deletecollection", "apps", "deployments"),
        (here, "create", "", "serviceaccounts/token"),
        (here, "create", "rbac.authorization.k8s.io", "rolebindings"),
        (here, "delete", "", "namespaces"),
        ("", "list", "", "nodes"),
        ("", "list", "", "persistentvolumes"),
        ("default", "list", "apps", "deployments"),
        ("kube-system", "get", "", "configmaps"),
        ("kube-system", "list", "", "pods"),
    ] {
        assert!(
            !may(&agent, namespace, verb, group, resource).await,
            "{verb} {resource} in {namespace}"
        );
    }
    // And by trying.
    let secrets = Api::<Secret>::namespaced(agent.clone(), here);
    let listed = secrets.list(&ListParams::default()).await;
    assert!(matches!(listed, Err(kube::Error::Api(status)) if status.is_forbidden()));
    let elsewhere = KubernetesOptions {
        namespace: Some("default".to_owned()),
        ..space.options()
    };
    let error = KubernetesRuntime::connect(elsewhere).await.unwrap_err();
    let text = error.to_string();
    assert!(
        !error.is_retryable() && text.contains("Role") && text.contains("ConfigMap"),
        "{text}"
    );
}

async fn may(agent: &Client, namespace: &str, verb: &str, group: &str, resource: &str) -> bool {
    let (resource, subresource) = match resource.split_once('/') {
        Some((resource, subresource)) => (resource, Some(subresource.to_owned())),
        None => (resource, None),
    };
    let review = SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec {
            resource_attributes: Some(ResourceAttributes {
                namespace: Some(namespace.to_owned()),
                verb: Some(verb.to_owned()),
                group: Some(group.to_owned()),
                resource: Some(resource.to_owned()),
                subresource,
                ..ResourceAttributes::default()
            }),
            ..SelfSubjectAccessReviewSpec::default()
        },
        ..SelfSubjectAccessReview::default()
    };
    let answer = Api::all(agent.clone())
        .create(&PostParams::default(), &review)
        .await;
    answer.unwrap().status.unwrap().allowed
}

#[tokio::test(flavor = "multi_thread")]
async fn how_a_session_ended_is_seen() {
    if lacks_cluster() {
        return;
    }
    let space = Space::new("ends").await;
    let runtime = space.open().await;
    let mut events = runtime.watch();

    let glutton = shell(
        session("glutton"),
        r#"x=0123456789abcdef; while :; do x="$x$x"; done"#,
    );
    runtime.start(&glutton).await.unwrap();
    assert_eq!(exit_of(&mut events, &glutton.session).await, Exit::OutOfMemory);

    let victim = shell(session("victim"), SLEEP);
    runtime.start(&victim).await.unwrap();
    if kill_container(&space, &victim.session).await {
        assert_eq!(exit_of(&mut events, &victim.session).await, Exit::Signal(9));
    }

    let missing = StartSpec {
        command: "no-such-program".to_owned(),
        ..shell(session("missing"), "")
    };
    let error = runtime.start(&missing).await.unwrap_err();
    let text = error.to_string();
    assert!(
        !error.is_retryable() && text.contains("no-such-program"),
        "{text}"
    );
    assert_eq!(space.leftovers(&missing.session).await, Vec::<String>::new());

    // On record: also when no pod is there any more to tell it.
    until("no pod of a session that has ended", async || {
        let of_session = ListParams::default().labels("regent.dev/session=glutton");
        let pods = space.api::<Pod>().list(&of_session).await.unwrap();
        pods.items.is_empty()
    })
    .await;
    let listed = space.open().await.list().await.unwrap();
    let states: Vec<ObservedState> = listed.iter().map(|one| one.state).collect();
    assert_eq!(
        states,
        [
            ObservedState::Exited(Exit::OutOfMemory),
            ObservedState::Exited(Exit::Signal(9))
        ]
    );
}

/// Kills a session's container behind the back of Kubernetes.
async fn kill_container(space: &Space, session: &SessionName) -> bool {
    let Some(engine) = std::env::var_os("REGENT_TEST_KUBERNETES_DOCKER") else {
        eprintln!("not killed: REGENT_TEST_KUBERNETES_DOCKER does not say where the node's engine is");
        return false;
    };
    let of_session = ListParams::default().labels(&format!("regent.dev/session={session}"));
    let pods = space.api::<Pod>().list(&of_session).await.unwrap();
    let containers = pods.items[0]
        .status
        .as_ref()
        .unwrap()
        .container_statuses
        .as_ref()
        .unwrap();
    let id = containers[0].container_id.as_ref().unwrap();
    let id = id.strip_prefix("docker://").unwrap();
    let kill = tokio::process::Command::new("docker")
        .arg("--host")
        .arg(engine)
        .args(["kill", id])
        .output();
    let kill = kill.await.unwrap();
    assert!(kill.status.success(), "{kill:?}");
    true
}

async fn exit_of(
    events: &mut futures::stream::BoxStream<'static, RuntimeEvent>,
    wanted: &SessionName,
) -> Exit {
    event(events, |event| match event {
        RuntimeEvent::Exited { session, exit, .. } if session == wanted => Some(*exit),
        _ => None,
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_does_not_exist_is_named() {
    if lacks_cluster() {
        return;
    }
    let space = Space::new("image").await;
    let runtime = space.open().await;
    let spec = StartSpec {
        image: Some("no-such-image:1".to_owned()),
        ..shell(session("no-image"), SLEEP)
    };
    let error = runtime.start(&spec).await.unwrap_err();
    let text = error.to_string();
    // The registry cannot be reached, and may be again: another run is for it.
    assert!(matches!(error, RuntimeError::StartFailed { .. }), "{error:?}");
    assert!(
        text.contains("no-such-image:1") && !text.contains("Back-off"),
        "{text}"
    );
    assert_eq!(space.leftovers(&spec.session).await, Vec::<String>::new());

    let root = StartSpec {
        container: regent_agent::runtime::ContainerSpec {
            security: regent_types::template::ManifestSecurity {
                capabilities: vec!["SYS_ADMIN".to_owned()],
                ..Default::default()
            },
            ..Default::default()
        },
        ..spec
    };
    let text = runtime.start(&root).await.unwrap_err().to_string();
    assert!(
        text.contains("SYS_ADMIN") && text.contains("allow-capability"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_no_node_takes_says_why_and_leaves_nothing() {
    if lacks_cluster() {
        return;
    }
    let space = Space::new("nodes").await;
    let options = KubernetesOptions {
        start_within: Duration::from_secs(5),
        ..space.options()
    };
    let runtime = space.open_with(options).await;
    let mut nowhere = shell(session("nowhere"), SLEEP);
    nowhere
        .container
        .node_selector
        .insert("regent.dev/nowhere".to_owned(), "yes".to_owned());
    does_not_fit(&space, &runtime, &nowhere, "didn't match").await;

    let _cordoned = Cordoned::new(&space).await;
    does_not_fit(
        &space,
        &runtime,
        &shell(session("cordoned"), SLEEP),
        "unschedulable",
    )
    .await;
}

async fn does_not_fit(space: &Space, runtime: &KubernetesRuntime, spec: &StartSpec, why: &str) {
    let mut events = runtime.watch();
    let error = runtime.start(spec).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, RuntimeError::StartFailed { .. }), "{error:?}");
    assert!(text.contains("0/1 nodes") && text.contains(why), "{text}");
    let words = event(&mut events, |event| match event {
        RuntimeEvent::Progress { session, message, .. } if *session == spec.session => Some(message.clone()),
        _ => None,
    });
    let words = words.await;
    assert!(words.starts_with("unschedulable: 0/1 nodes"), "{words}");
    assert_eq!(space.leftovers(&spec.session).await, Vec::<String>::new());
    assert!(runtime.list().await.unwrap().is_empty());
}

/// All nodes take no pods. For all tests, so only for a moment.
struct Cordoned(Api<Node>, Vec<String>);

impl Cordoned {
    async fn new(space: &Space) -> Self {
        let nodes = Api::<Node>::all(space.admin.clone());
        let names: Vec<String> = nodes
            .list(&ListParams::default())
            .await
            .unwrap()
            .iter()
            .map(ResourceExt::name_any)
            .collect();
        let cordoned = Self(nodes, names);
        cordoned.set(true).await;
        cordoned
    }

    async fn set(&self, cordoned: bool) {
        for name in &self.1 {
            let patch = Patch::Merge(json!({ "spec": { "unschedulable": cordoned } }));
            self.0.patch(name, &PatchParams::default(), &patch).await.unwrap();
        }
    }
}

impl Drop for Cordoned {
    fn drop(&mut self) {
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(self.set(false)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_delete_is_told_or_mended() {
    if lacks_cluster() {
        return;
    }
    let space = Space::new("others").await;
    let runtime = space.open().await;
    let mut events = runtime.watch();

    // A pod is replaced, and that is no exit.
    let spec = shell(session("drained"), SLEEP);
    let before = runtime.start(&spec).await.unwrap();
    let pod = before.metadata["pod"].clone();
    space
        .api::<Pod>()
        .delete(&pod, &DeleteParams::default().grace_period(1))
        .await
        .unwrap();
    until("another pod", async || {
        let listed = runtime.list().await.unwrap();
        let now = listed[0]
            .metadata
            .get("node")
            .and_then(|_| listed[0].metadata.get("podIP"));
        listed[0].state == ObservedState::Running && now.is_some() && listed[0].metadata["pod"] != pod
    })
    .await;

    // A Deployment is the session.
    let deployment = space.only::<Deployment>().await.name_any();
    space
        .api::<Deployment>()
        .delete(&deployment, &DeleteParams::background())
        .await
        .unwrap();
    assert_eq!(
        exit_of(&mut events, &spec.session).await,
        Exit::Removed,
        "the first exit that was told"
    );
    assert!(runtime.list().await.unwrap().is_empty());
    // What is left of it is swept up before the next begins.
    let again = StartSpec {
        generation: 2,
        ..spec
    };
    runtime.start(&again).await.unwrap();
    assert_eq!(space.all::<Pod>().await.len(), 1);
    runtime.stop(&again.session_ref(), GRACE).await.unwrap();
    assert_eq!(space.leftovers(&again.session).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_persistent_home_outlives_its_sessions_until_it_is_deleted() {
    if lacks_cluster() {
        return;
    }
    let space = Space::new("home").await;
    let runtime = space.open().await;
    let mut events = runtime.watch();
    let mut spec = StartSpec {
        persistent_home: true,
        user: UserName::new("A.very_odd+Name@Example.COM").unwrap(),
        ..shell(
            session("0-begins-with-a-digit"),
            "test -f /config/mark && exit 3; touch /config/mark || exit 5; exit 4",
        )
    };
    for (generation, delete_home, code) in [(1, false, 4), (2, true, 3), (3, true, 4)] {
        spec.generation = generation;
        runtime.start(&spec).await.unwrap();
        assert_eq!(exit_of(&mut events, &spec.session).await, Exit::Code(code));
        runtime
            .stop(&spec.session_ref(), Stop { delete_home, ..GRACE })
            .await
            .unwrap();
        assert_eq!(space.leftovers(&spec.session).await, Vec::<String>::new());
        let homes = space.all::<PersistentVolumeClaim>().await.len();
        assert_eq!(homes, usize::from(!delete_home));
    }

    // One that another session has stays.
    let one = StartSpec {
        generation: 4,
        ..spec.clone()
    };
    let other = StartSpec {
        session: session("other"),
        ..one.clone()
    };
    runtime.start(&one).await.unwrap();
    runtime.start(&other).await.unwrap();
    for (spec, homes) in [(one, 1), (other, 0)] {
        let how = Stop {
            delete_home: true,
            ..GRACE
        };
        runtime.stop(&spec.session_ref(), how).await.unwrap();
        assert_eq!(space.all::<PersistentVolumeClaim>().await.len(), homes);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hibernated_session_keeps_its_home() {
    if lacks_cluster() {
        return;
    }
    let space = Space::new("sleep").await;
    let runtime = space.open().await;
    let mut events = runtime.watch();
    let spec = shell(
        session("sleeper"),
        &format!("test -f /config/mark && exit 3; touch /config/mark; {SLEEP}"),
    );
    runtime.start(&spec).await.unwrap();
    until("its mark", async || {
        let pod = space.only::<Pod>().await;
        pod.status
            .is_some_and(|status| status.phase.as_deref() == Some("Running"))
    })
    .await;
    runtime.hibernate(&spec.session_ref()).await.unwrap();
    let pods = space.all::<Pod>().await;
    assert!(pods.iter().all(|pod| pod.metadata.deletion_timestamp.is_some()));
    runtime.wake(&spec.session_ref()).await.unwrap();
    assert_eq!(exit_of(&mut events, &spec.session).await, Exit::Code(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_is_served_by_a_service_and_its_silence_is_told() {
    if lacks_cluster() {
        return;
    }
    let space = Space::new("port").await;
    let runtime = space.open().await;
    let mut events = runtime.watch();
    let port = |name: &str, line: &str, ready_within| {
        let mut spec = shell(session(name), line);
        spec.port = Some(PortSpec {
            container_port: Some(8080),
            ready_within,
        });
        spec.container.ports = vec![ManifestPort {
            name: "http".to_owned(),
            container_port: 8080,
            protocol: "TCP".to_owned(),
        }];
        spec
    };
    let serves = port(
        "9-serves",
        "exec httpd -f -p 8080 -h /tmp",
        Duration::from_mins(1),
    );
    let observed = runtime.start(&serves).await.unwrap();
    let service = space.only::<Service>().await;
    assert_eq!(
        observed.url,
        Some(format!("http://{}.{}.svc:8080/", service.name_any(), space.name))
    );
    assert_eq!(observed.port, Some(8080));
    let address = service.spec.unwrap().cluster_ip.unwrap();
    until("an answer through the Service", async || {
        // A connection that is begun before the node knows the Service is lost for minutes.
        let connect = tokio::net::TcpStream::connect((address.as_str(), 8080));
        matches!(
            tokio::time::timeout(Duration::from_secs(1), connect).await,
            Ok(Ok(_))
        )
    })
    .await;

    let silent = port("silent", SLEEP, Duration::from_secs(1));
    let observed = runtime.start(&silent).await.unwrap();
    assert_eq!(observed.state, ObservedState::Running);
    let reason = event(&mut events, |event| match event {
        RuntimeEvent::Changed { observed, reason } if observed.session == silent.session => {
            Some(reason.clone())
        }
        _ => None,
    });
    let reason = reason.await;
    assert!(reason.contains("does not answer"), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_over_marks_every_object_and_a_late_patch_is_refused() {
    if lacks_cluster() {
        return;
    }
    let space = Space::new("takeover").await;
    let before = space.open().await;
    let mut spec = StartSpec {
        persistent_home: true,
        ..shell(session("with-home"), SLEEP)
    };
    spec.port = Some(PortSpec {
        container_port: Some(8080),
        ready_within: Duration::ZERO,
    });
    let started = before.start(&spec).await.unwrap();
    before.start(&shell(session("without"), SLEEP)).await.unwrap();
    // A former leader that has passed the fence has read this, and sends its patch now.
    let read: Vec<Deployment> = space.all().await;

    let after = space.open().await;
    assert_eq!(before.runtime_id(), after.runtime_id());
    after.take_over(Token(9)).await.unwrap();
    let mut tokens = Vec::new();
    tokens.extend(tokens_of(&space.all::<Deployment>().await));
    tokens.extend(tokens_of(&space.all::<Service>().await));
    tokens.extend(tokens_of(&space.all::<PersistentVolumeClaim>().await));
    assert_eq!(tokens, ["9"; 5], "two Deployments, a Service and two homes");
    for deployment in read {
        let late = Patch::Merge(json!({
            "metadata": { "resourceVersion": deployment.metadata.resource_version }, "spec": { "replicas": 0 },
        }));
        let sent = space
            .api::<Deployment>()
            .patch(&deployment.name_any(), &PatchParams::default(), &late)
            .await;
        assert!(matches!(sent, Err(kube::Error::Api(status)) if status.is_conflict()));
    }
    let error = before.stop(&spec.session_ref(), GRACE).await.unwrap_err();
    assert!(
        matches!(
            error,
            RuntimeError::Fence(FenceError::Fenced {
                asked: Token(7),
                highest: Token(9)
            })
        ),
        "{error:?}"
    );

    // The new leader goes on with it, and what it was started under is still known.
    let listed = after.list().await.unwrap();
    assert_eq!(listed[0], started);
    assert_eq!(listed[0].token, Token(7));
    let adopted = SessionRef {
        token: Token(9),
        ..spec.session_ref()
    };
    after.stop(&adopted, GRACE).await.unwrap();

    // A fence that somebody deletes is made again from what runs.
    let fence = space.only::<ConfigMap>().await.name_any();
    space
        .api::<ConfigMap>()
        .delete(&fence, &DeleteParams::default())
        .await
        .unwrap();
    let late = before.start(&shell(session("late"), SLEEP)).await.unwrap_err();
    assert!(
        matches!(late, RuntimeError::Fence(FenceError::Fenced { .. })),
        "{late:?}"
    );
}

fn tokens_of<K: kube::Resource>(objects: &[K]) -> Vec<String> {
    let tokens = objects
        .iter()
        .map(|object| object.annotations()["regent.dev/token"].clone());
    tokens.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn another_cluster_in_the_same_namespace_is_not_met() {
    if lacks_cluster() {
        return;
    }
    let space = Space::new("shared").await;
    let ours = space.open().await;
    let theirs = KubernetesRuntime::connect(space.options()).await.unwrap();
    assert!(
        theirs.list().await.unwrap().is_empty(),
        "nothing is found before it has joined"
    );
    let spec = shell(session("same-name"), SLEEP);
    let error = theirs.start(&spec).await.unwrap_err();
    assert!(error.is_retryable(), "{error:?}");
    theirs.joined(&ClusterId::new("Cluster.2").unwrap());
    let mut events = theirs.watch();
    let newer = StartSpec {
        token: Token(99),
        ..spec.clone()
    };
    ours.start(&newer).await.unwrap();
    // Their token is of another cluster, so it is not too old.
    theirs.start(&spec).await.unwrap();
    assert_eq!(space.all::<Deployment>().await.len(), 2);
    ours.stop(&newer.session_ref(), GRACE).await.unwrap();
    assert_eq!(theirs.list().await.unwrap().len(), 1);
    theirs.stop(&spec.session_ref(), GRACE).await.unwrap();
    // Neither the other's stop nor their own was told as an exit.
    let last = shell(session("last"), "exit 0");
    theirs.start(&last).await.unwrap();
    let first = event(&mut events, |event| match event {
        RuntimeEvent::Exited { session, .. } => Some(session.clone()),
        _ => None,
    });
    assert_eq!(first.await, last.session);
}
