//! Writers that go on through faults: each writes in a closed loop with a short patience, and goes to the next member
//! when a request fails or takes too long. They count the longest time in which nobody got an acknowledgement, and
//! remember what was acknowledged, so that it can be read back.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use serde_json::Value;
use tokio::task::JoinHandle;

use super::write::{paths, tags};
use crate::cluster::etcd::Etcd;
use crate::cluster::{Cluster, MEMBERS};
use crate::grpc::{Call, Channel};
use crate::http::Connection;
use crate::rpc::{PutRequest, PutResponse, RangeRequest, RangeResponse};

/// How many write.
pub(super) const WRITERS: usize = 16;
/// The records that they write to, each of them its own.
pub(super) const RECORDS: usize = 256;
/// How long one waits after a failure: a dead member refuses at once, and must not be spun on.
const AFTER_FAILURE: Duration = Duration::from_millis(10);
/// How long a value that is read back may take.
const READ_WITHIN: Duration = Duration::from_secs(10);

/// What was acknowledged, and when.
pub(super) struct Acks {
    /// The last acknowledgement.
    last: Instant,
    /// The longest time without one since [`Writers::mark`].
    longest: Duration,
    pub(super) acknowledged: u64,
    /// By the member that the request was sent to.
    pub(super) failed: [u64; MEMBERS],
    pub(super) failure: Option<String>,
}

/// What one record may hold: what was acknowledged last, or what failed and may yet have been done.
#[derive(Default)]
struct Book {
    acknowledged: Option<u64>,
    unknown: Vec<u64>,
}

/// By record.
pub(super) struct Books(BTreeMap<usize, Book>);

/// Writers that write until they are stopped.
pub(super) struct Writers {
    acks: Arc<Mutex<Acks>>,
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<anyhow::Result<BTreeMap<usize, Book>>>>,
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

impl Writers {
    /// Starts them, spread over all members. `first` is the first word that they write: above those of earlier ones.
    pub(super) fn start(cluster: &Cluster, patience: Duration, first: u64) -> Self {
        let acks = Arc::new(Mutex::new(Acks {
            last: Instant::now(),
            longest: Duration::ZERO,
            acknowledged: 0,
            failed: [0; MEMBERS],
            failure: None,
        }));
        let stop = Arc::new(AtomicBool::new(false));
        let target = Arc::new(Target::of(cluster));
        let tasks = (0..WRITERS).map(|number| {
            let writer = Writer {
                number,
                member: number % MEMBERS,
                link: None,
                target: target.clone(),
                acks: acks.clone(),
                stop: stop.clone(),
                patience,
            };
            tokio::spawn(writer.run(first))
        });
        Self {
            tasks: tasks.collect(),
            acks,
            stop,
        }
    }

    pub(super) fn acks(&self) -> MutexGuard<'_, Acks> {
        self.acks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the longest time without an acknowledgement from here on; what began before counts whole.
    pub(super) fn mark(&self) {
        self.acks().longest = Duration::ZERO;
    }

    /// The longest time without an acknowledgement since the mark.
    pub(super) fn longest(&self) -> Duration {
        let acks = self.acks();
        acks.longest.max(acks.last.elapsed())
    }

    /// Ends them; gives what the records may hold.
    pub(super) async fn stop(mut self) -> anyhow::Result<Books> {
        self.stop.store(true, Relaxed);
        let mut books = BTreeMap::new();
        for task in std::mem::take(&mut self.tasks) {
            books.extend(task.await??);
        }
        Ok(Books(books))
    }
}

impl Books {
    /// Reads every record; gives those that hold neither what was acknowledged last nor what may have been done
    /// since.
    pub(super) async fn lost(&self, cluster: &Cluster) -> anyhow::Result<Vec<String>> {
        let target = Target::of(cluster);
        let mut link = target.open(0).await?;
        let mut lost = Vec::new();
        for (record, book) in &self.0 {
            let Some(acknowledged) = book.acknowledged else {
                continue;
            };
            let read = tokio::time::timeout(READ_WITHIN, target.read(&mut link, *record));
            let found = read.await.context("a read was not answered")??;
            if found != acknowledged && !book.unknown.contains(&found) {
                lost.push(format!(
                    "record {record} holds {found:x} instead of {acknowledged:x}"
                ));
            }
        }
        Ok(lost)
    }
}

struct Writer {
    number: usize,
    member: usize,
    link: Option<Link>,
    target: Arc<Target>,
    acks: Arc<Mutex<Acks>>,
    stop: Arc<AtomicBool>,
    patience: Duration,
}

impl Writer {
    async fn run(mut self, first: u64) -> anyhow::Result<BTreeMap<usize, Book>> {
        let mut books: BTreeMap<usize, Book> = BTreeMap::new();
        let own: Vec<usize> = (self.number..RECORDS).step_by(WRITERS).collect();
        for word in first.. {
            if self.stop.load(Relaxed) {
                break;
            }
            let record = own[usize::try_from(word)? % own.len()];
            let book = books.entry(record).or_default();
            let outcome = match tokio::time::timeout(self.patience, self.write(record, word)).await {
                Ok(outcome) => outcome,
                Err(_elapsed) => Err(anyhow::anyhow!("no answer within {:?}", self.patience)),
            };
            if let Err(error) = outcome {
                self.note(Some(&error));
                // It may have been done, or may yet be.
                book.unknown.push(word);
                self.link = None;
                self.member = (self.member + 1) % MEMBERS;
                tokio::time::sleep(AFTER_FAILURE).await;
            } else {
                self.note(None);
                book.acknowledged = Some(word);
            }
        }
        Ok(books)
    }

    /// One request has ended.
    fn note(&self, error: Option<&anyhow::Error>) {
        let now = Instant::now();
        let mut acks = self.acks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = error {
            acks.failed[self.member] += 1;
            acks.failure.get_or_insert_with(|| format!("{error:#}"));
        } else {
            acks.longest = acks.longest.max(now.saturating_duration_since(acks.last));
            acks.last = now;
            acks.acknowledged += 1;
        }
    }

    async fn write(&mut self, record: usize, word: u64) -> anyhow::Result<()> {
        if self.link.is_none() {
            self.link = Some(self.target.open(self.member).await?);
        }
        let link = self.link.as_mut().context("it was just opened")?;
        self.target.write(link, record, word).await
    }
}

/// Where to write.
struct Target {
    addresses: Vec<SocketAddr>,
    /// Regent's; etcd has no paths and no token.
    regent: Option<(String, Arc<[String]>)>,
}

/// A connection.
enum Link {
    Etcd(Channel, Call<PutRequest, PutResponse>),
    Regent(Connection, Vec<u8>),
}

impl Target {
    fn of(cluster: &Cluster) -> Self {
        Self {
            addresses: cluster.members().iter().map(|member| member.address).collect(),
            regent: match cluster {
                Cluster::Etcd(_) => None,
                Cluster::Regent(regent) => Some((regent.token.clone(), paths(regent, ""))),
            },
        }
    }

    async fn open(&self, member: usize) -> anyhow::Result<Link> {
        let address = self.addresses[member];
        match &self.regent {
            None => {
                let channel = Channel::open(address).await?;
                let call = channel.method("/etcdserverpb.KV/Put")?;
                Ok(Link::Etcd(channel, call))
            }
            Some((token, _)) => Ok(Link::Regent(Connection::open(address, token).await?, Vec::new())),
        }
    }

    async fn write(&self, link: &mut Link, record: usize, word: u64) -> anyhow::Result<()> {
        match (link, &self.regent) {
            (Link::Etcd(_, put), _) => {
                let mut value = Vec::with_capacity(256);
                for part in 0..8 {
                    write!(value, "{word:016x}{part:016x}")?;
                }
                put.call(&PutRequest {
                    key: Etcd::key(record),
                    value: Bytes::from(value),
                    lease: 0,
                })
                .await?;
            }
            (Link::Regent(connection, body), Some((_, paths))) => {
                tags(body, word)?;
                let path = paths.get(record).context("too few sessions")?;
                connection.request("PATCH", path, body).await?.ok()?;
            }
            (Link::Regent(..), None) => bail!("a connection of another system"),
        }
        Ok(())
    }

    /// The word that a record holds, read linearizably.
    async fn read(&self, link: &mut Link, record: usize) -> anyhow::Result<u64> {
        let word = |text: &str| -> anyhow::Result<u64> {
            let digits = text
                .get(..16)
                .with_context(|| format!("a short value: {text:?}"))?;
            u64::from_str_radix(digits, 16).with_context(|| format!("not a word: {digits:?}"))
        };
        match (link, &self.regent) {
            (Link::Etcd(channel, _), _) => {
                let request = RangeRequest {
                    key: Etcd::key(record),
                    ..RangeRequest::default()
                };
                let answer: RangeResponse = channel.once("/etcdserverpb.KV/Range", &request).await?;
                ensure!(answer.kvs.len() == 1, "record {record} is gone");
                word(std::str::from_utf8(&answer.kvs[0].value)?)
            }
            (Link::Regent(connection, _), Some((_, paths))) => {
                let path = paths.get(record).context("too few sessions")?;
                let session: Value = connection.request("GET", path, b"").await?.json()?;
                word(session["tags"][0].as_str().context("a session without tags")?)
            }
            (Link::Regent(..), None) => bail!("a connection of another system"),
        }
    }
}
