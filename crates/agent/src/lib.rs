//! Connection, reconcile loop, the Runtime trait and the process runtime.

pub mod fence;
pub mod files;
pub mod journal;
pub mod lifeline;
pub mod runtime;
