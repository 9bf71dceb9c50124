//! What is installed beside the binary: completion scripts, manual pages, systemd units, and what a unit is told.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{Dev, REGENT, eventually, lacks};

/// Of 100: what `systemd-analyze security` may find open to a node, and to an agent, whose sessions are programs of all
/// kinds.
const UNITS: [(&str, u32); 2] = [("regent.service", 15), ("regent-agent@.service", 30)];

fn regent(args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(REGENT)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn each_shell_has_a_completion_script() {
    for shell in ["bash", "zsh", "fish"] {
        let (code, script, error) = regent(&["completion", shell]);
        assert_eq!((code, error.as_str()), (Some(0), ""));
        for word in ["force-release", "bootstrap-token-file"] {
            assert!(script.contains(word), "{shell}: no {word}");
        }
    }
    let (code, _, error) = regent(&["completion", "tcl"]);
    assert_eq!(code, Some(2));
    assert!(error.contains("bash"), "{error}");
}

#[test]
fn bash_reads_its_script_and_completes_by_it() {
    let (_, script, _) = regent(&["completion", "bash"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("regent");
    std::fs::write(&file, script).unwrap();
    let read = Command::new("bash").arg("-n").arg(&file).output().unwrap();
    assert!(read.status.success(), "{}", String::from_utf8_lossy(&read.stderr));
    let ask = "source $0; COMP_WORDS=(regent lease for) COMP_CWORD=2; _regent regent for lease; echo ${COMPREPLY[@]}";
    let output = Command::new("bash")
        .args(["--norc", "-c", ask])
        .arg(&file)
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "force-release");
}

#[test]
fn each_command_has_a_manual_page() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("man1");
    let (code, _, error) = regent(&["man", "--out", out.to_str().unwrap()]);
    assert_eq!((code, error.as_str()), (Some(0), ""));
    for page in ["regent", "regent-server", "regent-agent-run", "regent-lease-hold"] {
        let text = std::fs::read_to_string(out.join(format!("{page}.1"))).unwrap();
        assert!(text.contains(".SH OPTIONS"), "{page}");
    }
    assert!(!out.join("regent-internal.1").exists(), "it is not for people");
    // A file is no folder.
    let (code, _, error) = regent(&["man", "--out", out.join("regent.1").to_str().unwrap()]);
    assert_eq!(code, Some(1));
    assert!(error.contains("cannot be written"), "{error}");
}

#[test]
fn the_units_are_right_and_leave_little_open() {
    let there = Command::new("systemd-analyze")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    if lacks("systemd", there.is_ok_and(|status| status.success())) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/systemd");
    for (unit, exposure) in UNITS {
        let text = std::fs::read_to_string(units.join(unit)).unwrap();
        assert!(text.contains("/usr/bin/regent "), "{unit}");
        let file = folder.path().join(unit);
        // The binary is not installed here, and its manual is not either.
        std::fs::write(&file, text.replace("/usr/bin/regent ", &format!("{REGENT} "))).unwrap();
        let check = |args: &[&str]| {
            let output = Command::new("systemd-analyze")
                .args(args)
                .arg(&file)
                .output()
                .unwrap();
            let said = [output.stdout, output.stderr].concat();
            assert!(
                output.status.success(),
                "{unit}: {}",
                String::from_utf8_lossy(&said)
            );
        };
        check(&["verify", "--man=no"]);
        check(&[
            "security",
            "--offline=true",
            "--no-pager",
            &format!("--threshold={exposure}"),
        ]);
    }
}

#[tokio::test]
async fn a_service_manager_is_told_when_the_node_serves_and_when_it_stops() {
    let mut dev = Dev::start();
    for node in 0..3 {
        dev.kill_node(node);
    }
    let socket = dev.path().join("notify");
    let manager = UnixDatagram::bind(&socket).unwrap();
    manager.set_nonblocking(true).unwrap();
    let variable = format!("NOTIFY_SOCKET={}", socket.display());
    let mut command = vec!["env".to_owned(), variable];
    command.append(&mut dev.file.nodes[1].command);
    dev.file.nodes[1].command = command;
    dev.restart_node(1);
    // Alone it runs and does not serve.
    let readyz = format!("{}/readyz", dev.file.nodes[1].http);
    eventually("a refusal to serve", || async {
        let answer = reqwest::get(&readyz).await.ok()?;
        (answer.status() == 503).then_some(())
    })
    .await;
    let nothing = manager.recv(&mut [0; 256]).unwrap_err();
    assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);

    dev.restart_node(0);
    assert!(told(&manager).await.starts_with("READY=1"));
    let node = Pid::from_raw(dev.file.nodes[1].pid.cast_signed()).unwrap();
    kill_process(node, Signal::TERM).unwrap();
    assert_eq!(told(&manager).await.trim(), "STOPPING=1");
}

/// The next that the manager is told.
async fn told(manager: &UnixDatagram) -> String {
    eventually("a word to the service manager", || async {
        let mut text = [0; 256];
        let length = manager.recv(&mut text).ok()?;
        Some(String::from_utf8_lossy(&text[..length]).into_owned())
    })
    .await
}
