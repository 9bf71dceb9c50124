//! The spans there are, and nothing else of OpenTelemetry: what the rest of the project sees of traces.

use std::sync::OnceLock;

use http::HeaderMap;
use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::{
    FutureExt as _, Link, SpanBuilder, SpanKind, Status, TraceContextExt as _, Tracer as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::HeaderExtractor;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracer;
use regent_types::{ClusterId, CommandId};

use crate::command;

/// There once spans are sent.
static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// Spans are made from now on; a second tracer is refused.
pub(crate) fn turn_on(tracer: SdkTracer) -> Result<(), SdkTracer> {
    TRACER.set(tracer)
}

/// Whether spans are made at all.
pub fn is_on() -> bool {
    TRACER.get().is_some()
}

/// Something that is being done. It ends when it is dropped, be it that whoever waited for it went away.
#[derive(Debug)]
#[must_use = "a span ends when it is dropped"]
pub struct Span(Option<Context>);

impl Span {
    /// Nothing that is traced.
    pub const fn none() -> Self {
        Self(None)
    }

    /// Does `work` within this span: what it begins is a part of it.
    pub async fn around<F: Future>(&self, work: F) -> F::Output {
        match &self.0 {
            Some(context) => work.with_context(context.clone()).await,
            None => work.await,
        }
    }

    /// The answer to a request. What the node is to blame for is an error, what the caller is to blame for is none.
    pub fn answered(&self, status: u16) {
        if let Some(context) = &self.0 {
            let code = KeyValue::new("http.response.status_code", i64::from(status));
            context.span().set_attribute(code);
            if status >= 500 {
                context.span().set_status(Status::error(""));
            }
        }
    }

    /// It came to nothing.
    pub fn failed(&self, why: &str) {
        if let Some(context) = &self.0 {
            context.span().set_status(Status::error(why.to_owned()));
        }
    }

    fn begin(tracer: &SdkTracer, builder: SpanBuilder, parent: &Context) -> Self {
        Self(Some(parent.with_span(tracer.build_with_context(builder, parent))))
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some(context) = &self.0 {
            context.span().end();
        }
    }
}

/// A request, in the trace of its caller if its headers name one (W3C `traceparent`). One that cannot be read is as good
/// as none.
pub fn request(method: &'static str, route: &'static str, headers: &HeaderMap) -> Span {
    let Some(tracer) = TRACER.get() else {
        return Span::none();
    };
    let caller =
        TraceContextPropagator::new().extract_with_context(&Context::new(), &HeaderExtractor(headers));
    let builder = SpanBuilder::from_name(format!("{method} {route}"))
        .with_kind(SpanKind::Server)
        .with_attributes([
            KeyValue::new("http.request.method", method),
            KeyValue::new("http.route", route),
        ]);
    Span::begin(tracer, builder, &caller)
}

/// A write to the log, for the request that it is a part of. What nobody asked for is not traced.
pub fn propose() -> Span {
    let Some(tracer) = TRACER.get() else {
        return Span::none();
    };
    let current = Context::current();
    if current.has_active_span() {
        Span::begin(tracer, SpanBuilder::from_name("propose"), &current)
    } else {
        Span::none()
    }
}

/// A command was made: the root of its trace, linked with the proposal that made it and through that with its request.
pub fn command_made(cluster: &ClusterId, id: &CommandId, by: &Span) {
    let Some(tracer) = TRACER.get() else {
        return;
    };
    let root = command::root(cluster, id);
    let links = match &by.0 {
        Some(proposal) => {
            proposal.span().add_link(root.clone(), Vec::new());
            vec![Link::with_context(proposal.span().span_context().clone())]
        }
        None => Vec::new(),
    };
    let builder = SpanBuilder::from_name("command")
        .with_attributes([of(id)])
        .with_links(links);
    command::with_ids_of(&root, || {
        drop(Span::begin(tracer, builder, &Context::new()));
    });
}

/// The handing over of a command to its agent.
pub fn dispatch(cluster: &ClusterId, id: &CommandId, run: u32, attempt: u32) -> Span {
    within_command(cluster, id, || {
        SpanBuilder::from_name("dispatch")
            .with_kind(SpanKind::Producer)
            .with_attributes([
                of(id),
                KeyValue::new("regent.command.run", i64::from(run)),
                KeyValue::new("regent.command.attempt", i64::from(attempt)),
            ])
    })
}

/// What an agent does for a command.
pub fn execute(cluster: &ClusterId, id: &CommandId, run: u32, action: &str) -> Span {
    within_command(cluster, id, || {
        SpanBuilder::from_name("execute")
            .with_kind(SpanKind::Consumer)
            .with_attributes([
                of(id),
                KeyValue::new("regent.command.run", i64::from(run)),
                KeyValue::new("regent.command.action", action.to_owned()),
            ])
    })
}

/// What a node does with an agent's report on a command: `ack`, `complete` or `failed`.
pub fn report(cluster: &ClusterId, id: &CommandId, what: &'static str) -> Span {
    within_command(cluster, id, || {
        SpanBuilder::from_name("report").with_attributes([of(id), KeyValue::new("regent.report", what)])
    })
}

fn within_command(cluster: &ClusterId, id: &CommandId, builder: impl FnOnce() -> SpanBuilder) -> Span {
    let Some(tracer) = TRACER.get() else {
        return Span::none();
    };
    let parent = Context::new().with_remote_span_context(command::root(cluster, id));
    Span::begin(tracer, builder(), &parent)
}

fn of(id: &CommandId) -> KeyValue {
    KeyValue::new("regent.command.id", id.to_string())
}
