//! `regent user`.

use std::path::PathBuf;

use clap::Subcommand;
use regent_client::Client;
use regent_types::auth::{CreateUser, Quota, Role, SetPassword, User};
use regent_types::{Cpu, Memory, UserName};

use crate::output::{self, Format, or_dash};

/// See the variants.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a user; asks for the password.
    Create {
        /// The name.
        name: UserName,
        /// What they may do.
        #[arg(long, default_value = "user", value_parser = role)]
        role: Role,
        #[command(flatten)]
        quota: QuotaArgs,
        /// File with the password, readable by its owner only.
        #[arg(long, value_name = "FILE")]
        password_file: Option<PathBuf>,
    },
    /// List users.
    List,
    /// Remove a user and their tokens.
    Delete {
        /// The name.
        name: UserName,
    },
    /// Change a password.
    Passwd {
        /// The name.
        name: UserName,
        /// File with the new password, readable by its owner only.
        #[arg(long, value_name = "FILE")]
        password_file: Option<PathBuf>,
        /// File with the current one; needed to change one's own.
        #[arg(long, value_name = "FILE")]
        current_password_file: Option<PathBuf>,
    },
    /// Change what a user's sessions may use; what is not given is not limited.
    Quota {
        /// The name.
        name: UserName,
        #[command(flatten)]
        quota: QuotaArgs,
    },
}

/// What a user's sessions may use together.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct QuotaArgs {
    /// Sessions at the same time.
    #[arg(long)]
    sessions: Option<u32>,
    /// Their CPU, such as 4 or 500m.
    #[arg(long)]
    cpu: Option<Cpu>,
    /// Their memory, such as 8Gi.
    #[arg(long)]
    memory: Option<Memory>,
}

impl From<QuotaArgs> for Quota {
    fn from(args: QuotaArgs) -> Self {
        Self {
            sessions: args.sessions,
            cpu: args.cpu,
            memory: args.memory,
        }
    }
}

fn role(text: &str) -> Result<Role, String> {
    [Role::User, Role::Operator, Role::Admin]
        .into_iter()
        .find(|r| r.as_str() == text)
        .ok_or_else(|| "there is no such role; there are user, operator, admin".to_owned())
}

const COLUMNS: [&str; 5] = ["NAME", "ROLE", "SESSIONS", "CPU", "MEMORY"];

fn row(u: &User) -> Vec<String> {
    vec![
        u.username.to_string(),
        u.role.as_str().to_owned(),
        format!("{}/{}", u.used.sessions, or_dash(u.quota.sessions.as_ref())),
        format!("{}/{}", u.used.cpu, or_dash(u.quota.cpu.as_ref())),
        format!("{}/{}", u.used.memory, or_dash(u.quota.memory.as_ref())),
    ]
}

/// Runs it.
pub(crate) async fn run(client: &Client, command: Command, format: Format) -> anyhow::Result<()> {
    match command {
        Command::Create {
            name,
            role,
            quota,
            password_file,
        } => {
            let password = super::password(password_file.as_deref(), "Password: ")?;
            let user = client
                .create_user(&CreateUser {
                    username: name,
                    password,
                    role,
                    quota: quota.into(),
                })
                .await?;
            output::record(format, &user, &COLUMNS, row)
        }
        Command::List => output::records(format, &client.all_users().await?, &COLUMNS, row),
        Command::Delete { name } => Ok(client.delete_user(&name).await?),
        Command::Passwd {
            name,
            password_file,
            current_password_file,
        } => {
            let current_password = current_password_file
                .as_deref()
                .map(crate::config::secret_file)
                .transpose()?;
            let password = super::password(password_file.as_deref(), "New password: ")?;
            Ok(client
                .set_password(
                    &name,
                    &SetPassword {
                        password,
                        current_password,
                    },
                )
                .await?)
        }
        Command::Quota { name, quota } => Ok(client.set_quota(&name, &quota.into()).await?),
    }
}
