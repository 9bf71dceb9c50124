//! A few seeds on every run of the tests; thousands are run by `just simulate`.

#![allow(clippy::unwrap_used)] // a test may unwrap wherever it is written

use std::process::{Command, Output};

/// What the test of this name may take is far below a minute; only a fault makes a run longer.
fn simulate(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_simulate"))
        .args(args)
        .env("RUST_LOG", "off")
        .output()
        .unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn twenty_seeds_are_green() {
    let run = simulate(&["--seeds", "20", "--seconds", "10"]);
    let said = text(&run);
    assert!(run.status.success(), "{said}");
    assert_eq!(
        said.lines().filter(|line| line.contains(": green after")).count(),
        20,
        "{said}"
    );
}

/// The same seed gives the same run to the last byte that any machine was sent: a failure can be looked at again.
#[test]
fn a_seed_is_the_same_run_again() {
    let trace = || {
        let said = text(&simulate(&["--seed", "77", "--seconds", "10"]));
        let trace = said
            .split("trace ")
            .nth(1)
            .and_then(|rest| rest.split(';').next());
        trace.unwrap_or_else(|| panic!("{said}")).to_owned()
    };
    let first = trace();
    assert_eq!(first, trace());
    let other = text(&simulate(&["--seed", "78", "--seconds", "10"]));
    assert!(!other.contains(&first), "another seed is another run: {other}");
}
