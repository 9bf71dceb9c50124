//! Watchers of all events, each over one stream after another and from one node after another.
//!
//! Each begins with the first event there ever was and goes on after the last that it saw, so all that one saw over
//! the whole run is one part of the log without a gap. Nothing is pruned in a run: who is told that events are gone
//! has lost them.

use std::time::Duration;

use bytes::BytesMut;
use http_body_util::BodyExt;
use hyper::Method;
use hyper::body::Incoming;
use rand::RngExt;
use rand::rngs::StdRng;
use regent_history::watch::{Event, Watched};
use serde_json::Value;
use tokio::time::timeout;

use super::http::{Ask, Client};
use super::{Place, World};
use crate::machine::boot_ms;

/// A place before all events.
const BEGINNING: &str = "0.0";
/// Pause before a stream is opened, in milliseconds.
const PAUSE_MS: std::ops::Range<u64> = 10..500;
/// How long one stream is read, in milliseconds; one that hangs is left then as well.
const STAY_MS: std::ops::Range<u64> = 200..12_000;
/// How often it is looked whether it is time to leave.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How many of the streams begin with what the node has, without asking the cluster.
const STALE: f64 = 0.5;

/// Watches until the end of the run.
pub async fn run(world: World, place: Place, name: String, mut rng: StdRng) {
    let mut client = Client::new(world.clone(), place.host, name.clone());
    let at = {
        let mut book = world.book();
        book.watched.push(Watched {
            watcher: name.clone(),
            events: Vec::new(),
        });
        book.watched.len() - 1
    };
    let mut last = BEGINNING.to_owned();
    while !world.is_ending() {
        tokio::time::sleep(Duration::from_millis(rng.random_range(PAUSE_MS))).await;
        let node = rng.random_range(0..world.nodes);
        let consistency = if rng.random_bool(STALE) {
            "stale"
        } else {
            "linearizable"
        };
        let path = format!("/events?consistency={consistency}");
        let ask = Ask::new(Method::GET, path, Value::Null).with("last-event-id", last.clone());
        let gone = match client.open(node, ask).await {
            Some((200, body)) => {
                let until = boot_ms() + rng.random_range(STAY_MS);
                follow(&world, body, at, until, &mut last).await
            }
            Some((410, _)) => true,
            Some(_) | None => false,
        };
        if gone {
            let now = world.now();
            let what = format!("{now}: {name} cannot go on after {last} at node {}", node + 1);
            world.book().broken.push(what);
        }
    }
    world.book().done += 1;
}

/// Reads one stream, and says whether it ended since events are gone.
async fn follow(world: &World, mut body: Incoming, at: usize, until: u64, last: &mut String) -> bool {
    let mut unread = BytesMut::new();
    while !world.is_ending() && boot_ms() < until {
        let frame = match timeout(LOOK_EVERY, body.frame()).await {
            Err(_) => continue,
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(_)) | None) => return false,
        };
        unread.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
        // What is not whole is not an event.
        while let Some(end) = unread.windows(2).position(|two| two == b"\n\n") {
            let block = unread.split_to(end + 2);
            let block = String::from_utf8_lossy(&block);
            let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name));
            if field("event: ") == Some("gone") {
                return true;
            }
            // A block without an id keeps the stream alive.
            let (Some(id), Some(content)) = (field("id: "), field("data: ")) else {
                continue;
            };
            let mut book = world.book();
            match parse(id) {
                Some(id) => book.watched[at].events.push(Event {
                    id,
                    content: content.to_owned(),
                }),
                None => book.surprises.push(format!("an event has the id {id}")),
            }
            id.clone_into(last);
        }
    }
    false
}

/// The revision, and which event of it.
fn parse(id: &str) -> Option<(u64, u64)> {
    let (revision, number) = id.split_once('.')?;
    Some((revision.parse().ok()?, number.parse().ok()?))
}
