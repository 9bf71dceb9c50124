//! `regent lease hold`: a program that runs only while a lease is held. (StreamSpace's fault 4: a leader that was
//! cut off went on beside the next one.)
//!
//! What must not happen is measured from inside: the program writes the time, by the clock that guards count by,
//! again and again, and the last of it must be before the guard was over.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use regent_client::Client;
use regent_client::clock::boot_ms;
use regent_client::guard::hold_ms;
use regent_types::LeaseName;
use rustix::process::Signal;

use crate::harness::{Dev, PATIENCE, REGENT, eventually, lacks, send};
use crate::process::{Frozen, Process, naming};

/// The TTL without `--ttl`.
const TTL: u64 = 5_000;

/// Writes the time for ever, from a child of its own that ignores SIGTERM, so that only what ends the whole group
/// by force ends it. `/proc/uptime` is the clock of the guards, in hundredths of a second.
const STUBBORN: &str = r#"
    trap '' TERM
    ( while :; do read up rest < /proc/uptime; echo "$up" >> "$OUT"; sleep 0.02; done ) &
    wait
"#;

/// Writes the time until it is told to end ([`Hold::tell`]), and then once more.
const UNTIL_TOLD: &str = r#"
    now() { read up rest < /proc/uptime; echo "$up" >> "$OUT"; }
    while [ ! -e "$OUT.go" ]; do now; sleep 0.02; done; now
"#;

/// One `regent lease hold`.
struct Hold {
    process: Child,
    out: PathBuf,
}

impl Dev {
    fn hold(&self, name: &str, flags: &[&str], program: &[&str]) -> Hold {
        self.hold_at(&[0, 1, 2], name, flags, program)
    }

    /// One that knows only these nodes.
    fn hold_at(&self, nodes: &[usize], name: &str, flags: &[&str], program: &[&str]) -> Hold {
        let out = self.path().join(format!("hold-{}", next_number()));
        let urls: Vec<&str> = nodes.iter().map(|n| self.file.nodes[*n].http.as_str()).collect();
        let process = Command::new(REGENT)
            .args(["lease", "hold", name])
            .args(flags)
            .arg("--")
            .args(program)
            .env("REGENT_URL", urls.join(","))
            .env("REGENT_TOKEN", &self.file.admin_token)
            .env("OUT", &out)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(out.with_extension("stderr")).unwrap())
            .spawn()
            .unwrap();
        Hold { process, out }
    }
}

/// Another for each `hold` of this process.
fn next_number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Hold {
    fn pid(&self) -> u32 {
        self.process.id()
    }

    /// What the program has written.
    fn output(&self) -> String {
        std::fs::read_to_string(&self.out).unwrap_or_default()
    }

    /// What `hold` and the program have said.
    fn errors(&self) -> String {
        std::fs::read_to_string(self.out.with_extension("stderr")).unwrap_or_default()
    }

    /// Waits until the program has written something.
    async fn writes(&self) -> String {
        eventually("output of the program", || async {
            Some(self.output()).filter(|text| text.ends_with('\n'))
        })
        .await
    }

    /// Waits until the program goes on writing.
    async fn goes_on(&self) {
        let before = self.output().len();
        eventually("more output of the program", || async {
            (self.output().len() > before).then_some(())
        })
        .await;
    }

    async fn ended(&mut self) -> ExitStatus {
        for_the_end(&mut self.process).await
    }

    async fn code(&mut self) -> i32 {
        let status = self.ended().await;
        status
            .code()
            .unwrap_or_else(|| panic!("{status}: {}", self.errors()))
    }

    /// Tells [`UNTIL_TOLD`] to end.
    fn tell(&self) {
        std::fs::write(format!("{}.go", self.out.display()), "").unwrap();
    }

    /// The last time that the program has written, in milliseconds.
    fn last_write(&self) -> u64 {
        in_ms(self.output().lines().next_back().expect("it wrote"))
    }

    /// The first time that it has.
    fn first_write(&self) -> u64 {
        in_ms(self.output().lines().next().expect("it wrote"))
    }

    /// `hold`'s own descendants and the watchdog's: all that have its file in their environment, but `hold`.
    fn family(&self) -> BTreeSet<Process> {
        naming(&self.out)
            .into_iter()
            .filter(|pid| *pid != self.pid())
            .filter_map(Process::of)
            .collect()
    }
}

/// Seconds with hundredths, as in `/proc/uptime`.
fn in_ms(text: &str) -> u64 {
    let (seconds, hundredths) = text.split_once('.').unwrap();
    seconds.parse::<u64>().unwrap() * 1_000 + hundredths.parse::<u64>().unwrap() * 10
}

/// Waits until this many wait for the lease `l`.
async fn candidates(dev: &Dev, count: usize) {
    let client = dev.client();
    eventually(&format!("{count} candidates"), || async {
        let held = client.lease(&lease("l")).await.ok()?;
        (held.candidates.len() == count).then_some(())
    })
    .await;
}

async fn for_the_end(process: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = process.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < deadline, "it did not end");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        send(self.pid(), Signal::CONT);
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn lease(name: &str) -> LeaseName {
    LeaseName::new(name).unwrap()
}

/// Waits until the lease is free: a `hold` that ended gives it back, one that was killed lets it expire.
async fn free(client: &Client, name: &str) {
    eventually(&format!("an end of the lease {name}"), || async {
        client.lease(&lease(name)).await.is_err().then_some(())
    })
    .await;
}

async fn all_gone(what: &str, processes: &BTreeSet<Process>) {
    assert!(!processes.is_empty(), "{what}: nothing was there to begin with");
    eventually(what, || async {
        processes.iter().all(|process| !process.is_alive()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn it_exits_as_its_program_does_and_gives_the_lease_back() {
    let dev = Dev::start();
    let client = dev.client();
    for (program, code) in [
        (&["true"][..], 0),
        (&["sh", "-c", "exit 77"], 77),
        (&["sh", "-c", "kill -9 $$"], 128 + 9),
        (&["sh", "-c", "kill -TERM $$"], 128 + 15),
        (&["/nowhere/to/be/found"], 127),
        (&["no-such-program-of-this-name"], 127),
        (&["/"], 126),
        (&["/etc/passwd"], 126),
    ] {
        let mut hold = dev.hold("l", &[], program);
        assert_eq!(hold.code().await, code, "{program:?}: {}", hold.errors());
        let left = client.lease(&lease("l")).await;
        assert!(left.is_err(), "{program:?} left the lease: {left:?}");
    }
}

#[tokio::test]
async fn the_program_finds_the_name_and_the_token_and_its_own_group() {
    let dev = Dev::start();
    let script = r#"echo "$REGENT_LEASE_NAME $REGENT_LEASE_TOKEN $$ $(cut -d ' ' -f 5 /proc/$$/stat)" > "$OUT"; sleep 600"#;
    let mut hold = dev.hold("jobs/nightly", &["--holder", "me"], &["sh", "-c", script]);
    let written = hold.writes().await;
    let held = dev.client().lease(&lease("jobs/nightly")).await.unwrap();
    let [name, token, pid, group] = written.split_whitespace().collect::<Vec<_>>()[..] else {
        panic!("{written}");
    };
    assert_eq!((name, token), ("jobs/nightly", held.token.to_string().as_str()));
    assert_eq!((held.holder.as_str(), held.ttl_ms), ("me", TTL));
    assert_eq!(pid, group, "it leads a group of its own");
    // A signal to `hold` reaches the program, and its end is the end of `hold`.
    let family = hold.family();
    send(hold.pid(), Signal::TERM);
    assert_eq!(hold.code().await, 128 + 15);
    all_gone("an end of the program", &family).await;
}

#[tokio::test]
async fn a_signal_that_the_program_handles_does_not_end_hold() {
    let dev = Dev::start();
    let script = r#"trap 'echo got >> "$OUT"; exit 3' USR1; trap 'echo once >> "$OUT"' HUP; echo ready >> "$OUT"
        while :; do sleep 0.05; done"#;
    let mut hold = dev.hold("l", &[], &["sh", "-c", script]);
    hold.writes().await;
    send(hold.pid(), Signal::HUP);
    eventually("the first signal", || async {
        hold.output().contains("once").then_some(())
    })
    .await;
    send(hold.pid(), Signal::USR1);
    assert_eq!(hold.code().await, 3);
    assert_eq!(hold.output(), "ready\nonce\ngot\n");
}

#[tokio::test]
async fn nothing_outlives_the_program_in_its_group() {
    let dev = Dev::start();
    // One that can be asked to end, one that cannot, and one that is stopped. (A group that is left with somebody
    // stopped gets SIGHUP from the kernel: that must not be what ends them.)
    let script = r#"
        trap '' HUP
        sleep 600 &
        ( trap '' TERM; while :; do sleep 0.05; done ) &
        sleep 600 & kill -STOP $!
        echo ready > "$OUT"; while [ ! -e "$OUT.go" ]; do sleep 0.02; done; exit 5"#;
    let mut hold = dev.hold("l", &[], &["sh", "-c", script]);
    hold.writes().await;
    let family = hold.family();
    assert!(family.len() >= 4, "{family:?}");
    std::fs::write(format!("{}.go", hold.out.display()), "").unwrap();
    assert_eq!(hold.code().await, 5);
    let left: Vec<_> = family.iter().filter(|process| process.is_alive()).collect();
    assert!(left.is_empty(), "they were gone before hold was: {left:?}");
    assert!(dev.client().lease(&lease("l")).await.is_err());
}

#[tokio::test]
async fn who_cannot_have_it_in_time_runs_nothing() {
    let dev = Dev::start();
    let first = dev.hold("l", &[], &["sh", "-c", r#"echo > "$OUT"; sleep 600"#]);
    first.writes().await;
    for wait in ["0", "1s"] {
        let mut second = dev.hold("l", &["--wait", wait], &["sh", "-c", r#"echo > "$OUT""#]);
        assert_eq!(second.code().await, 125);
        assert!(second.errors().contains("lease_held"), "{}", second.errors());
        assert!(!second.out.exists());
    }
    // Nobody to ask is a failure of its own kind, with the same code.
    let mut nowhere = Command::new(REGENT)
        .args(["lease", "hold", "l", "--wait", "0", "--", "true"])
        .env("REGENT_URL", "http://127.0.0.1:1")
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    assert_eq!(for_the_end(&mut nowhere).await.code(), Some(125));
}

#[tokio::test]
async fn the_second_waits_and_runs_after_the_first() {
    let dev = Dev::start();
    let client = dev.client();
    let mut first = dev.hold("l", &[], &["sh", "-c", UNTIL_TOLD]);
    first.writes().await;
    let token = client.lease(&lease("l")).await.unwrap().token;
    let mut second = dev.hold("l", &[], &["sh", "-c", UNTIL_TOLD]);
    candidates(&dev, 1).await;
    let (_, shown, _) = dev.cli(&["lease", "get", "l"]);
    let shown: Vec<Vec<&str>> = shown
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let column = shown[0].iter().position(|word| *word == "CANDIDATES").unwrap();
    assert_eq!(shown[1][column], "1", "{shown:?}");
    assert!(!second.out.exists());
    first.tell();
    assert_eq!(first.code().await, 0);
    second.writes().await;
    assert!(
        client.lease(&lease("l")).await.unwrap().token > token,
        "tokens grow"
    );
    second.tell();
    assert_eq!(second.code().await, 0);
    assert!(second.first_write() >= first.last_write(), "one after the other");
}

#[tokio::test]
async fn a_hold_that_gives_up_waiting_leaves_the_queue() {
    let dev = Dev::start();
    let first = dev.hold("l", &[], &["sh", "-c", UNTIL_TOLD]);
    first.writes().await;
    let mut second = dev.hold("l", &[], &["true"]);
    candidates(&dev, 1).await;
    send(second.pid(), Signal::TERM);
    assert_eq!(second.code().await, 128 + 15);
    candidates(&dev, 0).await;
}

#[tokio::test]
async fn the_queue_keeps_its_order_when_the_node_at_which_a_candidate_waits_dies() {
    let mut dev = Dev::start();
    let mut first = dev.hold("l", &[], &["sh", "-c", UNTIL_TOLD]);
    first.writes().await;
    // All ask the first node first, so the second candidate waits there. The third is told of the others only.
    let mut second = dev.hold("l", &[], &["sh", "-c", UNTIL_TOLD]);
    candidates(&dev, 1).await;
    let mut third = dev.hold_at(&[1, 2], "l", &[], &["sh", "-c", UNTIL_TOLD]);
    candidates(&dev, 2).await;
    dev.kill_node(0);
    // Longer than a place is kept for whom nobody speaks.
    let end = boot_ms() + 6_000;
    while boot_ms() < end {
        first.goes_on().await;
    }
    candidates(&dev, 2).await;
    for hold in [&mut first, &mut second, &mut third] {
        hold.writes().await;
        hold.tell();
        assert_eq!(hold.code().await, 0, "{}", hold.errors());
    }
    assert!(first.last_write() <= second.first_write(), "one after the other");
    assert!(
        second.last_write() <= third.first_write(),
        "first come, first served"
    );
    eprintln!(
        "handed over: {} ms and {} ms between the last write of one and the first of the next",
        second.first_write() - first.last_write(),
        third.first_write() - second.last_write()
    );
}

#[tokio::test]
async fn a_watch_goes_on_at_another_node_and_shows_every_holder() {
    let mut dev = Dev::start();
    let client = dev.client();
    let mut states = client.watch_lease(&lease("l"));
    let out = dev.path().join("watch");
    let urls: Vec<&str> = dev.file.nodes.iter().map(|n| n.http.as_str()).collect();
    let mut shown = Command::new(REGENT)
        .args(["lease", "watch", "l"])
        .env("REGENT_URL", urls.join(","))
        .env("REGENT_TOKEN", &dev.file.admin_token)
        .stdout(std::fs::File::create(&out).unwrap())
        .spawn()
        .unwrap();
    let mut next = async || {
        let state = tokio::time::timeout(PATIENCE, states.next()).await.unwrap();
        state.unwrap().unwrap().leader.map(|leader| leader.holder)
    };
    assert_eq!(next().await, None);
    eventually("the first line", || async {
        std::fs::read_to_string(&out)
            .unwrap()
            .contains("free")
            .then_some(())
    })
    .await;
    let mut a = dev.hold("l", &["--holder", "a"], &["sh", "-c", UNTIL_TOLD]);
    assert_eq!(next().await.as_deref(), Some("a"));
    dev.kill_node(0);
    let mut b = dev.hold("l", &["--holder", "b"], &["sh", "-c", UNTIL_TOLD]);
    candidates(&dev, 1).await;
    a.tell();
    assert_eq!(a.code().await, 0);
    assert_eq!(next().await, None);
    assert_eq!(next().await.as_deref(), Some("b"));
    b.tell();
    assert_eq!(b.code().await, 0);
    assert_eq!(next().await, None);
    eventually("five lines", || async {
        let text = std::fs::read_to_string(&out).unwrap();
        (text.lines().count() == 5).then_some(())
    })
    .await;
    shown.kill().unwrap();
    shown.wait().unwrap();
    let text = std::fs::read_to_string(&out).unwrap();
    let words: Vec<&str> = text
        .lines()
        .map(|line| line.split_whitespace().nth(1).unwrap())
        .collect();
    assert_eq!(words, ["free", "held", "free", "held", "free"], "{text}");
}

#[tokio::test]
async fn a_lease_that_is_acquired_by_hand_is_waited_for() {
    let dev = Dev::start();
    let (code, _, errors) = dev.cli(&["lease", "acquire", "l", "--holder", "a", "--ttl", "60s"]);
    assert_eq!(code, 0, "{errors}");
    let (code, _, errors) = dev.cli(&["lease", "acquire", "l", "--holder", "b", "--wait", "500ms"]);
    assert!(code == 1 && errors.contains("lease_held"), "{errors}");
    // Its place is kept for a moment, for a repetition that does not come.
    candidates(&dev, 0).await;
    let mut waiting = Command::new(REGENT)
        .args([
            "lease", "acquire", "l", "--holder", "c", "--ttl", "60s", "--wait", "60s",
        ])
        .env("REGENT_URL", &dev.file.nodes[1].http)
        .env("REGENT_TOKEN", &dev.file.admin_token)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    candidates(&dev, 1).await;
    let (code, _, errors) = dev.cli(&["lease", "force-release", "l", "--reason", "of a test"]);
    assert_eq!(code, 0, "{errors}");
    assert_eq!(for_the_end(&mut waiting).await.code(), Some(0));
    // Longer than a promotion stands that nobody takes up.
    let end = boot_ms() + 4_000;
    while boot_ms() < end {
        let held = dev.client().lease(&lease("l")).await.unwrap();
        assert_eq!(held.holder, "c");
    }
}

#[tokio::test]
async fn a_service_manager_that_signals_everybody_gets_the_code_of_the_program() {
    let dev = Dev::start();
    let polite = r#"trap 'sleep 0.2; exit 9' TERM; echo ready >> "$OUT"; while :; do sleep 0.02; done"#;
    let mut hold = dev.hold("l", &[], &["sh", "-c", polite]);
    hold.writes().await;
    for process in hold.family() {
        send(process.pid, Signal::TERM);
    }
    send(hold.pid(), Signal::TERM);
    assert_eq!(hold.code().await, 9, "{}", hold.errors());
    assert!(dev.client().lease(&lease("l")).await.is_err());
}

#[tokio::test]
async fn a_lease_that_is_taken_away_ends_the_program_with_124() {
    let dev = Dev::start();
    let client = dev.client();
    let mut hold = dev.hold("l", &[], &["sh", "-c", STUBBORN]);
    hold.writes().await;
    let family = hold.family();
    client
        .force_release_lease(&lease("l"), Some("maintenance"))
        .await
        .unwrap();
    // Whatever was renewed before that was sent before that.
    let over = boot_ms() + hold_ms(TTL);
    assert_eq!(hold.code().await, 124);
    assert!(hold.errors().contains("lost"), "{}", hold.errors());
    all_gone("an end of the program", &family).await;
    assert!(hold.last_write() < over);
    // A program that can be asked to end, is: it has time for that.
    let polite =
        r#"trap 'echo bye >> "$OUT"; exit 0' TERM; echo ready >> "$OUT"; while :; do sleep 0.02; done"#;
    let mut hold = dev.hold("l", &[], &["sh", "-c", polite]);
    hold.writes().await;
    client.force_release_lease(&lease("l"), None).await.unwrap();
    assert_eq!(hold.code().await, 124);
    assert_eq!(hold.output(), "ready\nbye\n");
}

#[tokio::test]
async fn what_a_killed_hold_leaves_is_gone_before_its_guard_is_over() {
    let dev = Dev::start();
    let mut hold = dev.hold("l", &[], &["sh", "-c", STUBBORN]);
    hold.writes().await;
    let family = hold.family();
    // What was acknowledged by now was sent by now, so the guard ends a hold from now at the latest.
    let killed_at = boot_ms();
    send(hold.pid(), Signal::KILL);
    hold.ended().await;
    all_gone("an end of what the killed hold left", &family).await;
    let last = hold.last_write();
    assert!(last < killed_at + hold_ms(TTL), "{last} {killed_at}");
    // And nobody else had it before.
    let mut next = dev.hold(
        "l",
        &["--wait", "60s"],
        &["sh", "-c", r#"read up rest < /proc/uptime; echo "$up" > "$OUT""#],
    );
    assert_eq!(next.code().await, 0, "{}", next.errors());
    assert!(next.last_write() > last, "{} {last}", next.last_write());
    eprintln!(
        "killed: the last write came {} ms after, the next holder's {} ms after",
        last.saturating_sub(killed_at),
        next.last_write() - killed_at
    );
}

#[tokio::test]
async fn the_program_of_a_frozen_hold_is_gone_before_its_guard_is_over() {
    let dev = Dev::start();
    let client = dev.client();
    let mut hold = dev.hold("l", &[], &["sh", "-c", STUBBORN]);
    hold.writes().await;
    let family = hold.family();
    let frozen_at = boot_ms();
    let frozen = Frozen::new(hold.pid());
    let writer: BTreeSet<Process> = family
        .into_iter()
        .filter(|process| !is_watchdog(process.pid))
        .collect();
    all_gone("an end of the program of the frozen hold", &writer).await;
    let last = hold.last_write();
    assert!(last < frozen_at + hold_ms(TTL), "{last} {frozen_at}");
    free(&client, "l").await;
    let freed_at = boot_ms();
    drop(frozen);
    assert_eq!(hold.code().await, 124, "{}", hold.errors());
    eprintln!(
        "frozen: the last write came {} ms after, the lease was free {} ms after",
        last - frozen_at,
        freed_at - frozen_at
    );
}

fn is_watchdog(pid: u32) -> bool {
    crate::process::command_line(pid).contains("internal watchdog")
}

fn watchdog(family: &BTreeSet<Process>) -> Process {
    *family
        .iter()
        .find(|process| is_watchdog(process.pid))
        .expect("the watchdog runs")
}

#[tokio::test]
async fn without_its_watchdog_hold_ends_the_program_itself() {
    let dev = Dev::start();
    let mut hold = dev.hold("l", &[], &["sh", "-c", STUBBORN]);
    hold.writes().await;
    let family = hold.family();
    send(watchdog(&family).pid, Signal::KILL);
    assert_eq!(hold.code().await, 125);
    let left: Vec<_> = family.iter().filter(|process| process.is_alive()).collect();
    assert!(left.is_empty(), "they were gone before hold was: {left:?}");
    assert!(
        dev.client().lease(&lease("l")).await.is_err(),
        "it was given back"
    );
}

#[tokio::test]
async fn with_a_frozen_watchdog_hold_kills_when_the_guard_is_over() {
    let mut dev = Dev::start();
    let mut hold = dev.hold("l", &["--ttl", "2s"], &["sh", "-c", STUBBORN]);
    hold.writes().await;
    let family = hold.family();
    let frozen = Frozen::new(watchdog(&family).pid);
    // Without a majority nothing is renewed.
    dev.kill_node(0);
    dev.kill_node(1);
    let over = boot_ms() + hold_ms(2_000);
    let writer: BTreeSet<Process> = family
        .into_iter()
        .filter(|process| !is_watchdog(process.pid))
        .collect();
    all_gone("an end of the program", &writer).await;
    // Not before its end, as the watchdog does, but at it: hence a moment.
    assert!(hold.last_write() < over + 200, "{} {over}", hold.last_write());
    drop(frozen);
    assert_eq!(hold.code().await, 124, "{}", hold.errors());
}

#[tokio::test]
async fn without_a_majority_the_program_is_ended_in_time() {
    let mut dev = Dev::start();
    let mut hold = dev.hold("l", &[], &["sh", "-c", STUBBORN]);
    hold.writes().await;
    let family = hold.family();
    dev.kill_node(1);
    dev.kill_node(2);
    let over = boot_ms() + hold_ms(TTL);
    assert_eq!(hold.code().await, 124, "{}", hold.errors());
    assert!(hold.last_write() < over, "{} {over}", hold.last_write());
    all_gone("an end of the program", &family).await;
}

#[tokio::test]
async fn the_loss_of_any_one_node_does_not_end_the_program() {
    let mut dev = Dev::start();
    let mut hold = dev.hold("l", &[], &["sh", "-c", STUBBORN]);
    hold.writes().await;
    let token = dev.client().lease(&lease("l")).await.unwrap().token;
    for node in 0..3 {
        dev.kill_node(node);
        // Longer than the guard: it lasts as renewals go on over the others.
        let end = boot_ms() + TTL + 1_000;
        while boot_ms() < end {
            let ended = hold.process.try_wait().unwrap();
            assert!(
                ended.is_none(),
                "{ended:?} by the loss of node {node}: {}",
                hold.errors()
            );
            hold.goes_on().await;
        }
        dev.restart_node(node);
        ready(&dev, node).await;
    }
    for node in 0..3 {
        let frozen = Frozen::new(dev.file.nodes[node].pid);
        let end = boot_ms() + TTL + 1_000;
        while boot_ms() < end {
            let ended = hold.process.try_wait().unwrap();
            assert!(
                ended.is_none(),
                "{ended:?} by node {node}, which is frozen: {}",
                hold.errors()
            );
            hold.goes_on().await;
        }
        drop(frozen);
        ready(&dev, node).await;
    }
    assert_eq!(dev.client().lease(&lease("l")).await.unwrap().token, token);
}

/// Waits until a node serves linearizable reads, so that the next one may be taken away.
async fn ready(dev: &Dev, node: usize) {
    let client = dev.client_of(node);
    eventually("a node that is back", || async { client.all_leases().await.ok() }).await;
}

#[tokio::test]
async fn at_a_terminal_the_program_reads_from_it_and_the_script_after_it_too() {
    if lacks("script", on_path("script")) {
        return;
    }
    let dev = Dev::start();
    let out = dev.path().join("terminal");
    let urls: Vec<&str> = dev.file.nodes.iter().map(|n| n.http.as_str()).collect();
    let inner = format!(
        r#"{REGENT} lease hold l -- sh -c 'read a; echo "program $a" >> "$OUT"'; read b; echo "script $b" >> "$OUT""#
    );
    let mut script = Command::new("script")
        .args(["-qec", &inner, "/dev/null"])
        .env("SHELL", "/bin/sh")
        .env("REGENT_URL", urls.join(","))
        .env("REGENT_TOKEN", &dev.file.admin_token)
        .env("OUT", &out)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut keyboard = script.stdin.take().unwrap();
    let text = || std::fs::read_to_string(&out).unwrap_or_default();
    std::io::Write::write_all(&mut keyboard, b"one\n").unwrap();
    eventually("what the program read", || async {
        text().contains("program one\n").then_some(())
    })
    .await;
    std::io::Write::write_all(&mut keyboard, b"two\n").unwrap();
    eventually("what the script read", || async {
        text().contains("script two\n").then_some(())
    })
    .await;
    drop(keyboard);
    for_the_end(&mut script).await;
}

fn on_path(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| Path::new(&folder).join(tool).exists())
}
