//! Where work that blocks is done.
//!
//! On a disk it has a thread of its own, so that the runtime's are free for what others wait for. A node whose
//! log is in memory does it in place: that is quick, and a simulation must not depend on how the operating
//! system schedules threads.

use std::io;

/// Where work that blocks is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Offload {
    /// On one of the runtime's threads for that.
    Threads,
    /// In the task that asks.
    InPlace,
}

impl Offload {
    /// Does `work`; fails only when the runtime is going down or `work` panics.
    pub(crate) async fn run<T: Send + 'static>(
        self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, io::Error> {
        match self {
            Self::Threads => tokio::task::spawn_blocking(work).await.map_err(io::Error::other),
            Self::InPlace => Ok(work()),
        }
    }
}
