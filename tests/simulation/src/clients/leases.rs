//! Candidates for a few leases, which believe in their guard and in nothing else.
//!
//! Each takes a lease, keeps it alive for a while by the shipped guard (`regent_client::guard`) on its own machine's
//! clock, and gives it back or just falls silent. What is recorded is what it believed: from when until when it would
//! have acted, turned from its own clock into the time of the simulation.
//!
//! An intruder tries tokens that are over beside them: no node may accept one once a newer one is out.

use std::time::Duration;

use hyper::Method;
use rand::RngExt;
use rand::rngs::StdRng;
use regent_client::guard::Guard;
use regent_history::lease::Tenure;
use serde_json::json;

use super::http::{Ask, Client, Outcome};
use super::{Place, World};
use crate::machine::boot_ms;

/// How many leases there are.
const LEASES: usize = 3;
/// Their TTL in milliseconds.
const TTL_MS: std::ops::Range<u64> = 1_000..4_000;
/// How long one is held at most, in milliseconds.
const HOLD_MS: std::ops::Range<u64> = 500..25_000;
/// Of the newest tokens of a lease, how many the intruder chooses from.
const TRIED: usize = 4;
/// Its pause, in milliseconds.
const INTRUDE_MS: std::ops::Range<u64> = 20..300;

/// Campaigns until the end of the run.
pub async fn run(world: World, place: Place, name: String, mut rng: StdRng) {
    let mut client = Client::new(world.clone(), place.host, name.clone());
    let mut number = 0_u64;
    while !world.is_ending() {
        tokio::time::sleep(Duration::from_millis(rng.random_range(10..800))).await;
        number += 1;
        let lease = format!("lease-{}", rng.random_range(0..LEASES));
        let ttl_ms = rng.random_range(TTL_MS);
        campaign(
            &world,
            &mut client,
            place,
            &name,
            number,
            &lease,
            ttl_ms,
            &mut rng,
        )
        .await;
    }
    world.book().done += 1;
}

/// Tries tokens that are over, and such as are not, at any node until the end of the run.
pub async fn intrude(world: World, place: Place, name: String, mut rng: StdRng) {
    let mut client = Client::new(world.clone(), place.host, name.clone());
    while !world.is_ending() {
        tokio::time::sleep(Duration::from_millis(rng.random_range(INTRUDE_MS))).await;
        let lease = format!("lease-{}", rng.random_range(0..LEASES));
        let tokens: Vec<u64> = match world.book().fenced.get(&lease) {
            Some(fenced) => fenced.grants.iter().map(|grant| grant.token).collect(),
            None => continue,
        };
        let Some(newest) = tokens.iter().copied().max() else {
            continue;
        };
        let recent = &tokens[tokens.len().saturating_sub(TRIED)..];
        let token = recent[rng.random_range(0..recent.len())];
        // A current one is only looked at: renewing it is its holder's business.
        let what = if token < newest && rng.random_bool(0.5) {
            "renew"
        } else {
            "verify"
        };
        let node = rng.random_range(0..world.nodes);
        let path = format!("/leases/{lease}/{what}");
        let invoked = world.now();
        let ask = Ask::new(Method::POST, path, json!({"token": token}));
        if let Outcome::Done(_) = client.ask(node, ask).await {
            let by = format!("{name}: {what} at node {}", node + 1);
            world.book().accepted(&lease, by, token, invoked);
        }
    }
    world.book().done += 1;
}

#[allow(clippy::too_many_arguments)] // one step of `run`, apart because it ends in many ways
async fn campaign(
    world: &World,
    client: &mut Client,
    place: Place,
    name: &str,
    number: u64,
    lease: &str,
    ttl_ms: u64,
    rng: &mut StdRng,
) {
    let mut guard = Guard::new(ttl_ms);
    let wait_ms = if rng.random_bool(0.7) {
        rng.random_range(100..8_000)
    } else {
        0
    };
    let key = format!("{name}-{number}").replace(' ', "-");
    let path = format!("/leases/{lease}");
    let mut granted = None;
    // A repetition with the same key finds the place in the queue, or the grant.
    for _ in 0..3 {
        let node = rng.random_range(0..world.nodes);
        let body = json!({"holder": name, "ttlMs": ttl_ms, "waitMs": wait_ms});
        let ask =
            Ask::new(Method::POST, format!("{path}/acquire"), body).with("idempotency-key", key.clone());
        let seq = guard.sending(boot_ms());
        match client
            .ask_within(node, ask, Duration::from_millis(wait_ms + 4_000))
            .await
        {
            Outcome::Done(answer) => {
                granted = answer.body["token"].as_u64();
                if answer.body["waited"] == false {
                    guard.acknowledged(seq, ttl_ms);
                }
                break;
            }
            Outcome::Refused(answer) if answer.status == 409 => return,
            Outcome::Refused(_) | Outcome::NotSent | Outcome::Unknown => {}
        }
    }
    let Some(token) = granted else {
        return;
    };
    world.book().granted(lease, name, token, world.now());
    let mut tenure = Tenure {
        holder: name.to_owned(),
        token,
        valid: Vec::new(),
        ended: None,
    };
    believe(world, place, &guard, &mut tenure);
    let until = boot_ms() + rng.random_range(HOLD_MS);
    let mut lost = false;
    // As the shipped client does: one node as long as it answers.
    let mut node = rng.random_range(0..world.nodes);
    while boot_ms() < until && !lost && !world.is_ending() {
        let due = guard.next_keepalive().saturating_sub(boot_ms());
        if guard.is_valid(boot_ms()) {
            tokio::time::sleep(Duration::from_millis(due)).await;
        }
        let ask = Ask::new(Method::POST, format!("{path}/renew"), json!({"token": token}));
        let seq = guard.sending(boot_ms());
        let invoked = world.now();
        match client
            .ask_within(node, ask, Duration::from_millis(ttl_ms / 2))
            .await
        {
            Outcome::Done(answer) => {
                world
                    .book()
                    .accepted(lease, format!("{name}: renew"), token, invoked);
                if guard.acknowledged(seq, answer.body["ttlMs"].as_u64().unwrap_or(ttl_ms)) {
                    believe(world, place, &guard, &mut tenure);
                }
            }
            Outcome::Refused(answer) if answer.status == 409 || answer.status == 404 => lost = true,
            Outcome::Refused(_) | Outcome::NotSent | Outcome::Unknown => {
                tokio::time::sleep(Duration::from_millis(50)).await;
                node = rng.random_range(0..world.nodes);
            }
        }
    }
    if rng.random_bool(0.6) {
        // It stops acting before it says so.
        guard.lost();
        tenure.ended = Some(world.now());
        let node = rng.random_range(0..world.nodes);
        let ask = Ask::new(Method::POST, format!("{path}/release"), json!({"token": token}));
        keep(world, lease, tenure);
        client.ask(node, ask).await;
    } else {
        keep(world, lease, tenure);
    }
}

/// Notes until when it believes now.
fn believe(world: &World, place: Place, guard: &Guard, tenure: &mut Tenure) {
    if guard.is_valid(boot_ms()) {
        tenure
            .valid
            .push((world.now(), place.rate.when(guard.valid_until())));
    }
}

fn keep(world: &World, lease: &str, tenure: Tenure) {
    let mut book = world.book();
    book.leases.entry(lease.to_owned()).or_default().push(tenure);
}
