//! Where sessions run in a test, and a cluster with an agent there.

use regent_client::Client;
use regent_types::agent::Agent;
use regent_types::session::{CreateSession, Session};
use regent_types::template::Manifest;
use regent_types::{AgentId, SessionName, Token};
use serde_json::{Value, json};

use crate::harness::{Dev, eventually};

/// The agent's id.
pub(crate) const BOX: &str = "box";
/// Replicas of it.
pub(crate) const NAMES: [&str; 3] = ["one", "two", "three"];

/// An engine with images of the tests.
pub(crate) trait Stage {
    /// What `agent run` needs to use it; a flag and its value each.
    fn flags(&self) -> Vec<String>;

    /// A manifest's `spec` of a session that runs until it is told to end.
    fn sleeper(&self) -> Value;

    /// A manifest's `spec` whose start takes until the test is over.
    fn endless_start(&self) -> Value;

    /// A word of the reason that is shown meanwhile.
    fn slow_because(&self) -> &'static str;

    /// What runs for this session: the id of its one container or pod, and how often its program was started.
    fn running(&self, session: &SessionName) -> Vec<(String, u32)>;

    /// What is left of this session, in words.
    fn left(&self, session: &SessionName) -> Vec<String>;
}

/// A cluster and its agent.
pub(crate) struct Play {
    pub(crate) dev: Dev,
    pub(crate) client: Client,
    pub(crate) id: AgentId,
    /// Indexes of the agent's processes in `dev`, in the order of [`NAMES`].
    pub(crate) processes: Vec<usize>,
}

impl Play {
    /// With one process that is the agent.
    pub(crate) async fn alone(stage: &impl Stage, flags: &[&str]) -> Self {
        let mut dev = Dev::start();
        let all = all_flags(stage, flags);
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let index = dev.add_agent(BOX, &all).await;
        Self::ready(stage, dev, vec![index]).await
    }

    /// With three replicas of the agent.
    pub(crate) async fn replicas(stage: &impl Stage) -> Self {
        let mut dev = Dev::start();
        let all = all_flags(stage, &[]);
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let processes = dev.add_replicas(BOX, &NAMES, &all).await;
        let play = Self::ready(stage, dev, processes).await;
        play.led_after(None, 3).await;
        play
    }

    async fn ready(stage: &impl Stage, dev: Dev, processes: Vec<usize>) -> Self {
        let play = Self {
            client: dev.client(),
            id: AgentId::new(BOX).unwrap(),
            dev,
            processes,
        };
        play.template("sleeper", stage.sleeper()).await;
        play.dev.agent_online(&play.id).await;
        play
    }

    /// Applies a template.
    pub(crate) async fn template(&self, name: &str, spec: Value) {
        let manifest: Manifest =
            serde_json::from_value(json!({ "metadata": { "name": name }, "spec": spec })).unwrap();
        self.client.create_template(&manifest).await.unwrap();
    }

    /// Creates so many sessions at once.
    pub(crate) async fn create(&self, template: &str, count: usize) -> Vec<Session> {
        let wish = wish(template);
        let created = (0..count).map(|_| self.client.create_session(&wish));
        futures::future::try_join_all(created).await.unwrap()
    }

    /// Waits for a leader under a newer token, with so many connected.
    pub(crate) async fn led_after(&self, token: Option<Token>, connected: usize) -> Agent {
        eventually("a leader among the replicas", || async {
            let agent = self.client.agent(&self.id).await.ok()?;
            let led = agent.token.is_some() && agent.token > token;
            (led && agent.replicas.len() == connected && leaders(&agent).len() == 1).then_some(agent)
        })
        .await
    }

    /// The index in `dev` of the replica that leads.
    pub(crate) fn leader(&self, agent: &Agent) -> usize {
        let name = leaders(agent).pop().expect("somebody leads");
        self.processes[NAMES.iter().position(|one| *one == name).unwrap()]
    }
}

/// A session for the agent of these tests.
pub(crate) fn wish(template: &str) -> CreateSession {
    serde_json::from_value(json!({ "template": template, "placement": { "labels": { "of": BOX } } })).unwrap()
}

/// The replicas that lead.
pub(crate) fn leaders(agent: &Agent) -> Vec<String> {
    let leading = agent.replicas.iter().filter(|replica| replica.leader);
    leading.map(|replica| replica.name.to_string()).collect()
}

fn all_flags(stage: &impl Stage, flags: &[&str]) -> Vec<String> {
    let label = ["--label".to_owned(), format!("of={BOX}")];
    let given = flags.iter().map(|flag| (*flag).to_owned());
    label.into_iter().chain(stage.flags()).chain(given).collect()
}
