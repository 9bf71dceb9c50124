//! Stories: operations in, outcomes and events out, reviewed as text (`stories/*.txt`).
//!
//! A story is made of blocks: steps, a line `---`, and what they gave, up to a blank line. What the
//! steps are is in `harness/step.rs`. To write the results anew after a change, and review them in
//! the diff: `REGENT_UPDATE_STORIES=1 cargo nextest run -p regent-state story`.

// Clippy knows only functions marked as tests.
#![allow(clippy::unwrap_used)]

mod harness;

#[test]
fn stories_come_out_as_written() {
    let update = std::env::var_os("REGENT_UPDATE_STORIES").is_some();
    let differences = harness::script::run_all(update);
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}
