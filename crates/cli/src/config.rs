//! Configuration of the long-running commands: defaults, then a TOML file, then `REGENT_*`
//! variables, then flags. An unknown key is an error, in the file and among the variables.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};

use figment::providers::{Format as _, Serialized, Toml};
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};
use regent_trace::OtlpEndpoint;
use regent_types::NodeId;
use regent_types::duration::Span;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::agent_config::AgentConfig;

/// The command line or the configuration is wrong: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) String);

/// Variables that are not settings of `server` or `agent run`: those of the client commands, of
/// tests, and those that sessions find in their environment.
const OTHER_VARIABLES: [&str; 17] = [
    "url",
    "token",
    "config",
    "output",
    "log",
    "log_format",
    "require",
    "rounds",
    "password",
    "session",
    "generation",
    "lease_token",
    "agent",
    "user",
    "fencing_token",
    "session_dir",
    "shim_dir",
];

/// Settings that may come from a file, from variables and from flags.
pub(crate) trait Settings: Serialize + DeserializeOwned {
    /// All keys, as in the file.
    const KEYS: &'static [&'static str];
    /// Those that are lists: as variables they are written like in the file, `["a", "b"]`.
    const LISTS: &'static [&'static str];
}

/// Reads the settings of one command.
pub(crate) fn load<S: Settings>(file: Option<&Path>, flags: S) -> anyhow::Result<S> {
    let file = match file {
        Some(file) if !file.is_file() => {
            return Err(UsageError(format!(
                "the configuration file {} does not exist",
                file.display()
            ))
            .into());
        }
        file => file.map(Toml::file_exact),
    };
    let variables = std::env::vars_os().filter_map(|(name, value)| {
        let name = name.to_str()?.strip_prefix("REGENT_")?.to_ascii_lowercase();
        Some((name, value.into_string()))
    });
    Ok(combine(file, variables, flags)?)
}

/// A configuration file as it stands, whatever command it is for.
pub(crate) fn any(file: &Path) -> Result<serde_json::Value, UsageError> {
    let wrong = |why: String| UsageError(format!("the configuration file {}: {why}", file.display()));
    if !file.is_file() {
        return Err(wrong("it does not exist".to_owned()));
    }
    let read = Figment::new().merge(Toml::file_exact(file)).extract();
    read.map_err(|error| wrong(error.to_string()))
}

/// Puts the settings of one command together. Names of variables come in small letters and without their prefix.
pub(crate) fn combine<S: Settings>(
    file: Option<impl Provider>,
    all: impl Iterator<Item = (String, Result<String, OsString>)>,
    flags: S,
) -> Result<S, UsageError> {
    let known = [ServerConfig::KEYS, AgentConfig::KEYS].concat();
    let mut variables = Variables(Dict::new());
    for (key, value) in all {
        // Those of the tests, which start what they test with their own environment.
        if key.starts_with("test_") {
            continue;
        }
        let setting = key.replace('_', "-");
        if !OTHER_VARIABLES.contains(&key.as_str()) && !known.contains(&setting.as_str()) {
            return Err(UsageError(format!(
                "there is no setting for the variable REGENT_{}; unset it, or see `regent help server` and `regent help agent run`",
                key.to_ascii_uppercase()
            )));
        }
        if !S::KEYS.contains(&setting.as_str()) {
            continue;
        }
        let text = value.map_err(|_| {
            UsageError(format!(
                "the variable REGENT_{} is not text",
                key.to_ascii_uppercase()
            ))
        })?;
        let value = match text.parse() {
            Ok(value @ Value::Array(..)) if S::LISTS.contains(&setting.as_str()) => value,
            // Text even where it looks like a number: an agent may be called 7.
            _ => Value::from(text),
        };
        variables.0.insert(setting, value);
    }
    let mut figment = Figment::new();
    if let Some(file) = file {
        figment = figment.merge(file);
    }
    figment
        .merge(variables)
        .merge(Serialized::defaults(flags))
        // Numbers come as text from variables.
        .extract_lossy()
        .map_err(|error| UsageError(format!("the configuration is wrong: {error}")))
}

/// Variables as settings.
struct Variables(Dict);

impl Provider for Variables {
    fn metadata(&self) -> Metadata {
        Metadata::named("environment variables").interpolater(|_, keys| {
            let name = keys.join(".").to_ascii_uppercase().replace('-', "_");
            format!("REGENT_{name}")
        })
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Profile::Default.collect(self.0.clone()))
    }
}

/// Takes a setting that has no default.
pub(crate) fn required<T>(value: Option<T>, key: &str) -> Result<T, UsageError> {
    value.ok_or_else(|| {
        let variable = key.to_ascii_uppercase().replace('-', "_");
        UsageError(format!("{key} is not set: give --{key}, the variable REGENT_{variable}, or {key} in the configuration file"))
    })
}

/// Reads a secret from a file that only its owner may read. One that belongs to root may be readable by a group too,
/// as Kubernetes gives secrets to programs that are not root (`fsGroup`).
pub(crate) fn secret_file(path: &Path) -> anyhow::Result<String> {
    let about = |what: &str| UsageError(format!("the secret file {} {what}", path.display()));
    let metadata = std::fs::metadata(path).map_err(|e| about(&format!("cannot be read: {e}")))?;
    if !regent_tls::is_secret(&metadata) {
        return Err(about("may be read by others: run chmod 600 on it").into());
    }
    let text = std::fs::read_to_string(path).map_err(|e| about(&format!("cannot be read: {e}")))?;
    let secret = text.trim().to_owned();
    if secret.is_empty() {
        Err(about("is empty").into())
    } else {
        Ok(secret)
    }
}

/// Settings of `regent server`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(crate) struct ServerConfig {
    /// This node's id: 1 and up, different on each node, never used again. `from-hostname` takes the number at the end of
    /// this host's name, plus one: regent-0 is node 1.
    #[arg(long, value_name = "N", value_parser = crate::node_id::parse)]
    #[serde(
        skip_serializing_if = "Option::is_none",
        deserialize_with = "crate::node_id::deserialize"
    )]
    pub(crate) node_id: Option<NodeId>,
    /// Folder for this node's data. Losing it means that the node joins again under a new id.
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) data: Option<PathBuf>,
    /// Where REST and agents are served.
    #[arg(long, value_name = "ADDR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) http: Option<SocketAddr>,
    /// Where the other nodes are served.
    #[arg(long, value_name = "ADDR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) peer: Option<SocketAddr>,
    /// All members with their peer addresses, the same list on each: `1=ADDR,2=ADDR,3=ADDR`.
    #[arg(long, value_name = "ID=ADDR,...", value_parser = parse_members)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) members: Option<Members>,
    /// Join the cluster that these nodes belong to, instead of founding one with --members. Only the first start asks
    /// them; later it changes nothing.
    #[arg(long, value_name = "URL,URL", conflicts_with = "members")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) join: Option<String>,
    /// File with the join token (`regent cluster add`), readable by its owner only.
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) join_token_file: Option<PathBuf>,
    /// Remove a voter that could not be reached for so long, without a person; off by default.
    #[arg(long, value_name = "DURATION")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) remove_dead_after: Option<Span>,
    /// As many voters stay when dead ones are removed [default: 3].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) min_voters: Option<std::num::NonZeroUsize>,
    /// File with the secret that the nodes share; at least 16 characters, readable by its owner only.
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cluster_secret_file: Option<PathBuf>,
    /// Where others reach this node's REST API, when that is not --http.
    #[arg(long, value_name = "ADDR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) advertise_http: Option<String>,
    /// Where the other nodes reach this node, when that is not --peer.
    #[arg(long, value_name = "ADDR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) advertise_peer: Option<String>,
    /// What keeps the log and the vote: `sled`, or `segments`, plain files that take less work. A data folder
    /// stays with what it was begun with [default: sled].
    #[arg(long, value_name = "STORE", value_enum, hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) log_store: Option<LogStore>,
    /// A snapshot is taken whenever so many entries were applied [default: 50000]. Fewer make a start shorter and
    /// the log smaller, and cost the writing of the whole state each time.
    #[arg(long, value_name = "ENTRIES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) snapshot_every: Option<std::num::NonZeroU64>,
    /// How often agents send a heartbeat [default: 10s].
    #[arg(long, value_name = "DURATION")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) heartbeat: Option<Span>,
    /// After how long without one an agent is offline [default: 30s].
    #[arg(long, value_name = "DURATION")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stale_after: Option<Span>,
    /// Folder for backups on a schedule, made by every node that has this setting. Nodes that share a folder make one
    /// between them.
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) backup_dir: Option<PathBuf>,
    /// How long after the newest backup in it the next one is made [default: 1h].
    #[arg(long, value_name = "DURATION")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) backup_every: Option<Span>,
    /// How many backups are kept in it [default: 24].
    #[arg(long, value_name = "COUNT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) backup_keep: Option<std::num::NonZeroU32>,
    /// File with the first admin token; read on the very first start only.
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bootstrap_token_file: Option<PathBuf>,
    /// File with the password of the first user `admin`; read on the very first start only.
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bootstrap_password_file: Option<PathBuf>,
    /// Connections to the HTTP port at once from one address [default: 15000, half of all]. Agents that are connected
    /// do not count.
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) connections_per_address: Option<NonZeroUsize>,
    /// Requests a second with one API token, an admin's excepted; more are answered 429 [default: 5000].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) requests_per_second: Option<NonZeroU32>,
    /// This node's certificate, for the other nodes and for clients; `regent cert` makes them. Needs --tls-key and
    /// --tls-ca. New files are taken up while the node runs; SIGHUP does it at once.
    #[arg(long, value_name = "FILE", help_heading = "TLS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// The key of the certificate, readable by its owner only.
    #[arg(long, value_name = "FILE", help_heading = "TLS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tls_key: Option<PathBuf>,
    /// The CA of the cluster: other nodes must have a certificate of it.
    #[arg(long, value_name = "FILE", help_heading = "TLS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// Clients and agents must have a certificate of the CA too, beside their token.
    #[arg(long, help_heading = "TLS")]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) tls_clients: bool,
    /// No TLS, though --http or --peer is no loopback address: everything, tokens included, crosses the network as it
    /// is.
    #[arg(long, help_heading = "TLS")]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) plaintext: bool,
    /// Send traces to this collector: the base of its OTLP over HTTP, such as `http://127.0.0.1:4318` [default: off].
    #[arg(long, value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) otlp_endpoint: Option<OtlpEndpoint>,
    /// Part of `regent dev`: leases may be as short as 100 ms.
    #[arg(long, hide = true)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) dev: bool,
    /// End when this process ends (`PID:STARTTIME`).
    #[arg(long, hide = true, value_name = "PID:STARTTIME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lifeline: Option<String>,
}

impl ServerConfig {
    /// Where others reach this node's REST API.
    pub(crate) fn advertised_http(&self, http: SocketAddr) -> String {
        let scheme = if self.tls_cert.is_some() { "https" } else { "http" };
        let given = self.advertise_http.clone();
        given.unwrap_or_else(|| format!("{scheme}://{http}"))
    }

    /// Where the other nodes reach this node.
    pub(crate) fn advertised_peer(&self, peer: SocketAddr) -> String {
        self.advertise_peer.clone().unwrap_or_else(|| peer.to_string())
    }
}

impl Settings for ServerConfig {
    const KEYS: &'static [&'static str] = &[
        "node-id",
        "data",
        "http",
        "peer",
        "members",
        "join",
        "join-token-file",
        "remove-dead-after",
        "min-voters",
        "cluster-secret-file",
        "advertise-http",
        "advertise-peer",
        "log-store",
        "snapshot-every",
        "heartbeat",
        "stale-after",
        "backup-dir",
        "backup-every",
        "backup-keep",
        "bootstrap-token-file",
        "bootstrap-password-file",
        "connections-per-address",
        "requests-per-second",
        "tls-cert",
        "tls-key",
        "tls-ca",
        "tls-clients",
        "plaintext",
        "otlp-endpoint",
    ];
    const LISTS: &'static [&'static str] = &[];
}

/// The members of a cluster by id; in TOML a table or the text of the flag.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Members(pub(crate) BTreeMap<u64, String>);

impl Serialize for Members {
    /// As the text of the flag.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let parts: Vec<String> = self
            .0
            .iter()
            .map(|(id, address)| format!("{id}={address}"))
            .collect();
        serializer.serialize_str(&parts.join(","))
    }
}

fn parse_members(text: &str) -> Result<Members, String> {
    let mut members = BTreeMap::new();
    for part in text.split(',').filter(|p| !p.trim().is_empty()) {
        let (id, address) = part
            .split_once('=')
            .ok_or_else(|| format!("{part:?} is not ID=ADDR; write 1=10.0.0.1:7000,2=10.0.0.2:7000"))?;
        let id: u64 = id
            .trim()
            .parse()
            .map_err(|_| format!("{id:?} is not a node id; node ids are whole numbers from 1"))?;
        if id == 0 {
            return Err("node ids begin at 1".to_owned());
        }
        if members.insert(id, address.trim().to_owned()).is_some() {
            return Err(format!("node {id} is listed twice"));
        }
    }
    if members.is_empty() {
        Err("the list of members is empty".to_owned())
    } else {
        Ok(Members(members))
    }
}

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Text(String),
            Table(BTreeMap<String, String>),
        }
        let text = match Form::deserialize(deserializer)? {
            Form::Text(text) => text,
            Form::Table(table) => table
                .iter()
                .map(|(id, address)| format!("{id}={address}"))
                .collect::<Vec<_>>()
                .join(","),
        };
        parse_members(&text).map_err(serde::de::Error::custom)
    }
}

/// What keeps a node's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum LogStore {
    /// The sled database.
    #[default]
    Sled,
    /// Plain segment files.
    Segments,
}

impl LogStore {
    /// The word for it.
    pub(crate) fn as_str(self) -> &'static str {
        regent_server::LogStore::from(self).as_str()
    }

    /// What a node's data folder was begun with, if it was.
    pub(crate) fn begun_in(data: &Path) -> Option<Self> {
        Some(match regent_server::LogStore::begun_in(data)? {
            regent_server::LogStore::Sled => Self::Sled,
            regent_server::LogStore::Segments => Self::Segments,
        })
    }
}

impl From<LogStore> for regent_server::LogStore {
    fn from(store: LogStore) -> Self {
        match store {
            LogStore::Sled => Self::Sled,
            LogStore::Segments => Self::Segments,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn flags_go_before_the_file_and_members_may_be_a_table() {
        let file = file("node-id = 1\nheartbeat = \"5s\"\n[members]\n1 = \"a:1\"\n2 = \"b:2\"\n");
        let flags = ServerConfig {
            node_id: Some(NodeId(2)),
            ..ServerConfig::default()
        };
        let typed = ServerConfig {
            members: Some(parse_members("7=c:3").unwrap()),
            ..flags.clone()
        };
        assert_eq!(
            load(Some(file.path()), typed).unwrap().members.unwrap().0[&7],
            "c:3"
        );
        let config = load(Some(file.path()), flags).unwrap();
        assert_eq!(config.node_id, Some(NodeId(2)));
        assert_eq!(config.heartbeat, Some(Span(5_000)));
        assert_eq!(config.members.unwrap().0.len(), 2);
    }

    /// Text that looks like a number or a truth was taken for one, and then refused where text is wanted: no agent could
    /// be called 7 and no replica 0.
    #[test]
    fn a_variable_is_text_even_when_it_looks_like_a_number() {
        let variables = |all: &[(&str, &str)]| {
            all.iter()
                .map(|(name, value)| ((*name).to_owned(), Ok((*value).to_owned())))
                .collect::<Vec<_>>()
        };
        let read = |all| {
            combine::<AgentConfig>(
                None::<figment::providers::Data<Toml>>,
                variables(all).into_iter(),
                AgentConfig::default(),
            )
        };
        let config = read(&[
            ("agent_id", "7"),
            ("replica", "0"),
            ("token", "123456789012345678901234567890"),
            ("platform", "true"),
            ("region", "[eu]"),
            ("max_sessions", "5"),
            ("cpu", "2"),
            ("labels", "[\"a=b\", \"c=d\"]"),
        ])
        .unwrap();
        assert_eq!(config.agent_id.unwrap().as_str(), "7");
        assert_eq!(config.replica.unwrap().as_str(), "0");
        assert_eq!(config.token.as_deref(), Some("123456789012345678901234567890"));
        assert_eq!(config.platform.as_deref(), Some("true"));
        assert_eq!(config.region.as_deref(), Some("[eu]"));
        assert_eq!((config.max_sessions, config.cpu.unwrap().0), (Some(5), 2_000));
        assert_eq!(config.labels, ["a=b", "c=d"]);
        let error = read(&[("max_sessions", "many")]).unwrap_err().to_string();
        assert!(error.contains("REGENT_MAX_SESSIONS"), "{error}");
    }

    #[test]
    fn the_files_that_are_shipped_for_systemd_are_read() {
        let shipped = |name| {
            Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("../../deploy/systemd")
                .join(name)
        };
        let node = load(Some(&shipped("node.toml")), ServerConfig::default()).unwrap();
        assert_eq!(
            (node.node_id, node.members.unwrap().0.len()),
            (Some(NodeId(1)), 3)
        );
        let agent = load(Some(&shipped("agent.toml")), AgentConfig::default()).unwrap();
        assert!(agent.token_file.is_some());
    }

    #[test]
    fn a_node_id_may_be_a_number_or_come_from_the_name_of_the_host() {
        let number = file("node-id = 3\n");
        let config = load(Some(number.path()), ServerConfig::default()).unwrap();
        assert_eq!(config.node_id, Some(NodeId(3)));
        let wrong = file("node-id = \"from-host\"\n");
        let error = load(Some(wrong.path()), ServerConfig::default())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("from-host") && error.contains("from-hostname"),
            "{error}"
        );
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_it() {
        let file = file("node-idd = 1\n");
        let error = load(Some(file.path()), ServerConfig::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains("node-idd"), "{error}");
    }

    #[test]
    fn an_unknown_log_store_is_an_error_that_names_those_that_exist() {
        let known = file("log-store = \"segments\"\n");
        let config = load(Some(known.path()), ServerConfig::default()).unwrap();
        assert_eq!(config.log_store, Some(LogStore::Segments));
        let unknown = file("log-store = \"rocksdb\"\n");
        let error = load(Some(unknown.path()), ServerConfig::default())
            .unwrap_err()
            .to_string();
        assert!(
            ["log-store", "rocksdb", "`sled`", "`segments`"]
                .iter()
                .all(|word| error.contains(word)),
            "{error}"
        );
    }

    #[test]
    fn a_bad_list_of_members_says_how_to_write_it() {
        for bad in ["", "1", "x=a:1", "0=a:1", "1=a:1,1=b:1"] {
            assert!(parse_members(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn a_secret_that_others_may_read_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let file = file("secret");
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(
            secret_file(file.path())
                .unwrap_err()
                .to_string()
                .contains("chmod 600")
        );
    }
}
