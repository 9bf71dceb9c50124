//! Sessions: made, put to sleep, woken and stopped, by users with a quota; each start of one writes a line.
//!
//! Calls that make something carry an idempotency key and are repeated through other nodes, those that were answered
//! too: whatever is answered to one key must be the same thing.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rand::RngExt as _;
use rand::rngs::StdRng;
use regent_history::effects::{Effect, Ran};
use regent_types::SessionName;
use regent_types::session::SessionState;
use reqwest::Method;
use serde_json::json;
use tokio::task::JoinSet;

use super::{Answer, Run, send};
use crate::harness::{eventually, processes_naming};

const TEMPLATE: &str = "effects";
/// Who makes sessions, and how many each may have.
const USERS: [&str; 2] = ["olga", "pavel"];
pub(crate) const QUOTA: usize = 3;
/// Who has one session, which nobody ends.
const RESIDENT: &str = "rita";
/// What stands among the effects where the host lost its power.
pub(crate) const HOST_LOST: &str = "the host lost its power";
/// Clients of each user: more than it may have sessions, so that the quota is met.
const CLIENTS: usize = 4;
/// How often a call is repeated until it is known what came of it.
const REPEATS: usize = 40;
/// How long a client waits for a session. At the end all are waited for without haste.
const PATIENCE: Duration = Duration::from_secs(20);

/// What was recorded.
#[derive(Default)]
pub(crate) struct Record {
    /// The commands that were accepted.
    pub(crate) commands: BTreeSet<String>,
    /// What was answered to each idempotency key.
    pub(crate) answers: BTreeMap<String, Vec<String>>,
    /// Process groups that were seen: by session and group, first and last.
    ran: BTreeMap<(String, u32), (u64, u64)>,
    /// Sessions that were accepted.
    pub(crate) sessions: BTreeSet<String>,
    /// Those that were said to run.
    pub(crate) running: BTreeSet<String>,
}

pub(crate) struct Sessions {
    record: Mutex<Record>,
    file: PathBuf,
    /// Runs from the beginning to the end.
    resident: String,
}

/// Where programs write that they have begun.
pub(crate) fn effects_file(folder: &Path) -> PathBuf {
    folder.join("effects")
}

impl Sessions {
    /// Makes the users and the template.
    pub(crate) async fn new(run: &Arc<Run>) -> Arc<Self> {
        let file = effects_file(run.cluster.path());
        // One `echo` is one write to a file opened for appending: lines do not mix.
        let script = r#"trap 'exit 0' TERM
            echo "$REGENT_SESSION $REGENT_GENERATION" >> "$EFFECTS"
            while :; do sleep 1000 & wait; done"#;
        let manifest = json!({
            "metadata": { "name": TEMPLATE },
            "spec": {
                "command": ["sh", "-c"], "args": [script],
                "env": [{ "name": "EFFECTS", "value": file }],
                "defaultResources": { "cpu": "10m", "memory": "16Mi" }
            }
        });
        let manifest = serde_json::from_value(manifest).unwrap();
        let client = run.cluster.client(0);
        eventually("the template", || async {
            client.apply_template(&manifest).await.ok()
        })
        .await;
        for user in Self::users() {
            let body = json!({ "username": user, "password": "a long one, and never used", "role": "user",
                "quota": { "sessions": QUOTA } });
            eventually("a user", || async {
                match send(run.request(0, Method::POST, "users").json(&body)).await {
                    Answer::Done { .. } | Answer::Refused(409, _) => Some(()),
                    Answer::Refused(400, problem) => panic!("{problem}"),
                    Answer::Refused(..) | Answer::Unknown => None,
                }
            })
            .await;
        }
        let body = json!({ "template": TEMPLATE, "user": RESIDENT });
        let resident = eventually("the session that stays", || async {
            match send(run.request(0, Method::POST, "sessions").json(&body)).await {
                Answer::Done { body, .. } => Some(body["name"].as_str()?.to_owned()),
                Answer::Refused(..) | Answer::Unknown => None,
            }
        })
        .await;
        let name = SessionName::new(&resident).unwrap();
        crate::harness::session_state(&client, &name, SessionState::Running).await;
        Arc::new(Self {
            record: Mutex::default(),
            file,
            resident,
        })
    }

    /// Everybody who has sessions that run.
    pub(crate) fn users() -> impl Iterator<Item = &'static str> {
        USERS.into_iter().chain([RESIDENT])
    }

    pub(crate) fn spawn(self: &Arc<Self>, run: &Arc<Run>, clients: &mut JoinSet<()>) {
        for (number, user) in USERS.iter().enumerate() {
            for client in 0..CLIENTS {
                let id = u64::try_from(3_000 + number * 10 + client).unwrap();
                clients.spawn(self.clone().client(run.clone(), user, id));
            }
        }
        clients.spawn(self.clone().look(run.clone()));
    }

    pub(crate) fn record<T>(&self, with: impl FnOnce(&mut Record) -> T) -> T {
        with(&mut self.record.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The starts, in the order in which they happened, and after how many of them the host lost its power.
    pub(crate) fn effects(&self) -> (Vec<Effect>, Vec<usize>) {
        let text = std::fs::read_to_string(&self.file).unwrap_or_default();
        let (mut effects, mut losses) = (Vec::new(), Vec::new());
        for line in text.lines() {
            if line == HOST_LOST {
                losses.push(effects.len());
                continue;
            }
            let (session, generation) = line.split_once(' ').expect("lines are whole");
            effects.push(Effect {
                session: session.to_owned(),
                generation: generation.parse().expect("lines are whole"),
            });
        }
        (effects, losses)
    }

    /// Whether the session that nobody ends runs.
    pub(crate) fn resident_runs(&self) -> bool {
        self.processes()
            .iter()
            .any(|(session, _)| *session == self.resident)
    }

    /// The processes that were there for certain, and when. One that was seen only once need not have been there
    /// together with any other that was seen then.
    pub(crate) fn ran(&self) -> Vec<Ran> {
        self.record(|record| {
            let all = record.ran.iter().filter(|(_, (from, until))| from < until).map(
                |((session, pid), (from, until))| Ran {
                    session: session.clone(),
                    process: format!("process group {pid}"),
                    from: *from,
                    until: *until,
                },
            );
            all.collect()
        })
    }

    /// The process groups of sessions that run now.
    pub(crate) fn processes(&self) -> Vec<(String, u32)> {
        let marker = format!("EFFECTS={}", self.file.display());
        let all = processes_naming(&marker).into_iter().filter_map(|pid| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
            let environment = String::from_utf8_lossy(&environment).into_owned();
            let session = environment
                .split('\0')
                .find_map(|one| one.strip_prefix("REGENT_SESSION="))?;
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            // What a shell has just forked still looks like it, and is in its group.
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let group = stat.rsplit_once(')')?.1.split_whitespace().nth(2)?.parse().ok()?;
            command
                .starts_with(b"sh\0-c\0")
                .then(|| (session.to_owned(), group))
        });
        let all: BTreeSet<(String, u32)> = all.collect();
        all.into_iter().collect()
    }

    /// Looks which programs run, all the time.
    async fn look(self: Arc<Self>, run: Arc<Run>) {
        while run.goes_on() {
            let before = run.now();
            let found = self.processes();
            let after = run.now();
            self.record(|record| {
                for process in found {
                    // There for certain at one moment between the two: the last sight ends where the look began.
                    let seen = record.ran.entry(process).or_insert((after, after));
                    seen.1 = seen.1.max(before);
                }
            });
            run.rest(Duration::from_millis(250)).await;
        }
    }

    async fn client(self: Arc<Self>, run: Arc<Run>, user: &'static str, id: u64) {
        let mut random = run.random(id);
        while run.goes_on() {
            let body = json!({ "template": TEMPLATE, "user": user });
            let Some(name) = self.make(&run, &mut random, "sessions", &body, "name").await else {
                run.rest(Duration::from_millis(200)).await;
                continue;
            };
            self.record(|record| record.sessions.insert(name.clone()));
            let mut alive = self.wait(&run, &name, SessionState::Running).await;
            for _ in 0..random.random_range(0..3) {
                for (action, state) in [
                    ("hibernate", SessionState::Hibernated),
                    ("wake", SessionState::Running),
                ] {
                    if alive && run.goes_on() {
                        self.act(
                            &run,
                            &mut random,
                            Method::PUT,
                            &format!("sessions/{name}/{action}"),
                        )
                        .await;
                        alive = self.wait(&run, &name, state).await;
                    }
                }
            }
            self.act(&run, &mut random, Method::DELETE, &format!("sessions/{name}"))
                .await;
            self.wait(&run, &name, SessionState::Terminated).await;
        }
    }

    /// Makes something, and repeats it until it is known what came of it; often once more.
    async fn make(
        &self,
        run: &Run,
        random: &mut StdRng,
        path: &str,
        body: &serde_json::Value,
        id: &str,
    ) -> Option<String> {
        let key = format!("{:016x}", random.random::<u64>());
        let mut made = None;
        let answered = |answer: &str| {
            let answer = answer.to_owned();
            self.record(|record| record.answers.entry(key.clone()).or_default().push(answer));
        };
        for _ in 0..REPEATS {
            let node = run.any_node(random);
            let request = run
                .request(node, Method::POST, path)
                .header("idempotency-key", &key);
            match send(request.json(body)).await {
                Answer::Done { body, .. } => {
                    let name = body[id].as_str().unwrap_or_default().to_owned();
                    answered(&name);
                    made = Some(name);
                    if random.random_bool(0.7) {
                        break;
                    }
                }
                // A quota is a final word, unless it was made before: then the answer had to be that. That nobody leads
                // is not, and what was asked before may still be done.
                Answer::Refused(400..500, problem) => {
                    if made.is_some() && problem["code"] != "busy" {
                        answered(&format!("refused: {}", problem["detail"]));
                    }
                    break;
                }
                Answer::Refused(..) | Answer::Unknown => run.rest(Duration::from_millis(50)).await,
            }
        }
        made
    }

    /// Asks for something that is done at most once in any case.
    async fn act(&self, run: &Run, random: &mut StdRng, method: Method, path: &str) {
        for _ in 0..REPEATS {
            let node = run.any_node(random);
            match send(run.request(node, method.clone(), path)).await {
                Answer::Done { body, .. } => {
                    if let Some(command) = body["commandId"].as_str() {
                        self.record(|record| record.commands.insert(command.to_owned()));
                    }
                    return;
                }
                Answer::Refused(400..500, _) => return,
                Answer::Refused(..) | Answer::Unknown => run.rest(Duration::from_millis(50)).await,
            }
        }
    }

    /// Whether it gets there, and soon.
    async fn wait(&self, run: &Run, name: &str, state: SessionState) -> bool {
        let client = run.cluster.client(0).with_deadline(Duration::from_secs(2));
        let name = SessionName::new(name).unwrap();
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while run.goes_on() && tokio::time::Instant::now() < deadline {
            if let Ok(session) = client.session(&name).await {
                if session.state == SessionState::Running {
                    self.record(|record| record.running.insert(session.name.to_string()));
                }
                if session.state == state {
                    return true;
                }
                if session.state.is_final() {
                    return false;
                }
            }
            run.rest(Duration::from_millis(100)).await;
        }
        false
    }
}
