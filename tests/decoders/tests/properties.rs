//! Every decoder against random bytes and against sound inputs that were changed: flipped, cut, spliced, duplicated;
//! where the input is JSON, with other values in other places.
//!
//! The same functions as the fuzz targets, with much less time. What a decoder allocates is measured: no input may make
//! it take more than a fixed amount and a multiple of the input.

// Clippy knows only functions marked as tests.
#![allow(clippy::unwrap_used)]

mod change;

use std::fmt::Write as _;
use std::panic::{catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

use change::{Change, changed};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use regent_decoders::{Form, Target, target};

/// What any input may allocate at a time: a state, a plan, serde's first guess of a collection (1 MiB), a frame of a
/// snapshot, zstd's tables.
const FLOOR: u64 = 12 << 20;
/// What each byte may allocate: a byte on the wire may be a message of its own.
const PER_BYTE: u64 = 128;
/// The largest body and frame from outside.
const LARGE: usize = 1 << 20;
/// How long a large input may take: what is quadratic takes longer on any machine, what is not, milliseconds.
const LARGE_WITHIN: Duration = Duration::from_mins(1);

fn decode(target: &Target, input: &[u8]) {
    let mut result = Ok(());
    // A panic that left the measurement would leave it open.
    let used = allocation_counter::measure(|| result = catch_unwind(|| (target.decode)(input)));
    if let Err(panic) = result {
        resume_unwind(panic);
    }
    let most = FLOOR + PER_BYTE * input.len() as u64;
    assert!(
        used.bytes_max <= most,
        "{} took {} bytes for an input of {}",
        target.name,
        used.bytes_max,
        input.len()
    );
}

/// Random bytes, now and then behind a byte of a seed so that they get past the first look.
fn noise() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..600)
}

/// `REGENT_FUZZ_FACTOR` times the cases, for whoever has more time.
fn run(name: &str, cases: u32) {
    let factor = std::env::var("REGENT_FUZZ_FACTOR").map_or(1, |factor| factor.parse().unwrap());
    let target = target(name);
    let seeds = (target.seeds)();
    for seed in &seeds {
        decode(target, seed);
    }
    let config = Config {
        cases: cases.saturating_mul(factor),
        failure_persistence: None,
        max_shrink_iters: 2_000,
        ..Config::default()
    };
    let changes = proptest::collection::vec(any::<Change>(), 1..6);
    let inputs = prop_oneof![
        1 => noise(),
        6 => (any::<prop::sample::Index>(), any::<prop::sample::Index>(), changes).prop_map(move |(a, b, changes)| {
            let (seed, other) = (a.get(&seeds), b.get(&seeds));
            changed(seed, other, &changes, target.form == Form::Text)
        }),
    ];
    TestRunner::new(config)
        .run(&inputs, |input| {
            decode(target, &input);
            Ok(())
        })
        .unwrap();
}

macro_rules! properties {
    ($($name:ident: $cases:expr;)*) => {
        $(#[test]
        fn $name() {
            run(stringify!($name), $cases);
        })*

        #[test]
        fn no_decoder_is_left_out() {
            let here = [$(stringify!($name)),*];
            let all: Vec<_> = regent_decoders::TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(here[..], all[..]);
        }
    };
}

/// libFuzzer's targets are in a workspace of their own, which this one does not build.
#[test]
fn every_decoder_has_a_fuzz_target() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/fuzz_targets");
    let mut files: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|file| {
            file.unwrap()
                .path()
                .file_stem()
                .unwrap()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    let mut targets: Vec<&str> = regent_decoders::TARGETS
        .iter()
        .map(|target| target.name)
        .collect();
    files.sort();
    targets.sort_unstable();
    assert_eq!(files, targets);
}

// Files that are synced, and state machines, take longer than a parser.
properties! {
    log_record: 10_000;
    log_mark: 200;
    log_segment: 150;
    snapshot: 1_000;
    state_records: 2_000;
    peer_frame: 10_000;
    operations: 600;
    agent_frames: 600;
    server_frames: 600;
    agent_file: 5_000;
    body: 10_000;
    parameters: 5_000;
    manifest: 3_000;
    settings: 1_000;
    hold_line: 1_000;
    event_stream: 1_000;
    text: 3_000;
}

/// Quadratic behaviour shows at the largest input that is taken: seconds instead of milliseconds.
#[test]
fn large_inputs_take_no_time() {
    for target in regent_decoders::TARGETS {
        let seeds = (target.seeds)();
        let longest = seeds.iter().max_by_key(|seed| seed.len()).unwrap();
        for (what, input) in large(longest, target.form) {
            let begun = Instant::now();
            decode(target, &input);
            let took = begun.elapsed();
            assert!(took < LARGE_WITHIN, "{} takes {took:?} for {what}", target.name);
        }
    }
}

/// Large inputs of several shapes, each behind the first byte of a seed.
fn large(seed: &[u8], form: Form) -> Vec<(&'static str, Vec<u8>)> {
    let first = seed.first().copied().unwrap_or_default();
    let of = |piece: &[u8]| {
        let mut input = vec![first];
        while input.len() < LARGE {
            input.extend_from_slice(piece);
        }
        input
    };
    let mut inputs = vec![
        ("zeros", of(&[0])),
        ("ones", of(&[0xff])),
        ("itself over and over", of(seed)),
    ];
    if form == Form::Text {
        let mut fields = String::new();
        for n in 0..60_000 {
            write!(fields, "\"field{n}\":1,").unwrap();
        }
        let mut sessions = String::new();
        for n in 0..15_000 {
            write!(
                sessions,
                r#"{{"sessionId":"a-{n}","state":"running","generation":1}},"#
            )
            .unwrap();
        }
        let quoted = |before: &str, after: &str| {
            [
                &[first],
                before.as_bytes(),
                &vec![b'x'; LARGE - 200],
                after.as_bytes(),
            ]
            .concat()
        };
        inputs.extend([
            ("brackets", of(b"[")),
            ("objects", of(b"{\"a\":")),
            ("lines", of(b"\n")),
            ("digits", of(b"1")),
            ("durations", of(b"1s")),
            ("commas", of(b"a,")),
            ("pairs", of(b"a=1&")),
            ("a long field", quoted("{\"", "\":1}")),
            ("a long type", quoted("{\"type\":\"", "\"}")),
            (
                "a long text",
                quoted("{\"type\":\"status\",\"payload\":{\"sessionId\":\"", "\"}}"),
            ),
            ("a long value", quoted("{\"template\":\"", "\"}")),
            (
                "many fields",
                [&[first], b"{".as_slice(), fields.as_bytes(), b"\"z\":1}"].concat(),
            ),
            (
                "many sessions",
                [
                    &[first],
                    br#"{"type":"hello","payload":{"protocol":3,"runtimeId":"r","sessions":["#.as_slice(),
                    sessions.as_bytes(),
                    br#"{"sessionId":"z","state":"running"}]}}"#,
                ]
                .concat(),
            ),
        ]);
    }
    inputs
}
