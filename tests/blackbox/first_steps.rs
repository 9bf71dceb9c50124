//! The script of docs/operations.md that leads from nothing to a running session is run as it stands there, in a network
//! and among processes of its own: it names ports, and it ends nothing that it starts.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::harness::{PATIENCE, REGENT, lacks};

const HEADING: &str = "## From nothing to a running session\n";

#[test]
fn the_documented_script_leads_from_nothing_to_a_running_session_over_tls() {
    // The process with the number 1 of its own numbers ends all others with it.
    let isolated = ["--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--"];
    let unshare = |program: &str| {
        let mut command = Command::new("timeout");
        command.arg(PATIENCE.as_secs().to_string()).arg("unshare");
        command.args(isolated).arg(program).stdin(Stdio::null());
        command
    };
    let can = unshare("true")
        .output()
        .is_ok_and(|output| output.status.success());
    if lacks("netns", can) {
        return;
    }
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/operations.md");
    let script = script(&std::fs::read_to_string(docs).unwrap());
    let folder = tempfile::Builder::new().prefix("regent-test-").tempdir().unwrap();
    let steps = format!(
        "set -euo pipefail\nip link set lo up\n{script}\n\
         regent agent list --output json > agents.json\nregent cluster status --output json > cluster.json\n"
    );
    let began = Instant::now();
    let output = unshare("bash")
        .args(["-c", &steps])
        .current_dir(folder.path())
        .env("PATH", path_with(Path::new(REGENT).parent().unwrap()))
        .output()
        .unwrap();
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{out}{}{}",
        String::from_utf8_lossy(&output.stderr),
        logs(folder.path())
    );
    eprintln!("from nothing to a running session: {:.1?}", began.elapsed());

    assert!(out.lines().any(|line| line.contains("running")), "{out}");
    let read = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(folder.path().join(name)).unwrap()).unwrap()
    };
    let cluster = read("cluster.json");
    let members = cluster["members"].as_array().unwrap();
    assert_eq!(members.len(), 3, "{cluster}");
    for member in members {
        assert!(
            member["http"].as_str().unwrap().starts_with("https://"),
            "{member}"
        );
    }
    let agents = read("agents.json");
    assert!(agents.to_string().contains("a1"), "{agents}");
    // What the agent keeps is its own token, not the one that it came with.
    let given = std::fs::read_to_string(folder.path().join("cluster/admin.token")).unwrap();
    let given = given.trim();
    for file in files(&folder.path().join("data/agent")) {
        let content = String::from_utf8_lossy(&std::fs::read(&file).unwrap()).into_owned();
        assert!(
            !content.contains(given),
            "{} has the admin's token",
            file.display()
        );
    }
}

/// The first indented block after the heading.
fn script(docs: &str) -> String {
    let section = docs.split_once(HEADING).expect("the section is there").1;
    let lines = section
        .lines()
        .skip_while(|line| !line.starts_with("    "))
        .take_while(|line| line.is_empty() || line.starts_with("    "));
    lines
        .map(|line| line.trim_start_matches("    ").to_owned() + "\n")
        .collect()
}

fn path_with(folder: &Path) -> String {
    format!("{}:{}", folder.display(), std::env::var("PATH").unwrap())
}

fn logs(folder: &Path) -> String {
    let logs = files(folder)
        .into_iter()
        .filter(|file| file.extension().is_some_and(|is| is == "log"));
    let said = logs.map(|file| {
        format!(
            "\n{}:\n{}",
            file.display(),
            std::fs::read_to_string(&file).unwrap_or_default()
        )
    });
    said.collect()
}

/// The files in a folder and in the folders in it.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for item in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if item.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(files(&item.path()));
        } else {
            found.push(item.path());
        }
    }
    found
}
