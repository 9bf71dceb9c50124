//! The commands that ask a cluster: one file a noun.

pub(crate) mod agent;
pub(crate) mod cluster;
pub(crate) mod command;
pub(crate) mod events;
pub(crate) mod lease;
pub(crate) mod login;
pub(crate) mod session;
pub(crate) mod template;
pub(crate) mod token;
pub(crate) mod user;

use std::io::Read as _;
use std::path::Path;

use anyhow::Context as _;
use regent_client::Client;
use serde::de::DeserializeOwned;

use crate::args::{Command, Global};
use crate::config::UsageError;
use crate::{output, recovery};

/// Runs one command that asks a cluster.
pub(crate) async fn run(command: Command, global: &Global) -> anyhow::Result<()> {
    asked(command, global).await.map_err(with_hint)
}

/// Who was refused for want of a token is told where it is taken from, and whom TLS failed, why.
pub(crate) fn with_hint(error: anyhow::Error) -> anyhow::Error {
    let unauthenticated = error
        .downcast_ref::<regent_client::Error>()
        .is_some_and(|error| error.code() == Some(regent_types::Code::Unauthenticated));
    if unauthenticated && api_token().is_none() {
        return error.context("REGENT_TOKEN is not set: set it to an API token");
    }
    explained(error, "--ca-file (REGENT_CA_FILE)")
}

/// Whom TLS failed is told why, and which setting names the CA that is believed.
pub(crate) fn explained(error: anyhow::Error, setting: &str) -> anyhow::Error {
    let tls = error.chain().find_map(|cause| {
        let cause = cause.downcast_ref::<std::io::Error>()?;
        regent_tls::explain(cause)
    });
    match tls {
        Some(why) => error.context(format!("{why}; {setting} names the CA that is believed")),
        None => error,
    }
}

/// The API token of client commands.
fn api_token() -> Option<String> {
    std::env::var("REGENT_TOKEN")
        .ok()
        .filter(|token| !token.is_empty())
}

async fn asked(command: Command, global: &Global) -> anyhow::Result<()> {
    let format = global.output;
    let client = || client(global);
    match command {
        Command::Session(command) => session::run(&client()?, command, format).await,
        Command::Agent(command) => agent::run(&client()?, command, format).await,
        Command::Command(command) => command::run(&client()?, command, format).await,
        Command::Lease(command) => lease::run(&client()?, command, format).await,
        Command::Template(command) => template::run(&client()?, command, format).await,
        Command::Cluster(cluster::Command::Restore(args)) => recovery::restore(args, format).await,
        Command::Cluster(cluster::Command::Recover(args)) => recovery::recover(args, format).await,
        Command::Cluster(command) => cluster::run(&client()?, command, format).await,
        Command::User(command) => user::run(&client()?, command, format).await,
        Command::Token(command) => token::run(&client()?, command, format).await,
        Command::Login(args) => login::run(&client()?, args, format).await,
        Command::Events(args) => events::run(&client()?, args, format).await,
        Command::Version => output::version(format),
        Command::Dev(_)
        | Command::Debug(_)
        | Command::Ca(_)
        | Command::Cert(_)
        | Command::Server(_)
        | Command::Completion(_)
        | Command::Man(_)
        | Command::Internal { .. } => {
            unreachable!("these do not ask a cluster and are taken before")
        }
    }
}

/// A client of the cluster that the flags name, as whoever the environment's token is.
pub(crate) fn client(global: &Global) -> anyhow::Result<Client> {
    let servers = global.url.split(',').map(str::trim).filter(|s| !s.is_empty());
    Ok(Client::with_trust(servers, api_token(), &global.trust()?)?)
}

/// The same of one node.
pub(crate) fn client_of(url: &str, global: &Global) -> anyhow::Result<Client> {
    Ok(Client::with_trust([url], api_token(), &global.trust()?)?)
}

/// Reads a JSON document from a file, or from standard input for `-`.
fn read_json<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let text = if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text)?;
        text
    } else {
        std::fs::read_to_string(path)
            .map_err(|e| UsageError(format!("{} cannot be read: {e}", path.display())))?
    };
    serde_json::from_str(&text).with_context(|| format!("{} is not as it should be", path.display()))
}

/// A password, from a file or asked for without showing it.
fn password(file: Option<&Path>, prompt: &str) -> anyhow::Result<String> {
    match file {
        Some(file) => crate::config::secret_file(file),
        None => match std::env::var("REGENT_PASSWORD") {
            Ok(password) => Ok(password),
            Err(_) => {
                rpassword::prompt_password(prompt).context("no password could be read; give --password-file")
            }
        },
    }
}
