//! Traces over OTLP: what a collector is sent, and that one that does not answer changes nothing.

use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use prost::Message as _;
use regent_client::CommandFilter;
use regent_types::session::SessionState;
use regent_types::{CommandId, SessionName};
use rustix::process::Signal;
use serde_json::json;

use crate::harness::{Dev, REGENT, eventually, send, session_state};

/// The trace and the span of whoever asks.
const CALLER: (&str, &str) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");

/// A span as a collector sees it.
#[derive(Debug, Clone)]
struct Seen {
    service: String,
    instance: String,
    span: Span,
}

impl Seen {
    fn attribute(&self, key: &str) -> String {
        text(&self.span.attributes, key)
    }

    /// The trace and the span, as `traceparent` writes them.
    fn ids(&self) -> (String, String) {
        (hex(&self.span.trace_id), hex(&self.span.span_id))
    }

    fn parent(&self) -> String {
        hex(&self.span.parent_span_id)
    }

    fn links(&self) -> Vec<(String, String)> {
        let ids = |link: &_| {
            let link: &opentelemetry_proto::tonic::trace::v1::span::Link = link;
            (hex(&link.trace_id), hex(&link.span_id))
        };
        self.span.links.iter().map(ids).collect()
    }
}

/// A collector of this test's own.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Seen>>>);

impl Collector {
    /// Takes traces from now on; gives its endpoint. On the threads of the test's runtime, which must be several.
    async fn start(&self) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new()
            .route("/v1/traces", post(take))
            .with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        endpoint
    }

    fn all(&self) -> Vec<Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The spans of this name that are about a command.
    fn of(&self, name: &str, command: &CommandId) -> Vec<Seen> {
        let mut all = self.all();
        all.retain(|seen| seen.span.name == name && seen.attribute("regent.command.id") == command.as_str());
        all
    }
}

async fn take(State(collector): State<Collector>, headers: HeaderMap, body: Bytes) {
    assert_eq!(headers["content-type"], "application/x-protobuf");
    let request = ExportTraceServiceRequest::decode(body).unwrap();
    let mut seen = Vec::new();
    for of_resource in request.resource_spans {
        let resource = of_resource.resource.unwrap_or_default();
        for span in of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
            seen.push(Seen {
                service: text(&resource.attributes, "service.name"),
                instance: text(&resource.attributes, "service.instance.id"),
                span,
            });
        }
    }
    let mut all = collector.0.lock().unwrap_or_else(PoisonError::into_inner);
    all.extend(seen);
}

fn text(attributes: &[KeyValue], key: &str) -> String {
    let found = attributes.iter().find(|attribute| attribute.key == key);
    match found.and_then(|attribute| attribute.value.as_ref()?.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        _ => String::new(),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

/// Creates a session as somebody who traces, waits until it runs, and gives the command that started it.
async fn run_session(dev: &Dev) -> CommandId {
    let answer = reqwest::Client::new()
        .post(format!("{}/api/v1/sessions", dev.file.nodes[0].http))
        .bearer_auth(&dev.file.admin_token)
        .header("traceparent", format!("00-{}-{}-01", CALLER.0, CALLER.1))
        .json(&json!({ "template": "sleep" }))
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 202);
    let created: serde_json::Value = answer.json().await.unwrap();
    let name = SessionName::new(created["name"].as_str().unwrap()).unwrap();
    let client = dev.client();
    session_state(&client, &name, SessionState::Running).await;
    let commands = client.all_commands(&CommandFilter::default()).await.unwrap();
    assert_eq!(commands.len(), 1, "the only session has one command");
    commands[0].command_id.clone()
}

/// Stops a session as somebody with this trace, and gives the answer.
async fn stop(dev: &Dev, session: &SessionName, trace: &str) -> serde_json::Value {
    let answer = reqwest::Client::new()
        .delete(format!("{}/api/v1/sessions/{session}", dev.file.nodes[0].http))
        .bearer_auth(&dev.file.admin_token)
        .header("traceparent", format!("00-{trace}-{}-01", CALLER.1))
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 202);
    answer.json().await.unwrap()
}

/// Who asks for what is under way already gets the command of the first, which has one root.
#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_is_asked_for_twice_is_made_once() {
    let collector = Collector::default();
    let endpoint = collector.start().await;
    let dev = Dev::start_with_env(
        &["--otlp-endpoint", &endpoint],
        &[("OTEL_BSP_SCHEDULE_DELAY", "100")],
    );
    let start = run_session(&dev).await;
    let session = dev.client().command(&start).await.unwrap().session_id.unwrap();
    // The stop is under way until the agent wakes.
    send(dev.file.agents[0].pid, Signal::STOP);
    let traces = ["1".repeat(32), "2".repeat(32)];
    let mut commands = Vec::new();
    for trace in &traces {
        commands.push(stop(&dev, &session, trace).await["commandId"].clone());
    }
    assert_eq!(commands[0], commands[1]);
    let command = CommandId::new(commands[0].as_str().unwrap()).unwrap();
    // Spans of one node come in order.
    let second = eventually("the second stop", || async {
        let mut all = collector.all();
        all.retain(|seen| seen.ids().0 == traces[1] && seen.span.kind() == SpanKind::Server);
        all.pop()
    })
    .await;
    assert_eq!(second.span.name, "DELETE /api/v1/sessions/{name}");
    let roots = collector.of("command", &command);
    assert_eq!(roots.len(), 1);
    assert_eq!(roots[0].links()[0].0, traces[0]);
    send(dev.file.agents[0].pid, Signal::CONT);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_is_followed_from_its_request_to_the_agent_and_back() {
    let collector = Collector::default();
    let endpoint = collector.start().await;
    let dev = Dev::start_with_env(
        &["--otlp-endpoint", &endpoint],
        &[("OTEL_BSP_SCHEDULE_DELAY", "100")],
    );
    let command = run_session(&dev).await;

    let reported = |what: &str| {
        let mut reports = collector.of("report", &command);
        reports.retain(|seen| seen.attribute("regent.report") == what);
        reports.pop()
    };
    let one = |name: &str| collector.of(name, &command).pop();
    let asked = |name: &str| {
        let mut all = collector.all();
        all.retain(|seen| seen.ids().0 == CALLER.0 && seen.span.name == name);
        assert!(all.len() <= 1, "{all:?}");
        all.pop()
    };
    let (request, propose) = eventually("the spans of the request", || async {
        Some((asked("POST /api/v1/sessions")?, asked("propose")?))
    })
    .await;
    let (root, dispatch, execute, ack, complete) = eventually("the spans of the command", || async {
        Some((
            one("command")?,
            one("dispatch")?,
            one("execute")?,
            reported("ack")?,
            reported("complete")?,
        ))
    })
    .await;

    // The request and its proposal, in the caller's trace.
    assert_eq!(
        (request.parent().as_str(), request.instance.as_str()),
        (CALLER.1, "1")
    );
    assert_eq!(request.span.kind(), SpanKind::Server);
    assert_eq!(request.attribute("http.route"), "/api/v1/sessions");
    assert_eq!(request.attribute("http.response.status_code"), "202");
    assert_eq!(propose.parent(), request.ids().1);
    // The command is the root of a trace of its own; it and the proposal lead to each other.
    assert_eq!(root.parent(), "");
    assert_ne!(root.ids().0, CALLER.0);
    assert_eq!(root.links(), [propose.ids()]);
    assert_eq!(propose.links(), [root.ids()]);
    // What was done for it, by whomever, is in that trace.
    for seen in [&dispatch, &execute, &ack, &complete] {
        assert_eq!((seen.ids().0, seen.parent()), root.ids(), "{}", seen.span.name);
        assert!(
            seen.span.status.as_ref().is_none_or(|status| status.code != 2),
            "{seen:?}"
        );
    }
    let services = [&request, &propose, &root, &dispatch, &ack, &complete].map(|seen| seen.service.as_str());
    assert_eq!(services, ["regent-server"; 6]);
    assert_eq!(
        (execute.service.as_str(), execute.instance.as_str()),
        ("regent-agent", "dev")
    );
    assert_eq!(execute.attribute("regent.command.action"), "start_session");
    assert_eq!(execute.span.kind(), SpanKind::Consumer);
    assert_eq!(dispatch.span.kind(), SpanKind::Producer);
    assert_eq!(dispatch.attribute("regent.command.attempt"), "1");

    // Probes and scrapes are not traced, and what the cluster writes by itself is in nobody's request.
    for seen in collector.all() {
        assert!(
            !seen.span.name.starts_with("GET /") || seen.span.name.starts_with("GET /api/"),
            "{}",
            seen.span.name
        );
        assert!(seen.span.name != "propose" || !seen.parent().is_empty());
    }
}

/// With an hour between two batches, all there is comes at the end.
#[tokio::test(flavor = "multi_thread")]
async fn the_last_spans_are_sent_when_a_process_is_told_to_end() {
    let collector = Collector::default();
    let endpoint = collector.start().await;
    let dev = Dev::start_with_env(
        &[],
        &[
            ("REGENT_OTLP_ENDPOINT", &endpoint),
            ("OTEL_BSP_SCHEDULE_DELAY", "3600000"),
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2048"),
        ],
    );
    run_session(&dev).await;
    assert_eq!(collector.all().len(), 0);
    dev.end(Signal::TERM);
    assert!(!collector.all().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_does_not_answer_changes_nothing() {
    // Connections are taken by the system, and nobody ever reads what they bring.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let env = [("OTEL_BSP_SCHEDULE_DELAY", "100")];
    let mut dev = Dev::start_with_env(&["--otlp-endpoint", &endpoint], &env);
    run_session(&dev).await;
    let log = dev.path().join("node-1.log");
    let complaints = || {
        let log = std::fs::read_to_string(&log).unwrap();
        log.matches("traces are not taken").count()
    };
    eventually("a word about the collector", || async {
        (complaints() > 0).then_some(())
    })
    .await;

    // A node that waits for the collector ends as any other.
    dev.kill_node(2);
    let command = dev.file.nodes[2].command.clone();
    let again = std::fs::File::create(dev.path().join("node-3.again.log")).unwrap();
    let mut node = Command::new(&command[0])
        .args(&command[1..])
        .envs(env)
        .stdin(Stdio::null())
        .stdout(again.try_clone().unwrap())
        .stderr(again)
        .spawn()
        .unwrap();
    let client = dev.client_of(2);
    eventually("the node again", || async { client.readyz().await.ok() }).await;
    client.cluster().await.unwrap();
    send(node.id(), Signal::TERM);
    assert_eq!(node.wait().unwrap().code(), Some(0));

    dev.client_of(0).cluster().await.unwrap();
    assert_eq!(complaints(), 1, "it is said once");
}

#[test]
fn an_endpoint_that_is_none_is_refused_before_anything_is_begun() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("regent.toml");
    std::fs::write(&file, "otlp-endpoint = \"collector:4318\"\n").unwrap();
    let file = file.to_str().unwrap();
    let by_flag: &[&str] = &["--otlp-endpoint", "collector:4318"];
    for command in [&["server"][..], &["agent", "run"], &["dev"]] {
        let by_variable = ("REGENT_OTLP_ENDPOINT", "collector:4318");
        let mut ways = vec![(by_flag, None), (&[][..], Some(by_variable))];
        let by_file = ["--config", file];
        if command != ["dev"] {
            ways.push((&by_file, None));
        }
        for (flags, variable) in ways {
            let output = Command::new(REGENT)
                .args(command)
                .args(flags)
                .envs(variable)
                .stdin(Stdio::null())
                .output()
                .unwrap();
            let said = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(2), "{command:?} {flags:?}: {said}");
            for word in ["collector:4318", "http://127.0.0.1:4318", "no http or https URL"] {
                assert!(said.contains(word), "{command:?} {flags:?}: {said}");
            }
        }
    }
}
