//! Which agent takes a session: decided inside apply, so that it cannot be taken twice.
//!
//! An agent may take it when it is eligible, online, as wanted (platform, region, labels), can run the template (an
//! image, a command, or `regent` itself) and has room (sessions, cpu, memory). Of those the least loaded does: the one whose fullest dimension is
//! least full, then the one with fewer sessions, then the first by id. Shares are compared by
//! cross-multiplication, since fractions must come out the same on every node.

use std::cmp::Ordering;

use regent_types::AgentId;
use serde::Deserialize;

use crate::limits::MAX_REFUSALS;
use crate::record::{Agent, Capacity, Placement, Scheduling, Usage};
use crate::state::State;

/// The agent for a session, or why none can take it, agent by agent (the first [`MAX_REFUSALS`] by id).
pub(crate) fn choose(
    state: &State,
    cpu: u64,
    memory: u64,
    wanted: &Placement,
    manifest: &str,
) -> Result<AgentId, Vec<(AgentId, String)>> {
    let offers = offers(manifest);
    let best = state
        .agents()
        .values()
        .filter(|agent| {
            may_take(state, agent, wanted)
                && room(agent, cpu, memory).is_none()
                && unable(agent, &offers).is_none()
        })
        .min_by(|a, b| compare(a, b));
    match best {
        Some(agent) => Ok(agent.id.clone()),
        None => Err(state
            .agents()
            .values()
            .take(MAX_REFUSALS)
            .map(|agent| {
                let why = refusal(state, agent, wanted)
                    .or_else(|| unable(agent, &offers))
                    .or_else(|| room(agent, cpu, memory));
                (agent.id.clone(), why.unwrap_or_default())
            })
            .collect()),
    }
}

/// In one line, for a session that waits.
pub(crate) fn describe(refusals: &[(AgentId, String)]) -> String {
    if refusals.is_empty() {
        return "no agent is registered".to_owned();
    }
    refusals
        .iter()
        .map(|(agent, why)| format!("{agent}: {why}"))
        .collect::<Vec<_>>()
        .join("; ")
}

fn may_take(state: &State, agent: &Agent, wanted: &Placement) -> bool {
    agent.scheduling == Scheduling::Eligible && is_led(state, agent) && mismatch(agent, wanted).is_none()
}

/// Online is not enough: without a leading connection, now or soon, nobody would take the command.
fn is_led(state: &State, agent: &Agent) -> bool {
    agent.leading().is_some() || (agent.is_online() && state.has_successor(&agent.id))
}

/// Why not, in the order in which a person would ask: is it there, may it, is it the right one.
fn refusal(state: &State, agent: &Agent, wanted: &Placement) -> Option<String> {
    if agent.connections.is_empty() {
        return Some(if agent.offline_reason.is_empty() {
            "offline".to_owned()
        } else {
            format!("offline ({})", agent.offline_reason)
        });
    }
    if !is_led(state, agent) {
        return Some("none of its replicas leads".to_owned());
    }
    match agent.scheduling {
        Scheduling::Cordoned => return Some("cordoned".to_owned()),
        Scheduling::Draining { .. } => return Some("draining".to_owned()),
        Scheduling::Eligible => {}
    }
    mismatch(agent, wanted)
}

/// What of a template a runtime can start, in the words that agents register with.
const IMAGE: &str = "image";
const COMMAND: &str = "command";
const REGENT: &str = "regent";

/// What of a template could be started; nothing when it cannot be told.
fn offers(manifest: &str) -> Vec<&'static str> {
    #[derive(Default, Deserialize)]
    #[serde(default, rename_all = "camelCase")]
    struct Spec {
        base_image: String,
        command: Vec<String>,
    }
    #[derive(Deserialize)]
    struct Manifest {
        #[serde(default)]
        spec: Spec,
    }
    let Ok(Manifest { spec }) = serde_json::from_str(manifest) else {
        return Vec::new();
    };
    let mut offers = Vec::new();
    if !spec.base_image.is_empty() {
        offers.push(IMAGE);
    }
    if let Some(program) = spec.command.first() {
        offers.push(COMMAND);
        if spec.base_image.is_empty() && program == "regent" {
            offers.push(REGENT);
        }
    }
    offers
}

/// Why the agent cannot run what the template offers. One that does not say what it runs may be tried.
fn unable(agent: &Agent, offers: &[&str]) -> Option<String> {
    #[derive(Deserialize)]
    struct Told {
        runs: Option<Vec<String>>,
    }
    let runs = serde_json::from_str::<Told>(&agent.metadata).ok()?.runs?;
    if offers.is_empty() || runs.iter().any(|one| offers.contains(&one.as_str())) {
        return None;
    }
    Some(if offers.contains(&COMMAND) {
        "it runs images, and the template has none".to_owned()
    } else {
        "it runs commands, and the template has only an image".to_owned()
    })
}

fn mismatch(agent: &Agent, wanted: &Placement) -> Option<String> {
    if let Some(platform) = wanted
        .platform
        .as_ref()
        .filter(|wanted| **wanted != agent.platform)
    {
        return Some(format!("platform is {:?}, not {platform:?}", agent.platform));
    }
    if let Some(region) = wanted.region.as_ref().filter(|wanted| **wanted != agent.region) {
        return Some(format!("region is {:?}, not {region:?}", agent.region));
    }
    let (key, value) = wanted
        .labels
        .iter()
        .find(|(key, value)| agent.labels.get(*key) != Some(value))?;
    Some(match agent.labels.get(key) {
        Some(has) => format!("label {key} is {has:?}, not {value:?}"),
        None => format!("has no label {key}={value}"),
    })
}

/// What it lacks, if anything.
fn room(agent: &Agent, cpu: u64, memory: u64) -> Option<String> {
    let Capacity {
        max_sessions,
        cpu: max_cpu,
        memory: max_memory,
    } = agent.capacity;
    let Usage {
        sessions,
        cpu: used_cpu,
        memory: used_memory,
    } = agent.allocated;
    if let Some(max) = max_sessions.filter(|max| sessions >= *max) {
        return Some(format!("all of its {max} sessions are taken"));
    }
    if let Some(max) = max_cpu.filter(|max| used_cpu.saturating_add(cpu) > *max) {
        let free = max.saturating_sub(used_cpu);
        return Some(format!("{cpu}m cpu do not fit: {free}m of {max}m are free"));
    }
    if let Some(max) = max_memory.filter(|max| used_memory.saturating_add(memory) > *max) {
        let free = max.saturating_sub(used_memory);
        return Some(format!(
            "{memory} bytes of memory do not fit: {free} of {max} are free"
        ));
    }
    None
}

/// A share of a capacity, as numerator and denominator; what is not counted is never full.
#[derive(Debug, Clone, Copy)]
struct Share(u128, u128);

impl Share {
    fn of(used: u64, capacity: Option<u64>) -> Self {
        match capacity {
            None => Self(0, 1),
            Some(0) => Self(u128::from(used > 0), 1),
            Some(capacity) => Self(used.into(), capacity.into()),
        }
    }

    /// Both sides are below 2^64, so the products fit.
    fn compare(self, other: Self) -> Ordering {
        (self.0 * other.1).cmp(&(other.0 * self.1))
    }
}

fn fullest(agent: &Agent) -> Share {
    let Capacity {
        max_sessions,
        cpu,
        memory,
    } = agent.capacity;
    [
        Share::of(agent.allocated.sessions.into(), max_sessions.map(u64::from)),
        Share::of(agent.allocated.cpu, cpu),
        Share::of(agent.allocated.memory, memory),
    ]
    .into_iter()
    .max_by(|a, b| a.compare(*b))
    .unwrap_or(Share(0, 1))
}

fn compare(a: &Agent, b: &Agent) -> Ordering {
    fullest(a)
        .compare(fullest(b))
        .then_with(|| a.allocated.sessions.cmp(&b.allocated.sessions))
        .then_with(|| a.id.cmp(&b.id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_compared_exactly() {
        let third = Share::of(1, Some(3));
        assert_eq!(
            third.compare(Share::of(333_333, Some(1_000_000))),
            Ordering::Greater
        );
        assert_eq!(third.compare(Share::of(2, Some(6))), Ordering::Equal);
        assert_eq!(
            Share::of(u64::MAX, Some(u64::MAX)).compare(Share::of(1, Some(1))),
            Ordering::Equal
        );
        assert_eq!(Share::of(5, None).compare(Share::of(0, Some(9))), Ordering::Equal);
    }
}
