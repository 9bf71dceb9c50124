//! How often a password may be tried: per user, against guessing one account; per address, against
//! trying many. Only failures count, so nobody who knows their password meets it.
//!
//! Kept in memory by each node: a cluster of three allows three times as much, which is still far too
//! little for guessing. Bounded: when it is full, the oldest window goes.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::problem::{Failure, Result};

/// Failures of one user within a window.
const PER_USER: u32 = 10;
/// Failures from one address within a window; there may be many people behind it.
const PER_ADDRESS: u32 = 60;
/// How long failures count.
const WINDOW: Duration = Duration::from_mins(1);
/// Users and addresses that are remembered.
const MAX_KEYS: usize = 10_000;
/// Bytes of a user's name that tell one from another here; the name is not checked yet.
const MAX_NAME_BYTES: usize = 128;

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    User(String),
    Address(IpAddr),
}

#[derive(Debug, Clone, Copy)]
struct Window {
    began: Instant,
    failures: u32,
}

/// Failures of the last minute.
#[derive(Debug, Default)]
pub(super) struct Attempts {
    windows: Mutex<BTreeMap<Key, Window>>,
}

/// An attempt under way: counted as failed unless it says otherwise.
#[derive(Debug)]
pub(super) struct Attempt<'a> {
    attempts: &'a Attempts,
    keys: Vec<Key>,
}

impl Attempts {
    pub(super) const fn new() -> Self {
        Self {
            windows: Mutex::new(BTreeMap::new()),
        }
    }

    /// Counts an attempt, or refuses it with 429.
    pub(super) fn begin(&self, user: &str, address: Option<IpAddr>, now: Instant) -> Result<Attempt<'_>> {
        let mut keys = vec![user_key(user)];
        keys.extend(address.map(address_key));
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        for key in &keys {
            let limit = match key {
                Key::User(_) => PER_USER,
                Key::Address(_) => PER_ADDRESS,
            };
            if let Some(window) = windows.get(key) {
                let left = WINDOW.saturating_sub(now.duration_since(window.began));
                if window.failures >= limit && !left.is_zero() {
                    metrics::counter!("regent_login_limited_total").increment(1);
                    return Err(Failure::busy("too many failed logins; wait", left.as_secs() + 1));
                }
            }
        }
        for key in &keys {
            charge(&mut windows, key, now);
        }
        Ok(Attempt { attempts: self, keys })
    }
}

impl Attempt<'_> {
    /// It does not count.
    pub(super) fn forget(self) {
        let mut windows = self
            .attempts
            .windows
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for key in &self.keys {
            if let Some(window) = windows.get_mut(key) {
                window.failures = window.failures.saturating_sub(1);
                if window.failures == 0 {
                    windows.remove(key);
                }
            }
        }
    }
}

fn charge(windows: &mut BTreeMap<Key, Window>, key: &Key, now: Instant) {
    if let Some(window) = windows.get_mut(key) {
        if now.duration_since(window.began) >= WINDOW {
            *window = Window {
                began: now,
                failures: 0,
            };
        }
        window.failures += 1;
        return;
    }
    if windows.len() >= MAX_KEYS {
        windows.retain(|_, window| now.duration_since(window.began) < WINDOW);
    }
    if windows.len() >= MAX_KEYS {
        let oldest = windows
            .iter()
            .min_by_key(|(_, window)| window.began)
            .map(|(key, _)| key.clone());
        oldest.and_then(|key| windows.remove(&key));
    }
    windows.insert(
        key.clone(),
        Window {
            began: now,
            failures: 1,
        },
    );
}

fn user_key(user: &str) -> Key {
    let end = (0..=user.len().min(MAX_NAME_BYTES))
        .rev()
        .find(|at| user.is_char_boundary(*at))
        .unwrap_or(0);
    Key::User(user[..end].to_owned())
}

/// One IPv6 customer has a whole /64 to come from.
fn address_key(address: IpAddr) -> Key {
    Key::Address(match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() & !u128::from(u64::MAX)).into()),
        v4 @ IpAddr::V4(_) => v4,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOME: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    #[test]
    fn failures_are_limited_per_user_and_forgotten_after_a_while() {
        let (attempts, start) = (Attempts::new(), Instant::now());
        for _ in 0..PER_USER {
            attempts.begin("a", None, start).unwrap();
        }
        assert!(attempts.begin("a", None, start).is_err());
        assert!(
            attempts.begin("b", None, start).is_ok(),
            "another user is not concerned"
        );
        assert!(attempts.begin("a", None, start + WINDOW).is_ok());
    }

    #[test]
    fn failures_are_limited_per_address_over_all_users() {
        let (attempts, now) = (Attempts::new(), Instant::now());
        for n in 0..PER_ADDRESS {
            attempts.begin(&format!("user-{n}"), Some(HOME), now).unwrap();
        }
        assert!(attempts.begin("one-more", Some(HOME), now).is_err());
        let neighbour: IpAddr = "192.0.2.1".parse().unwrap();
        assert!(attempts.begin("one-more", Some(neighbour), now).is_ok());
    }

    #[test]
    fn successes_never_count() {
        let (attempts, now) = (Attempts::new(), Instant::now());
        for _ in 0..PER_ADDRESS * 2 {
            attempts.begin("a", Some(HOME), now).unwrap().forget();
        }
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (attempts, now) = (Attempts::new(), Instant::now());
        for n in 0..MAX_KEYS + 10 {
            attempts.begin(&format!("user-{n}"), None, now).unwrap();
        }
        assert_eq!(attempts.windows.lock().unwrap().len(), MAX_KEYS);
    }

    #[test]
    fn neighbours_in_one_ipv6_network_are_one() {
        let key = |text: &str| address_key(text.parse().unwrap());
        assert_eq!(key("2001:db8::1"), key("2001:db8::ffff"));
        assert_ne!(key("2001:db8::1"), key("2001:db8:0:1::1"));
        assert_eq!(key("::ffff:127.0.0.1"), key("127.0.0.1"));
    }
}
