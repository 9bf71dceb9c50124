//! Programs that write all the time through all nodes, as an operator's changes go on beside them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use regent_client::{Client, Error};
use regent_types::UserName;
use regent_types::auth::Quota;
use tokio::task::JoinHandle;

use crate::harness::eventually;

/// Writers at a time, and writes that they must get done after a change.
const WRITERS: u32 = 4;
const WRITES: usize = 80;

/// One durable write.
pub(crate) async fn write(client: &Client, number: u32) -> Result<(), Error> {
    let quota = Quota {
        sessions: Some(100 + number),
        ..Quota::default()
    };
    client.set_quota(&UserName::new("admin").unwrap(), &quota).await
}

/// Programs that write all the time.
pub(crate) struct Writers {
    tasks: Vec<JoinHandle<Vec<String>>>,
    done: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
}

impl Writers {
    /// Starts them.
    pub(crate) fn start(client: &Client) -> Self {
        let (done, stop) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let tasks = (0..WRITERS).map(|number| {
            let (done, stop) = (done.clone(), stop.clone());
            let client = client.with_deadline(Duration::from_secs(20));
            tokio::spawn(async move {
                let mut failed = Vec::new();
                while !stop.load(Ordering::SeqCst) {
                    match write(&client, number).await {
                        Ok(()) => drop(done.fetch_add(1, Ordering::SeqCst)),
                        Err(error) => failed.push(error.to_string()),
                    }
                }
                failed
            })
        });
        Self {
            tasks: tasks.collect(),
            done,
            stop,
        }
    }

    /// Waits until more was written.
    pub(crate) async fn go_on(&self) {
        let goal = self.done.load(Ordering::SeqCst) + WRITES;
        eventually("more writes", || async {
            (self.done.load(Ordering::SeqCst) >= goal).then_some(())
        })
        .await;
    }

    /// How many were acknowledged, and what failed.
    pub(crate) async fn end(self) -> (usize, Vec<String>) {
        self.stop.store(true, Ordering::SeqCst);
        let mut failed = Vec::new();
        for task in self.tasks {
            failed.extend(task.await.unwrap());
        }
        (self.done.load(Ordering::SeqCst), failed)
    }
}
