//! What a user's sessions may use: checked inside apply, together with what it is checked against.

use crate::outcome::Rejection;
use crate::record::User;

/// Whether one more session of this size is within the user's quota.
pub(crate) fn check(user: &User, cpu: u64, memory: u64) -> Result<(), Rejection> {
    let name = &user.name;
    if let Some(max) = user.quota.sessions.filter(|max| user.used.sessions >= *max) {
        return Err(exceeded(format!(
            "{name} has {} of {max} sessions",
            user.used.sessions
        )));
    }
    if let Some(max) = user
        .quota
        .cpu
        .filter(|max| user.used.cpu.saturating_add(cpu) > *max)
    {
        let used = user.used.cpu;
        return Err(exceeded(format!(
            "{name} uses {used}m of {max}m cpu; {cpu}m more do not fit"
        )));
    }
    if let Some(max) = user
        .quota
        .memory
        .filter(|max| user.used.memory.saturating_add(memory) > *max)
    {
        let used = user.used.memory;
        return Err(exceeded(format!(
            "{name} uses {used} of {max} bytes of memory; {memory} more do not fit"
        )));
    }
    Ok(())
}

fn exceeded(detail: String) -> Rejection {
    Rejection::QuotaExceeded(detail)
}
