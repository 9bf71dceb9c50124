//! Clients of one user, who has a quota: they make sessions, put them to sleep, wake them and end them.
//!
//! Every request that makes something has a key and is sent again with it until its outcome is known, and sometimes
//! once more than needed; the key is a tag of the session too, so that a second one shows.

use std::time::Duration;

use hyper::Method;
use rand::RngExt;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use super::Place;
use super::World;
use super::http::{Ask, Client, Outcome};

/// Whose sessions they are. A second user would need a password, and a hash of one is made on a thread beside the
/// simulation's.
const USER: &str = "admin";
/// How many sessions the user may have: fewer than the clients together want.
pub const QUOTA: usize = 8;
/// The code of a refusal for it.
const OVER_QUOTA: &str = "quota_exceeded";
/// How often a request is sent.
const TRIES: usize = 5;

/// Uses sessions until the end of the run.
pub async fn run(world: World, place: Place, name: String, mut rng: StdRng) {
    let mut client = Client::new(world.clone(), place.host, name.clone());
    let mut own: Vec<String> = Vec::new();
    let mut number = 0_u64;
    limit(&world, &mut client, &mut rng).await;
    while !world.is_ending() {
        tokio::time::sleep(Duration::from_millis(rng.random_range(50..1_500))).await;
        if own.is_empty() || (own.len() < 12 && rng.random_bool(0.35)) {
            number += 1;
            let key = format!("{name}-{number}").replace(' ', "-");
            if let Some(session) = create(&world, &mut client, &key, &mut rng).await {
                world.book().sessions.push((key, session.clone()));
                own.push(session);
            }
            continue;
        }
        let session = own[rng.random_range(0..own.len())].clone();
        let node = rng.random_range(0..world.nodes);
        let path = format!("/sessions/{session}");
        let ask = match rng.random_range(0..10) {
            0..4 => Ask::new(Method::PUT, format!("{path}/hibernate"), Value::Null),
            4..8 => Ask::new(Method::PUT, format!("{path}/wake"), Value::Null),
            _ => {
                own.retain(|other| *other != session);
                Ask::new(Method::DELETE, path, Value::Null)
            }
        };
        client.ask(node, ask).await;
    }
    world.book().done += 1;
}

/// Gives the user the quota, and comes back when there is one.
async fn limit(world: &World, client: &mut Client, rng: &mut StdRng) {
    while !world.is_ending() {
        let node = rng.random_range(0..world.nodes);
        let path = format!("/users/{USER}/quota");
        let ask = Ask::new(Method::PUT, path, json!({"sessions": QUOTA}));
        if let Outcome::Done(_) = client.ask(node, ask).await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(rng.random_range(50..500))).await;
    }
}

/// Gives the session's name, once it is known.
async fn create(world: &World, client: &mut Client, key: &str, rng: &mut StdRng) -> Option<String> {
    let mut found: Option<String> = None;
    for _ in 0..TRIES {
        let node = rng.random_range(0..world.nodes);
        let body = json!({"template": "demo", "tags": [key], "whenFull": "queue"});
        let ask = Ask::new(Method::POST, "/sessions", body).with("idempotency-key", key);
        match client.ask(node, ask).await {
            Outcome::Done(answer) => {
                let name = answer.body["name"].as_str()?.to_owned();
                if let Some(before) = found.filter(|before| *before != name) {
                    let what = format!("{}: {key} made {before}, and again {name}", world.now());
                    world.book().doubled.push(what);
                }
                found = Some(name);
                if rng.random_bool(0.7) {
                    break;
                }
            }
            Outcome::Refused(answer) if answer.code() == OVER_QUOTA => {
                let now = world.now();
                let mut book = world.book();
                book.over_quota += 1;
                // What was made before is the answer, however full it is by now.
                if let Some(before) = &found {
                    let what = format!("{now}: {key} made {before}, and then there was no room for it");
                    book.doubled.push(what);
                }
                break;
            }
            Outcome::Refused(_) | Outcome::NotSent | Outcome::Unknown => {}
        }
    }
    found
}
