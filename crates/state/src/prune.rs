//! Forgetting: nothing in the state grows for ever.
//!
//! The leader proposes it when [`State::needs_prune`] says so; what is old enough is decided here,
//! by the cluster's time. Each time a bounded number goes, so that one entry never takes long.

use crate::outcome::{Applied, Outcome};
use crate::state::State;
use crate::tokens;
use crate::txn::Txn;

/// Final sessions and commands can be asked for this long after their end, in milliseconds.
pub const KEEP_ENDED_MS: u64 = 24 * 3_600_000;
/// An idempotency key holds this long, in milliseconds.
pub const KEEP_RECORDED_MS: u64 = 24 * 3_600_000;
/// A watcher may resume after this long, in milliseconds, unless there were too many events.
pub const KEEP_EVENTS_MS: u64 = 3_600_000;
/// How many records one prune forgets.
pub const MAX_PRUNED: usize = 1_000;
/// How much longer something may be kept, in milliseconds: so one prune takes many at a time.
const SLACK_MS: u64 = 60_000;

/// What may be kept at a certain time: everything that ended after these.
struct Limits {
    ended: u64,
    recorded: u64,
    events: u64,
    expired: u64,
}

impl Limits {
    fn at(now: u64) -> Self {
        Self {
            ended: now.saturating_sub(KEEP_ENDED_MS),
            recorded: now.saturating_sub(KEEP_RECORDED_MS),
            events: now.saturating_sub(KEEP_EVENTS_MS),
            expired: now,
        }
    }
}

impl State {
    /// Whether there is something old enough for an [`crate::Operation::Prune`].
    pub fn needs_prune(&self, now: u64) -> bool {
        let limits = Limits::at(now.saturating_sub(SLACK_MS));
        let oldest = |at: Option<u64>, limit: u64| at.is_some_and(|at| at <= limit && limit > 0);
        oldest(
            self.index.ended_commands.get_min().map(|(at, _)| *at),
            limits.ended,
        ) || oldest(
            self.index.ended_sessions.get_min().map(|(at, _)| *at),
            limits.ended,
        ) || oldest(
            self.index.recorded.get_min().map(|((at, _), _)| *at),
            limits.recorded,
        ) || oldest(
            self.index.token_expiry.get_min().map(|(at, _)| *at),
            limits.expired,
        ) || oldest(self.events.first().map(|(_, event)| event.at), limits.events)
    }
}

/// Forgets at most [`MAX_PRUNED`] records; gives how many.
pub(crate) fn prune(txn: &mut Txn<'_>) -> Applied {
    txn.actor.require_node()?;
    let limits = Limits::at(txn.now());
    let mut left = MAX_PRUNED;
    while left > 0 && forget_one(txn, &limits) {
        left -= 1;
    }
    Ok(Outcome::Count((MAX_PRUNED - left) as u64))
}

fn forget_one(txn: &mut Txn<'_>, limits: &Limits) -> bool {
    let state = txn.state();
    if let Some((at, id)) = state.index.ended_commands.get_min()
        && *at <= limits.ended
    {
        let id = id.clone();
        txn.remove_command(&id);
    } else if let Some((at, name)) = state.index.ended_sessions.get_min()
        && *at <= limits.ended
    {
        let name = name.clone();
        txn.remove_session(&name);
    } else if let Some((at, _)) = state.index.recorded.get_min()
        && at.0 <= limits.recorded
    {
        let at = *at;
        txn.forget_recorded(at);
    } else if let Some((at, id)) = state.index.token_expiry.get_min()
        && *at <= limits.expired
    {
        let id = id.clone();
        tokens::revoke(txn, &id, "its token has expired");
    } else if let Some((_, event)) = state.events().first()
        && event.at <= limits.events
    {
        txn.drop_event();
    } else {
        return false;
    }
    true
}
