//! Leases: named, fenced, time-bound rights.

use serde::{Deserialize, Serialize};

use crate::{LeaseName, Time, Token};

/// The shortest TTL that is granted, outside `dev`, in milliseconds.
pub const MIN_TTL_MS: u64 = 1_000;
/// The shortest TTL that is granted in `dev`, in milliseconds.
pub const MIN_TTL_DEV_MS: u64 = 100;
/// The longest TTL that is granted, in milliseconds: an hour.
pub const MAX_TTL_MS: u64 = 3_600_000;
/// The longest that one request may wait for a lease, in milliseconds: an hour. Who wants to wait longer
/// repeats it with the same `Idempotency-Key`, which keeps the place in the queue.
pub const MAX_WAIT_MS: u64 = 3_600_000;
/// How many may wait for one lease.
pub const MAX_CANDIDATES: usize = 10_000;

/// Body of `POST /leases/{name}/acquire`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AcquireLease {
    /// Who holds it, for people: up to 200 characters.
    pub holder: String,
    /// How long it lasts without a renewal, in milliseconds.
    pub ttl_ms: u64,
    /// How long to wait in the queue when somebody else holds it, in milliseconds: up to an hour. Without
    /// it, or with 0, the answer is given at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_ms: Option<u64>,
}

/// Answer to an acquire that was granted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct LeaseGrant {
    /// The lease.
    pub name: LeaseName,
    /// Who holds it.
    pub holder: String,
    /// The fencing token: larger than that of every earlier grant.
    pub token: Token,
    /// The TTL. Counts from when the request was sent if `waited` is false.
    pub ttl_ms: u64,
    /// Whether the grant came while the request waited: then renew once before acting.
    pub waited: bool,
}

/// Body of renew, release and verify.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct LeaseTokenBody {
    /// The token of the grant.
    pub token: Token,
}

/// Answer to renew, release and verify.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct LeaseConfirmed {
    /// The token.
    pub token: Token,
    /// The TTL in milliseconds; counts from when the renewal was sent.
    pub ttl_ms: u64,
}

/// A lease that is held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct Lease {
    /// Its name.
    pub name: LeaseName,
    /// Who holds it, for people.
    pub holder: String,
    /// The principal that acquired it, such as `user:alice`.
    pub owner: String,
    /// The fencing token.
    pub token: Token,
    /// How long it lasts without a renewal.
    pub ttl_ms: u64,
    /// How much of that is left by the leader's clock; absent in stale reads.
    pub remaining_ms: Option<u64>,
    /// When it was granted.
    pub granted_at: Time,
    /// Who waits for it, first come first.
    pub candidates: Vec<LeaseCandidate>,
}

/// Somebody who waits for a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct LeaseCandidate {
    /// Who, for people.
    pub holder: String,
    /// The principal.
    pub owner: String,
    /// Since when.
    pub since: Time,
}

/// Answer to `GET /leases`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct LeaseList {
    /// One page, by name.
    pub leases: Vec<Lease>,
    /// How many match in all.
    pub total: u64,
    /// Where the next page starts, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}
