//! Crashes: at every sync of a workload, what a crash may leave of the data folder is made and opened. Everything
//! that was promised up to that moment must be there. Then such folders are damaged, a bit flipped or a file cut:
//! everything is there all the same, or the folder is refused and the damaged place named. Never silently less.
//!
//! The workload runs under strace. The trace says what was on disk at any moment ([`crate::disk`]), and what was
//! promised: a child process writes a line when an operation of the log is done, a node writes an answer to its
//! client. Each folder is opened in a process of its own, by what a node opens it with.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use regent_client::SessionFilter;
use regent_raft::LogStore;
use regent_raft::workbench::{Held, HeldEntry, Workbench, look};

use crate::disk::{self, History, Image, Rest, read_folder, write_folder};
use crate::harness::{Dev, eventually};
use crate::ledger::{Ledger, serves};
use crate::strace::{self, Trace};
use crate::workload::{expected, is_possible, workload};

/// Tells this program that it is a child, and what it is to do: `workload STORE FOLDER`, `look log FOLDER` or
/// `look node FOLDER`.
const CHILD: &str = "REGENT_TEST_CHILD";
/// Writes to the node.
const WRITES: usize = 60;
/// Folders of the node that are opened by a node.
const STARTED: usize = 5;
/// Folders of each workload that are opened after a crash, of those that differ, and folders that are damaged.
const CRASHED: usize = 320;
const DAMAGED: usize = 80;

/// How much of everything: as many times as `REGENT_ROUNDS` says. The default is for CI.
pub(crate) fn rounds() -> usize {
    std::env::var("REGENT_ROUNDS").map_or(1, |rounds| rounds.parse().expect("REGENT_ROUNDS is a number"))
}

#[tokio::test]
async fn no_crash_and_no_damage_of_a_log_in_sled_loses_what_was_promised() {
    if let Ok(what) = std::env::var(CHILD) {
        return child(&what).await;
    }
    log_crashes(LogStore::Sled).await;
}

#[tokio::test]
async fn no_crash_and_no_damage_of_a_log_in_segments_loses_what_was_promised() {
    log_crashes(LogStore::Segments).await;
}

async fn log_crashes(store: LogStore) {
    if strace::is_missing() {
        return;
    }
    // What is right: the same operations on the in-memory twin.
    let states = expected().await;
    let work = Work::new();
    let data = work.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let trace = work.path().join("trace");
    let command = strace::command(&child_command(), &trace, &["-e", disk::CALLS]);
    // Strace ends with its child, and gives its status.
    let status = Command::new(&command[0])
        .args(&command[1..])
        .env(CHILD, format!("workload {store} {}", data.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "{status}");

    let trace = Trace::read(&trace);
    let history = History::read(Image::new(), &data, &trace);
    assert_eq!(
        history.image(usize::MAX, Rest::Kept),
        read_folder(&data),
        "the trace explains every byte of the folder"
    );
    // Where each operation begins and is done.
    let said = |word: &str| -> Vec<usize> {
        let lines = trace.calls.iter().filter(|call| call.name == "write");
        lines
            .filter(|call| call.bytes().starts_with(word.as_bytes()))
            .map(|call| call.entered)
            .collect()
    };
    let (begun, done) = (said("begin "), said("done "));
    assert_eq!((begun.len(), done.len()), (states.len() - 1, states.len() - 1));
    let mut moments = history.moments();
    moments.extend(done.iter().map(|line| line + 1));
    moments.sort_unstable();
    moments.dedup();

    let promised = |moment: usize| {
        let count = |lines: &[usize]| lines.iter().filter(|line| **line < moment).count();
        (count(&done), count(&begun))
    };
    let check = |moment: usize, held: &Held| {
        let (done, begun) = promised(moment);
        is_possible(&states, done, begun, held)
    };
    crash_everywhere("log", &history, &moments, work.path(), &check);
    damage("log", &history, &done, work.path(), &check);
}

#[tokio::test]
async fn no_crash_and_no_damage_of_a_node_loses_what_it_acknowledged() {
    if strace::is_missing() {
        return;
    }
    let mut dev = Dev::start_with(&["--nodes", "1"]);
    let ledger = Ledger::new(&dev);
    ledger.write_some(&[0], 1).await;
    dev.kill_node(0);
    let data = dev.file.nodes[0].data.clone();
    let base = read_folder(&data);
    let trace = dev.path().join("trace");
    let command = dev.file.nodes[0].command.clone();
    dev.file.nodes[0].command = strace::beside(&command, &trace, &["-e", disk::CALLS]);
    dev.restart_node(0);
    serves(&dev, 0).await;
    ledger.write_some(&[0], WRITES * rounds()).await;
    let last = dev.file.nodes[0].pid;
    dev.kill_node(0);
    eventually("end of the trace", || async {
        strace::has_ended(&trace, last).then_some(())
    })
    .await;

    let trace = Trace::read(&trace);
    let history = History::read(base, &data, &trace);
    let end = read_folder(&data);
    assert!(
        history.image(usize::MAX, Rest::Kept) == end,
        "the trace explains every byte of the folder"
    );
    // Each answer says up to where the node has applied, and a node that is alone applies what it has synced.
    let answers: Vec<(usize, u64, Option<String>)> = trace
        .calls
        .iter()
        .filter(|call| call.path.to_string_lossy().starts_with("socket:"))
        .filter_map(|call| {
            let text = String::from_utf8_lossy(&call.bytes()).into_owned();
            let index = text
                .split_once("x-regent-index: ")?
                .1
                .split_once('\r')?
                .0
                .parse()
                .unwrap();
            let tag = text
                .split_once("\"tags\":[\"")
                .and_then(|(_, tag)| tag.split_once('"'));
            Some((call.entered, index, tag.map(|(tag, _)| tag.to_owned())))
        })
        .collect();
    assert!(answers.iter().filter(|(_, _, tag)| tag.is_some()).count() >= WRITES);
    let work = Work::new();
    let whole = match open("node", &end, &work.path().join("whole")) {
        Opened::Held(held) => held,
        Opened::Refused(why) => panic!("the folder of a killed node is refused: {why}"),
    };
    let check = |moment: usize, held: &Held| {
        let promised = answers
            .iter()
            .filter(|answer| answer.0 < moment)
            .map(|answer| answer.1)
            .max();
        let promised = promised.unwrap_or(0);
        let has = |entry: &HeldEntry| held.entries.contains(entry);
        match whole
            .entries
            .iter()
            .find(|entry| entry.index <= promised && !has(entry))
        {
            None => Ok(()),
            Some(missing) => Err(format!("{missing:?} is missing, acknowledged up to {promised}")),
        }
    };
    let acknowledged: Vec<usize> = answers.iter().map(|answer| answer.0).collect();
    let mut moments = history.moments();
    moments.extend(acknowledged.iter().map(|line| line + 1));
    moments.sort_unstable();
    moments.dedup();
    crash_everywhere("node", &history, &moments, work.path(), &check);
    damage("node", &history, &acknowledged, work.path(), &check);

    // The same by the program itself, which serves what it has.
    dev.file.nodes[0].command = command;
    for number in 1..=STARTED {
        let moment = moments[moments.len() * number / STARTED - 1];
        let rest = [Rest::Lost, Rest::Torn(number as u64)][number % 2];
        std::fs::remove_dir_all(&data).unwrap();
        write_folder(&history.image(moment, rest), &data);
        dev.restart_node(0);
        serves(&dev, 0).await;
        let sessions = dev
            .client()
            .all_sessions(&SessionFilter::default())
            .await
            .unwrap();
        for (line, _, tag) in &answers {
            if let Some(tag) = tag
                && *line < moment
            {
                assert!(
                    sessions.iter().any(|session| session.tags.contains(tag)),
                    "{tag} was acknowledged before a crash at line {moment} ({rest:?}) and is gone"
                );
            }
        }
        dev.kill_node(0);
    }
}

/// Crashes at all these moments. Nothing is damaged, so nothing may be refused either.
fn crash_everywhere(
    what: &str,
    history: &History,
    moments: &[usize],
    work: &Path,
    check: &(impl Fn(usize, &Held) -> Result<(), String> + Sync),
) {
    let torn = (0..=rounds() as u64).map(Rest::Torn);
    let ways: Vec<Rest> = [Rest::Lost, Rest::Kept].into_iter().chain(torn).collect();
    let crashes: Vec<(usize, Rest)> = moments
        .iter()
        .flat_map(|moment| ways.iter().map(|rest| (*moment, *rest)))
        .collect();
    // Many crashes leave the same: what is promised only grows, so the last moment of those counts.
    let mut different: BTreeMap<u64, (usize, Rest)> = BTreeMap::new();
    for (moment, rest) in &crashes {
        let mut hasher = DefaultHasher::new();
        history.image(*moment, *rest).hash(&mut hasher);
        different.insert(hasher.finish(), (*moment, *rest));
    }
    eprintln!(
        "{} crashes at {} moments leave {} different folders",
        crashes.len(),
        moments.len(),
        different.len()
    );
    // By their hashes they are in no order, so the first ones are from everywhere.
    let different: Vec<(usize, Rest)> = different
        .into_values()
        .take(CRASHED * rounds() * rounds())
        .collect();
    in_parallel(different.len(), |number| {
        let (moment, rest) = different[number];
        let image = history.image(moment, rest);
        let place = work.join(format!("crash-{number}"));
        match open(what, &image, &place) {
            Opened::Held(held) => {
                if let Err(missing) = check(moment, &held) {
                    keep(&image, &place);
                    panic!(
                        "after a crash at line {moment} ({rest:?}): {missing}; {}",
                        place.display()
                    );
                }
            }
            Opened::Refused(why) => {
                keep(&image, &place);
                panic!(
                    "after a crash at line {moment} ({rest:?}) it is refused: {why}; {}",
                    place.display()
                );
            }
        }
        let _ = std::fs::remove_dir_all(&place);
    });
}

/// Damages what a killed process leaves after some of the promises that were made at these lines.
fn damage(
    what: &str,
    history: &History,
    promises: &[usize],
    work: &Path,
    check: &(impl Fn(usize, &Held) -> Result<(), String> + Sync),
) {
    let refused = AtomicUsize::new(0);
    let damages = DAMAGED * rounds();
    in_parallel(damages, |number| {
        // In turn from all of the run, and mostly from its end, where most is to be lost.
        let promise = match number % 3 {
            0 => promises.len() - 1,
            _ => promises.len() * (number + 1) / (damages + 1),
        };
        let moment = promises[promise] + 1;
        let mut image = history.image(moment, Rest::Kept);
        let how = break_something(&mut image, number, damages);
        let place = work.join(format!("damage-{number}"));
        match open(what, &image, &place) {
            Opened::Held(held) => {
                if let Err(missing) = check(moment, &held) {
                    keep(&image, &place);
                    panic!("{how}, and nothing is said: {missing}; {}", place.display());
                }
            }
            Opened::Refused(why) => {
                refused.fetch_add(1, Ordering::Relaxed);
                assert!(
                    why.contains(place.to_str().unwrap()),
                    "{how}: the place is named: {why}"
                );
            }
        }
        let _ = std::fs::remove_dir_all(&place);
    });
    let refused = refused.into_inner();
    eprintln!("{damages} damages: {refused} refused, the others lost nothing");
    assert!(
        refused > DAMAGED / 10,
        "only {refused} of {DAMAGED} damages were noticed at all"
    );
}

/// Flips a bit or cuts a file; says what. The number chooses.
fn break_something(image: &mut Image, number: usize, of: usize) -> String {
    let mut files: Vec<(&PathBuf, &mut Vec<u8>)> = image
        .iter_mut()
        .filter_map(|(path, content)| Some((path, content.as_mut()?)))
        // The lock says nothing, and a file of zeros nothing that could be damaged.
        .filter(|(path, content)| !path.ends_with("lock") && content.iter().any(|byte| *byte != 0))
        .collect();
    // The log itself in most cases: the largest file.
    files.sort_by_key(|(_, content)| std::cmp::Reverse(content.len()));
    let count = files.len();
    let which = if number % 8 == 7 { number / 8 % count } else { 0 };
    let (path, content) = &mut files[which];
    let used = content
        .iter()
        .rposition(|byte| *byte != 0)
        .expect("not all is zero")
        + 1;
    // Spread over all of it; 7 and 13 have nothing in common with sizes of pages.
    let at = (number * 7_919 * 13 + number * used / of) % used;
    if number % 4 == 3 {
        content.truncate(at);
        format!("{} is cut to {at} of {used} bytes", path.display())
    } else {
        let bit = number % 8;
        content[at] ^= 1 << bit;
        format!(
            "bit {bit} of byte {at} of {used} of {} is flipped",
            path.display()
        )
    }
}

/// A folder for what is opened; it is kept when the test fails.
struct Work(Option<tempfile::TempDir>);

impl Work {
    fn new() -> Self {
        Self(Some(
            tempfile::Builder::new().prefix("regent-test-").tempdir().unwrap(),
        ))
    }

    fn path(&self) -> &Path {
        self.0.as_ref().expect("kept until the end").path()
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(folder) = self.0.take()
        {
            eprintln!("what was opened is kept in {}", folder.keep().display());
        }
    }
}

enum Opened {
    Held(Held),
    Refused(String),
}

/// Opens what a crash left, in a process of its own.
fn open(what: &str, image: &Image, place: &Path) -> Opened {
    write_folder(image, place);
    let command = child_command();
    let output = Command::new(&command[0])
        .args(&command[1..])
        .env(CHILD, format!("look {what} {}", place.display()))
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let after = |word: &str| {
        said.lines()
            .find_map(|line| line.strip_prefix(word).map(str::to_owned))
    };
    match (after("refused "), after("held ")) {
        (Some(why), None) => Opened::Refused(why),
        (None, Some(held)) => Opened::Held(serde_json::from_str(&held).unwrap()),
        _ => panic!(
            "{}: it neither opens nor is refused ({}): {said}{}",
            place.display(),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        ),
    }
}

/// Leaves what was opened as it was before, for people to look at.
fn keep(image: &Image, place: &Path) {
    let _ = std::fs::remove_dir_all(place);
    write_folder(image, place);
}

/// This program, to be a child.
fn child_command() -> Vec<String> {
    let program = std::env::current_exe().unwrap().display().to_string();
    let test = "crash_points::no_crash_and_no_damage_of_a_log_in_sled_loses_what_was_promised";
    [&program, "--exact", test, "--nocapture"]
        .map(str::to_owned)
        .to_vec()
}

/// What a child does.
async fn child(what: &str) {
    let words: Vec<&str> = what.split(' ').collect();
    match words[..] {
        ["workload", store, data] => {
            let stores = [LogStore::Sled, LogStore::Segments];
            let store = stores.into_iter().find(|known| known.as_str() == store).unwrap();
            workload(|| Workbench::open(Path::new(data), store).unwrap(), say).await;
        }
        ["look", whole, data] => {
            let data = Path::new(data);
            let held = match (whole, LogStore::begun_in(data).unwrap_or_default()) {
                ("log", store) => match Workbench::open(data, store) {
                    Ok(mut log) => Ok(log.held().await.unwrap()),
                    Err(error) => Err(anyhow::Error::from(error)),
                },
                _ => look(data).await.map_err(anyhow::Error::from),
            };
            match held {
                Ok(held) => say(&format!("held {}", serde_json::to_string(&held).unwrap())),
                Err(error) => say(&format!("refused {error:#}")),
            }
        }
        _ => panic!("{CHILD} is {what:?}"),
    }
}

/// Says a line by one write, which a trace shows.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("{line}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

/// Does all of it, on as many threads as there are processors.
fn in_parallel(count: usize, one: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return;
                    }
                    one(number);
                }
            });
        }
    });
}
