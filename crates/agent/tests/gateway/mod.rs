//! A gateway and a runtime to test an agent against: real sockets, nothing behind them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, StreamExt};
use regent_agent::runtime::{
    Observed, ObservedState, Runs, Runtime, RuntimeError, RuntimeEvent, RuntimeKind, SessionRef, StartSpec,
    Stop,
};
use regent_types::frame::{AgentFrame, CommandFrame, Hello, Incoming, ServerFrame};
use regent_types::{CommandId, SessionName, Token};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, broadcast, mpsc};

/// Longer than anything here takes; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(90);

/// No guard ends while a test runs.
const LEASE_TTL_MS: u64 = 600_000;

pub(crate) const TOKEN: &str = "regent_secret";

/// A node that serves registration and the agents' socket.
pub(crate) struct Gateway {
    pub(crate) url: String,
    pub(crate) registrations: Arc<AtomicUsize>,
    links: mpsc::UnboundedReceiver<Link>,
}

#[derive(Clone)]
struct Shared {
    links: mpsc::UnboundedSender<Link>,
    registrations: Arc<AtomicUsize>,
}

/// The gateway's end of one connection.
pub(crate) struct Link {
    pub(crate) query: String,
    from_agent: mpsc::UnboundedReceiver<Message>,
    to_agent: mpsc::UnboundedSender<Message>,
}

impl Gateway {
    pub(crate) async fn start() -> Self {
        let (links, accepted) = mpsc::unbounded_channel();
        let registrations = Arc::new(AtomicUsize::new(0));
        let shared = Shared {
            links,
            registrations: registrations.clone(),
        };
        let app = Router::new()
            .route("/api/v1/agents/register", post(register))
            .route("/api/v1/agents/connect", get(connect))
            .with_state(shared);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self {
            url,
            registrations,
            links: accepted,
        }
    }

    /// The next connection.
    pub(crate) async fn link(&mut self) -> Link {
        within("a connection", self.links.recv()).await.unwrap()
    }

    /// The next connection, up to and with the welcome; gives what `hello` said.
    pub(crate) async fn welcomed(&mut self, base: u64) -> (Link, Hello) {
        let mut link = self.link().await;
        let hello = link.hello().await;
        link.welcome(base, Some(5));
        (link, hello)
    }

    /// The next connection, of a replica, up to its campaign.
    pub(crate) async fn campaigning(&mut self) -> (Link, Hello) {
        let mut link = self.link().await;
        let hello = link.hello().await;
        link.welcome(0, None);
        assert!(matches!(link.answer().await, AgentFrame::LeaseCampaign(_)));
        (link, hello)
    }

    /// The next connection, of a replica, up to its lead under this token; gives the second `hello`.
    pub(crate) async fn led(&mut self, token: u64) -> (Link, Hello) {
        let (mut link, _) = self.campaigning().await;
        let seq = link.promote(token).await;
        link.renew(token, seq);
        let hello = link.hello().await;
        link.welcome(0, Some(token));
        (link, hello)
    }
}

async fn register(State(shared): State<Shared>, headers: HeaderMap, body: String) -> Response {
    if headers.get("authorization").and_then(|v| v.to_str().ok()) != Some(&format!("Bearer {TOKEN}")) {
        return refused();
    }
    shared.registrations.fetch_add(1, Ordering::SeqCst);
    let body: Value = serde_json::from_str(&body).unwrap();
    let agent = json!({
        "agentId": body["agentId"], "platform": body["platform"], "region": "", "status": "offline",
        "scheduling": "eligible", "capacity": body["capacity"], "allocated": { "sessions": 0, "cpu": "0", "memory": "0" },
        "activeSessions": 0, "labels": {}, "metadata": {}, "replicas": []
    });
    (StatusCode::CREATED, axum::Json(agent)).into_response()
}

async fn connect(
    State(shared): State<Shared>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    upgrade: WebSocketUpgrade,
) -> Response {
    if headers.get("x-agent-api-key").and_then(|v| v.to_str().ok()) != Some(TOKEN) {
        return refused();
    }
    upgrade.on_upgrade(move |socket| carry(socket, shared, query.unwrap_or_default()))
}

fn refused() -> Response {
    let problem = regent_types::Problem::new(regent_types::Code::Unauthenticated, "unknown token");
    (StatusCode::UNAUTHORIZED, axum::Json(problem)).into_response()
}

async fn carry(mut socket: WebSocket, shared: Shared, query: String) {
    let (read, from_agent) = mpsc::unbounded_channel();
    let (to_agent, mut to_write) = mpsc::unbounded_channel();
    let link = Link {
        query,
        from_agent,
        to_agent,
    };
    if shared.links.send(link).is_err() {
        return;
    }
    loop {
        tokio::select! {
            message = socket.recv() => match message {
                Some(Ok(message)) => { let _ = read.send(message); }
                _ => return,
            },
            // A link that is dropped drops the socket: a node that was killed.
            message = to_write.recv() => match message {
                Some(message) => if socket.send(message).await.is_err() { return; },
                None => return,
            },
        }
    }
}

impl Link {
    pub(crate) fn send(&self, frame: &Value) {
        self.send_text(&frame.to_string());
    }

    pub(crate) fn send_text(&self, text: &str) {
        self.to_agent.send(Message::text(text)).unwrap();
    }

    pub(crate) fn command(&self, id: &str, action: &str, session: &str, token: u64) {
        let frame = CommandFrame {
            command_id: CommandId::new(id).unwrap(),
            run: 1,
            action: action.to_owned(),
            payload: json!({
                "sessionId": session, "generation": 1, "user": "alice", "template": "demo",
                "templateManifest": { "metadata": { "name": "demo" }, "spec": { "command": ["true"] } }
            }),
            token: Token(token),
            attempt: 1,
            deadline: None,
        };
        self.send_text(&ServerFrame::Command(frame).to_text(None));
    }

    pub(crate) fn welcome(&self, base: u64, token: Option<u64>) {
        self.send(&json!({ "type": "welcome", "payload": {
            "clusterId": "c-1", "base": base, "epoch": 5, "token": token, "heartbeatMs": 100, "staleMs": 60_000,
            "protocol": 3, "node": 1 } }));
    }

    /// Grants the lease, and gives the number of the keepalive that confirms it.
    pub(crate) async fn promote(&mut self, token: u64) -> u64 {
        self.send(&json!({ "type": "lease_granted", "payload": {
            "name": "agent/dev", "token": token, "ttlMs": LEASE_TTL_MS } }));
        match self.answer().await {
            AgentFrame::LeaseKeepalive(keepalive) if keepalive.token == Token(token) => keepalive.seq,
            other => panic!("not a keepalive of {token}: {other:?}"),
        }
    }

    pub(crate) fn renew(&self, token: u64, seq: u64) {
        self.send(&json!({ "type": "lease_renewed", "payload": {
            "name": "agent/dev", "token": token, "ttlMs": LEASE_TTL_MS, "seq": seq } }));
    }

    /// The next frame that is no heartbeat, which is `hello`.
    pub(crate) async fn hello(&mut self) -> Hello {
        match self.answer().await {
            AgentFrame::Hello(hello) => hello,
            other => panic!("not hello: {other:?}"),
        }
    }

    pub(crate) fn close(&self, code: u16) {
        let frame = CloseFrame {
            code,
            reason: "told to".into(),
        };
        self.to_agent.send(Message::Close(Some(frame))).unwrap();
    }

    /// The next message that is not a ping.
    pub(crate) async fn message(&mut self) -> Option<Message> {
        loop {
            match within("a message", self.from_agent.recv()).await {
                Some(Message::Ping(_) | Message::Pong(_)) => {}
                other => return other,
            }
        }
    }

    /// The next frame. Each message must be one frame (fault 6).
    pub(crate) async fn next(&mut self) -> AgentFrame {
        match self.message().await {
            Some(Message::Text(text)) => match AgentFrame::parse(&text) {
                Ok(Incoming::Frame(frame)) => frame,
                other => panic!("{text:?} is not one frame: {other:?}"),
            },
            other => panic!("not a frame: {other:?}"),
        }
    }

    /// The next frame that is no heartbeat.
    pub(crate) async fn answer(&mut self) -> AgentFrame {
        loop {
            match self.next().await {
                AgentFrame::Heartbeat(_) => {}
                other => return other,
            }
        }
    }

    /// The next frame that is neither a heartbeat, a keepalive nor an acknowledgement.
    pub(crate) async fn outcome(&mut self) -> AgentFrame {
        loop {
            match self.answer().await {
                AgentFrame::Ack(_) | AgentFrame::LeaseKeepalive(_) => {}
                other => return other,
            }
        }
    }
}

pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

/// A runtime that runs nothing. A start of a session whose name begins with `slow` waits for a permit;
/// one whose name has `fail` in it fails.
pub(crate) struct FakeRuntime {
    pub(crate) sessions: Mutex<BTreeMap<SessionName, Observed>>,
    pub(crate) starts: AtomicUsize,
    pub(crate) permits: Semaphore,
    pub(crate) events: broadcast::Sender<RuntimeEvent>,
}

impl FakeRuntime {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            sessions: Mutex::default(),
            starts: AtomicUsize::new(0),
            permits: Semaphore::new(0),
            events: broadcast::channel(16).0,
        })
    }

    pub(crate) fn put(&self, session: &str, state: ObservedState) {
        let session = SessionName::new(session).unwrap();
        let observed = Observed {
            session: session.clone(),
            generation: 1,
            token: Token(5),
            state,
            pid: Some(7),
            port: None,
            url: Some(format!("http://{session}/")),
            started_at_ms: None,
            metadata: BTreeMap::new(),
        };
        self.sessions.lock().unwrap().insert(session, observed);
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.sessions
            .lock()
            .unwrap()
            .keys()
            .map(ToString::to_string)
            .collect()
    }

    fn change(&self, session: &SessionRef, state: ObservedState) -> Result<Observed, RuntimeError> {
        let mut sessions = self.sessions.lock().unwrap();
        let observed = sessions.get_mut(&session.session).ok_or(RuntimeError::NotFound {
            session: session.session.clone(),
        })?;
        observed.state = state;
        Ok(observed.clone())
    }
}

impl Runtime for FakeRuntime {
    fn kind(&self) -> RuntimeKind {
        RuntimeKind::Process
    }

    #[allow(clippy::unnecessary_literal_bound)] // as the trait has it
    fn runtime_id(&self) -> &str {
        "fake:1"
    }

    fn runs(&self) -> &'static [Runs] {
        &[Runs::Command]
    }

    fn take_over(&self, _token: Token) -> BoxFuture<'_, Result<(), RuntimeError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn start<'a>(&'a self, spec: &'a StartSpec) -> BoxFuture<'a, Result<Observed, RuntimeError>> {
        Box::pin(async move {
            self.starts.fetch_add(1, Ordering::SeqCst);
            if spec.session.as_str().starts_with("slow") {
                self.permits.acquire().await.unwrap().forget();
            }
            if spec.session.as_str().contains("fail") {
                return Err(RuntimeError::StartFailed {
                    session: spec.session.clone(),
                    reason: "asked for".to_owned(),
                });
            }
            if spec.session.as_str().starts_with("panic") {
                // A panic that leaves the log of the tests alone.
                std::panic::resume_unwind(Box::new("asked for"));
            }
            self.put(spec.session.as_str(), ObservedState::Running);
            Ok(self.sessions.lock().unwrap()[&spec.session].clone())
        })
    }

    fn stop<'a>(&'a self, session: &'a SessionRef, _how: Stop) -> BoxFuture<'a, Result<(), RuntimeError>> {
        Box::pin(async move {
            self.sessions.lock().unwrap().remove(&session.session);
            Ok(())
        })
    }

    fn hibernate<'a>(&'a self, session: &'a SessionRef) -> BoxFuture<'a, Result<Observed, RuntimeError>> {
        Box::pin(async move { self.change(session, ObservedState::Hibernated) })
    }

    fn wake<'a>(&'a self, session: &'a SessionRef) -> BoxFuture<'a, Result<Observed, RuntimeError>> {
        Box::pin(async move { self.change(session, ObservedState::Running) })
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<Observed>, RuntimeError>> {
        Box::pin(async move { Ok(self.sessions.lock().unwrap().values().cloned().collect()) })
    }

    fn watch(&self) -> BoxStream<'static, RuntimeEvent> {
        let events = self.events.subscribe();
        stream::unfold(events, |mut events| async move {
            Some((events.recv().await.ok()?, events))
        })
        .boxed()
    }
}
