//! One call: which server, how often, how long.
//!
//! Invariant: a request is sent a second time only if that cannot do its work twice, that is if it
//! certainly was not done before (no connection, 503), if doing it twice is doing it once ([`Repeat::Freely`]),
//! or if it carries an idempotency key ([`Repeat::WithKey`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt as _, TryStreamExt as _};
use regent_tls::{ClientConfig, Trust};
use regent_types::cluster::INDEX_HEADER;
use regent_types::{Code, Problem, Revision};
use reqwest::header::{ETAG, HeaderMap, HeaderValue};
use reqwest::{Method, StatusCode, Url};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Error;
use crate::backoff::FullJitter;

/// How long one call may take with all its repetitions, unless set by [`Client::with_deadline`]. Longer
/// than a failover of the cluster and than a node's own deadline for a write (10 s).
const DEADLINE: Duration = Duration::from_secs(20);
/// One server gets this long to answer: a frozen one must leave time for the next.
pub(crate) const ATTEMPT: Duration = Duration::from_secs(6);
/// One server gets this long to take the connection.
const CONNECT: Duration = Duration::from_secs(2);
/// When every server refused the connection this many times in a row, there is nobody there.
const ROUNDS_WITHOUT_CONNECTION: usize = 4;
/// The ceiling of the first wait, after every server was asked once.
pub(crate) const FIRST_WAIT: Duration = Duration::from_millis(50);
/// The ceiling of later waits.
pub(crate) const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// How much of a foreign server's answer is shown.
const SHOWN: usize = 200;

/// How fresh what is read must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Consistency {
    /// Everything that was acknowledged before the request was sent.
    #[default]
    Linearizable,
    /// Whatever the node that answers has; works without a quorum.
    Stale,
    /// At least up to this revision.
    AtLeast(Revision),
}

/// A client of a cluster. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    shared: Arc<Shared>,
    token: Option<HeaderValue>,
    deadline: Duration,
    consistency: Consistency,
}

#[derive(Debug)]
struct Shared {
    http: reqwest::Client,
    tls: Arc<ClientConfig>,
    servers: Vec<Url>,
    /// The server that answered last: the next call begins there.
    preferred: AtomicUsize,
}

/// When a request may be sent again after an attempt whose outcome is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Repeat {
    /// At any time: doing it twice is doing it once.
    Freely,
    /// At any time, under the same idempotency key.
    WithKey,
    /// Never: a repetition would be refused though the first was done (`If-Match`).
    NotInDoubt,
}

/// A request to be.
pub(crate) struct Call {
    method: Method,
    path: Vec<String>,
    query: Vec<(&'static str, String)>,
    body: Option<Vec<u8>>,
    if_match: Option<String>,
    repeat: Repeat,
    /// Whether `path` is under `/api/v1`.
    api: bool,
}

impl Call {
    pub(crate) fn new<const N: usize>(method: Method, path: [&str; N]) -> Self {
        let repeat = if method == Method::POST {
            Repeat::WithKey
        } else {
            Repeat::Freely
        };
        Self {
            method,
            path: path.iter().map(|&segment| segment.to_owned()).collect(),
            query: Vec::new(),
            body: None,
            if_match: None,
            repeat,
            api: true,
        }
    }

    pub(crate) fn get<const N: usize>(path: [&str; N]) -> Self {
        Self::new(Method::GET, path)
    }

    pub(crate) fn post<const N: usize>(path: [&str; N]) -> Self {
        Self::new(Method::POST, path)
    }

    pub(crate) fn put<const N: usize>(path: [&str; N]) -> Self {
        Self::new(Method::PUT, path)
    }

    pub(crate) fn delete<const N: usize>(path: [&str; N]) -> Self {
        Self::new(Method::DELETE, path)
    }

    /// Outside `/api/v1`.
    pub(crate) fn outside_api(mut self) -> Self {
        self.api = false;
        self
    }

    pub(crate) fn query(mut self, query: impl IntoIterator<Item = (&'static str, String)>) -> Self {
        self.query.extend(query);
        self
    }

    pub(crate) fn body(mut self, body: &impl Serialize) -> Self {
        self.body = Some(serde_json::to_vec(body).expect("bodies hold nothing that JSON cannot"));
        self
    }

    pub(crate) fn repeat(mut self, repeat: Repeat) -> Self {
        self.repeat = repeat;
        self
    }

    pub(crate) fn if_match(mut self, etag: Option<&str>) -> Self {
        if let Some(etag) = etag {
            self.if_match = Some(etag.to_owned());
            self.repeat = Repeat::NotInDoubt;
        }
        self
    }

    fn url(&self, server: &Url) -> Result<Url, Error> {
        // The URL standard resolves these two in any spelling, so they cannot name anything.
        if let Some(bad) = self
            .path
            .iter()
            .find(|segment| matches!(segment.as_str(), "." | ".."))
        {
            return Err(Error::Configuration(format!("{bad:?} cannot stand in a URL")));
        }
        let mut url = server.clone();
        {
            let mut segments = url
                .path_segments_mut()
                .expect("Client::new takes only http URLs, which have paths");
            segments.pop_if_empty();
            if self.api {
                segments.extend(["api", "v1"]);
            }
            segments.extend(&self.path);
        }
        if !self.query.is_empty() {
            url.query_pairs_mut().extend_pairs(&self.query);
        }
        Ok(url)
    }
}

/// What a server answered to a call that succeeded.
pub(crate) struct Answer {
    server: String,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Answer {
    pub(crate) fn json<T: DeserializeOwned>(&self) -> Result<T, Error> {
        serde_json::from_slice(&self.body).map_err(|source| Error::BadAnswer {
            server: self.server.clone(),
            source,
        })
    }

    pub(crate) fn etag(&self) -> Option<String> {
        self.headers.get(ETAG)?.to_str().ok().map(str::to_owned)
    }

    pub(crate) fn index(&self) -> Option<Revision> {
        self.headers.get(INDEX_HEADER)?.to_str().ok()?.parse().ok()
    }
}

/// How one attempt ended that did not succeed.
pub(crate) struct Failure {
    pub(crate) error: Error,
    /// Whether another attempt makes sense.
    pub(crate) again: bool,
    /// Whether the request may have been done.
    pub(crate) doubt: bool,
    /// Whether a connection was made at all.
    connected: bool,
}

impl Client {
    /// A client of the cluster whose nodes have these URLs, such as `https://10.0.0.1:8000`. They are
    /// asked in turn. Without a token only login and the status routes are answered. Nodes with `https` are believed
    /// when this machine trusts their certificates; a cluster's own CA is for [`Client::with_trust`].
    pub fn new<S: AsRef<str>>(
        servers: impl IntoIterator<Item = S>,
        token: Option<String>,
    ) -> Result<Self, Error> {
        Self::with_trust(servers, token, &Trust::default())
    }

    /// As [`Client::new`], believing these certificates. The files are read now, and only if a URL is `https`.
    pub fn with_trust<S: AsRef<str>>(
        servers: impl IntoIterator<Item = S>,
        token: Option<String>,
        trust: &Trust,
    ) -> Result<Self, Error> {
        let servers: Vec<Url> = servers
            .into_iter()
            .map(|text| text.as_ref().trim().to_owned())
            .filter(|text| !text.is_empty())
            .map(|text| parse_server(&text))
            .collect::<Result<_, _>>()?;
        if servers.is_empty() {
            return Err(Error::Configuration("no server is given".to_owned()));
        }
        // Other clients in this process may want the default that this one does without.
        regent_tls::install_provider();
        let tls = if servers.iter().any(|server| server.scheme() == "https") {
            trust.client_config()
        } else {
            Trust::none()
        }
        .map_err(|error| Error::Configuration(error.to_string()))?;
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(ClientConfig::clone(&tls))
            .connect_timeout(CONNECT)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("regent/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| Error::Configuration(format!("the HTTP client cannot be made: {error}")))?;
        Ok(Self {
            shared: Arc::new(Shared {
                http,
                tls,
                servers,
                preferred: AtomicUsize::new(0),
            }),
            token: token.map(|token| bearer(&token)).transpose()?,
            deadline: DEADLINE,
            consistency: Consistency::default(),
        })
    }

    /// The same client as somebody else.
    pub fn with_token(&self, token: &str) -> Result<Self, Error> {
        Ok(Self {
            token: Some(bearer(token)?),
            ..self.clone()
        })
    }

    /// The same client with another bound on how long one call may take with all its repetitions.
    #[must_use]
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        Self {
            deadline,
            ..self.clone()
        }
    }

    /// The same client with other demands on what is read.
    #[must_use]
    pub fn with_consistency(&self, consistency: Consistency) -> Self {
        Self {
            consistency,
            ..self.clone()
        }
    }

    /// The same client asking only the server at this place of the list (counted round), for what is
    /// about one node: its version, its readiness, its view of the cluster.
    #[must_use]
    pub fn only(&self, server: usize) -> Self {
        let server = self.shared.servers[server % self.shared.servers.len()].clone();
        Self {
            shared: Arc::new(Shared {
                http: self.shared.http.clone(),
                tls: self.shared.tls.clone(),
                servers: vec![server],
                preferred: AtomicUsize::new(0),
            }),
            ..self.clone()
        }
    }

    /// What its connections over TLS go by, for other connections to the same nodes.
    pub fn tls(&self) -> Arc<ClientConfig> {
        self.shared.tls.clone()
    }

    /// All servers, in the order given.
    pub fn servers(&self) -> Vec<String> {
        self.shared.servers.iter().map(name_of).collect()
    }

    pub(crate) fn first_server(&self) -> &Url {
        &self.shared.servers[0]
    }

    /// A request outside of calls, as this client's caller.
    pub(crate) fn get(&self, url: Url) -> reqwest::RequestBuilder {
        let request = self.shared.http.get(url);
        match &self.token {
            Some(token) => request.header(reqwest::header::AUTHORIZATION, token.clone()),
            None => request,
        }
    }

    /// Sends a call and reads its answer's body.
    pub(crate) async fn fetch<T: DeserializeOwned>(&self, call: Call) -> Result<T, Error> {
        self.send(call).await?.json()
    }

    /// Sends a call to one server after the other until one has an answer that stands.
    pub(crate) async fn send(&self, call: Call) -> Result<Answer, Error> {
        let started = Instant::now();
        let key = (call.repeat == Repeat::WithKey).then(new_key);
        let count = self.shared.servers.len();
        let first = self.shared.preferred.load(Ordering::Relaxed);
        let mut backoff = FullJitter::new(FIRST_WAIT, LONGEST_WAIT);
        let mut doubt = false;
        let mut unconnected = 0;
        for attempt in 0.. {
            let server = (first + attempt) % count;
            let left = self.deadline.saturating_sub(started.elapsed());
            let failure = match self
                .attempt(&call, server, key.as_deref(), left.min(ATTEMPT))
                .await
            {
                Ok(answer) => {
                    self.shared.preferred.store(server, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(failure) => failure,
            };
            // What an earlier attempt removed is not there any more: that is what was asked for.
            if doubt && call.method == Method::DELETE && is_not_found(&failure.error) {
                return Ok(Answer {
                    server: name_of(&self.shared.servers[server]),
                    headers: HeaderMap::new(),
                    body: b"null".to_vec(),
                });
            }
            doubt |= failure.doubt;
            unconnected = if failure.connected { 0 } else { unconnected + 1 };
            let hopeless = unconnected >= count * ROUNDS_WITHOUT_CONNECTION;
            let wait = if (attempt + 1) % count == 0 {
                backoff.next_delay()
            } else {
                Duration::ZERO
            };
            let late = started.elapsed() + wait >= self.deadline;
            if !failure.again || hopeless || late || (doubt && call.repeat == Repeat::NotInDoubt) {
                return Err(in_doubt(failure.error, doubt));
            }
            tracing::debug!(
                server = %self.shared.servers[server],
                attempt,
                error = %failure.error,
                "asking the next server"
            );
            tokio::time::sleep(wait).await;
        }
        unreachable!("the loop above has no end of its own")
    }

    /// Opens a stream of server-sent events at one server, without a bound on how long it lasts.
    pub(crate) async fn open_stream(
        &self,
        call: &Call,
        server: usize,
        last_id: Option<&str>,
    ) -> Result<reqwest::Response, Error> {
        let server = server % self.shared.servers.len();
        let mut request = self
            .request(call, server, None)?
            .header(reqwest::header::ACCEPT, "text/event-stream");
        if let Some(id) = last_id {
            request = request.header("Last-Event-ID", id);
        }
        self.opened(request, server).await
    }

    /// Asks one server after the other for an answer that is read as it comes, without a bound on how long it lasts.
    pub(crate) async fn download(
        &self,
        call: &Call,
    ) -> Result<BoxStream<'static, Result<Bytes, Error>>, Error> {
        let first = self.preferred();
        let mut last = None;
        for attempt in 0..self.server_count() {
            let server = (first + attempt) % self.server_count();
            match self.opened(self.request(call, server, None)?, server).await {
                Ok(response) => {
                    let client = self.clone();
                    let pieces = response.bytes_stream();
                    return Ok(pieces.map_err(move |error| client.lost(error).error).boxed());
                }
                Err(error) if error.is_retryable() => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.expect("there is at least one server"))
    }

    /// Waits for the head of an answer whose body may last for ever.
    async fn opened(
        &self,
        request: reqwest::RequestBuilder,
        server: usize,
    ) -> Result<reqwest::Response, Error> {
        match tokio::time::timeout(ATTEMPT, self.answered(request, server)).await {
            Ok(answered) => answered.map_err(|failure| failure.error),
            Err(_) => Err(Error::NotRegent {
                server: name_of(&self.shared.servers[server]),
                status: 504,
                body: "no answer in time".to_owned(),
            }),
        }
    }

    /// The server that answered last.
    pub(crate) fn preferred(&self) -> usize {
        self.shared.preferred.load(Ordering::Relaxed)
    }

    /// This server answered: the next call begins there.
    pub(crate) fn prefer(&self, server: usize) {
        let server = server % self.shared.servers.len();
        self.shared.preferred.store(server, Ordering::Relaxed);
    }

    /// How many servers there are; at least one.
    pub(crate) fn server_count(&self) -> usize {
        self.shared.servers.len()
    }

    /// The bound on how long one call may take with all its repetitions.
    pub(crate) fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Sends a call to one server (counted round), once.
    pub(crate) async fn attempt(
        &self,
        call: &Call,
        server: usize,
        key: Option<&str>,
        within: Duration,
    ) -> Result<Answer, Failure> {
        let server = server % self.shared.servers.len();
        let request = self
            .request(call, server, key)
            .map_err(|error| Failure {
                error,
                again: false,
                doubt: false,
                connected: true,
            })?
            .timeout(within);
        let response = self.answered(request, server).await?;
        let headers = response.headers().clone();
        let body = response.bytes().await.map_err(|error| self.lost(error))?;
        Ok(Answer {
            server: name_of(&self.shared.servers[server]),
            headers,
            body: body.into(),
        })
    }

    fn request(
        &self,
        call: &Call,
        server: usize,
        key: Option<&str>,
    ) -> Result<reqwest::RequestBuilder, Error> {
        let mut request = self
            .shared
            .http
            .request(call.method.clone(), call.url(&self.shared.servers[server])?);
        if call.method == Method::GET && call.api {
            request = match self.consistency {
                Consistency::Linearizable => request,
                Consistency::Stale => request.query(&[("consistency", "stale")]),
                Consistency::AtLeast(revision) => request.query(&[
                    ("consistency", "stale".to_owned()),
                    ("min_index", revision.to_string()),
                ]),
            };
        }
        if let Some(token) = &self.token {
            request = request.header(reqwest::header::AUTHORIZATION, token);
        }
        if let Some(key) = key {
            request = request.header("Idempotency-Key", key);
        }
        if let Some(etag) = &call.if_match {
            request = request.header(reqwest::header::IF_MATCH, etag);
        }
        if let Some(body) = &call.body {
            request = request
                .header(reqwest::header::CONTENT_TYPE, "application/json")
                .body(body.clone());
        }
        Ok(request)
    }

    /// Waits for the answer's head; anything but a success is read to its end and judged.
    async fn answered(
        &self,
        request: reqwest::RequestBuilder,
        server: usize,
    ) -> Result<reqwest::Response, Failure> {
        let response = request.send().await.map_err(|error| self.lost(error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.bytes().await.map_err(|error| self.lost(error))?;
        Err(judge(&self.shared.servers[server], status, &body))
    }

    fn lost(&self, source: reqwest::Error) -> Failure {
        let connected = !source.is_connect();
        Failure {
            again: true,
            doubt: connected,
            connected,
            error: Error::Unreachable {
                servers: self.servers(),
                maybe_done: connected,
                source: source.without_url(),
            },
        }
    }
}

/// A fresh idempotency key.
pub(crate) fn new_key() -> String {
    format!("{:032x}", rand::random::<u128>())
}

fn judge(server: &Url, status: StatusCode, body: &[u8]) -> Failure {
    match serde_json::from_slice::<Problem>(body) {
        Ok(problem) => Failure {
            again: matches!(
                problem.code,
                Code::NoLeader | Code::NoQuorum | Code::NotServing | Code::OutcomeUnknown
            ),
            doubt: matches!(problem.code, Code::OutcomeUnknown | Code::Internal),
            connected: true,
            error: Error::Problem(Box::new(problem)),
        },
        Err(_) => Failure {
            again: status.is_server_error(),
            doubt: status.is_server_error(),
            connected: true,
            error: Error::NotRegent {
                server: name_of(server),
                status: status.as_u16(),
                body: String::from_utf8_lossy(body).chars().take(SHOWN).collect(),
            },
        },
    }
}

/// The last attempt may have found nobody while an earlier one was taken by somebody.
fn in_doubt(error: Error, doubt: bool) -> Error {
    match error {
        Error::Unreachable { servers, source, .. } => Error::Unreachable {
            servers,
            maybe_done: doubt,
            source,
        },
        Error::Problem(problem) if doubt && problem.status == 503 => Error::Problem(Box::new(Problem {
            request_id: problem.request_id.clone(),
            ..Problem::new(
                Code::OutcomeUnknown,
                format!("an earlier attempt may have been done; then: {}", problem.detail),
            )
        })),
        other => other,
    }
}

fn is_not_found(error: &Error) -> bool {
    error
        .problem()
        .is_some_and(|problem| problem.status == 404 && problem.code != Code::RouteNotFound)
}

fn parse_server(text: &str) -> Result<Url, Error> {
    let with_scheme = if text.contains("://") {
        text.to_owned()
    } else {
        format!("http://{text}")
    };
    let url: Url = with_scheme
        .parse()
        .map_err(|error| Error::Configuration(format!("{text:?} is not the URL of a server: {error}")))?;
    match url.scheme() {
        "http" | "https" if url.has_host() => Ok(url),
        other => Err(Error::Configuration(format!(
            "{text:?} is not the URL of a server: it begins with {other}://, not http:// or https://"
        ))),
    }
}

fn name_of(server: &Url) -> String {
    server.as_str().trim_end_matches('/').to_owned()
}

fn bearer(token: &str) -> Result<HeaderValue, Error> {
    let mut value = HeaderValue::from_str(&format!("Bearer {}", token.trim()))
        .map_err(|_| Error::Configuration("the token has characters that no token has".to_owned()))?;
    value.set_sensitive(true);
    Ok(value)
}
