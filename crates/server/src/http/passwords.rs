//! argon2id, on threads that may block and only a few at a time: one hash takes 19 MiB and tens of
//! milliseconds, so a flood of logins would otherwise take the machine from everything else.

use std::sync::{LazyLock, OnceLock};

use argon2::password_hash::{PasswordHash, SaltString};
use argon2::{Argon2, PasswordHasher, PasswordVerifier};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::problem::{Failure, Result};

/// Hashes computed at once; half the cores, so that consensus keeps the others.
static RUNNING: LazyLock<Semaphore> = LazyLock::new(|| {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Semaphore::new((cores / 2).max(1))
});
/// Requests that may wait for their turn; at some ten hashes a second that is a few seconds.
const MAX_WAITING: usize = 32;
/// Bytes of a salt, as RFC 9106 recommends.
const SALT_BYTES: usize = 16;
static WAITING: Semaphore = Semaphore::const_new(MAX_WAITING);

/// Hashes a password with the defaults of OWASP (19 MiB, two passes), in PHC form.
pub(crate) async fn hash(password: String) -> Result<String> {
    blocking(move || {
        hashed(&password)
            .map_err(|error| Failure::internal(format!("the password cannot be hashed: {error}")))
    })
    .await?
}

fn hashed(password: &str) -> Result<String, argon2::password_hash::Error> {
    let salt = SaltString::encode_b64(&rand::random::<[u8; SALT_BYTES]>())?;
    Ok(Argon2::default()
        .hash_password(password.as_bytes(), &salt)?
        .to_string())
}

/// Whether the password is that of the hash. Without a hash (no such user, or no password) as much work
/// is done and the answer is no, so that the time taken tells nobody which users exist.
pub(super) async fn verify(password: String, hash: Option<String>) -> Result<bool> {
    blocking(move || {
        let known = hash.is_some();
        let text = hash.unwrap_or_else(|| decoy().to_owned());
        let matches = PasswordHash::new(&text).is_ok_and(|parsed| {
            Argon2::default()
                .verify_password(password.as_bytes(), &parsed)
                .is_ok()
        });
        matches && known
    })
    .await
}

fn decoy() -> &'static str {
    static DECOY: OnceLock<String> = OnceLock::new();
    DECOY.get_or_init(|| hashed("nobody has this one").unwrap_or_default())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let waiting: SemaphorePermit<'_> = WAITING
        .try_acquire()
        .map_err(|_| Failure::busy("too many passwords are being checked", 1))?;
    let running = RUNNING.acquire().await.expect("the semaphore is never closed");
    drop(waiting);
    // The permit goes along: the work goes on even if the request is given up.
    tokio::task::spawn_blocking(move || {
        let result = work();
        drop(running);
        result
    })
    .await
    .map_err(|_| Failure::internal("hashing a password failed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_password_matches_its_own_hash_only() {
        let hash = hash("correct horse".to_owned()).await.unwrap();
        assert!(hash.starts_with("$argon2id$"));
        assert!(
            verify("correct horse".to_owned(), Some(hash.clone()))
                .await
                .unwrap()
        );
        assert!(!verify("battery staple".to_owned(), Some(hash)).await.unwrap());
    }

    #[tokio::test]
    async fn nobody_has_the_decoys_password() {
        assert!(!verify("nobody has this one".to_owned(), None).await.unwrap());
        assert!(
            !verify("x".to_owned(), Some("not a hash".to_owned()))
                .await
                .unwrap()
        );
    }
}
