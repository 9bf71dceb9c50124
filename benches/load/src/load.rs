//! Many clients at a time, and what they saw.
//!
//! Closed loop: each client sends its next request when the last one is answered, so a stall is one long
//! sample a client, and latencies under saturation are queueing. Open loop (`--rate`): requests are due at a
//! steady pace whether or not those before them were answered, and latencies count from when they were due,
//! so a stall is in every sample that it delayed (no coordinated omission).

use std::time::{Duration, Instant};

use serde::{Serialize, Serializer};

use crate::cluster::Cluster;
use crate::machine;
use crate::measure::{Latencies, Metric, Values};
use crate::pace::Timer;
use crate::process::Usage;

/// How long a client waits after a failure: a dead member refuses at once, and must not be spun on.
const AFTER_FAILURE: Duration = Duration::from_millis(10);

/// One client.
pub(crate) trait Client: Send + 'static {
    /// Its `n`-th request, from 0. Gives of which kind it was, from 0.
    fn request(&mut self, n: u64) -> impl Future<Output = anyhow::Result<usize>> + Send;
    /// A new connection in place of one that failed.
    fn reopen(&mut self) -> impl Future<Output = anyhow::Result<()>> + Send;
}

/// How they are driven.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Plan {
    /// Driven, but not counted.
    #[serde(serialize_with = "as_seconds")]
    pub(crate) warm_up: Duration,
    #[serde(serialize_with = "as_seconds")]
    pub(crate) measure: Duration,
    /// Of all clients together, a second; closed loop without it.
    pub(crate) rate: Option<f64>,
    /// A request that takes longer is given up and has failed.
    #[serde(serialize_with = "as_seconds")]
    pub(crate) timeout: Duration,
}

/// For JSON.
pub(crate) fn as_seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}

/// What they saw, together.
pub(crate) struct Seen {
    /// When the clients were started: in an open loop, when the first request was due.
    pub(crate) start: Instant,
    /// When it began to count.
    pub(crate) begin: Instant,
    /// By kind: the latencies of requests that were begun (or due) in the measured time.
    pub(crate) latencies: Vec<Latencies>,
    /// By kind: answers that came in the measured time.
    pub(crate) answers: Vec<u64>,
    /// All requests that were done, in the warm-up too.
    pub(crate) done: u64,
    /// Requests that failed, in the warm-up too.
    pub(crate) failed: u64,
    pub(crate) failure: Option<String>,
    /// What the members and the generator used meanwhile.
    pub(crate) used: Used,
}

/// What was used over the measured time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Used {
    pub(crate) seconds: f64,
    pub(crate) cores: f64,
    pub(crate) generator_cores: f64,
    pub(crate) other_cores: f64,
    pub(crate) member_mb: f64,
}

impl Used {
    pub(crate) fn write(&self, values: &mut Values) {
        values.insert(Metric::Cores, self.cores);
        values.insert(Metric::GeneratorCores, self.generator_cores);
        values.insert(Metric::OtherCores, self.other_cores);
        values.insert(Metric::MemberMb, self.member_mb);
    }
}

impl Seen {
    /// The row of one kind of requests.
    pub(crate) fn values(&self, kind: usize) -> Values {
        let mut values = Values::new();
        values.insert(Metric::Rate, self.answers[kind] as f64 / self.used.seconds);
        self.latencies[kind].write(&mut values);
        self.used.write(&mut values);
        values.insert(Metric::Failed, self.failed as f64);
        values
    }
}

/// Drives the clients. `kinds` is how many kinds of requests they have.
pub(crate) async fn drive<C: Client>(
    cluster: &Cluster,
    clients: Vec<C>,
    kinds: usize,
    plan: Plan,
) -> anyhow::Result<Seen> {
    let count = clients.len();
    let start = Instant::now();
    let begin = start + plan.warm_up;
    let end = begin + plan.measure;
    let mut tasks = Vec::with_capacity(count);
    for (number, client) in clients.into_iter().enumerate() {
        let pace = match plan.rate {
            None => None,
            // Request `n` of client `c` is the `n * count + c`-th of all.
            Some(rate) => {
                let every = Duration::from_secs_f64(count as f64 / rate);
                let first = start + every.mul_f64(number as f64 / count as f64);
                Some((Timer::new()?, first, every))
            }
        };
        let driven = Driven {
            client,
            begin,
            end,
            timeout: plan.timeout,
            tally: Tally {
                latencies: (0..kinds).map(|_| Latencies::new()).collect(),
                answers: vec![0; kinds],
                done: 0,
                failed: 0,
                failure: None,
            },
        };
        tasks.push(tokio::spawn(driven.run(pace)));
    }
    let used = watch(cluster, begin, end).await?;
    let mut seen = Seen {
        start,
        begin,
        latencies: (0..kinds).map(|_| Latencies::new()).collect(),
        answers: vec![0; kinds],
        done: 0,
        failed: 0,
        failure: None,
        used,
    };
    for task in tasks {
        let tally = task.await??;
        for (sum, one) in seen.latencies.iter_mut().zip(&tally.latencies) {
            sum.add(one);
        }
        for (sum, one) in seen.answers.iter_mut().zip(&tally.answers) {
            *sum += one;
        }
        seen.done += tally.done;
        seen.failed += tally.failed;
        seen.failure = seen.failure.or(tally.failure);
    }
    Ok(seen)
}

/// What the members and the generator use from `begin` to `end`.
pub(crate) async fn watch(cluster: &Cluster, begin: Instant, end: Instant) -> anyhow::Result<Used> {
    let pids = cluster.pids();
    let own = std::process::id();
    tokio::time::sleep_until(begin.into()).await;
    let sample = || anyhow::Ok((machine::busy(), Usage::of_all(&pids), Usage::of(own)?));
    let (since, before) = (Instant::now(), sample()?);
    tokio::time::sleep_until(end.into()).await;
    let (elapsed, after) = (since.elapsed().as_secs_f64(), sample()?);
    let members = (after.1.cpu - before.1.cpu) / elapsed;
    let generator = (after.2.cpu - before.2.cpu) / elapsed;
    let all = (after.0 - before.0) / elapsed;
    Ok(Used {
        seconds: end.duration_since(begin).as_secs_f64(),
        cores: members,
        generator_cores: generator,
        other_cores: (all - members - generator).max(0.0),
        member_mb: after.1.resident_mb / pids.len().max(1) as f64,
    })
}

struct Tally {
    latencies: Vec<Latencies>,
    answers: Vec<u64>,
    done: u64,
    failed: u64,
    failure: Option<String>,
}

struct Driven<C> {
    client: C,
    begin: Instant,
    end: Instant,
    timeout: Duration,
    tally: Tally,
}

impl<C: Client> Driven<C> {
    async fn run(mut self, pace: Option<(Timer, Instant, Duration)>) -> anyhow::Result<Tally> {
        let mut n = 0;
        match pace {
            None => loop {
                let due = Instant::now();
                if due >= self.end {
                    break;
                }
                self.once(n, due).await;
                n += 1;
            },
            Some((timer, first, every)) => {
                let mut due = first;
                while due < self.end {
                    timer.until(due).await?;
                    self.once(n, due).await;
                    n += 1;
                    due += every;
                    // What is left of a pace that cannot be kept is not worked off after the end.
                    if Instant::now() >= self.end + self.timeout {
                        self.tally.failed += 1;
                        self.tally
                            .failure
                            .get_or_insert_with(|| "the pace could not be kept".to_owned());
                        break;
                    }
                }
            }
        }
        Ok(self.tally)
    }

    async fn once(&mut self, n: u64, due: Instant) {
        let outcome = match tokio::time::timeout(self.timeout, self.client.request(n)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(anyhow::anyhow!("no answer within {:?}", self.timeout)),
        };
        match outcome {
            Ok(kind) => {
                let now = Instant::now();
                self.tally.done += 1;
                if due >= self.begin {
                    self.tally.latencies[kind].record(now - due);
                }
                if now >= self.begin && now < self.end {
                    self.tally.answers[kind] += 1;
                }
            }
            Err(error) => {
                self.tally.failed += 1;
                self.tally.failure.get_or_insert_with(|| format!("{error:#}"));
                tokio::time::sleep(AFTER_FAILURE).await;
                // Where it fails, the next request fails and says so.
                let _ = tokio::time::timeout(self.timeout, self.client.reopen()).await;
            }
        }
    }
}
