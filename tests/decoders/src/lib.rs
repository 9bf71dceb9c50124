//! Everything in Regent that decodes bytes which it has not just written itself: one function each.
//!
//! A fuzz target (`tests/fuzz`) and the property tests (`tests/properties.rs` here) call the same function, so the two
//! cannot drift apart. A function takes whatever bytes there are and panics when a decoder breaks one of these rules:
//!
//! - it never panics; what it refuses it refuses in words, and in few;
//! - what it accepted survives being encoded and decoded again;
//! - what comes behind it (a state machine, a plan for a container) takes all that it accepts.
//!
//! How much is allocated and how long it takes is for the caller to watch. Where the decoder is private its crate has a
//! `fuzzing` module, which says what is done in detail.

mod agent;
mod operations;
mod seeds;
mod text;

/// One decoder.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name, that of its fuzz target too.
    pub name: &'static str,
    /// Decodes.
    pub decode: fn(&[u8]),
    /// Sound inputs to begin with, made by the encoders.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// How inputs are changed.
    pub form: Form,
}

/// What an input looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Bytes.
    Binary,
    /// Text, most of it JSON; a byte that says which kind may stand before it.
    Text,
}

macro_rules! targets {
    ($($name:ident: $form:ident, $decode:expr, $seeds:expr;)*) => {
        /// All of them.
        pub const TARGETS: &[Target] = &[$(Target {
            name: stringify!($name),
            decode: $decode,
            seeds: $seeds,
            form: Form::$form,
        }),*];
    };
}

targets! {
    log_record: Binary, |bytes| {
        regent_raft::fuzzing::log_record(bytes);
        regent_raft::fuzzing::log_value(bytes);
    }, regent_raft::fuzzing::log_records;
    log_mark: Binary, regent_raft::fuzzing::log_mark, seeds::marks;
    log_segment: Binary, regent_raft::fuzzing::log_segment, regent_raft::fuzzing::log_segments;
    snapshot: Binary, regent_raft::fuzzing::snapshot, seeds::snapshots;
    state_records: Binary, |bytes| drop(regent_state::fuzzing::records(bytes)), seeds::records;
    peer_frame: Binary, regent_raft::fuzzing::peer_frame, regent_raft::fuzzing::peer_frames;
    operations: Binary, operations::apply, operations::seeds;
    agent_frames: Text, regent_server::fuzzing::agent_frames, regent_server::fuzzing::conversation;
    server_frames: Text, agent::frames, agent::conversations;
    agent_file: Text, regent_agent::fuzzing::file, regent_agent::fuzzing::files;
    body: Text, regent_server::fuzzing::body, regent_server::fuzzing::bodies;
    parameters: Text, regent_server::fuzzing::parameters, regent_server::fuzzing::parameters_samples;
    manifest: Text, agent::manifest, agent::manifests;
    settings: Text, regent_cli::fuzzing::settings, regent_cli::fuzzing::settings_samples;
    hold_line: Text, regent_cli::fuzzing::hold_line, text::hold_lines;
    event_stream: Text, regent_client::fuzzing::event_stream, regent_client::fuzzing::event_streams;
    text: Text, text::text, text::texts;
}

/// The decoder of this name.
///
/// # Panics
/// There is none.
#[must_use]
pub fn target(name: &str) -> &'static Target {
    TARGETS
        .iter()
        .find(|target| target.name == name)
        .unwrap_or_else(|| panic!("there is no decoder {name}"))
}
