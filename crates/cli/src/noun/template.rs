//! `regent template`.

use std::path::PathBuf;

use clap::Subcommand;
use regent_client::Client;
use regent_types::TemplateName;
use regent_types::template::Template;

use crate::output::{self, Format, or_dash};

/// See the variants.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make or change a template.
    Apply {
        /// JSON file with the manifest; `-` reads standard input.
        #[arg(long, short)]
        file: PathBuf,
    },
    /// List templates.
    List,
    /// Show a template, as JSON.
    Get {
        /// Its name.
        name: TemplateName,
    },
    /// Remove a template. Sessions keep what they were started with.
    Delete {
        /// Its name.
        name: TemplateName,
    },
}

const COLUMNS: [&str; 6] = ["NAME", "BUILT-IN", "IMAGE", "COMMAND", "CPU", "MEMORY"];

fn row(t: &Template) -> Vec<String> {
    let spec = &t.manifest.spec;
    let image = (!spec.base_image.is_empty()).then_some(&spec.base_image);
    vec![
        t.name.to_string(),
        t.built_in.to_string(),
        or_dash(image),
        [spec.command.as_slice(), spec.args.as_slice()].concat().join(" "),
        or_dash(spec.default_resources.cpu.as_ref()),
        or_dash(spec.default_resources.memory.as_ref()),
    ]
}

/// Runs it.
pub(crate) async fn run(client: &Client, command: Command, format: Format) -> anyhow::Result<()> {
    match command {
        Command::Apply { file } => {
            let template = client.apply_template(&super::read_json(&file)?).await?;
            output::record(format, &template, &COLUMNS, row)
        }
        Command::List => output::records(format, &client.all_templates().await?, &COLUMNS, row),
        Command::Get { name } => output::json(&client.template(&name).await?),
        Command::Delete { name } => Ok(client.delete_template(&name).await?),
    }
}
