//! When a session was last used, as its leader remembers it.
//!
//! Activity is not replicated: it would write to the log for every key stroke. The leader keeps it in
//! memory, and a new leader gives every session its full idle time again, so a change of leader can
//! only make a session hibernate later.

use regent_types::SessionName;

use crate::keepalive::Handle as Leases;
use crate::leader::{Answer, Ask};
use crate::service::ServiceError;

/// Asks the leader, wherever it is.
#[derive(Clone)]
pub(crate) struct Handle {
    leases: Leases,
}

impl Handle {
    pub(crate) fn new(leases: Leases) -> Self {
        Self { leases }
    }

    /// The session is in use now.
    pub(crate) async fn touch(&self, session: SessionName) -> Result<(), ServiceError> {
        match self.leases.ask(Ask::Touch(vec![session])).await? {
            Answer::Done => Ok(()),
            other => Err(other.unexpected()),
        }
    }

    /// When each session was last in use, in Unix milliseconds; `None` where this leader saw none.
    pub(crate) async fn last(&self, sessions: &[SessionName]) -> Result<Vec<Option<u64>>, ServiceError> {
        match self.leases.ask(Ask::LastActivity(sessions.to_vec())).await? {
            Answer::Times(times) if times.len() == sessions.len() => Ok(times),
            other => Err(other.unexpected()),
        }
    }
}
