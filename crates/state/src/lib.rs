//! The replicated state machine: operations in, outcomes and events out.
