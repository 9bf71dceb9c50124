//! A namespace of one's own in a real cluster, and in it the agent with the rights of
//! `deploy/kubernetes/agent.yaml` and no others. Meddling is done as administrator.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Namespace, PersistentVolumeClaim, Pod, Service, ServiceAccount};
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, Resource, ResourceExt};
use regent_agent::runtime::{
    ContainerSpec, Observed, Runs, Runtime, RuntimeError, RuntimeEvent, RuntimeKind, SessionRef, StartSpec,
    Stop,
};
use regent_agent_kubernetes::{KubernetesOptions, KubernetesRuntime};
use regent_types::{AgentId, ClusterId, SessionName, TemplateName, Token, UserName};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// What a test waits for at most. Only waited out by a test that fails.
pub(crate) const PATIENCE: Duration = Duration::from_mins(2);
/// The image of the test cluster: busybox.
pub(crate) const IMAGE: &str = "regent-test:1";
/// A program that runs until it is told to end.
pub(crate) const SLEEP: &str = r#"trap "exit 0" TERM; while :; do sleep 1 & wait $!; done"#;

const AGENT: &str = include_str!("../../../../deploy/kubernetes/agent.yaml");
const ACCOUNT: &str = "regent-agent";

static NAMESPACES: AtomicU32 = AtomicU32::new(0);

/// Whether there is no cluster. A missing cluster skips the test by name, unless `REGENT_REQUIRE` lists it: then it
/// is a failure.
pub(crate) fn lacks_cluster() -> bool {
    if std::env::var_os("REGENT_TEST_KUBECONFIG").is_some() {
        return false;
    }
    let required = std::env::var("REGENT_REQUIRE").unwrap_or_default();
    assert!(
        !required.split(',').any(|r| r.trim() == "kubernetes"),
        "REGENT_REQUIRE demands kubernetes, which is not here"
    );
    eprintln!(
        "SKIPPED: {} lacks kubernetes",
        std::thread::current().name().unwrap_or("this test")
    );
    true
}

/// A namespace, gone with all that is in it when the test ends.
pub(crate) struct Space {
    pub(crate) admin: Client,
    pub(crate) name: String,
    kubeconfig: tempfile::NamedTempFile,
}

impl Space {
    pub(crate) async fn new(what: &str) -> Self {
        let path = PathBuf::from(std::env::var_os("REGENT_TEST_KUBECONFIG").unwrap());
        let admin = client(&path).await;
        let number = NAMESPACES.fetch_add(1, Ordering::Relaxed);
        let name = format!("regent-test-{what}-{}-{number}", std::process::id());
        let mut namespace = Namespace::default();
        namespace.metadata.name = Some(name.clone());
        Api::all(admin.clone())
            .create(&PostParams::default(), &namespace)
            .await
            .unwrap();
        let mut space = Self {
            admin,
            name,
            kubeconfig: tempfile::NamedTempFile::new().unwrap(),
        };
        space.apply_the_deployed_role().await;
        space.log_in_as_agent(&path).await;
        space
    }

    pub(crate) fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.admin.clone(), &self.name)
    }

    /// A client with the rights of the agent.
    pub(crate) async fn agent(&self) -> Client {
        client(self.kubeconfig.path()).await
    }

    pub(crate) fn options(&self) -> KubernetesOptions {
        KubernetesOptions {
            kubeconfig: Some(self.kubeconfig.path().to_owned()),
            namespace: Some(self.name.clone()),
            home_size: "100Mi".to_owned(),
            run_as_user: Some(1000),
            image_pull_policy: Some("IfNotPresent".to_owned()),
            ..KubernetesOptions::new(agent_id())
        }
    }

    /// An agent that was just started.
    pub(crate) async fn open(&self) -> KubernetesRuntime {
        self.open_with(self.options()).await
    }

    pub(crate) async fn open_with(&self, options: KubernetesOptions) -> KubernetesRuntime {
        let runtime = KubernetesRuntime::connect(options).await.unwrap();
        runtime.joined(&ClusterId::new("Cluster.1").unwrap());
        runtime
    }

    /// All that belongs to a session, in words.
    pub(crate) async fn leftovers(&self, session: &SessionName) -> Vec<String> {
        let mut left = Vec::new();
        left.extend(labelled::<Deployment>(self, session).await);
        left.extend(labelled::<ReplicaSet>(self, session).await);
        left.extend(labelled::<Pod>(self, session).await);
        left.extend(labelled::<Service>(self, session).await);
        left.extend(labelled::<PersistentVolumeClaim>(self, session).await);
        left
    }

    /// The one object of this kind.
    pub(crate) async fn only<K>(&self) -> K
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + DeserializeOwned,
    {
        let mut all = self.all::<K>().await;
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    pub(crate) async fn all<K>(&self) -> Vec<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + DeserializeOwned,
    {
        let ours = ListParams::default().labels("app.kubernetes.io/managed-by=regent");
        self.api::<K>().list(&ours).await.unwrap().items
    }

    /// Creates the account, the Role and the binding of the deployed file here.
    async fn apply_the_deployed_role(&mut self) {
        for document in AGENT.split("\n---\n") {
            let mut object: Value = serde_saphyr::from_str(document).unwrap();
            object["metadata"]["namespace"] = self.name.as_str().into();
            for subject in object["subjects"].as_array_mut().into_iter().flatten() {
                subject["namespace"] = self.name.as_str().into();
            }
            match object["kind"].as_str().unwrap() {
                "ServiceAccount" => self.create::<ServiceAccount>(object).await,
                "Role" => self.create::<Role>(object).await,
                "RoleBinding" => self.create::<RoleBinding>(object).await,
                "Deployment" => drop(serde_json::from_value::<Deployment>(object).unwrap()),
                other => panic!("the file has a {other}, which this test does not know"),
            }
        }
        // Without it no pod is let in.
        until("the default service account", async || {
            let accounts = self.api::<ServiceAccount>();
            accounts.get_opt("default").await.unwrap().is_some()
        })
        .await;
    }

    async fn create<K>(&self, object: Value)
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + DeserializeOwned
            + serde::Serialize,
    {
        let object: K = serde_json::from_value(object).unwrap();
        self.api().create(&PostParams::default(), &object).await.unwrap();
    }

    /// Writes the administrator's kubeconfig again, with the token of the agent's account in it.
    async fn log_in_as_agent(&mut self, admin: &std::path::Path) {
        let request = TokenRequest {
            spec: TokenRequestSpec {
                expiration_seconds: Some(3600),
                ..TokenRequestSpec::default()
            },
            ..TokenRequest::default()
        };
        let accounts = self.api::<ServiceAccount>();
        let params = PostParams::default();
        let answer = accounts.create_token_request(ACCOUNT, &params, &request).await;
        let token = answer.unwrap().status.unwrap().token;
        let mut config: Value = serde_saphyr::from_str(&std::fs::read_to_string(admin).unwrap()).unwrap();
        config["users"][0]["user"] = serde_json::json!({ "token": token });
        // JSON is YAML.
        std::fs::write(self.kubeconfig.path(), config.to_string()).unwrap();
    }
}

impl Drop for Space {
    /// On a runtime of its own: the test's may be going down, and a namespace that is left takes room in the cluster.
    fn drop(&mut self) {
        let (path, name) = (
            std::env::var_os("REGENT_TEST_KUBECONFIG").unwrap(),
            self.name.clone(),
        );
        let removal = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let namespaces = Api::<Namespace>::all(client(&PathBuf::from(path)).await);
                drop(namespaces.delete(&name, &DeleteParams::background()).await);
            });
        });
        drop(removal.join());
    }
}

async fn client(kubeconfig: &std::path::Path) -> Client {
    let kubeconfig = Kubeconfig::read_from(kubeconfig).unwrap();
    let options = KubeConfigOptions::default();
    let config = Config::from_custom_kubeconfig(kubeconfig, &options).await;
    Client::try_from(config.unwrap()).unwrap()
}

async fn labelled<K>(space: &Space, session: &SessionName) -> Vec<String>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned,
{
    let of_session = ListParams::default().labels(&format!("regent.dev/session={session}"));
    let found = space.api::<K>().list(&of_session).await.unwrap();
    let names = found
        .iter()
        .map(|one| format!("{} {}", K::kind(&()), one.name_any()));
    names.collect()
}

pub(crate) fn agent_id() -> AgentId {
    AgentId::new("k8s").unwrap()
}

pub(crate) fn session(name: &str) -> SessionName {
    SessionName::new(name).unwrap()
}

/// A session whose program is a line of shell.
pub(crate) fn shell(name: SessionName, line: &str) -> StartSpec {
    StartSpec {
        session: name,
        generation: 1,
        token: Token(7),
        agent: agent_id(),
        user: UserName::new("alice").unwrap(),
        template: TemplateName::new("demo").unwrap(),
        image: Some(IMAGE.to_owned()),
        command: "sh".to_owned(),
        args: vec!["-c".to_owned(), line.to_owned()],
        env: BTreeMap::new(),
        cpu_milli: None,
        memory_bytes: Some(32 << 20),
        persistent_home: false,
        port: None,
        hibernate: None,
        container: ContainerSpec::default(),
        metadata: BTreeMap::new(),
    }
}

/// Waits for an event and gives it; others may come before.
pub(crate) async fn event<T>(
    events: &mut BoxStream<'static, RuntimeEvent>,
    mut wanted: impl FnMut(&RuntimeEvent) -> Option<T>,
) -> T {
    let mut before = Vec::new();
    let found = async {
        loop {
            let event = events.next().await.expect("the events ended");
            if let Some(found) = wanted(&event) {
                return found;
            }
            before.push(event);
        }
    };
    let found = tokio::time::timeout(PATIENCE, found).await;
    found.unwrap_or_else(|_| panic!("no such event came; instead: {before:#?}"))
}

/// Waits until something holds.
pub(crate) async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, wait).await;
    waited.unwrap_or_else(|_| panic!("not in time: {what}"));
}

/// A runtime that tells of exits only, which is what the conformance suite is about: how long a pod takes to come up,
/// and what it tells meanwhile, is the cluster's affair.
pub(crate) struct ExitsOnly(pub(crate) KubernetesRuntime);

impl Runtime for ExitsOnly {
    fn kind(&self) -> RuntimeKind {
        self.0.kind()
    }

    fn runtime_id(&self) -> &str {
        self.0.runtime_id()
    }

    fn runs(&self) -> &'static [Runs] {
        self.0.runs()
    }

    fn is_shared(&self) -> bool {
        self.0.is_shared()
    }

    fn joined(&self, cluster: &ClusterId) {
        self.0.joined(cluster);
    }

    fn take_over(&self, token: Token) -> BoxFuture<'_, Result<(), RuntimeError>> {
        self.0.take_over(token)
    }

    fn start<'a>(&'a self, spec: &'a StartSpec) -> BoxFuture<'a, Result<Observed, RuntimeError>> {
        self.0.start(spec)
    }

    fn stop<'a>(&'a self, session: &'a SessionRef, how: Stop) -> BoxFuture<'a, Result<(), RuntimeError>> {
        self.0.stop(session, how)
    }

    fn hibernate<'a>(&'a self, session: &'a SessionRef) -> BoxFuture<'a, Result<Observed, RuntimeError>> {
        self.0.hibernate(session)
    }

    fn wake<'a>(&'a self, session: &'a SessionRef) -> BoxFuture<'a, Result<Observed, RuntimeError>> {
        self.0.wake(session)
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<Observed>, RuntimeError>> {
        self.0.list()
    }

    fn watch(&self) -> BoxStream<'static, RuntimeEvent> {
        let exits = self.0.watch().filter(|event| {
            let exit = !matches!(
                event,
                RuntimeEvent::Progress { .. } | RuntimeEvent::Changed { .. }
            );
            async move { exit }
        });
        exits.boxed()
    }
}
