//! The Docker runtime against a real engine.
//!
//! The engine is one of the tests' own (`tests/docker/engine`), which ends with them. Every test is an agent of its own
//! there, so all run in parallel. A condition is waited for, never a time. Where no engine can be started each test
//! says SKIPPED, unless `REGENT_REQUIRE` lists `docker`.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "these helpers are all of a test"
)]

mod support;

use std::collections::BTreeMap;
use std::time::Instant;

use futures::future::{BoxFuture, FutureExt as _};
use regent_agent::runtime::{
    ContainerSpec, Exit, HibernateMode, ObservedState, Runtime, RuntimeError, RuntimeEvent, StartSpec, Stop,
    conformance,
};
use regent_agent_docker::{DockerOptions, DockerRuntime, Pull};
use regent_types::template::{ManifestMount, ManifestSecurity};
use regent_types::{ClusterId, SessionName, Token, UserName};
use support::{Agent, Engine, GRACE, SLEEP, address, get, next, next_exit, spec, stop, until, with_port};

/// The engine, or the end of a test that cannot be.
macro_rules! engine {
    ($test:literal) => {
        match Engine::shared($test) {
            Some(engine) => engine,
            None => return,
        }
    };
}

struct Target<'a>(&'a Agent<'a>);

impl conformance::Target for Target<'_> {
    fn open(&self) -> Box<dyn Runtime> {
        let open = || tokio::runtime::Handle::current().block_on(self.0.open());
        Box::new(tokio::task::block_in_place(open))
    }

    fn sleeper(&self, session: SessionName) -> StartSpec {
        spec(&self.0.id, session.as_str(), SLEEP)
    }

    fn exits_with_7(&self, session: SessionName) -> StartSpec {
        spec(&self.0.id, session.as_str(), "exit 7")
    }

    fn broken(&self, session: SessionName) -> StartSpec {
        StartSpec {
            command: "/no/such/program".to_owned(),
            ..spec(&self.0.id, session.as_str(), "")
        }
    }

    fn leftovers<'a>(&'a self, session: &'a SessionName) -> BoxFuture<'a, Vec<String>> {
        async move { self.0.left(session.as_str()) }.boxed()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_docker_runtime_conforms() {
    let engine = engine!("the_docker_runtime_conforms");
    let agent = Agent::new(engine, "conforms");
    if let Err(violation) = conformance::check(&Target(&agent)).await {
        panic!("{violation}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_confined_and_its_limits_hold() {
    let engine = engine!("a_session_is_confined_and_its_limits_hold");
    let agent = Agent::new(engine, "confined");
    let runtime = agent.open().await;
    let spec = StartSpec {
        cpu_milli: Some(250),
        memory_bytes: Some(64 << 20),
        container: ContainerSpec {
            security: ManifestSecurity {
                read_only_root_filesystem: true,
                run_as_user: Some(4321),
                capabilities: vec![],
            },
            ..ContainerSpec::default()
        },
        ..spec(&agent.id, "confined-1", SLEEP)
    };
    let observed = runtime.start(&spec).await.unwrap();
    assert_eq!(observed.metadata["cpuLimit"], "250m");
    assert_eq!(observed.metadata["memoryLimit"], (64 << 20).to_string());
    assert_eq!(observed.metadata["colour"], "blue");
    let id = agent.container("confined-1");
    let inside = |script: &str| engine.docker(&["exec", &id, "sh", "-c", script]);
    let status = inside("cat /proc/self/status");
    for line in [
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Uid:\t4321",
    ] {
        assert!(status.contains(line), "{line} is not in {status}");
    }
    let refused = engine.docker_output(&["exec", &id, "sh", "-c", "touch /etc/x"]);
    assert!(!refused.status.success(), "the root can be written");
    inside("touch /tmp/x && touch /config/x");
    let limits = engine.docker(&[
        "inspect",
        "--format",
        "{{.HostConfig.PidsLimit}} {{.HostConfig.Memory}} {{.HostConfig.MemorySwap}} {{.HostConfig.NanoCpus}} {{.HostConfig.RestartPolicy.Name}} {{.HostConfig.Privileged}} {{.HostConfig.PidMode}}{{.HostConfig.NetworkMode}}",
        &id,
    ]);
    assert!(
        limits.starts_with("512 67108864 67108864 250000000 no false "),
        "{limits}"
    );
    let namespaces = inside("for kind in pid net ipc; do readlink /proc/self/ns/$kind; done");
    for (kind, inside) in ["pid", "net", "ipc"].iter().zip(namespaces.lines()) {
        let outside = std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
        assert_ne!(outside.to_str().unwrap(), inside, "the host's {kind} namespace");
    }
    stop(&runtime, &spec).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_is_published_on_loopback_alone_and_sessions_find_each_other_by_name() {
    let engine = engine!("a_port_is_published_on_loopback_alone_and_sessions_find_each_other_by_name");
    let agent = Agent::new(engine, "ports");
    let runtime = agent.open().await;
    let page =
        "echo hello from $REGENT_SESSION of $REGENT_USER > /tmp/index.html; exec httpd -f -p $PORT -h /tmp";
    let server = with_port(spec(&agent.id, "ports-server", page), 8080);
    let observed = runtime.start(&server).await.unwrap();
    // The start waits for the port, so it answers at once.
    let body = get(&address(&observed)).await.unwrap();
    assert_eq!(body.trim(), "hello from ports-server of alice");
    let published = engine.docker(&["port", &agent.container("ports-server")]);
    assert_eq!(
        published,
        format!("8080/tcp -> 127.0.0.1:{}", observed.port.unwrap())
    );
    let client = spec(
        &agent.id,
        "ports-client",
        "wget -q -O - http://ports-server:8080/ > /config/answer; sleep 1000",
    );
    runtime.start(&client).await.unwrap();
    let id = agent.container("ports-client");
    let answer = until("the other session answers", async || {
        let output = engine.docker_output(&["exec", &id, "cat", "/config/answer"]);
        let text = String::from_utf8(output.stdout).unwrap();
        (!text.is_empty()).then_some(text)
    })
    .await;
    assert_eq!(answer.trim(), "hello from ports-server of alice");
    for spec in [server, client] {
        runtime
            .stop(&spec.session_ref(), Stop::within(std::time::Duration::ZERO))
            .await
            .unwrap();
    }
}

/// Own end, memory, a kill and a removal by somebody else: each is told with its reason.
#[tokio::test(flavor = "multi_thread")]
async fn every_end_is_told_with_its_reason() {
    let engine = engine!("every_end_is_told_with_its_reason");
    let agent = Agent::new(engine, "ends");
    let runtime = agent.open().await;
    let mut events = runtime.watch();
    let mut started = Vec::new();
    let mut begin = async |spec: StartSpec| {
        runtime.start(&spec).await.unwrap();
        started.push(spec);
    };
    begin(spec(&agent.id, "ends-code", "exit 3")).await;
    assert_eq!(
        next_exit(&mut events).await,
        ("ends-code".to_owned(), Exit::Code(3))
    );

    let greedy = StartSpec {
        memory_bytes: Some(16 << 20),
        ..spec(&agent.id, "ends-memory", "exec tail /dev/zero")
    };
    begin(greedy).await;
    assert_eq!(
        next_exit(&mut events).await,
        ("ends-memory".to_owned(), Exit::OutOfMemory)
    );

    begin(spec(&agent.id, "ends-killed", SLEEP)).await;
    let at = Instant::now();
    engine.docker(&["kill", &agent.container("ends-killed")]);
    assert_eq!(
        next_exit(&mut events).await,
        ("ends-killed".to_owned(), Exit::Signal(9))
    );
    println!(
        "a killed container was told after {} ms",
        at.elapsed().as_millis()
    );

    begin(spec(&agent.id, "ends-removed", SLEEP)).await;
    let at = Instant::now();
    engine.docker(&["rm", "-f", &agent.container("ends-removed")]);
    assert_eq!(
        next_exit(&mut events).await,
        ("ends-removed".to_owned(), Exit::Removed)
    );
    println!(
        "a removed container was told after {} ms",
        at.elapsed().as_millis()
    );

    let states: BTreeMap<String, ObservedState> = runtime
        .list()
        .await
        .unwrap()
        .into_iter()
        .map(|one| (one.session.to_string(), one.state))
        .collect();
    let should = BTreeMap::from([
        ("ends-code".to_owned(), ObservedState::Exited(Exit::Code(3))),
        ("ends-memory".to_owned(), ObservedState::Exited(Exit::OutOfMemory)),
        ("ends-killed".to_owned(), ObservedState::Exited(Exit::Signal(9))),
    ]);
    assert_eq!(states, should);
    for spec in &started {
        stop(&runtime, spec).await;
        assert_eq!(agent.left(spec.session.as_str()), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_home_outlives_its_session_if_it_persists_and_goes_when_asked() {
    let engine = engine!("a_home_outlives_its_session_if_it_persists_and_goes_when_asked");
    let agent = Agent::new(engine, "homes");
    let runtime = agent.open().await;
    let writes = "echo kept >> /config/file; cat /config/file > /tmp/seen; exec sleep 1000";
    let home = |session: &str, user: &str, persistent_home| StartSpec {
        user: UserName::new(user).unwrap(),
        persistent_home,
        ..spec(&agent.id, session, writes)
    };
    let lines = |session: &str| {
        let id = agent.container(session);
        let script = "until [ -e /tmp/seen ]; do sleep 0.1; done; wc -l < /config/file";
        engine.docker(&["exec", &id, "sh", "-c", script])
    };
    let end = async |spec: &StartSpec, delete_home| {
        let how = Stop {
            grace: std::time::Duration::ZERO,
            delete_home,
        };
        runtime.stop(&spec.session_ref(), how).await.unwrap();
        assert_eq!(agent.left(spec.session.as_str()), Vec::<String>::new());
    };
    // The same user and template find it again; an odd user name has one of its own (fault 17).
    for (n, user, should) in [
        (1, "alice", "1"),
        (2, "alice", "2"),
        (3, "Alice@example.org", "1"),
    ] {
        let spec = home(&format!("home-{n}"), user, true);
        runtime.start(&spec).await.unwrap();
        assert_eq!(lines(&format!("home-{n}")), should, "{user}");
        end(&spec, false).await;
    }
    // A session without one starts from nothing each time.
    for _ in 0..2 {
        let spec = home("home-4", "alice", false);
        runtime.start(&spec).await.unwrap();
        assert_eq!(lines("home-4"), "1");
        end(&spec, false).await;
    }
    // Asked for, it goes, but not while another session has it.
    let [first, second] = ["home-5", "home-6"].map(|name| home(name, "alice", true));
    runtime.start(&first).await.unwrap();
    runtime.start(&second).await.unwrap();
    end(&first, true).await;
    runtime.start(&first).await.unwrap();
    assert_ne!(lines("home-5"), "1", "it was still in use");
    end(&first, false).await;
    end(&second, true).await;
    runtime.start(&first).await.unwrap();
    assert_eq!(lines("home-5"), "1");
    end(&first, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hibernation_keeps_files_and_identity_and_pause_keeps_memory_too() {
    let engine = engine!("hibernation_keeps_files_and_identity_and_pause_keeps_memory_too");
    let agent = Agent::new(engine, "sleeps");
    let runtime = agent.open().await;
    let counts = "echo run >> /config/runs; cp /config/runs /tmp/index.html; exec httpd -f -p 8080 -h /tmp";
    for (mode, runs) in [
        (None, 2),
        (Some(HibernateMode::Restart), 2),
        (Some(HibernateMode::Stop), 1),
    ] {
        let spec = StartSpec {
            hibernate: mode,
            ..with_port(spec(&agent.id, "sleeps-1", counts), 8080)
        };
        let started = runtime.start(&spec).await.unwrap();
        let id = agent.container("sleeps-1");
        let asleep = runtime.hibernate(&spec.session_ref()).await.unwrap();
        assert_eq!((asleep.state, asleep.url), (ObservedState::Hibernated, None));
        let listed = agent.open().await.list().await.unwrap();
        assert_eq!(listed[0].state, ObservedState::Hibernated, "{mode:?}");
        let awake = runtime.wake(&spec.session_ref()).await.unwrap();
        assert_eq!(agent.container("sleeps-1"), id, "the container is the same");
        assert_eq!(awake.pid == started.pid, mode == Some(HibernateMode::Stop));
        // The port may be another one; the answer says where it is now.
        assert_eq!(
            get(&address(&awake)).await.unwrap().lines().count(),
            runs,
            "{mode:?}"
        );
        // After a wake its own end is an end again, and no sleep.
        let mut events = runtime.watch();
        engine.docker(&["kill", &id]);
        assert_eq!(
            next_exit(&mut events).await,
            ("sleeps-1".to_owned(), Exit::Signal(9))
        );
        stop(&runtime, &spec).await;
        assert_eq!(agent.left("sleeps-1"), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_waits_for_the_health_check_of_the_image_and_later_illness_is_told() {
    let engine = engine!("a_start_waits_for_the_health_check_of_the_image_and_later_illness_is_told");
    let agent = Agent::new(engine, "health");
    let runtime = agent.open().await;
    let mut events = runtime.watch();
    let script = "sleep 2; touch /config/healthy; exec sleep 1000";
    let spec = StartSpec {
        image: Some("regent-test-health:1".to_owned()),
        ..with_port(spec(&agent.id, "health-1", script), 8080)
    };
    runtime.start(&spec).await.unwrap();
    let id = agent.container("health-1");
    let health = engine.docker(&["inspect", "--format", "{{.State.Health.Status}}", &id]);
    assert_eq!(health, "healthy");
    engine.docker(&["exec", &id, "rm", "/config/healthy"]);
    let reason = loop {
        match next(&mut events).await {
            RuntimeEvent::Changed { observed, reason } if reason.contains("unhealthy") => {
                assert_eq!(observed.state, ObservedState::Running);
                break reason;
            }
            RuntimeEvent::Changed { .. } => {}
            other => panic!("instead of its illness came {other:?}"),
        }
    };
    println!("{reason}");
    runtime
        .stop(&spec.session_ref(), Stop::within(std::time::Duration::ZERO))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_and_allowed_folders_are_mounted_and_others_refused() {
    let engine = engine!("volumes_and_allowed_folders_are_mounted_and_others_refused");
    let agent = Agent::new(engine, "mounts");
    let shared = agent.data.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    support::write(&shared, "word", "from the host");
    let runtime = agent
        .open_with(DockerOptions {
            allowed_binds: vec![shared.clone()],
            ..agent.options()
        })
        .await;
    let mount = |name: &str, at: &str, host: Option<&str>| ManifestMount {
        name: name.to_owned(),
        mount_path: at.to_owned(),
        read_only: host.is_some(),
        host_path: host.map(str::to_owned),
    };
    let with = |mounts: Vec<ManifestMount>| StartSpec {
        container: ContainerSpec {
            mounts,
            ..ContainerSpec::default()
        },
        ..spec(
            &agent.id,
            "mounts-1",
            "cp /shared/word /data/word && cp /data/word /home/me/word && exit 5; exit 1",
        )
    };
    let allowed = with(vec![
        mount("user-home", "/home/me", None),
        mount("data", "/data", None),
        mount("shared", "/shared", shared.to_str()),
    ]);
    let mut events = runtime.watch();
    runtime.start(&allowed).await.unwrap();
    assert_eq!(
        next_exit(&mut events).await,
        ("mounts-1".to_owned(), Exit::Code(5))
    );
    stop(&runtime, &allowed).await;
    let refused = runtime
        .start(&with(vec![mount("etc", "/etc2", Some("/etc"))]))
        .await
        .unwrap_err();
    assert!(matches!(refused, RuntimeError::BadSpec { .. }), "{refused}");
    assert!(refused.to_string().contains("docker-allow-bind"), "{refused}");
    assert_eq!(agent.left("mounts-1"), Vec::<String>::new());
}

/// Two replicas that both think they lead: the engine makes a name once.
#[tokio::test(flavor = "multi_thread")]
async fn starts_of_one_generation_that_race_make_one_container() {
    let engine = engine!("starts_of_one_generation_that_race_make_one_container");
    let agent = Agent::new(engine, "races");
    let runtimes: Vec<DockerRuntime> = futures::future::join_all((0..4).map(|_| agent.open())).await;
    for round in 0..5 {
        let spec = spec(&agent.id, &format!("races-{round}"), SLEEP);
        let answers = futures::future::join_all(runtimes.iter().map(|runtime| runtime.start(&spec))).await;
        for answer in answers {
            assert_eq!(answer.unwrap().state, ObservedState::Running);
        }
        agent.container(&format!("races-{round}"));
        stop(&runtimes[0], &spec).await;
        assert_eq!(agent.left(spec.session.as_str()), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_and_clusters_on_one_engine_do_not_see_each_other() {
    let engine = engine!("agents_and_clusters_on_one_engine_do_not_see_each_other");
    let (mine, mut other) = (Agent::new(engine, "apart"), Agent::new(engine, "apart"));
    other.cluster = ClusterId::new("other-cluster").unwrap();
    let another = Agent::new(engine, "apart-too");
    let mut runtimes = Vec::new();
    for agent in [&mine, &other, &another] {
        let runtime = agent.open().await;
        // The same name and generation in each of them.
        let started = runtime.start(&spec(&agent.id, "apart-1", SLEEP)).await.unwrap();
        assert_eq!(runtime.list().await.unwrap(), vec![started]);
        runtimes.push(runtime);
    }
    let unjoined = DockerRuntime::connect(mine.options()).await.unwrap();
    assert_eq!(
        unjoined.list().await.unwrap(),
        vec![],
        "before the cluster is known nothing is ours"
    );
    stop(&runtimes[0], &spec(&mine.id, "apart-1", SLEEP)).await;
    assert_eq!(runtimes[0].list().await.unwrap(), vec![]);
    for (runtime, agent) in runtimes.iter().zip([&mine, &other, &another]).skip(1) {
        assert_eq!(runtime.list().await.unwrap().len(), 1);
        stop(runtime, &spec(&agent.id, "apart-1", SLEEP)).await;
    }
}

/// The engine takes two networks of one name, and starts no container on either. An agent that is killed between making
/// one and seeing that another agent was first leaves that behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_network_of_one_name_keeps_no_session_from_starting() {
    let engine = engine!("a_second_network_of_one_name_keeps_no_session_from_starting");
    let mut agent = Agent::new(engine, "network-twice");
    agent.cluster = ClusterId::new("network-twice").unwrap();
    let socket = engine.host.trim_start_matches("unix://");
    let docker = bollard::Docker::connect_with_unix(socket, 30, bollard::API_DEFAULT_VERSION).unwrap();
    let docker = docker.negotiate_version().await.unwrap();
    let networks = || {
        let filter = "name=^regent-network-twice$";
        let listed = engine.docker(&["network", "ls", "--quiet", "--filter", filter]);
        listed.lines().count()
    };
    for _ in 0..2 {
        let request = bollard::models::NetworkCreateRequest {
            name: "regent-network-twice".to_owned(),
            ..Default::default()
        };
        docker.create_network(request).await.unwrap();
    }
    assert_eq!(networks(), 2);
    let runtime = agent.open().await;
    let twice = spec(&agent.id, "network-twice-1", SLEEP);
    let started = runtime.start(&twice).await.unwrap();
    assert_eq!(started.state, ObservedState::Running);
    assert_eq!(networks(), 1);
    stop(&runtime, &twice).await;
    runtime.remove_network().await.unwrap();
}

/// A leader that is deposed in the middle of a start: whoever comes first, one container runs, and after its stop there
/// is nothing, not even a volume that nobody could tell whose it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_takeover_in_the_middle_of_a_start_leaves_one_container_and_after_its_stop_nothing() {
    let engine =
        engine!("a_takeover_in_the_middle_of_a_start_leaves_one_container_and_after_its_stop_nothing");
    let agent = Agent::new(engine, "deposed");
    let (old, new) = (agent.open().await, agent.open().await);
    let volumes = || engine.docker(&["volume", "ls", "-q", "--filter", "name=deposed"]);
    for round in 1..=12 {
        let before = StartSpec {
            token: Token(2 * round),
            ..spec(&agent.id, &format!("deposed-{round}"), SLEEP)
        };
        let after = StartSpec {
            token: Token(2 * round + 1),
            ..before.clone()
        };
        old.take_over(before.token).await.unwrap();
        let takeover = async {
            // Somewhere in the middle, somewhere else in each round.
            tokio::time::sleep(std::time::Duration::from_millis(round * 8)).await;
            new.take_over(after.token).await.unwrap();
            new.start(&after).await.unwrap()
        };
        let (first, second) = tokio::join!(old.start(&before), takeover);
        assert_eq!(second.state, ObservedState::Running, "{first:?}");
        agent.container(after.session.as_str());
        stop(&new, &after).await;
        assert_eq!(agent.left(after.session.as_str()), Vec::<String>::new());
        assert_eq!(volumes(), "", "round {round}: {first:?}");
    }
}

/// A hibernation that finds the session ended says so, and so does an event.
#[tokio::test(flavor = "multi_thread")]
async fn an_end_in_the_middle_of_a_hibernation_is_told() {
    let engine = engine!("an_end_in_the_middle_of_a_hibernation_is_told");
    let agent = Agent::new(engine, "midway");
    let runtime = agent.open().await;
    for round in 0..6 {
        let name = format!("midway-{round}");
        let spec = spec(&agent.id, &name, SLEEP);
        let mut events = runtime.watch();
        runtime.start(&spec).await.unwrap();
        let id = agent.container(&name);
        let session = spec.session_ref();
        let kill = async {
            tokio::time::sleep(std::time::Duration::from_millis(round * 3)).await;
            engine.docker_output(&["kill", &id])
        };
        let (asleep, _) = tokio::join!(runtime.hibernate(&session), kill);
        match asleep {
            // It slept before the kill came, or by it: then it wakes.
            Ok(_) => assert_eq!(
                runtime.wake(&session).await.unwrap().state,
                ObservedState::Running
            ),
            Err(RuntimeError::WrongState { .. }) => {
                assert_eq!(next_exit(&mut events).await, (name.clone(), Exit::Signal(9)));
            }
            Err(other) => panic!("{other:?}"),
        }
        stop(&runtime, &spec).await;
    }
}

/// A container that the engine is stuck over does not hide the others.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_the_engine_is_stuck_over_does_not_hide_the_others() {
    let Some(engine) = Engine::own("a_container_that_the_engine_is_stuck_over_does_not_hide_the_others")
    else {
        return;
    };
    let agent = Agent::new(&engine, "stuck");
    let runtime = agent.open().await;
    let [stuck, other] = ["stuck-1", "stuck-2"].map(|name| spec(&agent.id, name, SLEEP));
    for spec in [&stuck, &other] {
        runtime.start(spec).await.unwrap();
    }
    // Its shim is frozen, and somebody asks the engine to end it.
    let pid = engine.docker(&[
        "inspect",
        "--format",
        "{{.State.Pid}}",
        &agent.container("stuck-1"),
    ]);
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let shim = stat
        .rsplit_once(") ")
        .unwrap()
        .1
        .split(' ')
        .nth(1)
        .unwrap()
        .to_owned();
    let signal = |signal: &str| {
        std::process::Command::new("kill")
            .args([signal, &shim])
            .status()
            .unwrap()
    };
    signal("-STOP");
    let ending = stuck.session_ref();
    let stopping = runtime.stop(&ending, Stop::within(GRACE));
    let looking = async {
        until("the engine is stuck", async || {
            let inspect = ["inspect", "--format", "{{.Id}}", &agent.container("stuck-1")].map(str::to_owned);
            let host = engine.host.clone();
            let asked = tokio::process::Command::new("/usr/bin/docker")
                .env("DOCKER_HOST", host)
                .args(inspect)
                .output();
            tokio::time::timeout(std::time::Duration::from_secs(1), asked)
                .await
                .is_err()
                .then_some(())
        })
        .await;
        let listed = runtime.list().await.unwrap();
        signal("-CONT");
        listed
    };
    let (stopped, listed) = tokio::join!(stopping, looking);
    let listed: Vec<(String, ObservedState)> = listed
        .into_iter()
        .map(|one| (one.session.to_string(), one.state))
        .collect();
    let should = ["stuck-1", "stuck-2"].map(|name| (name.to_owned(), ObservedState::Running));
    assert_eq!(listed, should);
    stopped.unwrap();
    stop(&runtime, &other).await;
}

/// What a deposed leader's call made that had passed the fence just before: it is of the generation that it was asked for, the
/// newer leader finds it, and a start of that generation adopts it.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_late_call_made_is_found_and_adopted_and_a_cut_off_one_is_no_session() {
    let engine = engine!("what_a_late_call_made_is_found_and_adopted_and_a_cut_off_one_is_no_session");
    let agent = Agent::new(engine, "late");
    let (old, new) = (agent.open().await, agent.open().await);
    let spec = spec(&agent.id, "late-1", SLEEP);
    // Made by the old leader; nobody was told.
    old.start(&spec).await.unwrap();
    new.take_over(Token(2)).await.unwrap();
    let id = agent.container("late-1");
    let newer = StartSpec {
        token: Token(2),
        ..spec.clone()
    };
    assert_eq!(
        new.start(&newer).await.unwrap().token,
        Token(1),
        "adopted, not made again"
    );
    assert_eq!(agent.container("late-1"), id);
    // Half a start: made, never run. It is not listed, a start completes it, and a stop removes it.
    stop(&new, &newer).await;
    let name = {
        new.start(&newer).await.unwrap();
        let id = agent.container("late-1");
        let name = engine.docker(&["inspect", "--format", "{{.Name}}", &id]);
        let labels = engine.docker(&["inspect", "--format", "{{json .Config.Labels}}", &id]);
        let labels: BTreeMap<String, String> = serde_json::from_str(&labels).unwrap();
        stop(&new, &newer).await;
        let labels: Vec<String> = labels
            .iter()
            .map(|(name, value)| format!("--label={name}={value}"))
            .collect();
        let mut create = vec!["create", "--name", name.trim_start_matches('/')];
        create.extend(labels.iter().map(String::as_str));
        create.extend(["regent-test:1", "sleep", "1000"]);
        engine.docker(&create);
        name
    };
    assert_eq!(new.list().await.unwrap(), vec![]);
    assert_eq!(new.start(&newer).await.unwrap().state, ObservedState::Running);
    assert_eq!(
        engine.docker(&["inspect", "--format", "{{.Name}}", &agent.container("late-1")]),
        name
    );
    let how = Stop::within(std::time::Duration::ZERO);
    new.stop(&newer.session_ref(), how).await.unwrap();
    assert_eq!(agent.left("late-1"), Vec::<String>::new());
}

/// An engine that is restarted takes its containers along. The agent's runtime goes on, and says that what shall run
/// is to be started again.
#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_restarts_does_not_lose_the_agent() {
    let Some(engine) = Engine::own("an_engine_that_restarts_does_not_lose_the_agent") else {
        return;
    };
    let agent = Agent::new(&engine, "restarts");
    let runtime = agent.open().await;
    for (n, signal) in ["TERM", "KILL"].into_iter().enumerate() {
        let generation = u64::try_from(n).unwrap() * 2 + 1;
        let running = StartSpec {
            generation,
            ..spec(&agent.id, "restarts-1", SLEEP)
        };
        let asleep = StartSpec {
            generation,
            ..spec(&agent.id, "restarts-2", SLEEP)
        };
        runtime.start(&running).await.unwrap();
        runtime.start(&asleep).await.unwrap();
        runtime.hibernate(&asleep.session_ref()).await.unwrap();
        let mut events = runtime.watch();
        engine.control(&format!("stop {signal}"));
        let error = runtime.list().await.unwrap_err();
        assert!(error.is_retryable(), "{error}");
        engine.control("start");
        match next(&mut events).await {
            RuntimeEvent::Restarted { reason } => println!("{signal}: {reason}"),
            other => panic!("{signal}: instead of a restart came {other:?}"),
        }
        let states: Vec<ObservedState> = runtime
            .list()
            .await
            .unwrap()
            .iter()
            .map(|one| one.state)
            .collect();
        assert_eq!(
            states,
            [ObservedState::Exited(Exit::Unknown), ObservedState::Hibernated],
            "{signal}: one ended with the engine, the other slept through it"
        );
        // What the control plane does with it: the next generation.
        let next_one = StartSpec {
            generation: generation + 1,
            ..running
        };
        assert_eq!(
            runtime.start(&next_one).await.unwrap().state,
            ObservedState::Running
        );
        assert_eq!(
            runtime.wake(&asleep.session_ref()).await.unwrap().state,
            ObservedState::Running
        );
        engine.docker(&["kill", &agent.container("restarts-1")]);
        assert_eq!(
            next_exit(&mut events).await,
            ("restarts-1".to_owned(), Exit::Signal(9)),
            "events go on"
        );
        stop(&runtime, &next_one).await;
        stop(&runtime, &asleep).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_is_not_there_or_not_for_us_is_said_so() {
    let engine = engine!("an_engine_that_is_not_there_or_not_for_us_is_said_so");
    let agent = Agent::new(engine, "nowhere");
    let options = DockerOptions {
        host: "unix:///nowhere/docker.sock".to_owned(),
        ..agent.options()
    };
    let error = DockerRuntime::connect(options).await.unwrap_err().to_string();
    assert!(
        error.contains("/nowhere/docker.sock") && error.contains("is it running"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_may_not_be_pulled_is_refused_for_good() {
    let engine = engine!("an_image_that_may_not_be_pulled_is_refused_for_good");
    let agent = Agent::new(engine, "never");
    let runtime = agent
        .open_with(DockerOptions {
            pull: Pull::Never,
            ..agent.options()
        })
        .await;
    let spec = StartSpec {
        image: Some("no-such-image:1".to_owned()),
        ..spec(&agent.id, "never-1", SLEEP)
    };
    let error = runtime.start(&spec).await.unwrap_err();
    assert!(
        matches!(&error, RuntimeError::BadSpec { reason, .. } if reason.contains("docker-pull")),
        "{error}"
    );
    assert_eq!(agent.left("never-1"), Vec::<String>::new());
}
