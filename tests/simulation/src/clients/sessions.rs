//! A user who makes sessions, puts them to sleep, wakes them and ends them.
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

/// How often a request is sent.
const TRIES: usize = 5;

/// Uses sessions until the end of the run.
pub async fn run(world: World, place: Place, name: String, mut rng: StdRng) {
    let mut client = Client::new(world.clone(), place.host, name.clone());
    let mut own: Vec<String> = Vec::new();
    let mut number = 0_u64;
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

/// Gives the session's name, once it is known.
async fn create(world: &World, client: &mut Client, key: &str, rng: &mut StdRng) -> Option<String> {
    let mut found: Option<String> = None;
    for _ in 0..TRIES {
        let node = rng.random_range(0..world.nodes);
        let body = json!({"template": "demo", "tags": [key], "whenFull": "queue"});
        let ask = Ask::new(Method::POST, "/sessions", body).with("idempotency-key", key);
        if let Outcome::Done(answer) = client.ask(node, ask).await {
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
    }
    found
}
