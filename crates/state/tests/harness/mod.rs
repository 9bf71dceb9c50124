//! What the tests of the state machine share: a world to which steps are applied, and how it is shown.

// Each test binary uses a part of it.
#![allow(dead_code, unreachable_pub)]
// Lines for people, put together piece by piece.
#![allow(clippy::format_push_string)]

pub mod script;
pub mod show;
pub mod step;
pub mod world;
