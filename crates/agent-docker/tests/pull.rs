//! Images that have to be pulled, from a small registry of the test's own: with credentials, with progress, again after
//! a failure, and not for ever.
#![allow(clippy::unwrap_used, reason = "these helpers are all of a test")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::StreamExt as _;
use regent_agent::runtime::{ObservedState, Runtime, RuntimeError, RuntimeEvent, StartSpec};
use regent_agent_docker::{DockerOptions, DockerRuntime, Pull};
use regent_types::Token;
use sha2::{Digest as _, Sha256};
use support::{Agent, Engine, SLEEP, spec, stop};

/// A registry with one image, `app:1`, which is a shell.
struct Registry {
    address: String,
    shared: Arc<Shared>,
}

struct Shared {
    layer: Vec<u8>,
    config: Vec<u8>,
    manifest: Vec<u8>,
    /// What `Authorization` must be, if anything.
    password: Option<String>,
    /// So many of the next requests for the manifest fail.
    failures: AtomicUsize,
    /// Requests for the manifest are never answered.
    silent: AtomicBool,
    manifests: AtomicUsize,
}

impl Registry {
    async fn start(password: Option<&str>) -> Self {
        let layer = layer();
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": [digest(&layer)] }
        });
        let config = serde_json::to_vec(&config).unwrap();
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {
                "mediaType": "application/vnd.docker.container.image.v1+json",
                "size": config.len(), "digest": digest(&config)
            },
            "layers": [{
                "mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip",
                "size": layer.len(), "digest": digest(&layer)
            }]
        });
        let shared = Arc::new(Shared {
            layer,
            config,
            manifest: serde_json::to_vec(&manifest).unwrap(),
            password: password.map(|password| format!("Basic {}", STANDARD.encode(password))),
            failures: AtomicUsize::new(0),
            silent: AtomicBool::new(false),
            manifests: AtomicUsize::new(0),
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let router = Router::new()
            .route(
                "/v2/",
                get(async |State(shared): State<Arc<Shared>>, headers: HeaderMap| shared.check(&headers)),
            )
            .route("/v2/app/manifests/{reference}", get(manifest_of))
            .route("/v2/app/blobs/{digest}", get(blob))
            .with_state(shared.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, shared }
    }

    fn image(&self) -> String {
        format!("{}/app:1", self.address)
    }
}

const MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

impl Shared {
    fn check(&self, headers: &HeaderMap) -> Response {
        let given = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok());
        if self
            .password
            .as_deref()
            .is_none_or(|password| given == Some(password))
        {
            return StatusCode::OK.into_response();
        }
        (
            StatusCode::UNAUTHORIZED,
            [(header::WWW_AUTHENTICATE, "Basic realm=\"test\"")],
        )
            .into_response()
    }
}

async fn manifest_of(
    State(shared): State<Arc<Shared>>,
    Path(reference): Path<String>,
    headers: HeaderMap,
) -> Response {
    let refused = shared.check(&headers);
    if refused.status() != StatusCode::OK {
        return refused;
    }
    shared.manifests.fetch_add(1, Ordering::SeqCst);
    if shared.silent.load(Ordering::SeqCst) {
        std::future::pending::<()>().await;
    }
    let fails = |left: usize| left.checked_sub(1);
    if shared
        .failures
        .fetch_update(Ordering::SeqCst, Ordering::SeqCst, fails)
        .is_ok()
    {
        return (StatusCode::INTERNAL_SERVER_ERROR, "asked for").into_response();
    }
    if reference != "1" && reference != digest(&shared.manifest) {
        let body = r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#;
        return (
            StatusCode::NOT_FOUND,
            [("content-type", "application/json")],
            body,
        )
            .into_response();
    }
    let found = digest(&shared.manifest);
    (
        [("content-type", MANIFEST), ("docker-content-digest", &found)],
        shared.manifest.clone(),
    )
        .into_response()
}

async fn blob(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Response {
    match name {
        name if name == digest(&shared.layer) => shared.layer.clone().into_response(),
        name if name == digest(&shared.config) => shared.config.clone().into_response(),
        _ => StatusCode::NOT_FOUND.into_response(),
    }
}

fn digest(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = "sha256:".to_owned();
    for byte in Sha256::digest(bytes) {
        write!(text, "{byte:02x}").unwrap();
    }
    text
}

/// A shell, a folder to write in, and a few megabytes that take time to fetch.
fn layer() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut put = |name: &str, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o755);
        tar.append_data(&mut header, name, content).unwrap();
    };
    let busybox = std::fs::read("/bin/busybox").unwrap();
    for name in ["bin/sh", "bin/sleep"] {
        put(name, &busybox);
    }
    // Two runs of the tests must not find each other's.
    put("marker", format!("{:?}", std::time::SystemTime::now()).as_bytes());
    tar.into_inner().unwrap()
}

async fn pulled(runtime: &DockerRuntime, spec: &StartSpec) -> Vec<String> {
    let mut events = runtime.watch();
    let observed = runtime.start(spec).await.unwrap();
    assert_eq!(observed.state, ObservedState::Running);
    let mut told = Vec::new();
    while let Some(Some(RuntimeEvent::Progress { session, message, .. })) =
        futures::FutureExt::now_or_never(events.next())
    {
        assert_eq!(session, spec.session);
        told.push(message);
    }
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_pulled_with_the_credentials_of_its_registry_and_again_after_a_failure() {
    let test = "an_image_is_pulled_with_the_credentials_of_its_registry_and_again_after_a_failure";
    let Some(engine) = Engine::shared(test) else {
        return;
    };
    let registry = Registry::start(Some("puller:secret word")).await;
    let agent = Agent::new(engine, "pulls");
    let spec = StartSpec {
        image: Some(registry.image()),
        ..spec(&agent.id, "pulls-1", SLEEP)
    };
    // Without credentials it is refused, for good: nobody will answer otherwise by being asked again.
    let error = agent.open().await.start(&spec).await.unwrap_err();
    assert!(matches!(&error, RuntimeError::BadSpec { .. }), "{error:?}");
    assert_eq!(agent.left("pulls-1"), Vec::<String>::new());
    let auth = STANDARD.encode("puller:secret word");
    let config = format!(r#"{{"auths":{{"{}":{{"auth":"{auth}"}}}}}}"#, registry.address);
    let with_credentials = DockerOptions {
        registry_config: Some(support::write(agent.data.path(), "config.json", &config)),
        ..agent.options()
    };
    let runtime = agent.open_with(with_credentials.clone()).await;
    registry.shared.failures.store(2, Ordering::SeqCst);
    let told = pulled(&runtime, &spec).await;
    assert!(
        told.iter().any(|message| message.contains("tried again")),
        "{told:?}"
    );
    stop(&runtime, &spec).await;
    // It is there now, and not asked for again, unless that is wished; and then what is there will do.
    let asked = registry.shared.manifests.load(Ordering::SeqCst);
    runtime.start(&spec).await.unwrap();
    stop(&runtime, &spec).await;
    assert_eq!(registry.shared.manifests.load(Ordering::SeqCst), asked);
    let always = agent
        .open_with(DockerOptions {
            pull: Pull::Always,
            pull_within: Duration::from_secs(2),
            ..with_credentials
        })
        .await;
    always.start(&spec).await.unwrap();
    stop(&always, &spec).await;
    assert!(registry.shared.manifests.load(Ordering::SeqCst) > asked);
    registry.shared.failures.store(1000, Ordering::SeqCst);
    always.start(&spec).await.unwrap();
    stop(&always, &spec).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_does_not_exist_is_refused_for_good_and_leaves_nothing() {
    let test = "an_image_that_does_not_exist_is_refused_for_good_and_leaves_nothing";
    let Some(engine) = Engine::shared(test) else {
        return;
    };
    let registry = Registry::start(None).await;
    let agent = Agent::new(engine, "pulls-none");
    let runtime = agent.open().await;
    for image in [format!("{}/app:2", registry.address), "Not An Image".to_owned()] {
        let spec = StartSpec {
            image: Some(image.clone()),
            ..spec(&agent.id, "pulls-none-1", SLEEP)
        };
        let error = runtime.start(&spec).await.unwrap_err();
        assert!(
            matches!(&error, RuntimeError::BadSpec { reason, .. } if reason.contains(&image)),
            "{error:?}"
        );
        assert_eq!(agent.left("pulls-none-1"), Vec::<String>::new());
    }
}

/// Meanwhile another replica takes over: the start that was waiting for its image makes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_does_not_answer_ends_a_start_and_a_takeover_meanwhile_fences_it() {
    let test = "a_registry_that_does_not_answer_ends_a_start_and_a_takeover_meanwhile_fences_it";
    let Some(engine) = Engine::shared(test) else {
        return;
    };
    let registry = Registry::start(None).await;
    let agent = Agent::new(engine, "pulls-late");
    let impatient = DockerOptions {
        pull_within: Duration::from_secs(2),
        ..agent.options()
    };
    let runtime = agent.open_with(impatient).await;
    let spec = StartSpec {
        image: Some(registry.image()),
        ..spec(&agent.id, "pulls-late-1", SLEEP)
    };
    registry.shared.silent.store(true, Ordering::SeqCst);
    let error = runtime.start(&spec).await.unwrap_err();
    assert!(
        error.is_retryable() && error.to_string().contains("within 2 s"),
        "{error}"
    );
    assert_eq!(agent.left("pulls-late-1"), Vec::<String>::new());

    let (old, new) = (agent.open().await, agent.open().await);
    registry.shared.silent.store(false, Ordering::SeqCst);
    registry.shared.failures.store(1000, Ordering::SeqCst);
    let mut events = old.watch();
    let late = old.start(&spec);
    let takeover = async {
        // A try has failed, and the next one waits: the old leader is in the middle of its start.
        while !matches!(events.next().await, Some(RuntimeEvent::Progress { message, .. }) if message.contains("again"))
        {
        }
        new.take_over(Token(2)).await.unwrap();
        registry.shared.failures.store(0, Ordering::SeqCst);
    };
    let (late, ()) = tokio::join!(late, takeover);
    let error = late.unwrap_err();
    assert!(matches!(error, RuntimeError::Fence(_)), "{error:?}");
    assert_eq!(agent.left("pulls-late-1"), Vec::<String>::new());
    assert_eq!(new.list().await.unwrap(), vec![]);
}
