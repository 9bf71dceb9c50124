//! The container image, and what the tests of its deployments share.

use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

use crate::engine::Engine;
use crate::harness::{REGENT, eventually};

/// The tag that all of `deploy/` names.
pub(crate) const TAG: &str = "regent:0.1.0";
/// The user of the image.
const USER: u32 = 65_532;
/// The first admin's token.
pub(crate) const ADMIN: &str = "regent_the-first-admin-of-this-test";

/// Makes the image on this engine as a person would, but in the profile that builds quickly.
pub(crate) fn build(host: &str) {
    // The binary is built once; two at a time would only wait for each other.
    static BINARY: OnceLock<()> = OnceLock::new();
    let build = |args: &[&str]| {
        let output = Command::new(deploy("image/build"))
            .args(["--profile", "dev"])
            .args(args)
            // The engine of the tests is Debian's; some machines have another package's client too.
            .env("DOCKER", "/usr/bin/docker")
            .env("DOCKER_HOST", host)
            // What cargo tells a test is not for another build.
            .env_remove("RUSTC_WORKSPACE_WRAPPER")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    BINARY.get_or_init(|| build(&["--binary-only"]));
    build(&["--tag", TAG]);
}

/// A file below `deploy/`.
pub(crate) fn deploy(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(path)
}

/// The commands of the manual's section, by their number in it.
pub(crate) fn manual(section: &str, number: usize) -> String {
    let manual = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operations.md");
    let manual = std::fs::read_to_string(manual).unwrap();
    let (_, section) = manual.split_once(&format!("\n{section}\n")).unwrap();
    let section = section.split("\n#").next().unwrap().trim_start_matches('\n');
    let commands = |part: &&str| part.lines().all(|line| line.starts_with("    "));
    section
        .split("\n\n")
        .filter(commands)
        .nth(number)
        .unwrap()
        .to_owned()
}

/// Makes the cluster's folder by the command of the manual, or new certificates in it; and the agent's, beside those of the
/// nodes. `nodes` are the values of `--node`.
pub(crate) fn cluster_folder(root: &Path, nodes: &[String]) -> PathBuf {
    let cluster = root.join("cluster");
    let agent = cluster.join("agent");
    if !cluster.exists() {
        std::fs::create_dir_all(&agent).unwrap();
        let token = cluster.join("admin.token");
        std::fs::write(&token, ADMIN).unwrap();
        std::fs::set_permissions(&token, Permissions::from_mode(0o600)).unwrap();
        std::fs::set_permissions(&agent, Permissions::from_mode(0o700)).unwrap();
    }
    let made = Command::new(REGENT)
        .args(["cert", "cluster", "--out"])
        .arg(&cluster)
        .args(nodes.iter().flat_map(|node| ["--node", node]))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    std::fs::copy(cluster.join("ca/ca.pem"), agent.join("ca.pem")).unwrap();
    let ids = nodes.iter().filter_map(|node| node.split('=').next());
    let folders = ids.map(|id| cluster.join(format!("node-{id}")));
    for folder in folders.chain([agent]) {
        for entry in std::fs::read_dir(&folder).unwrap() {
            own(&entry.unwrap().path());
        }
        own(&folder);
    }
    cluster
}

/// The nodes as compose and the Swarm call them.
pub(crate) fn nodes() -> Vec<String> {
    (1..=3).map(|id| format!("{id}=node-{id}")).collect()
}

/// Writes a secret for the image's user.
pub(crate) fn secret(file: &Path, text: &str) {
    std::fs::write(file, text).unwrap();
    std::fs::set_permissions(file, Permissions::from_mode(0o600)).unwrap();
    own(file);
}

fn own(path: &Path) {
    chown(path, Some(USER), Some(USER)).unwrap();
}

/// The group of the engine's socket.
pub(crate) fn group_of(socket: &str) -> String {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(socket).unwrap().gid().to_string()
}

/// Runs the binary in a node's container, as its administrator; what it prints, or what it complains of.
pub(crate) fn regent(engine: &Engine, container: &str, args: &[&str]) -> Result<String, String> {
    run_with(engine, container, &[], args)
}

fn run_with(engine: &Engine, container: &str, options: &[&str], args: &[&str]) -> Result<String, String> {
    let token = format!("REGENT_TOKEN={ADMIN}");
    let exec = ["exec", "-e", &token];
    let output = engine.docker_output(&[&exec, options, &[container, "regent"], args].concat());
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr))
    }
}

/// The same as JSON.
pub(crate) fn json(engine: &Engine, container: &str, args: &[&str]) -> Result<Value, String> {
    let said = regent(engine, container, &[args, &["--output", "json"]].concat())?;
    serde_json::from_str(&said).map_err(|error| format!("{error}: {said}"))
}

/// Waits until the administrator is served there and sees so many members reached; the cluster as that node tells it.
pub(crate) async fn served(engine: &Engine, container: &str, members: usize) -> Value {
    eventually("a cluster that serves", || async {
        let cluster = json(engine, container, &["cluster", "status"]).ok()?;
        let reached = cluster["members"].as_array()?.iter();
        let reached = reached.filter(|member| member["reachable"] == true).count();
        (reached == members && cluster["leader"].is_u64()).then_some(cluster)
    })
    .await
}

/// Waits until this member has a vote.
pub(crate) async fn votes(engine: &Engine, container: &str, member: u64) {
    eventually("a member's vote", || async {
        let cluster = json(engine, container, &["cluster", "status"]).ok()?;
        let mut members = cluster["members"].as_array()?.iter();
        members
            .any(|one| one["id"] == member && one["voter"] == true)
            .then_some(())
    })
    .await;
}

/// Waits until these are the members, and all are reached; the cluster as that node tells it.
pub(crate) async fn members(engine: &Engine, container: &str, ids: &[u64]) -> Value {
    eventually("the members that are to be", || async {
        let cluster = served(engine, container, ids.len()).await;
        let members = cluster["members"].as_array()?.iter();
        let are: Vec<u64> = members.filter_map(|member| member["id"].as_u64()).collect();
        (are == ids).then_some(cluster)
    })
    .await
}

/// That a node serves by TLS and by nothing else, and says so of all others.
pub(crate) fn by_tls_only(engine: &Engine, container: &str) {
    let cluster = json(engine, container, &["cluster", "status"]).unwrap();
    for member in cluster["members"].as_array().unwrap() {
        let http = member["http"].as_str().unwrap();
        assert!(http.starts_with("https://"), "{cluster}");
    }
    let plain = ["-e", "REGENT_URL=http://127.0.0.1:8000"];
    let refused = run_with(engine, container, &plain, &["cluster", "status"]).unwrap_err();
    assert!(refused.contains("speaks TLS only"), "{refused}");
}

/// A template whose sessions run until they are told to end.
pub(crate) fn sleeper(image: &str) -> String {
    serde_json::json!({
        "metadata": { "name": "sleeper" },
        "spec": {
            "baseImage": image, "command": ["sh", "-c"], "args": ["trap 'exit 0' TERM; sleep 100000 & wait"],
            "defaultResources": { "cpu": "10m", "memory": "16Mi" }
        }
    })
    .to_string()
}

/// Plain text between machines is for who asks for it, and nothing that is shipped does.
#[test]
fn nothing_that_is_deployed_asks_for_plain_text() {
    let mut folders = vec![deploy("")];
    let mut read = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap().to_lowercase();
            for word in ["plaintext", "http://"] {
                assert!(!text.contains(word), "{word} in {}", path.display());
            }
            read += 1;
        }
    }
    assert!(read > 0, "there is nothing in deploy/");
}

#[tokio::test]
async fn the_image_runs_a_node_without_root_and_without_writing_to_itself() {
    let Some(engine) = Engine::shared("the_image_runs_a_node_without_root_and_without_writing_to_itself")
    else {
        return;
    };
    build(&engine.host);
    let folder = tempfile::tempdir().unwrap();
    let config = cluster_folder(folder.path(), &nodes()).join("node-1");
    assert_eq!(
        engine.docker(&["inspect", "--format", "{{.Config.User}}", TAG]),
        "65532:65532"
    );
    let version = engine.docker(&["run", "--rm", "--read-only", "--network", "none", TAG, "version"]);
    assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");

    let name = format!("image-{}", std::process::id());
    let mount = format!("{}:/etc/regent:ro", config.display());
    let hardened: &[&str] = &[
        "--read-only",
        "--cap-drop",
        "ALL",
        "--security-opt",
        "no-new-privileges",
    ];
    let run: &[&str] = &[
        "run",
        "--detach",
        "--name",
        &name,
        "--network",
        "none",
        "--volume",
        "/data",
    ];
    let node: &[&str] = &[
        "--volume",
        &mount,
        TAG,
        "server",
        "--node-id=1",
        "--data=/data",
        "--http=127.0.0.1:8000",
        "--peer=127.0.0.1:7000",
        "--members=1=127.0.0.1:7000",
        "--cluster-secret-file=/etc/regent/cluster.secret",
        "--bootstrap-token-file=/etc/regent/admin.token",
    ];
    engine.docker(&[run, hardened, node].concat());
    served(engine, &name, 1).await;
    let processes = engine.docker(&["top", &name, "-o", "pid,uid"]);
    let users = processes
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().nth(1));
    assert_eq!(users.collect::<Vec<_>>(), ["65532"], "{processes}");
    // It ends in order when it is told to, as its first process.
    engine.docker(&["stop", "--time", "60", &name]);
    assert_eq!(
        engine.docker(&["inspect", "--format", "{{.State.ExitCode}}", &name]),
        "0"
    );
    engine.docker(&["rm", "--volumes", &name]);
}
