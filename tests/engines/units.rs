//! `deploy/systemd`: a node and an agent as services of a real systemd, installed by the commands of the manual.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use serde_json::Value;

use crate::harness::{REGENT, eventually, lacks};
use crate::image::{deploy, manual};

/// As root, where the manual's commands find the program and `deploy`. Its files are right for the addresses in them.
const PRELUDE: &str = "cd /tmp
export PATH=$PATH:/usr/local/bin HOME=/tmp REGENT_URL=https://10.0.0.1:8000 REGENT_CA_FILE=/tmp/cluster/ca/ca.pem
[ ! -e cluster ] || export REGENT_TOKEN=$(cat cluster/admin.token)
editor() { test -f $1; }
";

/// A machine with a systemd of its own, which ends with this.
struct Machine {
    pid: String,
    script: Child,
    /// It ends when this does.
    control: Option<ChildStdin>,
    _folder: tempfile::TempDir,
}

impl Drop for Machine {
    /// What it made goes only while its folder is there.
    fn drop(&mut self) {
        drop(self.control.take());
        let _ = self.script.wait();
    }
}

impl Machine {
    /// A machine for a test; none, and said so, where there can be none.
    fn start() -> Option<Self> {
        let folder = tempfile::Builder::new()
            .prefix("regent-systemd")
            .tempdir()
            .unwrap();
        let mut script = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/systemd/machine"))
            .arg(folder.path())
            .arg(REGENT)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut pid = String::new();
        let output = script.stdout.take().expect("it is piped");
        BufReader::new(output).read_line(&mut pid).unwrap();
        if pid.is_empty() {
            let mut why = String::new();
            let mut errors = script.stderr.take().expect("it is piped");
            errors.read_to_string(&mut why).unwrap();
            eprintln!("{}", why.trim());
        }
        let machine = Self {
            pid: pid.trim().to_owned(),
            control: script.stdin.take(),
            script,
            _folder: folder,
        };
        (!lacks("systemd-machine", !machine.pid.is_empty())).then_some(machine)
    }

    /// Runs a script in the machine; what it prints, or what it complains of.
    fn run(&self, script: &str, input: &[u8]) -> Result<String, String> {
        let mut child = Command::new("nsenter")
            .args(["--target", &self.pid, "--all", "--root", "--wd", "--"])
            // Whatever hangs is a failure that says where.
            .args(["timeout", "180", "sh", "-euc", &format!("{PRELUDE}{script}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().expect("it is piped");
        stdin.write_all(input).unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() {
            Ok(text(&output.stdout))
        } else {
            Err(text(&[output.stdout, output.stderr].concat()))
        }
    }

    fn sh(&self, script: &str) -> String {
        self.run(script, &[]).unwrap_or_else(|why| {
            let state = self.run("journalctl --no-pager --lines 100", &[]);
            panic!("{script}\n{why}\n{}", state.unwrap_or_else(|state| state))
        })
    }

    /// Brings a file of `deploy/systemd`.
    fn bring(&self, name: &str) {
        let file = std::fs::read(deploy("systemd").join(name)).unwrap();
        self.run(&format!("cat > 'deploy/systemd/{name}'"), &file)
            .unwrap();
    }

    /// What systemd says of a unit.
    fn says(&self, unit: &str, property: &str) -> String {
        self.sh(&format!("systemctl show --value --property {property} {unit}"))
    }

    /// What a command of `regent` prints as JSON.
    fn json(&self, command: &str) -> Value {
        serde_json::from_str(&self.sh(&format!("regent {command} --output json"))).unwrap()
    }
}

#[tokio::test]
async fn a_node_and_an_agent_are_services_of_systemd() {
    let Some(machine) = Machine::start() else {
        return;
    };
    machine.sh("mkdir -p deploy/systemd; ln -s /usr/local/bin/regent .");
    for file in [
        "node.toml",
        "regent.service",
        "agent.toml",
        "regent-agent@.service",
    ] {
        machine.bring(file);
    }
    machine.sh("for address in 10.0.0.1 10.0.0.2 10.0.0.3; do ip address add $address/32 dev lo; done");
    machine.sh(&manual("## Install", 0));
    machine.sh(&manual("### On three machines, with systemd", 0));
    // It runs, and without the other members it does not serve: for systemd it has not started.
    eventually("a node that waits for the others", || async {
        let journal = machine.sh("journalctl --no-pager --unit regent");
        journal
            .contains("the cluster is not formed yet waits_for=node 2")
            .then_some(())
    })
    .await;
    assert_eq!(machine.says("regent", "ActiveState"), "activating");

    // A cluster of one. What waits for the unit finds it serving.
    machine.sh("sed -i '/^[23] = /d' /etc/regent/node.toml; systemctl restart regent; regent cluster status");
    assert_eq!(machine.says("regent", "ActiveState"), "active");
    assert_eq!(machine.says("regent", "StatusText"), "serving");
    let first = machine.says("regent", "MainPID");
    let status = machine.sh(&format!("cat /proc/{first}/status"));
    let user = machine.sh("id -u regent");
    let has = |line: &str| {
        status
            .lines()
            .any(|one| one.split_whitespace().eq(line.split_whitespace()))
    };
    for line in [
        &format!("Uid: {user} {user} {user} {user}")[..],
        "CapEff: 0000000000000000",
        "CapBnd: 0000000000000000",
        "NoNewPrivs: 1",
        "Seccomp: 2",
    ] {
        assert!(has(line), "no {line:?} in {status}");
    }
    assert_eq!(machine.sh("stat -c '%U %a' /var/lib/regent"), "regent 700");

    // New certificates, without a restart.
    machine.sh("regent cert cluster --out cluster --node 1=10.0.0.1
        install -o regent -g regent -m 0600 cluster/node-1/* /etc/regent/
        systemctl reload regent");
    eventually("new certificates", || async {
        let journal = machine.sh("journalctl --no-pager --unit regent");
        journal.contains("new certificates are in use").then_some(())
    })
    .await;
    assert_eq!(machine.says("regent", "MainPID"), first);

    machine.sh("systemctl restart regent; regent cluster status");
    let second = machine.says("regent", "MainPID");
    assert_ne!(first, second);
    // Killed, it is started again.
    machine.sh("systemctl kill --signal KILL regent");
    eventually("another start", || async {
        let again = machine.says("regent", "NRestarts") == "1";
        (again && machine.says("regent", "ActiveState") == "active").then_some(())
    })
    .await;
    machine.sh("regent cluster status");

    // A session that is a process outlives its agent's service, and is found by the next one.
    machine.sh(&manual("### On three machines, with systemd", 1));
    let before = leads_after(&machine, 0).await;
    let created = machine.json("session create demo --wait");
    let program = format!("cut -d ' ' -f 22 /proc/{}/stat", created["metadata"]["pid"]);
    let started = machine.sh(&program);
    machine.sh("systemctl restart regent-agent@one");
    leads_after(&machine, before).await;
    assert_eq!(machine.sh(&program), started, "the process goes on");
    let name = created["name"].as_str().unwrap();
    let session = machine.json(&format!("session get {name}"));
    assert_eq!(
        (&session["state"], &session["generation"]),
        (&"running".into(), &1.into())
    );
    machine.sh(&format!("regent session stop {name}"));
    eventually("the end of the process", || async {
        machine.run(&program, &[]).is_err().then_some(())
    })
    .await;

    recovered(&machine);
    for unit in ["regent-agent@one", "regent-4", "regent"] {
        machine.sh(&format!("systemctl stop {unit}"));
        assert_eq!(machine.says(unit, "ActiveState"), "inactive");
        assert_eq!(machine.says(unit, "Result"), "success");
        assert_eq!(machine.says(unit, "ExecMainStatus"), "0");
    }
}

/// The folder that is left becomes a new cluster by the commands of the manual, under the same unit, with what was in it.
fn recovered(machine: &Machine) {
    let old = machine.json("cluster status");
    // As the file of a node that had others.
    machine.sh("printf '2 = \"10.0.0.2:7000\"\\n3 = \"10.0.0.3:7000\"\\n' >> /etc/regent/node.toml");
    let commands = manual("### Three in the morning, with systemd", 0);
    machine.sh(&format!("editor() {{ sed -i '/^[23] = /d' $1; }}\n{commands}"));
    assert_eq!(machine.says("regent", "ActiveState"), "active");
    assert_eq!(machine.sh("stat -c '%U %a' /var/lib/regent"), "regent 700");
    let new = machine.json("cluster status");
    assert_ne!(new["clusterId"], old["clusterId"]);
    assert_eq!(new["formerClusterIds"][0], old["clusterId"]);
    assert_eq!(machine.json("agent get one")["agentId"], "one");
    // Another node joins. It is on this machine too, so its folders and its unit have another name.
    machine.sh(&manual("### Three in the morning, with systemd", 1));
    assert_eq!(machine.sh("stat -c %a cluster/node-4/join"), "600");
    let join = manual("### Three in the morning, with systemd", 2);
    machine.sh(&format!(
        "sed 's/^node-id.*/node-id = 4/; s/10.0.0.1/10.0.0.2/; /^# The same/,$d' deploy/systemd/node.toml > node-4.toml
cat >> node-4.toml << END
{join}
END
sed -i 's:/regent:/regent-4:' node-4.toml
install -d -o regent -g regent -m 0700 /etc/regent-4
install -o regent -g regent -m 0600 cluster/node-4/* /etc/regent-4/
install -o regent -g regent -m 0600 node-4.toml /etc/regent-4/node.toml
sed 's:/etc/regent/:/etc/regent-4/:; s:^StateDirectory=regent:&-4:' deploy/systemd/regent.service \
    > /etc/systemd/system/regent-4.service
systemctl daemon-reload
systemctl start regent-4"
    ));
    let joined = machine.json("cluster status");
    assert_eq!(
        (&joined["members"][0]["id"], &joined["members"][1]["id"]),
        (&1.into(), &4.into())
    );
}

/// The token of the agent's leader, once it is newer than this.
async fn leads_after(machine: &Machine, token: u64) -> u64 {
    eventually("an agent that leads", || async {
        let agent = machine.json("agent get one");
        let now = agent["token"].as_u64()?;
        (agent["status"] == "online" && now > token).then_some(now)
    })
    .await
}
