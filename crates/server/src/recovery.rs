//! What is done while no node runs: for `regent cluster restore` and `recover`.

pub use regent_raft::offline::{
    Founded, Founder, OfflineError, Position, Survivor, Survivors, Terms, restore,
};
pub use regent_raft::{BackupInfo, SnapshotError};
use regent_types::TokenId;

use crate::ids;
use crate::options::MIN_TOKEN_CHARS;

/// What is kept of a new administrator's token: its id and the hash of its secret.
///
/// # Errors
/// It is too short.
pub fn admin_token(secret: &str) -> Result<(TokenId, [u8; 32]), String> {
    if secret.trim().len() < MIN_TOKEN_CHARS {
        return Err(format!(
            "the bootstrap token must have at least {MIN_TOKEN_CHARS} characters"
        ));
    }
    Ok((ids::token_id(), ids::secret_hash(secret.trim())))
}

/// Wall clock, in milliseconds since the Unix epoch.
pub fn wall_ms() -> u64 {
    regent_raft::clocks::wall_ms()
}
