//! Connection, reconcile loop, the Runtime trait and the process runtime.

pub mod action;
pub mod executor;
pub mod fence;
pub mod files;
pub mod journal;
pub mod lifeline;
pub mod reconcile;
pub mod runtime;
pub mod session;
