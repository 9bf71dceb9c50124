//! Stands in for the hidden subcommands of the `regent` binary in the tests of this crate:
//! `shim FILE` is `regent internal shim --spec FILE`, `demo` is `regent internal demo`, and
//! `lifeline DATA SHIM SESSION` starts a session whose lifeline is itself, then waits to be killed.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use regent_agent::lifeline::ProcessId;
use regent_agent::runtime::process::{ProcessOptions, ProcessRuntime, demo::demo_main, shim::shim_main};
use regent_agent::runtime::{ContainerSpec, Runtime, StartSpec};
use regent_types::{AgentId, SessionName, TemplateName, Token, UserName};

fn main() -> anyhow::Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["shim", file] => Ok(shim_main(Path::new(file))),
        ["demo"] => Ok(demo_main()),
        ["lifeline", data, session, script] => lifeline(data, session, script),
        _ => anyhow::bail!("usage: shim FILE | demo | lifeline DATA SESSION SCRIPT"),
    }
}

#[tokio::main(flavor = "current_thread")]
async fn lifeline(data: &str, session: &str, script: &str) -> anyhow::Result<ExitCode> {
    let mut options = ProcessOptions::new(data)?;
    options.shim = vec![std::env::current_exe()?.into(), "shim".into()];
    options.lifeline = Some(ProcessId::current()?);
    let runtime = ProcessRuntime::open(options)?;
    let spec = StartSpec {
        session: SessionName::new(session)?,
        generation: 1,
        token: Token(1),
        agent: AgentId::new("test")?,
        user: UserName::new("alice")?,
        template: TemplateName::new("sleeper")?,
        image: None,
        command: "/bin/sh".to_owned(),
        args: vec!["-c".to_owned(), script.to_owned()],
        env: BTreeMap::new(),
        cpu_milli: None,
        memory_bytes: None,
        persistent_home: false,
        port: None,
        hibernate: None,
        container: ContainerSpec::default(),
        metadata: BTreeMap::new(),
    };
    runtime.start(&spec).await?;
    std::future::pending().await
}
