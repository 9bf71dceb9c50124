//! Traces: spans that follow a command from the request that made it to what the agent did, sent by OTLP.
//!
//! A command's trace id is a hash of its id (`command`). So every node and the agent find the same trace without
//! being told: no frame carries a context, no operation in the log, and a node that has crashed loses the others
//! nothing but its own spans. A request has the trace of its caller; the proposal by which it made a command and the
//! command are linked to each other.
//!
//! Off unless [`export`] was called: then every function here looks at one flag and does nothing. What is on costs a
//! few allocations for each span, and never waits: what cannot be sent is dropped.

mod command;
mod endpoint;
mod export;
mod span;

pub use endpoint::{OtlpEndpoint, WrongEndpoint};
pub use export::{Export, ExportError, export};
pub use span::{Span, command_made, dispatch, execute, is_on, propose, report, request};
