//! The command line: every command that asks a cluster, as a table and as JSON; exit code 0 when it is
//! done, 1 when it is refused (the problem on stderr), 2 when it is used wrongly.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::harness::{Dev, REGENT, eventually, restrict};

impl Dev {
    /// What a command that must succeed prints.
    #[track_caller]
    fn says(&self, args: &[&str]) -> String {
        let (code, out, err) = self.cli(args);
        assert_eq!(code, 0, "{args:?}: {err}");
        assert_eq!(err, "", "{args:?}");
        out
    }

    /// The same as JSON.
    #[track_caller]
    fn json(&self, args: &[&str]) -> Value {
        let out = self.says(&[args, &["--output", "json"]].concat());
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{args:?}: {error}: {out}"))
    }

    /// The problem of a command that must be refused.
    #[track_caller]
    fn refused(&self, args: &[&str]) -> String {
        let (code, out, err) = self.cli(args);
        assert_eq!((code, out.as_str()), (1, ""), "{args:?}: {err}");
        assert!(err.starts_with("regent: "), "{err}");
        err
    }

    /// A table's first line has these columns and some line these words.
    #[track_caller]
    fn table(&self, args: &[&str], columns: &[&str], words: &[&str]) {
        let out = self.says(args);
        let head = out.lines().next().unwrap_or_default();
        for column in columns {
            assert!(head.contains(column), "{args:?}: no {column} in {head}");
        }
        assert!(
            out.lines()
                .skip(1)
                .any(|line| words.iter().all(|word| line.contains(word))),
            "{args:?}: no {words:?} in\n{out}"
        );
    }
}

/// Runs the binary with nothing of this test's environment but these variables.
fn bare(args: &[&str], variables: &[(&str, &str)]) -> (i32, String, String) {
    let mut command = Command::new(REGENT);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("REGENT_") {
            command.env_remove(name);
        }
    }
    let output = command
        .args(args)
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[tokio::test]
async fn sessions_and_commands_by_command_line() {
    let dev = Dev::start();
    let made = dev.json(&[
        "session", "create", "demo", "--tag", "t", "--cpu", "200m", "--memory", "64Mi", "--wait",
    ]);
    assert_eq!(
        (&made["state"], &made["tags"], &made["resources"]["cpu"]),
        (&json!("running"), &json!(["t"]), &json!("200m"))
    );
    let name = made["name"].as_str().unwrap();
    dev.table(
        &["session", "list"],
        &["NAME", "STATE", "AGENT"],
        &[name, "running", "dev"],
    );
    dev.table(
        &["sessions", "list", "--tag", "t", "--state", "running"],
        &["NAME"],
        &[name],
    );
    assert_eq!(
        dev.json(&["session", "list", "--user", "admin", "--agent", "dev"])[0]["name"],
        name
    );
    assert_eq!(dev.json(&["session", "list", "--state", "failed"]), json!([]));
    assert_eq!(dev.json(&["session", "get", name])["name"], name);
    assert_eq!(
        dev.json(&["session", "set", name, "--tag", "u"])["tags"],
        json!(["u"])
    );
    for (action, state) in [
        ("hibernate", "hibernated"),
        ("wake", "running"),
        ("stop", "terminated"),
    ] {
        let told = dev.json(&["session", action, name]);
        assert_eq!(told["name"], name);
        assert!(told["commandId"].is_string(), "{told}");
        eventually(state, || async {
            (dev.json(&["session", "get", name])["state"] == state).then_some(())
        })
        .await;
    }
    dev.table(
        &["command", "list", "--session", name],
        &["ID", "ACTION", "STATUS"],
        &["stop_session", "completed"],
    );
    let commands = dev.json(&["commands", "list", "--agent", "dev", "--status", "completed"]);
    let id = commands[0]["commandId"].as_str().unwrap();
    assert_eq!(dev.json(&["command", "get", id])["commandId"], id);
    assert!(dev.refused(&["command", "cancel", id]).contains("wrong_state"));
    assert!(
        dev.refused(&["session", "get", "none"])
            .contains("session_not_found")
    );
    assert!(
        dev.refused(&["session", "create", "none"])
            .contains("template_not_found")
    );
    let full = dev.refused(&["session", "create", "demo", "--region", "nowhere"]);
    assert!(full.contains("no_agents_available"), "{full}");

    dev.api(0).agent(json!({ "agentId": "away" })).await;
    let command = dev
        .api(0)
        .post("agents/away/commands", json!({ "action": "a" }))
        .await
        .ok(202);
    let id = command["commandId"].as_str().unwrap();
    assert_eq!(dev.json(&["command", "cancel", id])["status"], "cancelled");
    let again = dev.json(&["command", "retry", id]);
    assert_eq!((&again["status"], &again["run"]), (&json!("pending"), &json!(2)));
}

#[tokio::test]
async fn watching_by_command_line() {
    let dev = Dev::start();
    let watch = |args: &[&str]| {
        let urls: Vec<&str> = dev.file.nodes.iter().map(|n| n.http.as_str()).collect();
        let mut child = Command::new(REGENT)
            .args(args)
            .env("REGENT_URL", urls.join(","))
            .env("REGENT_TOKEN", &dev.file.admin_token)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        (BufReader::new(child.stdout.take().unwrap()).lines(), child)
    };
    let index = dev.client().index().await.unwrap().unwrap();
    let made = dev.json(&["session", "create", "sleep", "--wait"]);
    let name = made["name"].as_str().unwrap();
    let after = format!("{index}.{}", u32::MAX);
    let (mut lines, mut child) = watch(&["events", "--after", &after, "--kind", "session", "-o", "json"]);
    let first: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(
        (&first["kind"], &first["subject"]),
        (&json!("session.created"), &json!(name))
    );
    child.kill().unwrap();
    child.wait().unwrap();
    let (mut lines, mut child) = watch(&["session", "watch", name]);
    // It watches from when it is connected on: what it is to see comes until it is seen.
    let busy = std::sync::atomic::AtomicBool::new(true);
    let line = std::thread::scope(|scope| {
        scope.spawn(|| {
            while busy.load(std::sync::atomic::Ordering::Relaxed) {
                dev.cli(&[
                    "session",
                    "set",
                    name,
                    "--tag",
                    &format!("{:?}", std::time::Instant::now())[..20],
                ]);
            }
        });
        let line = lines.next().unwrap().unwrap();
        busy.store(false, std::sync::atomic::Ordering::Relaxed);
        line
    });
    assert!(line.contains(name) && line.contains("session."), "{line}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test]
async fn agents_leases_templates_and_the_cluster_by_command_line() {
    let dev = Dev::start();
    dev.table(
        &["agent", "list"],
        &["ID", "STATUS", "SCHEDULING"],
        &["dev", "online", "eligible"],
    );
    assert_eq!(dev.json(&["agents", "list"])[0]["agentId"], "dev");
    assert_eq!(dev.json(&["agent", "get", "dev"])["status"], "online");
    assert_eq!(dev.json(&["agent", "cordon", "dev"])["scheduling"], "cordoned");
    assert_eq!(
        dev.json(&["agent", "drain", "dev", "--deadline", "5m"])["scheduling"],
        "draining"
    );
    assert_eq!(dev.json(&["agent", "uncordon", "dev"])["scheduling"], "eligible");
    dev.api(0).agent(json!({ "agentId": "away" })).await;
    let secret = dev.says(&["agent", "token", "away"]);
    assert_eq!(
        secret.lines().count(),
        1,
        "the secret and nothing else, for scripts"
    );
    assert_eq!(
        dev.api(1)
            .with_token(secret.trim())
            .get("agents/away")
            .await
            .status,
        200
    );
    dev.says(&["agent", "delete", "away", "--force"]);
    assert!(dev.refused(&["agent", "get", "away"]).contains("agent_not_found"));

    let grant = dev.json(&["lease", "acquire", "jobs/one", "--holder", "me", "--ttl", "1m"]);
    let token = grant["token"].to_string();
    assert_eq!(grant["ttlMs"], 60_000);
    dev.table(
        &["lease", "list"],
        &["NAME", "HOLDER", "TOKEN"],
        &["jobs/one", "me", &token],
    );
    assert_eq!(dev.json(&["leases", "get", "jobs/one"])["holder"], "me");
    assert!(
        dev.refused(&["lease", "acquire", "jobs/one", "--holder", "you"])
            .contains("lease_held")
    );
    assert_eq!(
        dev.json(&["lease", "renew", "jobs/one", "--token", &token])["ttlMs"],
        60_000
    );
    dev.says(&["lease", "verify", "jobs/one", "--token", &token]);
    dev.says(&["lease", "release", "jobs/one", "--token", &token]);
    assert!(
        dev.refused(&["lease", "verify", "jobs/one", "--token", &token])
            .contains("lease_lost")
    );
    dev.says(&["lease", "acquire", "jobs/one", "--holder", "me"]);
    dev.says(&["lease", "force-release", "jobs/one"]);
    assert!(
        dev.refused(&["lease", "get", "jobs/one"])
            .contains("lease_not_found")
    );

    let file = dev.path().join("template.json");
    let manifest =
        json!({ "metadata": { "name": "mine" }, "spec": { "command": ["sleep"], "args": ["100"] } });
    std::fs::write(&file, manifest.to_string()).unwrap();
    let file = file.display().to_string();
    for _ in 0..2 {
        dev.table(
            &["template", "apply", "--file", &file],
            &["NAME", "COMMAND"],
            &["mine", "sleep 100"],
        );
    }
    dev.table(&["template", "list"], &["NAME"], &["demo", "true"]);
    assert_eq!(
        dev.json(&["templates", "get", "mine"])["manifest"]["spec"]["args"],
        json!(["100"])
    );
    dev.says(&["template", "delete", "mine"]);
    assert!(
        dev.refused(&["template", "get", "mine"])
            .contains("template_not_found")
    );

    let status = dev.json(&["cluster", "status"]);
    assert_eq!(status["members"].as_array().unwrap().len(), 3);
    // What members say of themselves travels now and then.
    eventually("a leader and followers in the table", || async {
        let table = dev.says(&["cluster", "status"]);
        (table.contains("leader") && table.contains("follower")).then_some(())
    })
    .await;
    assert!(dev.says(&["version"]).starts_with("regent "));
    assert!(dev.json(&["version"])["version"].is_string());
}

#[tokio::test]
async fn users_tokens_and_logins_by_command_line() {
    let dev = Dev::start();
    let secret = |name: &str, text: &str| {
        let path = dev.path().join(name);
        std::fs::write(&path, text).unwrap();
        restrict(&path);
        path.display().to_string()
    };
    let (old, new) = (
        secret("old", "the old password"),
        secret("new", "the new password"),
    );
    let anna = dev.json(&[
        "user",
        "create",
        "anna",
        "--password-file",
        &old,
        "--sessions",
        "2",
        "--memory",
        "1Gi",
    ]);
    assert_eq!(
        (&anna["role"], &anna["quota"]),
        (&json!("user"), &json!({ "sessions": 2, "memory": "1Gi" }))
    );
    assert!(
        dev.refused(&["user", "create", "anna", "--password-file", &old])
            .contains("already_exists")
    );
    dev.table(&["user", "list"], &["NAME", "ROLE"], &["anna", "user"]);
    dev.says(&["user", "quota", "anna", "--sessions", "1"]);
    let users = dev.json(&["user", "list"]);
    let anna = users
        .as_array()
        .unwrap()
        .iter()
        .find(|user| user["username"] == "anna")
        .unwrap();
    assert_eq!(
        anna["quota"],
        json!({ "sessions": 1 }),
        "what is not given is not limited"
    );
    let line = dev.says(&["login", "anna", "--password-file", &old]);
    let token = line
        .trim()
        .strip_prefix("export REGENT_TOKEN=")
        .expect("a line to paste")
        .to_owned();
    let url = dev.file.nodes[1].http.clone();
    let as_anna = |args: &[&str]| bare(args, &[("REGENT_URL", &url), ("REGENT_TOKEN", &token)]);
    assert_eq!(as_anna(&["session", "list"]).0, 0);
    let (code, out, err) = as_anna(&["agent", "list"]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.contains("forbidden"), "{err}");
    dev.says(&["user", "passwd", "anna", "--password-file", &new]);
    assert!(
        as_anna(&["session", "list"]).2.contains("unauthenticated"),
        "logins end with the password"
    );
    assert!(
        dev.refused(&["login", "anna", "--password-file", &old])
            .contains("unauthenticated")
    );
    assert!(dev.json(&["login", "anna", "--password-file", &new])["token"].is_string());

    let secret = dev.says(&[
        "token",
        "create",
        "--user",
        "anna",
        "--expires-in",
        "1h",
        "--description",
        "by test",
    ]);
    assert_eq!(secret.lines().count(), 1);
    let tokens = dev.json(&["token", "list"]);
    let made = tokens
        .as_array()
        .unwrap()
        .iter()
        .find(|token| token["description"] == "by test")
        .unwrap();
    dev.table(
        &["tokens", "list"],
        &["ID", "FOR"],
        &[made["id"].as_str().unwrap(), "user:anna"],
    );
    dev.says(&["token", "revoke", made["id"].as_str().unwrap()]);
    assert!(
        dev.refused(&["token", "revoke", made["id"].as_str().unwrap()])
            .contains("token_not_found")
    );
    dev.says(&["user", "delete", "anna"]);
    assert!(
        dev.refused(&["user", "delete", "anna"])
            .contains("user_not_found")
    );
}

#[test]
fn wrong_usage_is_exit_code_2_and_a_cluster_that_is_not_there_1() {
    for args in [
        &["nonsense"][..],
        &[],
        &["session"],
        &["session", "create"],
        &["session", "create", "Not A Name"],
        &["session", "list", "--state", "asleep"],
        &["session", "list", "--output", "xml"],
        &["lease", "renew", "x"],
        &["lease", "acquire", "x", "--holder", "h", "--ttl", "soon"],
        &["command", "list", "--status", "lost"],
        &["template", "apply", "--file", "/nowhere"],
        &["server"],
        &["agent", "run", "--runtime", "abacus"],
        &["dev", "--nodes", "0"],
        &["dev", "--port", "1"],
    ] {
        let (code, out, err) = bare(args, &[]);
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {err}");
        assert!(!err.is_empty(), "{args:?}");
    }
    for args in [
        &["--help"][..],
        &["session", "--help"],
        &["--version"],
        &["help", "server"],
    ] {
        assert_eq!(bare(args, &[]).0, 0, "{args:?}");
    }
    let (code, out, err) = bare(
        &["session", "list", "--url", "http://127.0.0.1:9"],
        &[("REGENT_TOKEN", "t")],
    );
    assert_eq!((code, out.as_str()), (1, ""), "{err}");
    assert!(err.contains("http://127.0.0.1:9"), "{err}");
}

#[test]
fn an_unknown_key_of_the_configuration_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("regent.toml");
    std::fs::write(&file, "node-id = 1\nhartbeat = \"5s\"\n").unwrap();
    let file = file.display().to_string();
    for command in [&["server"][..], &["agent", "run"]] {
        let (code, _, err) = bare(&[command, &["--config", &file]].concat(), &[]);
        assert_eq!(code, 2, "{err}");
        assert!(err.contains("hartbeat") || err.contains("node-id"), "{err}");
        let (code, _, err) = bare(command, &[("REGENT_HARTBEAT", "5s")]);
        assert_eq!(code, 2, "{err}");
        assert!(err.contains("REGENT_HARTBEAT"), "{err}");
        let (code, _, err) = bare(&[command, &["--config", "/nowhere.toml"]].concat(), &[]);
        assert_eq!(code, 2, "{err}");
    }
    let (code, _, err) = bare(&["server", "--heartbeat", "5 parsecs"], &[]);
    assert_eq!(code, 2, "{err}");
}

/// Whoever pasted the two lines of `dev` has an admin's token in `REGENT_TOKEN`. A flag stands before it.
#[test]
fn the_token_file_of_an_agent_is_taken_whatever_token_the_shell_has() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing.token").display().to_string();
    let data = folder.path().join("data").display().to_string();
    let output = std::process::Command::new(REGENT)
        .args([
            "agent",
            "run",
            "--agent-id",
            "a",
            "--servers",
            "http://127.0.0.1:1",
        ])
        .args(["--token-file", &missing, "--data", &data])
        .env("REGENT_TOKEN", "of somebody else")
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(
        said.contains("missing.token") && said.contains("cannot be read"),
        "{said}"
    );
}
