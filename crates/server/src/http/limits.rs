//! What may stand in the fields of bodies, checked where they enter; apply may rely on it. Each bound
//! keeps a record small enough for a log entry, an event and a page of a list.

use std::collections::BTreeMap;

use regent_state::record::{Capacity, Quota};
use regent_types::duration::Span;
use regent_types::session::Resources;
use regent_types::{agent, auth};
use serde_json::Value;

use super::problem::{Failure, Result};

/// Tags of one session.
const MAX_TAGS: usize = 32;
/// Bytes of one tag.
const MAX_TAG_BYTES: usize = 256;
/// Labels of an agent or a placement.
const MAX_LABELS: usize = 64;
/// Bytes of a label's key or value, and of other short words.
const MAX_WORD_BYTES: usize = 256;
/// Bytes of free JSON: metadata of an agent, payload of a command.
const MAX_JSON_BYTES: usize = 64 << 10;
/// Levels of free JSON. It is shown within lists and events and sent within frames, and our own decoders, like many
/// others, read no more than 127 levels in all.
pub(crate) const MAX_JSON_LEVELS: usize = 100;
/// Longest duration: a year. Keeps sums of times far from overflowing.
const MAX_SPAN_MS: u64 = 366 * 86_400_000;
/// Most CPU in thousandths: a million cores. Sums over all sessions stay far below overflow.
const MAX_CPU: u64 = 1_000_000_000;
/// Most memory: a pebibyte.
const MAX_MEMORY: u64 = 1 << 50;

/// Tags: few, short, without control characters.
pub(super) fn tags(tags: &[String]) -> Result<()> {
    if tags.len() > MAX_TAGS {
        return Err(Failure::field("tags", format!("at most {MAX_TAGS} tags")));
    }
    for (n, tag) in tags.iter().enumerate() {
        if !(1..=MAX_TAG_BYTES).contains(&tag.len()) || tag.chars().any(char::is_control) {
            return Err(Failure::field(
                format!("tags[{n}]"),
                format!("a tag has 1 to {MAX_TAG_BYTES} bytes and no control characters"),
            ));
        }
    }
    Ok(())
}

/// Labels: few, short.
pub(super) fn labels(field: &str, labels: &BTreeMap<String, String>) -> Result<()> {
    if labels.len() > MAX_LABELS {
        return Err(Failure::field(field, format!("at most {MAX_LABELS} labels")));
    }
    for (key, value) in labels {
        if key.is_empty() {
            return Err(Failure::field(field, "a label's name cannot be empty"));
        }
        word(&format!("{field}.{key}"), key)?;
        word(&format!("{field}.{key}"), value)?;
    }
    Ok(())
}

/// A short word; may be empty.
pub(super) fn word(field: &str, text: &str) -> Result<()> {
    if text.len() > MAX_WORD_BYTES || text.chars().any(char::is_control) {
        return Err(Failure::field(
            field,
            format!("at most {MAX_WORD_BYTES} bytes and no control characters"),
        ));
    }
    Ok(())
}

/// A duration in milliseconds that must be positive and sane.
pub(super) fn span(field: &str, span: Option<Span>) -> Result<Option<u64>> {
    match span {
        Some(Span(ms)) if !(1..=MAX_SPAN_MS).contains(&ms) => Err(Failure::field(
            field,
            "must be more than 0s and at most 366 days (8784h)",
        )),
        span => Ok(span.map(Span::millis)),
    }
}

/// CPU and memory that are asked for: positive and countable.
pub(super) fn resources(field: &str, resources: &Resources) -> Result<(Option<u64>, Option<u64>)> {
    let cpu = amount(
        &format!("{field}.cpu"),
        resources.cpu.map(|cpu| cpu.0),
        1,
        MAX_CPU,
    )?;
    let memory = amount(
        &format!("{field}.memory"),
        resources.memory.map(|memory| memory.0),
        1,
        MAX_MEMORY,
    )?;
    Ok((cpu, memory))
}

/// What an agent says it can carry. Nothing at all is a capacity too.
pub(super) fn capacity(capacity: &agent::Capacity) -> Result<Capacity> {
    Ok(Capacity {
        max_sessions: capacity.max_sessions,
        cpu: amount("capacity.cpu", capacity.cpu.map(|cpu| cpu.0), 0, MAX_CPU)?,
        memory: amount(
            "capacity.memory",
            capacity.memory.map(|memory| memory.0),
            0,
            MAX_MEMORY,
        )?,
    })
}

/// What a user's sessions may use; nothing at all is a quota too.
pub(super) fn quota(field: &str, quota: &auth::Quota) -> Result<Quota> {
    Ok(Quota {
        sessions: quota.sessions,
        cpu: amount(&format!("{field}cpu"), quota.cpu.map(|cpu| cpu.0), 0, MAX_CPU)?,
        memory: amount(
            &format!("{field}memory"),
            quota.memory.map(|memory| memory.0),
            0,
            MAX_MEMORY,
        )?,
    })
}

fn amount(field: &str, amount: Option<u64>, min: u64, max: u64) -> Result<Option<u64>> {
    match amount {
        Some(n) if n < min => Err(Failure::field(field, "must be more than nothing")),
        Some(n) if n > max => Err(Failure::field(field, "is more than any machine has")),
        amount => Ok(amount),
    }
}

/// Free JSON as the text that is kept; nothing becomes empty.
pub(super) fn json(field: &str, value: &Value) -> Result<String> {
    if value.is_null() {
        return Ok(String::new());
    }
    if !is_shallow(value) {
        return Err(Failure::field(
            field,
            format!("at most {MAX_JSON_LEVELS} levels of JSON"),
        ));
    }
    let text = value.to_string();
    if text.len() > MAX_JSON_BYTES {
        return Err(Failure::field(
            field,
            format!("at most {MAX_JSON_BYTES} bytes of JSON"),
        ));
    }
    Ok(text)
}

/// Whether it has no more than [`MAX_JSON_LEVELS`].
pub(crate) fn is_shallow(value: &Value) -> bool {
    fn within(value: &Value, levels: usize) -> bool {
        match value {
            Value::Array(values) => levels > 0 && values.iter().all(|value| within(value, levels - 1)),
            Value::Object(fields) => levels > 0 && fields.values().all(|value| within(value, levels - 1)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => true,
        }
    }
    within(value, MAX_JSON_LEVELS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use regent_types::{Cpu, Memory};

    /// A payload as deep as a body may be could be read nowhere any more: not in the list of commands, not in an
    /// event, and not by the agent, which ignored the frame until the command failed.
    #[test]
    fn json_is_kept_only_as_deep_as_it_can_be_shown() {
        let nested =
            |levels: usize| (0..levels).fold(serde_json::json!(1), |inner, _| serde_json::json!([inner]));
        let kept = json("payload", &nested(MAX_JSON_LEVELS)).unwrap();
        let shown = format!(r#"{{"type":"command","payload":{{"payload":{kept}}}}}"#);
        assert!(serde_json::from_str::<Value>(&shown).is_ok());
        assert!(json("payload", &nested(MAX_JSON_LEVELS + 1)).is_err());
    }

    #[test]
    fn a_tag_may_have_256_bytes_and_not_more() {
        assert!(tags(&["t".repeat(256)]).is_ok());
        assert!(tags(&["t".repeat(257)]).is_err());
        assert!(tags(&[String::new()]).is_err());
        assert!(tags(&vec!["t".to_owned(); 33]).is_err());
        assert!(tags(&["a\nb".to_owned()]).is_err());
    }

    #[test]
    fn amounts_must_be_positive_and_possible() {
        let ask = |cpu: u64, memory: u64| {
            resources(
                "resources",
                &Resources {
                    cpu: Some(Cpu(cpu)),
                    memory: Some(Memory(memory)),
                },
            )
        };
        assert_eq!(ask(1, 1).unwrap(), (Some(1), Some(1)));
        assert!(ask(0, 1).is_err() && ask(1, 0).is_err());
        assert!(ask(u64::MAX, 1).is_err() && ask(1, u64::MAX).is_err());
    }

    #[test]
    fn durations_have_bounds() {
        assert_eq!(span("idleTimeout", None).unwrap(), None);
        assert_eq!(span("idleTimeout", Some(Span(1_000))).unwrap(), Some(1_000));
        assert!(span("idleTimeout", Some(Span(0))).is_err());
        assert!(span("idleTimeout", Some(Span(u64::MAX))).is_err());
    }
}
