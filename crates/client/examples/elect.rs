//! One of many copies of this program works at a time: `REGENT_URL=... REGENT_TOKEN=... cargo run -p
//! regent-client --example elect`. Start it twice, and end the first in any way you like.

#![allow(clippy::print_stdout)] // it shows what it does

use std::time::Duration;

use regent_client::{Client, LeaderElector, Leadership};
use regent_types::LeaseName;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    // All nodes, separated by commas: with one of them only, its loss would be the loss of the lease.
    let servers = std::env::var("REGENT_URL").unwrap_or_else(|_| "http://127.0.0.1:8000".to_owned());
    let client = Client::new(servers.split(','), std::env::var("REGENT_TOKEN").ok())?;
    let me = format!("elect/{}", std::process::id());
    let elector = LeaderElector::new(client, LeaseName::new("jobs/example")?, me);
    loop {
        // Waits its turn, first come, first served.
        let leadership = elector.campaign().await?;
        println!("leading under token {}", leadership.token());
        tokio::select! {
            () = work(&leadership) => {
                leadership.resign().await?;
                return Ok(());
            }
            standing = leadership.invalid() => println!("leading no more: {standing:?}"),
        }
        // Dropped here, so given back if it had only lapsed.
    }
}

async fn work(leadership: &Leadership) {
    for step in 1..=60 {
        // Ask right before acting. Between this and the act there is still a moment, so whatever must not happen
        // twice is given the token, and refuses one that is older than what it has seen.
        if !leadership.is_valid() {
            return;
        }
        println!("step {step} under token {}", leadership.token());
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}
