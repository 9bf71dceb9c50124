//! Backup, restore, recover: every command for real, on clusters that did something before.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use regent_types::session::{Session, SessionState};
use serde_json::{Value, json};

use crate::harness::{Dev, eventually, free_address, restrict, session_of, session_state};
use crate::wire::{Api, Socket};
use crate::workload::{process_of, running_sessions};

/// What a revision of a restored cluster is at least.
const BASE_STEP: u64 = 1 << 40;
const NEW_TOKEN: &str = "the-new-administrators-token";

/// A cluster with something of everything, and what it was.
struct Past {
    dev: Dev,
    sessions: Vec<Session>,
    lease_token: u64,
    /// Of a command that was open when the backup was taken.
    open: String,
    user: Api,
    /// The id of the new cluster's node.
    new_node: &'static str,
}

impl Past {
    async fn new(new_node: &'static str) -> Self {
        let dev = Dev::start();
        let sessions = running_sessions(&dev.client(), "sleep", 2).await;
        let api = dev.api(0);
        let lease = json!({ "holder": "me", "ttlMs": 3_600_000 });
        let granted = api.post("leases/jobs/acquire", lease).await.ok(200);
        api.agent(json!({ "agentId": "away" })).await;
        let command = api
            .post("agents/away/commands", json!({ "action": "ping" }))
            .await;
        let open = command.ok(202)["commandId"].as_str().unwrap().to_owned();
        let user = dev.api(1).user("anna", "user").await;
        Self {
            sessions,
            lease_token: granted["token"].as_u64().unwrap(),
            open,
            user,
            new_node,
            dev,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dev.path().join(name)
    }

    /// Kills all nodes; their agent and its sessions go on.
    fn kill_all(&mut self) {
        for node in 0..3 {
            self.dev.kill_node(node);
        }
    }

    /// The flags of the only node of a new cluster, which stands where node 1 was.
    fn new_cluster<'a>(&'a self, data: &'a str) -> Vec<&'a str> {
        let command = &self.dev.file.nodes[0].command;
        vec![
            data,
            "--node-id",
            self.new_node,
            "--peer",
            flag(command, "--peer"),
            "--http",
            flag(command, "--http"),
        ]
    }

    /// Starts that node.
    async fn start(&mut self, data: &Path) {
        let command = &mut self.dev.file.nodes[0].command;
        let members = format!("{}={}", self.new_node, flag(command, "--peer"));
        set(command, "--node-id", self.new_node);
        set(command, "--data", data.to_str().unwrap());
        set(command, "--members", &members);
        self.dev.restart_node(0);
        eventually("a restored cluster that serves", || async {
            self.dev.client_of(0).readyz().await.ok()
        })
        .await;
    }

    fn new_token_file(&self) -> PathBuf {
        let file = self.path("new.token");
        fs::write(&file, NEW_TOKEN).unwrap();
        restrict(&file);
        file
    }
}

fn flag<'a>(command: &'a [String], name: &str) -> &'a str {
    let at = command.iter().position(|word| word == name);
    &command[at.unwrap_or_else(|| panic!("no {name}")) + 1]
}

fn set(command: &mut [String], name: &str, value: &str) {
    let at = command.iter().position(|word| word == name).unwrap();
    value.clone_into(&mut command[at + 1]);
}

/// Every file below, with what is in it; without the lock, in which a running node notes its pid.
fn content(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for item in fs::read_dir(folder).unwrap() {
        let path = item.unwrap().path();
        if path.is_dir() {
            found.extend(content(&path));
        } else {
            let bytes = fs::read(&path).unwrap();
            found.insert(path, bytes);
        }
    }
    found
}

#[track_caller]
fn done(dev: &Dev, args: &[&str]) -> Value {
    let args: Vec<&str> = args.iter().copied().chain(["--output", "json"]).collect();
    let (code, out, err) = dev.cli(&args);
    assert_eq!(code, 0, "{args:?}: {err}");
    serde_json::from_str(&out).unwrap()
}

#[track_caller]
fn refused(dev: &Dev, args: &[&str], words: &[&str]) {
    let (code, out, err) = dev.cli(args);
    assert_ne!(code, 0, "{args:?} was done: {out}");
    for word in words {
        assert!(err.contains(word), "{args:?} says {err:?}, not {word:?}");
    }
}

async fn acquire(api: &Api, name: &str) -> crate::wire::Answer {
    let body = json!({ "holder": "me", "ttlMs": 60_000 });
    api.post(&format!("leases/{name}/acquire"), body).await
}

#[tokio::test]
async fn a_backup_makes_a_cluster_that_says_nothing_twice_and_grants_nothing_too_early() {
    let mut past = Past::new("7").await;
    past.user.get("cluster/backup").await.problem(403, "forbidden");
    let nobody = past.user.with_token("");
    nobody.get("cluster/backup").await.problem(401, "unauthenticated");
    let file = past.path("a.backup");
    let name = file.to_str().unwrap();
    let written = done(&past.dev, &["cluster", "backup", name]);
    assert_eq!((&written["sessions"], &written["users"]), (&json!(2), &json!(2)));
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    refused(&past.dev, &["cluster", "backup", name], &["exists already"]);
    past.kill_all();
    refused(
        &past.dev,
        &["cluster", "backup", past.path("b").to_str().unwrap()],
        &["no server answered"],
    );
    assert!(!past.path("b").exists());

    // Nothing is made of what is not whole, and nothing is written over.
    let whole = fs::read(&file).unwrap();
    let damaged = past.path("damaged.backup");
    let new = past.path("new");
    let data = new.to_str().unwrap();
    for (at, why) in [
        (0, "does not begin like a snapshot"),
        (whole.len() / 2, "frame"),
        (whole.len() - 9, "whole file"),
    ] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        fs::write(&damaged, bytes).unwrap();
        let mut args = vec!["cluster", "restore", damaged.to_str().unwrap(), "--data"];
        args.extend(past.new_cluster(data));
        refused(&past.dev, &args, &["damaged.backup is damaged", why]);
        fs::write(&damaged, &whole[..at]).unwrap();
        refused(
            &past.dev,
            &args,
            &["damaged.backup is damaged", "it ends too early"],
        );
    }
    assert!(!new.exists());

    // Somewhere else than where the agent looks: it has no token here.
    let home = past.dev.file.nodes[0].http.clone();
    past.serve_at(&free_address());
    let token_file = past.new_token_file();
    let mut restore = vec!["cluster", "restore", name, "--data"];
    restore.extend(past.new_cluster(data));
    restore.extend(["--bootstrap-token-file", token_file.to_str().unwrap()]);
    let made = done(&past.dev, &restore);
    assert_eq!(made["formerClusterId"], written["clusterId"]);
    assert_ne!(made["clusterId"], written["clusterId"]);
    assert!(made["revision"].as_u64().unwrap() > BASE_STEP);
    assert!(made["noLeaseBefore"].is_string());
    let before = content(&new);
    refused(&past.dev, &restore, &["is not empty"]);
    assert_eq!(content(&new), before);
    let mut nowhere = restore.clone();
    nowhere[2] = "/nonexistent/backup";
    refused(&past.dev, &nowhere, &["/nonexistent/backup", "No such file"]);

    drop((restore, nowhere));
    past.start(&new).await;
    let old = past.dev.api(0);
    old.get("sessions").await.problem(401, "unauthenticated");
    let api = old.with_token(NEW_TOKEN);
    let sessions = api.get("sessions").await.ok(200);
    assert_eq!(sessions["total"], 2);
    let login = json!({ "username": "anna", "password": crate::wire::PASSWORD });
    old.with_token("").post("auth/login", login).await.ok(200);
    let command = api.get(&format!("commands/{}", past.open)).await.ok(200);
    assert_eq!(
        (&command["status"], &command["error"]),
        (&json!("failed"), &json!("restored"))
    );
    assert_eq!(api.get("leases").await.ok(200)["leases"], json!([]));
    let cluster = api.get("cluster").await.ok(200);
    assert_eq!(cluster["formerClusterIds"], json!([written["clusterId"]]));
    assert!(cluster["leasesHeldBackUntil"].is_string());
    let held_back = acquire(&api, "jobs").await;
    let wait: u64 = held_back.header("retry-after").parse().unwrap();
    assert!((3_000..=3_672).contains(&wait), "{wait}");
    let problem = held_back.problem(503, "leases_held_back");
    assert_eq!(problem["until"], made["noLeaseBefore"]);
    let key = api.agent(json!({ "agentId": "another" })).await;
    let mut socket = Socket::connect(&api, "agent_id=another&protocol=3", &key).await;
    socket
        .send(json!({ "type": "hello", "payload": { "protocol": 3 } }))
        .await;
    let (code, reason) = socket.closed().await;
    assert_eq!(code, 1013);
    assert!(reason.contains("the cluster was restored"), "{reason}");
    let used = api.get("cluster").await.header("x-regent-index").to_owned();

    // The same backup once more, by somebody who knows that the old cluster is dead, and of the cluster between.
    past.dev.kill_node(0);
    past.serve_at(&home);
    let again = past.path("again");
    let mut restore = vec!["cluster", "restore", name, "--data"];
    restore.extend(past.new_cluster(again.to_str().unwrap()));
    restore.extend([
        "--keep-tokens",
        "--old-cluster-is-dead",
        "--above-revision",
        &used,
    ]);
    let made = done(&past.dev, &restore);
    assert!(made["revision"].as_u64().unwrap() > 2 * BASE_STEP);
    assert!(made["noLeaseBefore"].is_null());
    drop(restore);
    past.start(&again).await;
    let api = past.dev.api(0);
    let granted = acquire(&api, "jobs").await.ok(200);
    let token = granted["token"].as_u64().unwrap();
    assert!(token > past.lease_token && token > used.parse().unwrap());
    let renew = json!({ "token": past.lease_token });
    api.post("leases/jobs/renew", renew)
        .await
        .problem(409, "lease_lost");

    // The agent ran all the time: it follows, with its sessions, and takes orders again.
    let agent = past.dev.agent_id();
    let client = past.dev.client_of(0);
    eventually("the agent in the new cluster", || async {
        let agent = client.agent(&agent).await.ok()?;
        agent.token.filter(|token| token.0 > 2 * BASE_STEP)
    })
    .await;
    for before in &past.sessions {
        let now = session_state(&client, &before.name, SessionState::Running).await;
        assert_eq!(process_of(&now), process_of(before), "it was started again");
    }
    let session = client.create_session(&session_of("sleep")).await.unwrap();
    session_state(&client, &session.name, SessionState::Running).await;
    let (membership, fence) = (past.agent_file("cluster.json"), past.agent_file("fence.json"));
    assert_eq!(membership["clusterId"], made["clusterId"]);
    assert_eq!(membership["origin"], written["clusterId"]);
    let highest = fence.to_string();
    let highest: u64 = highest
        .chars()
        .filter(char::is_ascii_digit)
        .collect::<String>()
        .parse()
        .unwrap();
    assert!(highest > 2 * BASE_STEP, "{fence}");
}

impl Past {
    /// The next start of node 1's command listens there.
    fn serve_at(&mut self, http: &str) {
        let node = &mut self.dev.file.nodes[0];
        let address = http.trim_start_matches("http://");
        set(&mut node.command, "--http", address);
        node.http = format!("http://{address}");
    }

    fn agent_file(&self, name: &str) -> Value {
        let data = flag(&self.dev.file.agents[0].command, "--data");
        serde_json::from_slice(&fs::read(Path::new(data).join(name)).unwrap()).unwrap()
    }
}

#[tokio::test]
async fn a_cluster_is_recovered_from_one_folder_of_three_and_the_old_nodes_stay_out() {
    let mut past = Past::new("1").await;
    let survivor = past.dev.file.nodes[0].data.clone();
    let folder = survivor.to_str().unwrap().to_owned();
    refused(
        &past.dev,
        &["cluster", "recover", "--data", &folder, "--dry-run"],
        &["in use by another process"],
    );
    let last = past
        .dev
        .client()
        .create_session(&session_of("sleep"))
        .await
        .unwrap();
    // What only the two that are lost had applied would be gone; this one has it too.
    let index = past.dev.client().index().await.unwrap().unwrap();
    eventually("the session on node 1", || async {
        past.dev
            .client_of(0)
            .index()
            .await
            .ok()?
            .filter(|at| *at >= index)
    })
    .await;
    past.kill_all();
    // Node 3 comes back later, from its folder; node 2's is gone for good.
    fs::remove_dir_all(&past.dev.file.nodes[1].data).unwrap();
    let before = content(&survivor);

    let (code, out, err) = past
        .dev
        .cli(&["cluster", "recover", "--data", &folder, "--dry-run"]);
    assert_eq!(code, 0, "{err}");
    for words in [
        "Node 1 has the last entry",
        "The data of nodes 2 and 3 is missing",
        "are lost",
        "nothing was made",
    ] {
        assert!(out.contains(words), "{words:?} is not in {out}");
    }
    let node_3 = past.dev.file.nodes[2].data.to_str().unwrap().to_owned();
    let both = done(
        &past.dev,
        &[
            "cluster",
            "recover",
            "--data",
            &folder,
            "--data",
            &node_3,
            "--dry-run",
        ],
    );
    assert_eq!(both["survivors"].as_array().unwrap().len(), 2);
    assert!(
        both["losses"][0]
            .as_str()
            .unwrap()
            .contains("majority of the voters are here")
    );
    refused(
        &past.dev,
        &[
            "cluster",
            "recover",
            "--data",
            &folder,
            "--data",
            &folder,
            "--dry-run",
        ],
        &["both of node 1"],
    );
    refused(
        &past.dev,
        &["cluster", "recover", "--data", "/proc", "--dry-run"],
        &["/proc is not a node's data folder"],
    );
    refused(&past.dev, &["cluster", "recover", "--data", &folder], &["--into"]);

    let into = past.path("recovered");
    let mut recover = vec!["cluster", "recover", "--data", &folder, "--into"];
    recover.extend(past.new_cluster(into.to_str().unwrap()));
    recover.extend(["--keep-tokens", "--old-cluster-is-dead"]);
    let recovered = done(&past.dev, &recover);
    assert_eq!(recovered["chosen"], 1);
    assert_eq!(content(&survivor), before, "the old folder was changed");
    refused(&past.dev, &recover, &["is not empty"]);
    drop(recover);
    past.start(&into).await;
    let client = past.dev.client_of(0);
    for session in past.sessions.iter().chain([&last]) {
        client.session(&session.name).await.unwrap();
    }
    let cluster = client.cluster().await.unwrap();
    assert_eq!(cluster.members.len(), 1);
    assert_eq!(
        cluster.cluster_id.unwrap().as_str(),
        recovered["made"]["clusterId"].as_str().unwrap()
    );
    let agent = past.dev.agent_id();
    eventually("the agent in the new cluster", || async {
        let agent = client.agent(&agent).await.ok()?;
        agent.token.filter(|token| token.0 > BASE_STEP)
    })
    .await;

    // Node 3 finds the new cluster where node 1 was, under its id.
    past.dev.restart_node(2);
    let log = past.path("node-2.again.log");
    let new_id = recovered["made"]["clusterId"].as_str().unwrap();
    eventually("a refusal of node 3", || async {
        let text = fs::read_to_string(&log).ok()?;
        text.contains("cannot join the peer peer=1").then_some(())?;
        past.dev.client_of(2).readyz().await.is_err().then_some(())
    })
    .await;
    let cluster = client.cluster().await.unwrap();
    assert_eq!(cluster.members.len(), 1, "{cluster:?}");

    // Its machine takes part again as a new node.
    past.dev.kill_node(2);
    let token = done(&past.dev, &["cluster", "add"]);
    let token_file = past.path("join.token");
    fs::write(&token_file, token["token"].as_str().unwrap()).unwrap();
    restrict(&token_file);
    let (data, server) = (past.path("joined"), past.dev.file.nodes[0].http.clone());
    let command = &mut past.dev.file.nodes[2].command;
    set(command, "--node-id", "8");
    set(command, "--data", data.to_str().unwrap());
    let at = command.iter().position(|word| word == "--members").unwrap();
    command.drain(at..at + 2);
    let joins = [
        "--join",
        &server,
        "--join-token-file",
        token_file.to_str().unwrap(),
    ];
    command.extend(joins.map(str::to_owned));
    past.dev.restart_node(2);
    let joined = past.dev.client_of(2);
    eventually("the session on the node that joined", || async {
        joined.readyz().await.ok()?;
        joined.session(&last.name).await.ok()
    })
    .await;
    let cluster = joined.cluster().await.unwrap();
    assert_eq!(cluster.cluster_id.unwrap().as_str(), new_id);
    assert_eq!(cluster.members.len(), 2);
}

#[tokio::test]
async fn backups_on_a_schedule_are_kept_in_number_and_can_be_restored() {
    let mut past = Past::new("7").await;
    let folder = past.path("backups");
    past.dev.kill_node(1);
    let more = [
        "--backup-dir",
        folder.to_str().unwrap(),
        "--backup-every",
        "1s",
        "--backup-keep",
        "2",
    ];
    past.dev.file.nodes[1].command.extend(more.map(str::to_owned));
    past.dev.restart_node(1);
    let kept = || {
        let mut names: Vec<PathBuf> = fs::read_dir(&folder)
            .into_iter()
            .flatten()
            .map(|item| item.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "backup"))
            .collect();
        names.sort();
        names
    };
    let first = eventually("a backup", || async { kept().first().cloned() }).await;
    eventually("the first one is one too many", || async {
        (!first.exists()).then_some(())
    })
    .await;
    eventually("no more than two", || async { (kept().len() == 2).then_some(()) }).await;
    let metrics = past.dev.api(1).get("/metrics").await.text;
    assert!(
        metrics.contains("regent_backups_total{outcome=\"done\"}"),
        "{metrics}"
    );
    past.dev.kill_node(1);
    let newest = kept().pop().unwrap();
    assert_eq!(fs::metadata(&newest).unwrap().permissions().mode() & 0o777, 0o600);
    let data = past.path("unused");
    let mut check = vec![
        "cluster",
        "restore",
        newest.to_str().unwrap(),
        "--dry-run",
        "--data",
    ];
    check.push(data.to_str().unwrap());
    let whole = done(&past.dev, &check);
    assert_eq!(whole["sessions"], 2);
    assert!(!data.exists());

    let alone = &mut past.dev.file.nodes[1].command;
    let at = alone.iter().position(|word| word == "--backup-dir").unwrap();
    alone.drain(at..at + 2);
    past.dev.restart_node(1);
    let log = past.path("node-1.again.log");
    eventually("a refusal of the settings", || async {
        fs::read_to_string(&log)
            .ok()?
            .contains("give --backup-dir")
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_one_node_has_can_be_backed_up_without_a_quorum_by_name_only() {
    let mut past = Past::new("7").await;
    past.dev.kill_node(0);
    past.dev.kill_node(1);
    let file = past.path("alone.backup");
    let path = file.to_str().unwrap();
    refused(&past.dev, &["cluster", "backup", path], &["quorum"]);
    assert!(!file.exists(), "a backup that was refused left a file");
    let made = done(&past.dev, &["cluster", "backup", path, "--stale"]);
    assert_eq!(made["sessions"], 2, "{made}");
    let data = past.path("unused");
    let check = [
        "cluster",
        "restore",
        path,
        "--dry-run",
        "--data",
        data.to_str().unwrap(),
    ];
    assert_eq!(done(&past.dev, &check)["sessions"], 2);
}
