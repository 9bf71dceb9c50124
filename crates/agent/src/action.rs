//! What a command asks for: its payload, read once and checked.
//!
//! An action that is not known or a payload that cannot be read is refused for good: a repetition would
//! read the same.

use std::collections::BTreeMap;
use std::time::Duration;

use regent_types::frame::CommandFrame;
use regent_types::template::{self, Manifest};
use regent_types::{AgentId, Cpu, Memory, SessionName, TemplateName, Token, UserName};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::runtime::{
    ContainerSpec, Generation, HibernateMode, Observed, PortSpec, SessionRef, StartSpec, Stop,
};

/// How long a start waits until the session's port takes connections. It runs all the same after that.
const READY_WITHIN: Duration = Duration::from_secs(10);
/// How long a session may take to end when asked, before it is forced, unless the payload says.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// The longest grace that a payload can ask for.
const MAX_STOP_GRACE: Duration = Duration::from_mins(1);

/// Commands of one line are done one after the other.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Line {
    /// About this session.
    Session(SessionName),
    /// About no session.
    Agent,
}

impl Line {
    /// The line of a command.
    pub fn of(command: &CommandFrame) -> Self {
        command
            .payload
            .get("sessionId")
            .and_then(Value::as_str)
            .and_then(|name| SessionName::new(name).ok())
            .map_or(Self::Agent, Self::Session)
    }
}

/// Something that a runtime can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Start a session.
    Start(Box<StartSpec>),
    /// End a session.
    Stop(SessionRef, Stop),
    /// Put a session to sleep.
    Hibernate(SessionRef),
    /// Wake a session.
    Wake(SessionRef),
}

impl Action {
    /// Reads a command. The error is for a person.
    pub fn parse(agent: &AgentId, command: &CommandFrame) -> Result<Self, String> {
        let target = || {
            let target: Target = read(command)?;
            Ok::<_, String>(target.session_ref(command.token))
        };
        match command.action.as_str() {
            "start_session" => {
                start(agent, read(command)?, command.token).map(|spec| Self::Start(Box::new(spec)))
            }
            "stop_session" => {
                let grace = command.payload.get("graceMs").and_then(Value::as_u64);
                let grace = grace
                    .map_or(STOP_GRACE, Duration::from_millis)
                    .min(MAX_STOP_GRACE);
                let delete_home = command.payload.get("deletePVC").and_then(Value::as_bool);
                let how = Stop {
                    grace,
                    delete_home: delete_home.unwrap_or_default(),
                };
                Ok(Self::Stop(target()?, how))
            }
            "hibernate_session" => target().map(Self::Hibernate),
            "wake_session" => target().map(Self::Wake),
            other => Err(format!("this agent does not know the action {other:?}")),
        }
    }

    /// Names the session that it is about.
    pub fn target(&self) -> SessionRef {
        match self {
            Self::Start(spec) => spec.session_ref(),
            Self::Stop(target, _) | Self::Hibernate(target) | Self::Wake(target) => target.clone(),
        }
    }
}

/// What a completed start, hibernate or wake tells.
pub fn result_of(observed: &Observed) -> Value {
    let mut metadata: serde_json::Map<String, Value> = observed
        .metadata
        .iter()
        .map(|(name, value)| (name.clone(), Value::from(value.as_str())))
        .collect();
    metadata.insert("generation".to_owned(), observed.generation.into());
    if let Some(pid) = observed.pid {
        metadata.insert("pid".to_owned(), pid.into());
    }
    if let Some(port) = observed.port {
        metadata.insert("port".to_owned(), port.into());
    }
    json!({ "url": observed.url, "metadata": metadata })
}

fn read<'a, T: Deserialize<'a>>(command: &'a CommandFrame) -> Result<T, String> {
    T::deserialize(&command.payload)
        .map_err(|error| format!("the payload of {} cannot be read: {error}", command.action))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Target {
    session_id: SessionName,
    generation: Generation,
}

impl Target {
    fn session_ref(self, token: Token) -> SessionRef {
        SessionRef {
            session: self.session_id,
            generation: self.generation,
            token,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct StartPayload {
    #[serde(flatten)]
    target: Target,
    user: UserName,
    template: TemplateName,
    template_manifest: Manifest,
    #[serde(default)]
    memory: Option<Memory>,
    #[serde(default)]
    cpu: Option<Cpu>,
    #[serde(default)]
    persistent_home: bool,
}

fn start(agent: &AgentId, payload: StartPayload, token: Token) -> Result<StartSpec, String> {
    let spec = payload.template_manifest.spec;
    let mut words = spec.command.into_iter();
    let command = words.next().unwrap_or_default();
    if command.is_empty() && spec.base_image.is_empty() {
        return Err(format!(
            "template {} has neither a command nor an image",
            payload.template
        ));
    }
    Ok(StartSpec {
        session: payload.target.session_id,
        generation: payload.target.generation,
        token,
        agent: agent.clone(),
        user: payload.user,
        template: payload.template,
        image: Some(spec.base_image).filter(|image| !image.is_empty()),
        command,
        args: words.chain(spec.args).collect(),
        env: spec.env.into_iter().map(|one| (one.name, one.value)).collect(),
        cpu_milli: payload.cpu.map(|cpu| cpu.0).filter(|&milli| milli > 0),
        memory_bytes: payload.memory.map(|memory| memory.0).filter(|&bytes| bytes > 0),
        persistent_home: payload.persistent_home,
        port: spec.ports.first().map(|port| PortSpec {
            container_port: Some(port.container_port).filter(|&port| port > 0),
            ready_within: READY_WITHIN,
        }),
        hibernate: spec.hibernate.map(|mode| match mode {
            template::HibernateMode::Pause => HibernateMode::Stop,
            template::HibernateMode::Restart => HibernateMode::Restart,
        }),
        container: ContainerSpec {
            ports: spec.ports,
            mounts: spec.volume_mounts,
            security: spec.security,
            node_selector: spec.node_selector,
            tolerations: spec.tolerations,
            image_pull_secrets: spec.image_pull_secrets,
        },
        metadata: BTreeMap::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(action: &str, payload: &Value) -> CommandFrame {
        serde_json::from_value(json!({
            "commandId": "c1", "run": 1, "action": action, "payload": payload, "token": 7, "attempt": 1
        }))
        .unwrap()
    }

    fn agent() -> AgentId {
        AgentId::new("dev").unwrap()
    }

    #[test]
    fn a_start_carries_the_manifest_to_the_runtime() {
        let payload = json!({
            "sessionId": "alice-demo-1", "generation": 3, "user": "alice", "template": "demo",
            "templateManifest": { "metadata": { "name": "demo" }, "spec": {
                "command": ["regent", "internal"], "args": ["demo"], "env": [{ "name": "A", "value": "b" }],
                "ports": [{ "containerPort": 3000 }], "hibernate": "restart" } },
            "memory": "64Mi", "cpu": "250m", "persistentHome": true, "idleTimeout": null, "tags": []
        });
        let Ok(Action::Start(spec)) = Action::parse(&agent(), &command("start_session", &payload)) else {
            panic!("not read as a start");
        };
        assert_eq!(
            (spec.command.as_str(), spec.args.join(" ")),
            ("regent", "internal demo".to_owned())
        );
        assert_eq!((spec.cpu_milli, spec.memory_bytes), (Some(250), Some(64 << 20)));
        assert_eq!(
            (spec.generation, spec.token, spec.persistent_home),
            (3, Token(7), true)
        );
        assert_eq!(spec.env["A"], "b");
        assert_eq!(spec.port.as_ref().unwrap().container_port, Some(3000));
        assert_eq!(spec.hibernate, Some(HibernateMode::Restart));
    }

    #[test]
    fn what_is_not_known_or_not_readable_is_said_so() {
        let unknown = Action::parse(&agent(), &command("dance", &json!({}))).unwrap_err();
        assert!(unknown.contains("\"dance\""), "{unknown}");
        let unreadable =
            Action::parse(&agent(), &command("stop_session", &json!({ "sessionId": "a" }))).unwrap_err();
        assert!(unreadable.contains("generation"), "{unreadable}");
    }
}
