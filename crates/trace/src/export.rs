//! Sends spans to a collector: OTLP over HTTP, protobuf.
//!
//! Spans wait in a queue of the SDK's, which is bounded and has a thread of its own: while a collector is away they are
//! dropped, and nothing waits. The SDK's own variables (`OTEL_BSP_*`, `OTEL_TRACES_SAMPLER`,
//! `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_RESOURCE_ATTRIBUTES`) mean what they always do.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use regent_tls::{ClientConfig, Trust};
use tokio::runtime::Handle;

use crate::command::Ids;
use crate::endpoint::OtlpEndpoint;
use crate::span;

/// How long a collector may take with all repetitions. Meanwhile spans wait, and are dropped once too many do.
const SEND_WITHIN: Duration = Duration::from_secs(5);
/// How long the end of the process waits for the last spans.
const END_WITHIN: Duration = Duration::from_secs(1);
/// A collector says little; the rest of what it may answer is not read.
const MAX_ANSWER: usize = 64 * 1024;

/// Why spans cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The machine trusts nobody, and the endpoint is `https`.
    #[error("no traces can be sent to {0}")]
    Trust(String, #[source] regent_tls::Error),
    /// The HTTP client cannot be made.
    #[error("the HTTP client for traces cannot be made")]
    Client(#[source] reqwest::Error),
    /// A variable of the SDK's is wrong.
    #[error("the exporter of traces cannot be made")]
    Exporter(#[source] opentelemetry_otlp::ExporterBuildError),
    /// A process has one exporter.
    #[error("traces are sent already")]
    Again,
}

/// The sending of spans, until [`Export::end`].
#[derive(Debug)]
pub struct Export(SdkTracerProvider);

/// Begins to make spans and to send them, as the service of this name and this instance of it. Within a runtime of
/// several threads, which must outlive it: the requests to the collector are made there.
pub fn export(
    endpoint: &OtlpEndpoint,
    service: &'static str,
    instance: String,
) -> Result<Export, ExportError> {
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(Sender::new(endpoint)?)
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(endpoint.traces())
        .with_timeout(SEND_WITHIN)
        .build()
        .map_err(ExportError::Exporter)?;
    let resource = Resource::builder()
        .with_service_name(service)
        .with_attribute(KeyValue::new("service.instance.id", instance))
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build();
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_id_generator(Ids::default())
        .with_resource(resource)
        .build();
    span::turn_on(provider.tracer("regent")).map_err(|_| ExportError::Again)?;
    Ok(Export(provider))
}

impl Export {
    /// Sends what waits, for a moment at most. Blocks.
    pub fn end(self) {
        if let Err(error) = self.0.shutdown_with_timeout(END_WITHIN) {
            tracing::debug!(%error, "the last spans were not sent");
        }
    }
}

/// The project's own HTTP client. The SDK calls it from a thread that has no runtime.
#[derive(Debug)]
struct Sender {
    http: reqwest::Client,
    runtime: Handle,
    /// Said once, and once when it is over.
    failing: AtomicBool,
}

impl Sender {
    fn new(endpoint: &OtlpEndpoint) -> Result<Self, ExportError> {
        let tls = if endpoint.is_https() {
            Trust::default().client_config()
        } else {
            Trust::none()
        }
        .map_err(|error| ExportError::Trust(endpoint.to_string(), error))?;
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(ClientConfig::clone(&tls))
            .timeout(SEND_WITHIN)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("regent/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(ExportError::Client)?;
        Ok(Self {
            http,
            runtime: Handle::current(),
            failing: AtomicBool::new(false),
        })
    }

    fn said(&self, why: Option<String>) {
        let was_failing = self.failing.swap(why.is_some(), Ordering::Relaxed);
        match why {
            Some(why) if !was_failing => {
                tracing::warn!(why, "traces are not taken; spans are dropped until they are");
            }
            None if was_failing => tracing::info!("traces are taken again"),
            Some(_) | None => {}
        }
    }
}

#[async_trait]
impl HttpClient for Sender {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let sent = self.runtime.spawn(send(self.http.clone(), request)).await;
        let answer = match sent {
            Ok(answer) => answer.map_err(HttpError::from),
            // The runtime ends, and the process with it.
            Err(error) => return Err(error.into()),
        };
        self.said(match &answer {
            Ok(answer) if answer.status().is_success() => None,
            Ok(answer) => Some(format!("the collector answered {}", answer.status())),
            Err(error) => Some(with_causes(error.as_ref())),
        });
        answer
    }
}

async fn send(http: reqwest::Client, request: Request<Bytes>) -> Result<Response<Bytes>, reqwest::Error> {
    let mut answer = http.execute(request.try_into()?).await?;
    let mut head = Response::new(Bytes::new());
    *head.status_mut() = answer.status();
    *head.headers_mut() = std::mem::take(answer.headers_mut());
    let mut body = Vec::new();
    while let Some(part) = answer.chunk().await? {
        body.extend_from_slice(&part[..part.len().min(MAX_ANSWER - body.len())]);
        if body.len() == MAX_ANSWER {
            break;
        }
    }
    Ok(head.map(|_| body.into()))
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
