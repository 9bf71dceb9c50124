//! The process runtime against real processes of this machine.
//!
//! Every test has a data folder of its own, which is also what its processes are recognised by, so all of
//! them run in parallel. A condition is waited for, never a time. The shim is `examples/shim.rs`, which
//! cargo builds along when all targets of the package are tested.
#![allow(clippy::unwrap_used, reason = "these helpers are all of a test")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::{BoxFuture, FutureExt};
use regent_agent::lifeline::{Lifeline, ProcessId};
use regent_agent::runtime::process::{ProcessOptions, ProcessRuntime};
use regent_agent::runtime::{
    ContainerSpec, Exit, ObservedState, PortSpec, Runtime, RuntimeError, RuntimeEvent, SessionRef, StartSpec,
    Stop, conformance,
};
use regent_types::{AgentId, SessionName, TemplateName, Token, UserName};

const GRACE: Duration = Duration::from_secs(20);

/// Only waited out by a test that fails.
const PATIENCE: Duration = Duration::from_mins(3);

/// Stays until it is told to end, and is easy on the machine.
const SLEEP: &str = "exec sleep 1000";

fn regent() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().unwrap().parent().unwrap().join("examples/shim");
    assert!(
        path.exists(),
        "{} is missing: cargo build -p regent-agent --examples",
        path.display()
    );
    path
}

fn open(data: &Path) -> ProcessRuntime {
    let mut options = ProcessOptions::new(data).unwrap();
    options.regent = regent();
    options.shim = vec![regent().into(), "shim".into()];
    ProcessRuntime::open(options).unwrap()
}

fn spec(session: &str, script: &str) -> StartSpec {
    StartSpec {
        session: SessionName::new(session).unwrap(),
        generation: 1,
        token: Token(1),
        agent: AgentId::new("test").unwrap(),
        user: UserName::new("alice").unwrap(),
        template: TemplateName::new("script").unwrap(),
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
        metadata: BTreeMap::from([("colour".to_owned(), "blue".to_owned())]),
    }
}

/// A data folder whose processes are ended when the test ends, however it ends.
struct Data(tempfile::TempDir);

impl Data {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn session(&self, session: &str) -> PathBuf {
        self.path().canonicalize().unwrap().join("sessions").join(session)
    }

    fn processes(&self) -> Vec<u32> {
        let mark = self.path().canonicalize().unwrap().join("sessions/");
        marked(mark.to_str().unwrap())
    }
}

impl Drop for Data {
    fn drop(&mut self) {
        for pid in self.processes() {
            let _ = Command::new("kill")
                .args(["-9", &pid.to_string()])
                .stderr(Stdio::null())
                .status();
        }
    }
}

/// The live processes with this text in their environment, found independently of the code under test.
fn marked(mark: &str) -> Vec<u32> {
    let pids = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|e| e.unwrap().file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environ.windows(mark.len()).any(|part| part == mark.as_bytes()) && ProcessId::of(*pid).is_ok()
    })
    .collect()
}

async fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "still not: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn next_exit(events: &mut futures::stream::BoxStream<'static, RuntimeEvent>) -> (String, Exit) {
    match tokio::time::timeout(PATIENCE, events.next())
        .await
        .expect("an exit event")
        .unwrap()
    {
        RuntimeEvent::Exited { session, exit, .. } => (session.to_string(), exit),
        other => panic!("instead of an exit came {other:?}"),
    }
}

impl conformance::Target for Data {
    fn open(&self) -> Box<dyn Runtime> {
        Box::new(open(self.path()))
    }

    fn sleeper(&self, session: SessionName) -> StartSpec {
        spec(session.as_str(), SLEEP)
    }

    fn exits_with_7(&self, session: SessionName) -> StartSpec {
        spec(session.as_str(), "exit 7")
    }

    fn broken(&self, session: SessionName) -> StartSpec {
        StartSpec {
            command: "/no/such/program".to_owned(),
            ..spec(session.as_str(), "")
        }
    }

    fn leftovers<'a>(&'a self, session: &'a SessionName) -> BoxFuture<'a, Vec<String>> {
        let folder = self.session(session.as_str());
        let mut left: Vec<String> = marked(folder.to_str().unwrap())
            .iter()
            .map(|pid| format!("process {pid}"))
            .collect();
        if folder.exists() {
            left.push(folder.display().to_string());
        }
        async move { left }.boxed()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_process_runtime_conforms() {
    let data = Data::new();
    conformance::check(&data).await.unwrap();
    assert_eq!(data.processes(), Vec::<u32>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_sees_a_clean_environment_and_its_output_is_kept() {
    let data = Data::new();
    let runtime = open(data.path());
    let mut spec = spec("env-1", "env; pwd; echo oops >&2; exit 3");
    spec.env = BTreeMap::from([
        ("COLOUR".to_owned(), "blue".to_owned()),
        ("REGENT_SESSION".to_owned(), "forged".to_owned()),
        ("HOME".to_owned(), "/root".to_owned()),
    ]);
    spec.port = Some(PortSpec {
        container_port: None,
        ready_within: Duration::ZERO,
    });
    let mut events = runtime.watch();
    let started = runtime.start(&spec).await.unwrap();
    assert_eq!(next_exit(&mut events).await, ("env-1".to_owned(), Exit::Code(3)));
    let log = fs::read_to_string(runtime.log_file(&spec.session)).unwrap();
    let folder = data.session("env-1");
    let mut names: Vec<&str> = log
        .lines()
        .filter_map(|l| l.split_once('='))
        .map(|(name, _)| name)
        .collect();
    names.retain(|name| !matches!(*name, "_" | "PWD" | "SHLVL" | "OLDPWD"));
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "COLOUR",
            "HOME",
            "LANG",
            "PATH",
            "PORT",
            "REGENT_AGENT",
            "REGENT_FENCING_TOKEN",
            "REGENT_GENERATION",
            "REGENT_SESSION",
            "REGENT_SESSION_DIR",
            "REGENT_USER",
        ]
    );
    for line in [
        "REGENT_SESSION=env-1".to_owned(),
        "REGENT_USER=alice".to_owned(),
        "COLOUR=blue".to_owned(),
        format!("HOME={}", folder.join("home").display()),
        format!("PORT={}", started.port.unwrap()),
        folder.join("home").display().to_string(),
        "oops".to_owned(),
    ] {
        assert!(log.lines().any(|l| l == line), "no line {line:?} in\n{log}");
    }
    assert_eq!(
        started.url.unwrap(),
        format!("http://127.0.0.1:{}/", started.port.unwrap())
    );
    assert_eq!(started.metadata["colour"], "blue");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exit_while_no_agent_was_there_is_found_with_its_code() {
    let data = Data::new();
    let runtime = open(data.path());
    let spec = spec("late-1", "while [ ! -e go ]; do sleep 0.01; done; exit 9");
    runtime.start(&spec).await.unwrap();
    drop(runtime);
    let folder = data.session("late-1");
    fs::write(folder.join("home/go"), "").unwrap();
    until("exit.json", || folder.join("exit.json").exists().then_some(())).await;
    let listed = open(data.path()).list().await.unwrap();
    assert_eq!(listed[0].state, ObservedState::Exited(Exit::Code(9)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adopted_session_is_watched_and_a_signal_is_told() {
    let data = Data::new();
    let pid = open(data.path())
        .start(&spec("adopt-1", SLEEP))
        .await
        .unwrap()
        .pid
        .unwrap();
    let runtime = open(data.path());
    let mut events = runtime.watch();
    assert_eq!(runtime.list().await.unwrap()[0].pid, Some(pid));
    assert!(
        Command::new("kill")
            .args(["-9", &pid.to_string()])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(
        next_exit(&mut events).await,
        ("adopt-1".to_owned(), Exit::Signal(9))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_was_never_recorded_is_found_by_its_environment() {
    let data = Data::new();
    let runtime = open(data.path());
    let spec = StartSpec {
        generation: 4,
        token: Token(8),
        ..spec("lost-1", SLEEP)
    };
    let pid = runtime.start(&spec).await.unwrap().pid.unwrap();
    drop(runtime);
    // As after a crash before the record was written, and then without any record at all.
    for file in ["process.json", "launch.json"] {
        fs::remove_file(data.session("lost-1").join(file)).unwrap();
        let listed = open(data.path()).list().await.unwrap();
        assert_eq!(listed.len(), 1, "without {file}");
        let found = &listed[0];
        assert_eq!(
            (found.generation, found.token, found.pid, found.state),
            (4, Token(8), Some(pid), ObservedState::Running)
        );
    }
    open(data.path())
        .stop(&spec.session_ref(), Stop::within(GRACE))
        .await
        .unwrap();
    assert_eq!(data.processes(), Vec::<u32>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_record_neither_stops_the_agent_nor_loses_the_session() {
    let data = Data::new();
    let spec = spec("torn-1", SLEEP);
    open(data.path()).start(&spec).await.unwrap();
    for file in ["process.json", "launch.json"] {
        fs::write(data.session("torn-1").join(file), "{").unwrap();
        assert_eq!(
            open(data.path()).list().await.unwrap().len(),
            1,
            "with a torn {file}"
        );
    }
    open(data.path())
        .stop(&spec.session_ref(), Stop::within(GRACE))
        .await
        .unwrap();
    assert_eq!(data.processes(), Vec::<u32>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reused_pid_is_neither_adopted_nor_killed() {
    let data = Data::new();
    let runtime = open(data.path());
    let spec = spec("reuse-1", SLEEP);
    let pid = runtime.start(&spec).await.unwrap().pid.unwrap();
    drop(runtime);
    let program = ProcessId::of(pid).unwrap();
    // The machine went down and came up: other processes have the numbers, shim and program are gone.
    for pid in data.processes() {
        Command::new("kill")
            .args(["-9", &pid.to_string()])
            .status()
            .unwrap();
    }
    until("killed", || {
        (!program.is_alive() && data.processes().is_empty()).then_some(())
    })
    .await;
    let mut stranger = Command::new("sleep").arg("1000").spawn().unwrap();
    let other = ProcessId::of(stranger.id()).unwrap();
    let record = data.session("reuse-1").join("process.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    json["program"] = other.to_string().into();
    json["shim"] = other.to_string().into();
    fs::write(&record, json.to_string()).unwrap();

    let runtime = open(data.path());
    let listed = runtime.list().await.unwrap();
    assert_eq!(listed[0].state, ObservedState::Exited(Exit::Unknown));
    runtime
        .stop(&spec.session_ref(), Stop::within(GRACE))
        .await
        .unwrap();
    assert!(
        other.is_alive(),
        "a process that is not of the session was killed"
    );
    assert!(!data.session("reuse-1").exists());
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_shim_was_killed_goes_on_and_its_end_is_noticed() {
    let data = Data::new();
    let runtime = open(data.path());
    let mut events = runtime.watch();
    let spec = spec("noshim-1", SLEEP);
    let pid = runtime.start(&spec).await.unwrap().pid.unwrap();
    let record: serde_json::Value =
        serde_json::from_slice(&fs::read(data.session("noshim-1").join("process.json")).unwrap()).unwrap();
    let shim: ProcessId = record["shim"].as_str().unwrap().parse().unwrap();
    Command::new("kill")
        .args(["-9", &shim.pid.to_string()])
        .status()
        .unwrap();
    until("shim gone", || (!shim.is_alive()).then_some(())).await;
    assert_eq!(runtime.list().await.unwrap()[0].state, ObservedState::Running);
    Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status()
        .unwrap();
    assert_eq!(
        next_exit(&mut events).await,
        ("noshim-1".to_owned(), Exit::Unknown)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_ends_grandchildren_also_those_that_ignore_term_or_left_the_group() {
    let data = Data::new();
    let runtime = open(data.path());
    // The last one carries no mark, but is in the shim's kernel session. What drops both at once can only
    // be held by a control group; the documents say so.
    let script = "trap '' TERM; (sleep 1000 & sleep 1000) & setsid sleep 1000 & env -i sleep 1000 & \
                  touch ready; while :; do sleep 1000; done";
    let spec = spec("family-1", script);
    runtime.start(&spec).await.unwrap();
    let home = data.session("family-1").join("home");
    until("ready", || home.join("ready").exists().then_some(())).await;
    let sid = {
        let record: serde_json::Value =
            serde_json::from_slice(&fs::read(data.session("family-1").join("process.json")).unwrap())
                .unwrap();
        record["shim"].as_str().unwrap().parse::<ProcessId>().unwrap().pid
    };
    let unmarked =
        |pid: &u32| fs::read(format!("/proc/{pid}/environ")).is_ok_and(|environ| environ.is_empty());
    until("the one without a mark", || {
        in_kernel_session(sid).iter().any(unmarked).then_some(())
    })
    .await;
    runtime
        .stop(&spec.session_ref(), Stop::within(Duration::from_millis(100)))
        .await
        .unwrap();
    assert_eq!(data.processes(), Vec::<u32>::new());
    assert_eq!(in_kernel_session(sid), Vec::<u32>::new());
}

/// The live processes of a kernel session, by the sixth field of their `stat`.
fn in_kernel_session(sid: u32) -> Vec<u32> {
    let pids = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|e| e.unwrap().file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after_name = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
        let fields: Vec<&str> = after_name.split(' ').collect();
        fields.get(3) == Some(&sid.to_string().as_str()) && fields[0] != "Z"
    })
    .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_program_leaves_behind_ends_with_it() {
    let data = Data::new();
    let runtime = open(data.path());
    let mut events = runtime.watch();
    runtime
        .start(&spec("daemon-1", "setsid -f sleep 1000; exit 4"))
        .await
        .unwrap();
    assert_eq!(
        next_exit(&mut events).await,
        ("daemon-1".to_owned(), Exit::Code(4))
    );
    assert_eq!(data.processes(), Vec::<u32>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn hibernate_freezes_every_process_and_wake_continues_them() {
    let data = Data::new();
    let runtime = open(data.path());
    let script =
        "(while :; do echo x >> child; sleep 0.01; done) & while :; do echo x >> parent; sleep 0.01; done";
    let spec = spec("freeze-1", script);
    runtime.start(&spec).await.unwrap();
    let home = data.session("freeze-1").join("home");
    let sizes = || ["child", "parent"].map(|f| fs::metadata(home.join(f)).map_or(0, |m| m.len()));
    until("both write", || {
        sizes().iter().all(|size| *size > 0).then_some(())
    })
    .await;
    runtime.hibernate(&spec.session_ref()).await.unwrap();
    let program_states = || {
        let stat = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let state = |pid: &u32| stat(pid).rsplit_once(") ").unwrap().1.chars().next().unwrap();
        let mark = format!("REGENT_SESSION_DIR={}", data.session("freeze-1").display());
        marked(&mark).iter().map(state).collect::<String>()
    };
    let frozen = program_states();
    assert!(
        !frozen.is_empty() && frozen.chars().all(|state| matches!(state, 'T' | 'D')),
        "{frozen}"
    );
    let before = sizes();
    runtime.wake(&spec.session_ref()).await.unwrap();
    until("both write again", || {
        sizes()
            .iter()
            .zip(before)
            .all(|(now, then)| *now > then)
            .then_some(())
    })
    .await;
    // A frozen session can be stopped too.
    runtime.hibernate(&spec.session_ref()).await.unwrap();
    runtime
        .stop(&spec.session_ref(), Stop::within(GRACE))
        .await
        .unwrap();
    assert_eq!(data.processes(), Vec::<u32>::new());
}

/// The parent of a `vfork` sleeps where no signal reaches it until its child has gone on, and a stopped child does
/// not: a shell that is just starting something looks like this.
#[tokio::test(flavor = "multi_thread")]
async fn a_program_in_the_middle_of_a_vfork_is_frozen_too() {
    const SPAWN: &str = "import os
os.mkfifo('gate')
open_gate = [(os.POSIX_SPAWN_OPEN, 0, 'gate', os.O_RDONLY, 0)]
child = os.posix_spawn('/bin/true', ['true'], os.environ, file_actions=open_gate)
os.waitpid(child, 0)
os._exit(6)";
    if Command::new("python3").arg("-c").arg("").status().is_err() {
        eprintln!("SKIPPED: a_program_in_the_middle_of_a_vfork_is_frozen_too lacks python3");
        return;
    }
    let data = Data::new();
    let runtime = open(data.path());
    let mut events = runtime.watch();
    let spec = StartSpec {
        command: "python3".to_owned(),
        args: vec!["-c".to_owned(), SPAWN.to_owned()],
        ..spec("vfork-1", "")
    };
    runtime.start(&spec).await.unwrap();
    let mark = format!("REGENT_SESSION_DIR={}", data.session("vfork-1").display());
    let states = || {
        let read = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let state = |pid: &u32| {
            read(pid)
                .rsplit_once(") ")
                .and_then(|(_, rest)| rest.chars().next())
        };
        marked(&mark).iter().filter_map(state).collect::<String>()
    };
    until("a child is held before it runs", || {
        (states().chars().filter(|state| *state == 'D').count() == 1).then_some(())
    })
    .await;
    runtime.hibernate(&spec.session_ref()).await.unwrap();
    assert!(
        states().chars().all(|state| matches!(state, 'T' | 'D')),
        "{}",
        states()
    );
    runtime.wake(&spec.session_ref()).await.unwrap();
    let gate = data.session("vfork-1").join("home/gate");
    tokio::task::spawn_blocking(move || fs::write(gate, b""))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        next_exit(&mut events).await,
        ("vfork-1".to_owned(), Exit::Code(6))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_persistent_home_goes_only_when_asked_and_when_no_other_session_has_it() {
    let data = Data::new();
    let runtime = open(data.path());
    let [first, second] = ["home-1", "home-2"].map(|name| StartSpec {
        persistent_home: true,
        ..spec(name, SLEEP)
    });
    for spec in [&first, &second] {
        runtime.start(spec).await.unwrap();
    }
    let home = data.path().join("homes/alice/script");
    let with_home = Stop {
        delete_home: true,
        ..Stop::within(GRACE)
    };
    runtime.stop(&first.session_ref(), with_home).await.unwrap();
    assert!(home.exists(), "the second session has it too");
    runtime
        .stop(&second.session_ref(), Stop::within(GRACE))
        .await
        .unwrap();
    assert!(home.exists(), "nobody asked");
    runtime.start(&first).await.unwrap();
    runtime.stop(&first.session_ref(), with_home).await.unwrap();
    assert!(!home.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_of_an_unknown_program_says_which_and_leaves_nothing() {
    let data = Data::new();
    let runtime = open(data.path());
    let spec = StartSpec {
        command: "no-such-program".to_owned(),
        ..spec("unknown-1", "")
    };
    let error = runtime.start(&spec).await.unwrap_err();
    assert!(matches!(error, RuntimeError::BadSpec { .. }), "{error:?}");
    assert!(error.to_string().contains("no-such-program"), "{error}");
    assert!(!error.is_retryable());
    assert!(!data.session("unknown-1").exists());
    assert_eq!(data.processes(), Vec::<u32>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_variable_that_poses_as_regents_own_is_refused() {
    let data = Data::new();
    let env = BTreeMap::from([("REGENT_SESSION_DIR=/elsewhere".to_owned(), String::new())]);
    let error = open(data.path())
        .start(&StartSpec {
            env,
            ..spec("pose-1", SLEEP)
        })
        .await
        .unwrap_err();
    assert!(matches!(error, RuntimeError::BadSpec { .. }), "{error:?}");
    assert!(!data.session("pose-1").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_says_nothing_is_rolled_back() {
    let data = Data::new();
    let mut options = ProcessOptions::new(data.path()).unwrap();
    options.shim = vec!["/bin/false".into()];
    let runtime = ProcessRuntime::open(options).unwrap();
    let error = runtime.start(&spec("silent-1", SLEEP)).await.unwrap_err();
    assert!(matches!(error, RuntimeError::StartFailed { .. }), "{error:?}");
    assert!(error.is_retryable());
    assert!(!data.session("silent-1").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_memory_limit_is_applied_and_reported() {
    let data = Data::new();
    let runtime = open(data.path());
    let mut events = runtime.watch();
    // dd needs its block size in memory.
    let script = |mib: u32| format!("dd if=/dev/zero of=/dev/null bs={mib}M count=1 2>&1");
    let limited = |name, mib| StartSpec {
        memory_bytes: Some(64 << 20),
        ..spec(name, &script(mib))
    };
    let started = runtime.start(&limited("memory-1", 16)).await.unwrap();
    assert!(
        started.metadata["memoryLimit"].contains(&(64 << 20).to_string()),
        "{:?}",
        started.metadata
    );
    assert_eq!(next_exit(&mut events).await.1, Exit::Code(0));
    runtime.start(&limited("memory-2", 256)).await.unwrap();
    let (_, exit) = next_exit(&mut events).await;
    assert_ne!(exit, Exit::Code(0), "it got more memory than its limit");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_is_bounded_however_much_is_written() {
    let data = Data::new();
    let mut options = ProcessOptions::new(data.path()).unwrap();
    options.shim = vec![regent().into(), "shim".into()];
    options.log_bytes = 256 * 1024;
    let runtime = ProcessRuntime::open(options).unwrap();
    let mut events = runtime.watch();
    let spec = spec(
        "chatty-1",
        "head -c 5000000 /dev/zero | tr '\\0' x; echo; echo the end",
    );
    runtime.start(&spec).await.unwrap();
    assert_eq!(next_exit(&mut events).await.1, Exit::Code(0));
    let log = runtime.log_file(&spec.session);
    let size = |path: &Path| fs::metadata(path).unwrap().len();
    assert!(size(&log) + size(&log.with_extension("1")) <= 256 * 1024);
    assert!(fs::read_to_string(&log).unwrap().ends_with("the end\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_the_lifeline_ends_everything() {
    let data = Data::new();
    let script = "trap '' TERM; sleep 1000 & setsid sleep 1000 & touch ready; while :; do sleep 1000; done";
    let mut holder = Command::new(regent())
        .arg("lifeline")
        .arg(data.path())
        .args(["line-1", script])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let ready = data.session("line-1").join("home/ready");
    until("ready", || ready.exists().then_some(())).await;
    assert!(data.processes().len() >= 4, "shim, shell and two sleepers");
    holder.kill().unwrap();
    holder.wait().unwrap();
    until("all ended", || data.processes().is_empty().then_some(())).await;
    let listed = open(data.path()).list().await.unwrap();
    assert_eq!(
        listed[0].state,
        ObservedState::Exited(Exit::Unknown),
        "taken along is not an exit of its own"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn under_a_dead_lifeline_nothing_is_started() {
    let data = Data::new();
    let mut gone = Command::new("true").spawn().unwrap();
    let process = ProcessId {
        pid: gone.id(),
        start: 1,
    };
    gone.wait().unwrap();
    assert!(Lifeline::open(process).unwrap().has_ended());
    let mut options = ProcessOptions::new(data.path()).unwrap();
    options.shim = vec![regent().into(), "shim".into()];
    options.lifeline = Some(process);
    let error = ProcessRuntime::open(options)
        .unwrap()
        .start(&spec("dead-1", SLEEP))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("lifeline"), "{error}");
    assert_eq!(data.processes(), Vec::<u32>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_sessions_in_parallel() {
    let data = Data::new();
    let runtime = open(data.path());
    let specs: Vec<StartSpec> = (0..50)
        .map(|n| StartSpec {
            port: Some(PortSpec {
                container_port: None,
                ready_within: Duration::ZERO,
            }),
            ..spec(&format!("many-{n}"), SLEEP)
        })
        .collect();
    let started = futures::future::join_all(specs.iter().map(|spec| runtime.start(spec))).await;
    let mut ports: Vec<u16> = started
        .into_iter()
        .map(|started| started.unwrap().port.unwrap())
        .collect();
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), 50, "two sessions got one port");
    let other = open(data.path());
    let listed = other.list().await.unwrap();
    assert_eq!(
        listed
            .iter()
            .filter(|s| s.state == ObservedState::Running)
            .count(),
        50
    );
    let refs: Vec<SessionRef> = specs.iter().map(StartSpec::session_ref).collect();
    let stopped = futures::future::join_all(
        refs.iter()
            .map(|session| other.stop(session, Stop::within(GRACE))),
    )
    .await;
    for result in stopped {
        result.unwrap();
    }
    assert_eq!(data.processes(), Vec::<u32>::new());
    assert_eq!(runtime.list().await.unwrap(), Vec::new());
    // The watchers of both replicas look once more before they let go.
    let locks = || fs::read_dir(data.path().join("locks")).unwrap().count();
    until("no lock file is left", || (locks() == 0).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn starts_of_one_generation_that_race_through_two_replicas_start_one_program() {
    let data = Data::new();
    let replicas = [open(data.path()), open(data.path())];
    let spec = spec("race-1", SLEEP);
    let starts = (0..8).map(|n| replicas[n % 2].start(&spec));
    let pids: Vec<_> = futures::future::join_all(starts)
        .await
        .into_iter()
        .map(|started| started.unwrap().pid)
        .collect();
    assert!(pids.iter().all(|pid| *pid == pids[0]), "{pids:?}");
    // One shim and one program.
    assert_eq!(data.processes().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_user_names_get_homes_of_their_own_fault_17() {
    let data = Data::new();
    let runtime = open(data.path());
    let long = format!("A{}", "b".repeat(127));
    let users = ["a.b@example.org", "a+b", "Alice_", "alice", "a..", long.as_str()];
    let mut events = runtime.watch();
    for (n, user) in users.iter().enumerate() {
        let home = |session: String, script: &str| StartSpec {
            user: UserName::new(user).unwrap(),
            persistent_home: true,
            ..spec(&session, script)
        };
        let first = home(
            format!("odd-{n}"),
            "[ ! -e mine ] && echo \"$REGENT_USER\" > mine",
        );
        runtime.start(&first).await.unwrap();
        assert_eq!(
            next_exit(&mut events).await.1,
            Exit::Code(0),
            "{user}: the home is somebody else's"
        );
        runtime
            .stop(&first.session_ref(), Stop::within(GRACE))
            .await
            .unwrap();
        let next = home(format!("odd-{n}-next"), "[ \"$(cat mine)\" = \"$REGENT_USER\" ]");
        runtime.start(&next).await.unwrap();
        assert_eq!(
            next_exit(&mut events).await.1,
            Exit::Code(0),
            "{user}: the home was not found again"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_opens_as_soon_as_its_start_is_done() {
    use std::io::{Read, Write};
    let data = Data::new();
    let runtime = open(data.path());
    let spec = StartSpec {
        command: "regent".to_owned(),
        args: vec!["demo".to_owned()],
        port: Some(PortSpec {
            container_port: None,
            ready_within: PATIENCE,
        }),
        ..spec("demo-1", "")
    };
    let started = runtime.start(&spec).await.unwrap();
    let mut client = std::net::TcpStream::connect(("127.0.0.1", started.port.unwrap())).unwrap();
    client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains("demo-1") && answer.contains("alice"), "{answer}");
    runtime
        .stop(&spec.session_ref(), Stop::within(GRACE))
        .await
        .unwrap();
}
