//! The reconcilers: what must happen though nobody asks for it now.
//!
//! Overdue commands and sessions, drains, idle and over-long sessions, sessions that wait for room, and
//! forgetting. They run on the leader only, take no input, and are woken by what is applied and by time.
//! Everything they do is an operation that apply checks again, so a look at a state that is a little old
//! does no harm.

mod due;

use std::collections::BTreeMap;
use std::time::Duration;

use futures::StreamExt;
use regent_raft::View;
use regent_state::{Leadership, Outcome};
use regent_types::Revision;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::due::Item;
use crate::ids;
use crate::leader::Leader;
use crate::service::Service;

/// Shortest time between two looks: under load every look covers many applied operations.
const PAUSE: Duration = Duration::from_millis(100);
/// Longest time between two looks.
const PERIOD: Duration = Duration::from_secs(5);
/// Proposals under way at once.
const UNDER_WAY: usize = 32;
/// How long an operation that changed nothing, or was not written, is left alone.
const REST: Duration = Duration::from_secs(2);

/// Runs until `stop`; does something only while this node leads.
pub(crate) async fn run(service: Service, leader: std::sync::Arc<Leader>, stop: CancellationToken) {
    let mut leadership = service.node().leadership();
    let mut applied = service.node().applied();
    let mut tried = Tried::default();
    loop {
        applied.mark_unchanged();
        let mine = leadership.borrow_and_update().mine;
        let mut sleep = PERIOD;
        if let Some(mine) = mine {
            sleep = look(&service, &leader, mine, &mut tried).await;
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            changed = leadership.changed() => if changed.is_err() { return },
            changed = applied.changed(), if mine.is_some() => if changed.is_err() { return },
            () = tokio::time::sleep(sleep) => {}
        }
    }
}

/// One look; gives how long until something is due.
async fn look(service: &Service, leader: &Leader, mine: Leadership, tried: &mut Tried) -> Duration {
    let view = service.node().view();
    let now = service.node().cluster_now();
    // No answer means that a newer leadership has begun.
    let Some(idleness) = leader.idleness(mine) else {
        return PERIOD;
    };
    let due = due::look(
        &view.state,
        now,
        |session| idleness.last(session),
        ids::command_id,
    );
    let next = due
        .next
        .map_or(PERIOD, |at| Duration::from_millis(at.saturating_sub(now) + 1));
    let mut items = due.operations;
    items.extend(place(&view, now, tried));
    items.retain(|item| tried.may_try(item));
    let rest = !items.is_empty();
    futures::stream::iter(items)
        .for_each_concurrent(UNDER_WAY, |item| propose(service, item))
        .await;
    if rest { REST.min(next) } else { next.min(PERIOD) }
}

/// Placing is tried again only when something was applied since.
fn place(view: &View, now: u64, tried: &mut Tried) -> Option<Item> {
    if tried.placed_at == Some(view.revision) {
        return None;
    }
    tried.placed_at = Some(view.revision);
    due::placeable(&view.state, now, ids::command_id)
}

async fn propose(service: &Service, item: Item) {
    let about = item.about;
    match service
        .propose_own(item.operation)
        .await
        .map(|proposed| proposed.applied)
    {
        Ok(Ok(Outcome::Stale)) => tracing::debug!(about, "what was due had changed"),
        Ok(Ok(_)) => {
            metrics::counter!("regent_reconciled_total").increment(1);
            tracing::debug!(about, "reconciled");
        }
        Ok(Err(rejection)) => tracing::debug!(about, %rejection, "what was due was rejected"),
        Err(error) => tracing::debug!(about, %error, "what is due was not written; it is tried again"),
    }
}

/// What was proposed lately, so that an operation that changes nothing is not written over and over.
#[derive(Default)]
struct Tried {
    items: BTreeMap<String, (Revision, Instant)>,
    placed_at: Option<Revision>,
}

impl Tried {
    fn may_try(&mut self, item: &Item) -> bool {
        let now = Instant::now();
        if self.items.len() >= 4 * due::MAX_DUE {
            self.items.retain(|_, (_, at)| now.duration_since(*at) < REST);
        }
        match self.items.get(&item.about) {
            Some((changed, at)) if *changed == item.changed && now.duration_since(*at) < REST => false,
            _ => {
                self.items.insert(item.about.clone(), (item.changed, now));
                true
            }
        }
    }
}
