//! Every deadline, backoff and bound of sessions and commands, each with its reason. Milliseconds.
//!
//! They are part of what apply decides: changing one changes outcomes, so it is gated by the
//! feature level (these are level 1). The order that they keep: the deadlines of a command end
//! before the deadline of the session that waits for it, so that the command speaks first, with the
//! better reason, and the session's own deadline only catches what no command speaks for.

/// How long a placed session waits for its start to be handed to its agent, which is online: the
/// gateway sends at once, so this only ends what got stuck.
pub const PENDING_MS: u64 = 60_000;
/// How long a start may take: images are pulled, volumes bound. StreamSpace's agents allow 120 s.
pub const STARTING_MS: u64 = 180_000;
/// How long putting to sleep may take: a signal, or scaling to zero with a grace period of 30 s.
pub const HIBERNATING_MS: u64 = 60_000;
/// How long waking may take: where sleeping ended it, waking is a start.
pub const WAKING_MS: u64 = 180_000;
/// How long ending may take: TERM, a grace period, KILL, and removal of what it leaves.
pub const TERMINATING_MS: u64 = 120_000;
/// How long an agent's own action may take.
pub const CUSTOM_MS: u64 = 300_000;
/// By how much a session's deadline is later than that of the command it waits for.
pub const SESSION_MARGIN_MS: u64 = 5_000;

/// How long an acknowledgement may take: agents acknowledge before they act.
pub const ACK_MS: u64 = 10_000;
/// The same for StreamSpace's agents, which read nothing while they start a session (up to 120 s).
pub const ACK_V2_MS: u64 = 180_000;
/// How often a run is sent without an acknowledgement over a connection that stays; then it failed.
pub const MAX_UNANSWERED: u32 = 5;
/// How many more runs the control plane begins by itself after retryable failures.
pub const MAX_AUTOMATIC_RUNS: u32 = 3;
/// How many runs a stop gets: nothing else cleans up, and an engine that restarts takes a minute.
pub const MAX_STOP_RUNS: u32 = 5;

/// Wait before the first repetition; doubled with each.
const BACKOFF_BASE_MS: u64 = 1_000;
/// Longest wait between repetitions.
const BACKOFF_MAX_MS: u64 = 30_000;
/// Wait before the second run of a stop; four times as long with each: 2, 8, 32, 60 s.
const STOP_BACKOFF_BASE_MS: u64 = 2_000;
/// Longest wait between runs of a stop.
const STOP_BACKOFF_MAX_MS: u64 = 60_000;

/// Agents named in a refused placement: an answer is read by people.
pub const MAX_REFUSALS: usize = 50;
/// Sessions that may wait for room at a time, over all users.
pub const MAX_WAITING: usize = 10_000;
/// Open commands of one agent that are not part of a session's life.
pub const MAX_QUEUE: usize = 10_000;
/// Sessions looked at by one `PlaceQueued`, so that one entry is applied in a bounded time.
pub const MAX_PLACED_AT_ONCE: usize = 256;
/// Tags of a session.
pub const MAX_TAGS: usize = 64;
/// Bytes of a tag.
pub const MAX_TAG: usize = 256;
/// Bytes of a word for people: reasons and errors end up in every listing and event.
pub const MAX_TEXT: usize = 2_000;
/// Bytes of a command's payload, result or metadata: they are kept in memory and in snapshots.
pub const MAX_JSON: usize = 64 << 10;
/// Bytes of a template's manifest, which every session of it carries along.
pub const MAX_MANIFEST: usize = 64 << 10;
/// Bytes of the name of an agent's own action.
pub const MAX_ACTION: usize = 64;
/// Longest expiry, idle timeout or duration: ten years. Sums with it cannot overflow.
pub const MAX_SPAN_MS: u64 = 10 * 366 * 24 * 3_600_000;

/// How long to wait before repetition `n` (from 1).
pub(crate) fn backoff(n: u32) -> u64 {
    exponential(BACKOFF_BASE_MS, 2, BACKOFF_MAX_MS, n)
}

/// How long to wait before repetition `n` (from 1) of a stop.
pub(crate) fn stop_backoff(n: u32) -> u64 {
    exponential(STOP_BACKOFF_BASE_MS, 4, STOP_BACKOFF_MAX_MS, n)
}

fn exponential(base: u64, factor: u64, max: u64, n: u32) -> u64 {
    base.saturating_mul(factor.saturating_pow(n.saturating_sub(1)))
        .min(max)
}

/// A text for people, cut to [`MAX_TEXT`] at a character's edge.
pub(crate) fn cut(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        let edge = (0..=MAX_TEXT)
            .rev()
            .find(|at| text.is_char_boundary(*at))
            .unwrap_or(0);
        text.truncate(edge);
    }
    text
}

/// JSON text, or a note that it was too large: cutting it would break it.
pub(crate) fn bounded_json(text: String) -> String {
    if text.len() > MAX_JSON {
        format!("{{\"omitted\":\"larger than {MAX_JSON} bytes\"}}")
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_up_to_a_bound() {
        assert_eq!(
            (1..=7).map(backoff).collect::<Vec<_>>(),
            [1000, 2000, 4000, 8000, 16000, 30000, 30000]
        );
        assert_eq!(
            (1..=5).map(stop_backoff).collect::<Vec<_>>(),
            [2000, 8000, 32000, 60000, 60000]
        );
        assert_eq!(backoff(u32::MAX), BACKOFF_MAX_MS);
    }

    #[test]
    fn texts_are_cut_between_characters() {
        let long = "ä".repeat(MAX_TEXT);
        let short = cut(format!("x{long}"));
        assert!(short.len() <= MAX_TEXT && short.ends_with('ä'));
        assert_eq!(cut("short".to_owned()), "short");
        assert_eq!(bounded_json("{}".to_owned()), "{}");
        assert!(bounded_json("1".repeat(MAX_JSON + 1)).starts_with("{\"omitted\""));
    }
}
