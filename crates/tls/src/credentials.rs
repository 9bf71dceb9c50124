//! What a node shows and whom it believes, followed as the files change.
//!
//! Invariant: what is in use was complete and right when it was read: key and certificate fit, the certificate is
//! of the CA, has not expired, and is this node's. New files that are not leave the old ones in use. A connection
//! that stands keeps what it began with.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use regent_types::NodeId;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{CertificateError, ClientConfig, RootCertStore, ServerConfig};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::files::{self, Contents, Files};
use crate::{Error, NoNode, PEER_HOST, names, provider};

/// How often the files are looked at. A certificate is replaced long before it ends, so sooner is not needed.
pub const CHECK_EVERY: Duration = Duration::from_secs(10);

/// From when on an old certificate is warned of: time enough for a person to notice and to act.
const WARN_BEFORE: Duration = Duration::from_hours(14 * 24);

/// Who may speak to the HTTP port at all. That API tokens say who calls is another matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HttpClients {
    /// Anybody.
    #[default]
    Any,
    /// Whoever has a certificate of the CA.
    Certified,
}

/// What a node shows and whom it believes.
pub struct Credentials {
    files: Files,
    node: NodeId,
    http_clients: HttpClients,
    current: ArcSwap<Current>,
    asked: Notify,
}

struct Current {
    contents: Contents,
    peer_server: Arc<ServerConfig>,
    peer_client: Arc<ClientConfig>,
    http: Arc<ServerConfig>,
    not_after: i64,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("files", &self.files)
            .field("node", &self.node)
            .field("http_clients", &self.http_clients)
            .finish_non_exhaustive()
    }
}

impl Credentials {
    /// Reads the files, which must be those of `node`.
    pub fn load(files: Files, node: NodeId, http_clients: HttpClients) -> Result<Self, Error> {
        let current = Current::new(&files, files.read()?, node, http_clients)?;
        Ok(Self {
            files,
            node,
            http_clients,
            current: ArcSwap::from_pointee(current),
            asked: Notify::new(),
        })
    }

    /// For peers that connect: each must show a certificate of the CA.
    pub fn peer_server(&self) -> Arc<ServerConfig> {
        self.current.load().peer_server.clone()
    }

    /// For connecting to peers.
    pub fn peer_client(&self) -> Arc<ClientConfig> {
        self.current.load().peer_client.clone()
    }

    /// For REST and agents.
    pub fn http(&self) -> Arc<ServerConfig> {
        self.current.load().http.clone()
    }

    /// The node that the other end of a peer connection is, by the certificate that the handshake has accepted.
    ///
    /// # Errors
    /// It is none.
    pub fn node_of(chain: Option<&[CertificateDer<'_>]>) -> Result<NodeId, NoNode> {
        let certificate = chain
            .and_then(<[_]>::first)
            .ok_or_else(|| NoNode("cannot be seen".to_owned()))?;
        names::subject(certificate)
            .map(|subject| subject.node)
            .map_err(NoNode)
    }

    /// When the certificate ends, in seconds since 1970.
    pub fn not_after(&self) -> i64 {
        self.current.load().not_after
    }

    /// Looks at the files and takes what is new in them; `false` when nothing is.
    pub fn reload(&self) -> Result<bool, Error> {
        let contents = self.files.read()?;
        if contents == self.current.load().contents {
            return Ok(false);
        }
        let current = Current::new(&self.files, contents, self.node, self.http_clients)?;
        self.current.store(Arc::new(current));
        Ok(true)
    }

    /// Whoever follows the files is to look at them now, and to say what came of it.
    pub fn look_now(&self) {
        self.asked.notify_one();
    }

    /// Follows the files until `stop`: now and then, and when asked by [`Credentials::look_now`].
    pub async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let mut told = String::new();
        self.warn_of_the_end();
        loop {
            let wanted = tokio::select! {
                () = tokio::time::sleep(CHECK_EVERY) => false,
                () = self.asked.notified() => true,
                () = stop.cancelled() => return,
            };
            let this = self.clone();
            let reloaded = tokio::task::spawn_blocking(move || this.reload()).await;
            match reloaded {
                Ok(Ok(true)) => {
                    told.clear();
                    tracing::info!(cert = %self.files.cert.display(), "new certificates are in use");
                    self.warn_of_the_end();
                }
                Ok(Ok(false)) if wanted => tracing::info!("the certificates have not changed"),
                Ok(Ok(false)) => {}
                Ok(Err(error)) => {
                    // The same again is not news, unless somebody asks.
                    let text = error.to_string();
                    if wanted || text != told {
                        tracing::error!(error = text, "new certificates are not used, the old ones stay");
                    }
                    told = text;
                }
                // Only when the process ends.
                Err(_) => return,
            }
        }
    }

    fn warn_of_the_end(&self) {
        let left = self.not_after() - now();
        if left < WARN_BEFORE.as_secs().cast_signed() {
            let days = left / 86_400;
            tracing::warn!(cert = %self.files.cert.display(), days, "the certificate ends soon");
        }
    }
}

impl Current {
    fn new(
        files: &Files,
        contents: Contents,
        node: NodeId,
        http_clients: HttpClients,
    ) -> Result<Self, Error> {
        let chain = files::certificates(&files.cert, &contents.cert)?;
        let roots = Arc::new(files::roots(&files.ca, &contents.ca)?);
        let own = |what: String| Error::certificate(&files.cert, what);
        check_chain(&files.ca, &chain, &roots).map_err(own)?;
        let subject = names::subject(&chain[0]).map_err(own)?;
        if subject.node != node {
            return Err(own(format!(
                "is node {}'s, and this is node {node}",
                subject.node
            )));
        }
        let refused = |error: rustls::Error| {
            own(format!(
                "and the key {} cannot be used: {error}",
                files.key.display()
            ))
        };
        // A key of a type that is not `Clone` is read once for each use.
        let key = || files::key(&files.key, &contents.key);
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
            .build()
            .map_err(|error| Error::content(&files.ca, format!("no CA that can be used: {error}")))?;

        // Both ends are ours: nothing old. Every connection shows and checks certificates anew.
        let mut peer_server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(refused)?
            .with_client_cert_verifier(clients.clone())
            .with_single_cert(chain.clone(), key()?)
            .map_err(refused)?;
        peer_server.send_tls13_tickets = 0;
        let mut peer_client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(refused)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain.clone(), key()?)
            .map_err(refused)?;
        peer_client.resumption = Resumption::disabled();

        let http = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(refused)?;
        let http = match http_clients {
            HttpClients::Any => http.with_no_client_auth(),
            HttpClients::Certified => http.with_client_cert_verifier(clients),
        };
        let mut http = http.with_single_cert(chain, key()?).map_err(refused)?;
        http.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self {
            contents,
            peer_server: Arc::new(peer_server),
            peer_client: Arc::new(peer_client),
            http: Arc::new(http),
            not_after: subject.not_after,
        })
    }
}

/// Whether the other nodes would believe this chain.
fn check_chain(ca: &Path, chain: &[CertificateDer<'_>], roots: &Arc<RootCertStore>) -> Result<(), String> {
    let verifier = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider())
        .build()
        .map_err(|error| format!("cannot be checked against {}: {error}", ca.display()))?;
    let name = ServerName::try_from(PEER_HOST).expect("a DNS name");
    let now = UnixTime::since_unix_epoch(Duration::from_secs(now().max(0).cast_unsigned()));
    let checked = verifier.verify_server_cert(&chain[0], &chain[1..], &name, &[], now);
    match checked {
        Ok(_) => Ok(()),
        // The second: a CA of the same name.
        Err(rustls::Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        )) => Err(format!("is not of the CA in {}", ca.display())),
        Err(error @ rustls::Error::InvalidCertificate(_)) => {
            Err(format!("cannot be used: {}", plain(&error)))
        }
        Err(error) => Err(format!("cannot be used: {error}")),
    }
}

/// As rustls says it, without its preface.
fn plain(error: &rustls::Error) -> String {
    let text = error.to_string();
    text.strip_prefix("invalid peer certificate: ")
        .map_or(text.clone(), str::to_owned)
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_secs().cast_signed()
}
