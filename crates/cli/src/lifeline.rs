//! The process that a node or an agent of `regent dev` must not outlive.

use regent_agent::lifeline::{self, ProcessId};

use crate::config::UsageError;

/// The lifeline of this process, if it was given one.
#[derive(Clone, Copy)]
pub(crate) struct Lifeline(Option<ProcessId>);

impl Lifeline {
    /// Reads the hidden flag; refused when that process has ended already.
    pub(crate) fn of(flag: Option<&str>) -> anyhow::Result<Self> {
        let id: Option<ProcessId> = flag
            .map(str::parse)
            .transpose()
            .map_err(|e: String| UsageError(format!("--lifeline: {e}")))?;
        if id.is_some_and(|id| !id.is_alive()) {
            anyhow::bail!(
                "the `regent dev` that this command belonged to has ended; start `regent dev` again"
            );
        }
        Ok(Self(id))
    }

    /// Its id, to hand on.
    pub(crate) fn id(self) -> Option<ProcessId> {
        self.0
    }

    /// Until it has ended; for ever without one. A watch that fails counts as its end: to go on
    /// unwatched could leave processes behind.
    pub(crate) async fn ended(self) {
        match self.0 {
            None => std::future::pending().await,
            Some(id) => {
                if let Ok(lifeline) = lifeline::Lifeline::open(id) {
                    let _ = lifeline.ended().await;
                }
            }
        }
    }
}
