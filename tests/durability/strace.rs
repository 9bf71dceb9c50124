//! strace as the tests use it: it attaches to a process, may make its calls fail or slow, and what it wrote is
//! read back as calls in the order in which they were entered and left.
//!
//! Strings are asked for in hex (`-xx`), so nothing in them can be taken for syntax. Calls that overlap are
//! written in two lines; the line numbers order everything within one trace, the clock orders traces.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;

use crate::harness::{lacks, send};

/// Longest string that is written out. A longer one would be cut, which the reader refuses.
const STRING_LIMIT: &str = "4194304";

/// Whether strace is missing, or may not attach to a process.
pub(crate) fn is_missing() -> bool {
    let works = || {
        let mut sleep = Command::new("sleep").arg("60").spawn().ok()?;
        let folder = tempfile::tempdir().ok()?;
        let tracer = Tracer::attach(sleep.id(), &folder.path().join("trace"), &["-e", "trace=none"]);
        let attached = tracer.is_some();
        drop(tracer);
        let _ = sleep.kill();
        let _ = sleep.wait();
        attached.then_some(())
    };
    lacks("strace", works().is_some())
}

/// An strace that is attached to a process, with all its threads; it lets go when it is dropped.
pub(crate) struct Tracer {
    process: Child,
    file: PathBuf,
}

impl Tracer {
    /// Attaches, and is attached on return. `None` when strace is not there or may not.
    pub(crate) fn attach(pid: u32, file: &Path, flags: &[&str]) -> Option<Self> {
        let mut process = Command::new("strace")
            .args(common_flags(file))
            .args(flags)
            .args(["-p", &pid.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .ok()?;
        let mut said = BufReader::new(process.stderr.take()?).lines();
        let attached = said.any(|line| line.is_ok_and(|line| line.contains(" attached")));
        // What it says later must not fill the pipe.
        std::thread::spawn(move || said.for_each(drop));
        let tracer = Self {
            process,
            file: file.to_owned(),
        };
        attached.then_some(tracer)
    }

    /// Lets go and reads what was traced.
    pub(crate) fn end(self) -> Trace {
        let file = self.file.clone();
        drop(self);
        Trace::read(&file)
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        send(self.process.id(), Signal::TERM);
        let _ = self.process.wait();
    }
}

/// A command that runs another under strace, and ends with it and as it does.
pub(crate) fn command(command: &[String], file: &Path, flags: &[&str]) -> Vec<String> {
    let mut whole = vec!["strace".to_owned()];
    whole.extend(common_flags(file));
    whole.extend(flags.iter().map(ToString::to_string));
    whole.extend_from_slice(command);
    whole
}

/// The same, but the program keeps the pid that is started: strace stands aside, and ends a moment after it.
pub(crate) fn beside(program: &[String], file: &Path, flags: &[&str]) -> Vec<String> {
    let mut whole = command(program, file, flags);
    whole.insert(1, "-D".to_owned());
    whole
}

/// Whether the trace of a process says that it has ended.
pub(crate) fn has_ended(file: &Path, pid: u32) -> bool {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let last = text.lines().next_back().unwrap_or_default();
    text.ends_with('\n') && last.starts_with(&format!("{pid} ")) && last.ends_with(" +++")
}

fn common_flags(file: &Path) -> Vec<String> {
    let file = file.display().to_string();
    // All threads, microseconds since 1970, time spent, paths of descriptors, hex.
    ["-f", "-ttt", "-T", "-y", "-xx", "-s", STRING_LIMIT, "-o", &file]
        .map(str::to_owned)
        .to_vec()
}

/// All calls of one trace.
pub(crate) struct Trace {
    /// By where they were entered.
    pub(crate) calls: Vec<Call>,
}

/// One call.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) name: String,
    /// Microseconds since 1970; strace saw it before the kernel did.
    pub(crate) entered_at: u64,
    /// Strace saw it after the kernel was done, and before the program did.
    pub(crate) left_at: Option<u64>,
    /// Line of the trace where it begins.
    pub(crate) entered: usize,
    /// Line where it is done; the same one when nothing came between.
    pub(crate) left: Option<usize>,
    /// What it gave; negative is an error.
    pub(crate) result: Option<i64>,
    /// The descriptor that it begins with.
    pub(crate) fd: Option<i32>,
    /// What that descriptor is.
    pub(crate) path: PathBuf,
    /// Its strings: paths, or the bytes that are written.
    pub(crate) strings: Vec<Vec<u8>>,
    /// The arguments as strace wrote them.
    args: String,
}

impl Call {
    /// What is written, as one piece.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.strings.concat()
    }

    /// Whether some bytes are among those that are written. They must not span two pieces.
    pub(crate) fn has(&self, needle: &[u8]) -> bool {
        self.strings
            .iter()
            .any(|string| string.windows(needle.len()).any(|window| window == needle))
    }

    /// Whether it makes a file durable, and did.
    pub(crate) fn is_sync_of(&self, file: &Path) -> bool {
        matches!(self.name.as_str(), "fsync" | "fdatasync") && self.path == file && self.result == Some(0)
    }

    /// Its last argument, a number.
    pub(crate) fn last_number(&self) -> u64 {
        let last = self.args.rsplit(',').next().unwrap_or("");
        last.trim()
            .parse()
            .unwrap_or_else(|_| panic!("{}({}) ends with a number", self.name, self.args))
    }

    /// Whether a flag stands in its arguments.
    pub(crate) fn has_flag(&self, flag: &str) -> bool {
        self.args
            .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .any(|word| word == flag)
    }
}

impl Trace {
    /// Reads a trace, up to the last whole line.
    pub(crate) fn read(file: &Path) -> Self {
        let text = std::fs::read_to_string(file).unwrap();
        let mut calls: Vec<Call> = Vec::new();
        // Of each thread the call that it is in.
        let mut open: HashMap<&str, usize> = HashMap::new();
        for (number, line) in text.split_inclusive('\n').enumerate() {
            let Some(line) = line.strip_suffix('\n') else {
                break;
            };
            let (thread, rest) = line.split_once(' ').expect("a thread begins the line");
            let (at, rest) = rest.trim_start().split_once(' ').expect("a time follows");
            let at = micros(at);
            if rest.starts_with("+++ ") {
                open.remove(thread);
                continue;
            }
            if rest.starts_with("--- ") {
                continue;
            }
            if let Some(rest) = rest.strip_prefix("<... ") {
                let rest = rest.split_once(" resumed>").expect("it says which call").1;
                let call = open.remove(thread).expect("it was entered before");
                calls[call].left = Some(number);
                calls[call].left_at = Some(at);
                calls[call].result = result(rest);
                continue;
            }
            let (name, rest) = rest
                .split_once('(')
                .unwrap_or_else(|| panic!("line {number} is a call: {line:.200}"));
            let cut = ["<unfinished ...>", "<detached ...>"];
            let (args, end) = if let Some(args) = cut.iter().find_map(|cut| rest.strip_suffix(cut)) {
                (args, None)
            } else {
                let (args, end) = rest
                    .rsplit_once(") = ")
                    .unwrap_or_else(|| panic!("line {number} is a whole call: {line:.200}"));
                (args, Some(end))
            };
            let mut call = Call {
                name: name.to_owned(),
                entered_at: at,
                left_at: None,
                entered: number,
                left: None,
                result: None,
                fd: None,
                path: PathBuf::new(),
                strings: strings(args),
                args: without_strings(args),
            };
            (call.fd, call.path) = descriptor(args);
            if let Some(end) = end {
                call.result = result(&format!(") = {end}"));
                call.left = Some(number);
                call.left_at = Some(at + spent(end));
            } else {
                open.insert(thread, calls.len());
            }
            calls.push(call);
        }
        Self { calls }
    }
}

fn micros(text: &str) -> u64 {
    let (seconds, micros) = text.split_once('.').expect("strace writes seconds.micros");
    seconds.parse::<u64>().unwrap() * 1_000_000 + micros.parse::<u64>().unwrap()
}

/// What follows `) = `: a number, `-1 EIO (...)`, or `?` when it never came back.
fn result(text: &str) -> Option<i64> {
    let text = text.rsplit_once(") = ").map_or(text, |(_, end)| end);
    let end = text.trim_start_matches(['=', ' ']);
    let number: String = end
        .chars()
        .take_while(|c| c.is_ascii_digit() || *c == '-')
        .collect();
    number.parse().ok()
}

/// The time at the end of a line, in microseconds.
fn spent(text: &str) -> u64 {
    text.rsplit_once('<')
        .and_then(|(_, time)| time.strip_suffix('>'))
        .map_or(0, micros)
}

/// `12<\x2f...>` at the beginning.
fn descriptor(args: &str) -> (Option<i32>, PathBuf) {
    let Some((fd, rest)) = args.split_once('<') else {
        return (
            args.split(',').next().and_then(|fd| fd.trim().parse().ok()),
            PathBuf::new(),
        );
    };
    let Ok(fd) = fd.parse() else {
        return (None, PathBuf::new());
    };
    let path = rest.split_once('>').map_or("", |(path, _)| path);
    let path = String::from_utf8_lossy(&unhex(path)).into_owned();
    (Some(fd), PathBuf::from(path))
}

fn strings(args: &str) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    let mut rest = args;
    while let Some((_, begun)) = rest.split_once('"') {
        let (string, after) = begun.split_once('"').expect("a string ends");
        assert!(
            !after.starts_with("..."),
            "strace cut a string short: {STRING_LIMIT} is too little"
        );
        found.push(unhex(string));
        rest = after;
    }
    found
}

fn without_strings(args: &str) -> String {
    args.split('"').step_by(2).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => byte - b'0',
        b'a'..=b'f' => byte - b'a' + 10,
        _ => panic!("strace writes \\xNN, not {:?}", char::from(byte)),
    };
    text.as_bytes()
        .chunks_exact(4)
        .map(|chunk| digit(chunk[2]) * 16 + digit(chunk[3]))
        .collect()
}
