//! Clients of a few registers, for linearizability: templates, whose image is the value.
//!
//! A register is written, read, and written on the condition that it is what it was when it was read (`If-Match`).
//! Few registers and many clients, so that they get in each other's way.

use std::time::Duration;

use hyper::Method;
use rand::RngExt;
use rand::rngs::StdRng;
use regent_history::register::{Call, Op};
use serde_json::{Value, json};

use super::http::{Ask, Client, Outcome};
use super::{Place, World, begin, ended};

/// How many registers there are.
const REGISTERS: usize = 3;
/// Pause between two calls of a client, in milliseconds.
const PAUSE_MS: std::ops::Range<u64> = 5..200;

/// Calls until the end of the run.
pub async fn run(world: World, place: Place, number: u32, mut rng: StdRng) {
    let mut client = Client::new(world.clone(), place.host, format!("client {number}"));
    let mut written = 0;
    while !world.is_ending() {
        tokio::time::sleep(Duration::from_millis(rng.random_range(PAUSE_MS))).await;
        let register = format!("register-{}", rng.random_range(0..REGISTERS));
        let node = rng.random_range(0..world.nodes);
        written += 1;
        let value = u64::from(number) * 1_000_000 + written;
        match rng.random_range(0..100) {
            0..40 => {
                read(&world, &mut client, number, &register, node).await;
            }
            40..75 => {
                let op = Op::Write(value);
                write(&world, &mut client, number, &register, node, op, None).await;
            }
            _ => {
                let found = read(&world, &mut client, number, &register, node).await;
                let Some((expected, Some(etag))) = found else {
                    continue;
                };
                let node = rng.random_range(0..world.nodes);
                let op = Op::Cas { expected, new: value };
                write(&world, &mut client, number, &register, node, op, Some(etag)).await;
            }
        }
    }
    world.book().done += 1;
}

/// Reads each register on each node, at the end of a run.
pub async fn read_all(world: World, place: Place, number: u32) {
    let mut client = Client::new(world.clone(), place.host, format!("client {number}"));
    for node in 0..world.nodes {
        for register in 0..REGISTERS {
            let register = format!("register-{register}");
            if read(&world, &mut client, number, &register, node).await.is_none() {
                let surprise = format!("{}: {register} cannot be read at node {}", world.now(), node + 1);
                world.book().surprises.push(surprise);
            }
        }
    }
    world.book().done += 1;
}

/// Gives the value and its `ETag`.
async fn read(
    world: &World,
    client: &mut Client,
    number: u32,
    register: &str,
    node: usize,
) -> Option<(u64, Option<String>)> {
    let invoked = begin(world.now());
    let ask = Ask::new(Method::GET, format!("/templates/{register}"), Value::Null);
    let (seen, etag) = match client.ask(node, ask).await {
        Outcome::Done(answer) => (value_of(&answer.body)?, answer.etag),
        Outcome::Refused(answer) if answer.status == 404 => (0, None),
        Outcome::Refused(_) | Outcome::NotSent | Outcome::Unknown => return None,
    };
    record(
        world,
        register,
        Call {
            client: number,
            invoked,
            returned: Some(ended(world.now())),
            op: Op::Read,
            seen: Some(seen),
        },
    );
    Some((seen, etag))
}

async fn write(
    world: &World,
    client: &mut Client,
    number: u32,
    register: &str,
    node: usize,
    op: Op,
    if_match: Option<String>,
) {
    let (Op::Write(value) | Op::Cas { new: value, .. }) = op else {
        return;
    };
    let invoked = begin(world.now());
    let body = json!({
        "apiVersion": "stream.space/v1alpha1", "kind": "Template",
        "metadata": {"name": register}, "spec": {"baseImage": format!("v{value}")},
    });
    let mut ask = Ask::new(Method::PUT, format!("/templates/{register}"), body);
    if let Some(etag) = if_match {
        ask = ask.with("if-match", etag);
    }
    let returned = match client.ask(node, ask).await {
        Outcome::Done(_) => Some(ended(world.now())),
        Outcome::Unknown => None,
        Outcome::Refused(_) | Outcome::NotSent => return,
    };
    record(
        world,
        register,
        Call {
            client: number,
            invoked,
            returned,
            op,
            seen: None,
        },
    );
}

fn value_of(template: &Value) -> Option<u64> {
    template["manifest"]["spec"]["baseImage"]
        .as_str()?
        .strip_prefix('v')?
        .parse()
        .ok()
}

fn record(world: &World, register: &str, call: Call) {
    let mut book = world.book();
    book.registers.entry(register.to_owned()).or_default().push(call);
}
