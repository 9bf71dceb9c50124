//! What can be typed. The flags of `server` and `agent run` are their configuration's fields
//! ([`crate::config`]); those of the nouns stand with the noun.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use regent_client::{Identity, Trust};

use crate::config::{ServerConfig, UsageError};
use crate::{certificates, debug, dev, internal, logging, manual, noun, output};

/// A highly available control plane with no database beside it.
#[derive(Debug, Parser)]
#[command(
    name = "regent",
    version,
    propagate_version = true,
    after_help = "Commands that ask a cluster take its nodes from REGENT_URL and the API token from REGENT_TOKEN."
)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags that every command takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Global {
    /// TOML file with the settings of `server` or `agent run`; flags and REGENT_* variables go before it.
    #[arg(long, global = true, env = "REGENT_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// How log lines are written.
    #[arg(long, global = true, env = "REGENT_LOG_FORMAT", value_enum, default_value_t)]
    pub(crate) log_format: logging::Format,
    /// How records are printed.
    #[arg(
        long,
        short,
        global = true,
        env = "REGENT_OUTPUT",
        value_enum,
        default_value_t
    )]
    pub(crate) output: output::Format,
    /// The cluster: any of its nodes, comma-separated, tried in turn.
    #[arg(
        long,
        global = true,
        env = "REGENT_URL",
        value_name = "URL,URL",
        default_value = "http://127.0.0.1:8000"
    )]
    pub(crate) url: String,
    /// The CA that the nodes' certificates are of; without it, those that this machine trusts.
    #[arg(long, global = true, env = "REGENT_CA_FILE", value_name = "FILE")]
    pub(crate) ca_file: Option<PathBuf>,
    /// A client's certificate, for nodes that ask for one (`--tls-clients`); needs --key-file.
    #[arg(
        long,
        global = true,
        env = "REGENT_CERT_FILE",
        value_name = "FILE",
        hide_env = true
    )]
    pub(crate) cert_file: Option<PathBuf>,
    /// The key of the client's certificate.
    #[arg(
        long,
        global = true,
        env = "REGENT_KEY_FILE",
        value_name = "FILE",
        hide_env = true
    )]
    pub(crate) key_file: Option<PathBuf>,
}

impl Global {
    /// Which certificates are believed and shown.
    pub(crate) fn trust(&self) -> Result<Trust, UsageError> {
        trust(
            self.ca_file.as_ref(),
            self.cert_file.as_ref(),
            self.key_file.as_ref(),
        )
    }
}

/// Which certificates are believed and shown, by three settings.
pub(crate) fn trust(
    ca: Option<&PathBuf>,
    cert: Option<&PathBuf>,
    key: Option<&PathBuf>,
) -> Result<Trust, UsageError> {
    let identity = match (cert, key) {
        (None, None) => None,
        (Some(cert), Some(key)) => Some(Identity {
            cert: cert.clone(),
            key: key.clone(),
        }),
        _ => {
            return Err(UsageError(
                "a client's certificate and its key go together: give --cert-file and --key-file, or neither"
                    .to_owned(),
            ));
        }
    };
    Ok(Trust {
        ca: ca.cloned(),
        identity,
    })
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a whole cluster on this machine: nodes and an agent, for trying and developing.
    Dev(dev::DevArgs),
    /// Make the CA of a cluster.
    Ca(certificates::CaArgs),
    /// Make certificates: of nodes, of clients, or all that a cluster needs.
    #[command(subcommand, alias = "certs")]
    Cert(certificates::Command),
    /// Run one node.
    Server(Box<ServerConfig>),
    /// Agents: run one, or manage those of a cluster.
    #[command(subcommand, alias = "agents")]
    Agent(noun::agent::Command),
    /// Sessions.
    #[command(subcommand, alias = "sessions")]
    Session(noun::session::Command),
    /// Commands: what agents are told to do.
    #[command(subcommand, alias = "commands")]
    Command(noun::command::Command),
    /// Leases: named, fenced, time-bound rights.
    #[command(subcommand, alias = "leases")]
    Lease(noun::lease::Command),
    /// Templates: what sessions run.
    #[command(subcommand, alias = "templates")]
    Template(noun::template::Command),
    /// The cluster itself.
    #[command(subcommand, alias = "clusters")]
    Cluster(noun::cluster::Command),
    /// Users.
    #[command(subcommand, alias = "users")]
    User(noun::user::Command),
    /// API tokens.
    #[command(subcommand, alias = "tokens")]
    Token(noun::token::Command),
    /// Log in by password; prints a line to paste into the shell.
    Login(noun::login::LoginArgs),
    /// Follow what happens.
    #[command(alias = "event")]
    Events(noun::events::EventsArgs),
    /// Gather what a report of a fault needs into one file, without secrets.
    Debug(debug::DebugArgs),
    /// Print the script by which a shell completes these commands.
    Completion(manual::CompletionArgs),
    /// Write the manual pages.
    Man(manual::ManArgs),
    /// The version of this program.
    Version,
    /// What other commands start; not for people.
    #[command(hide = true)]
    Internal {
        /// Which.
        #[command(subcommand)]
        command: internal::Command,
    },
}
