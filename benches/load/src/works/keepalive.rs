//! Many leases kept alive at a steady pace over a few streams: what does it cost the members?
//!
//! Open loop: a keepalive is due when it is due, whether or not those before it were answered, and its latency
//! counts from then. etcd: one `LeaseKeepAlive` stream a connection. Regent: one agent's WebSocket each.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use futures_util::{SinkExt as _, StreamExt as _};
use serde::Deserialize;
use serde_json::json;
use tokio_tungstenite::tungstenite::Message;

use super::lease::{GRANT_PATH, REVOKE_PATH};
use super::{Result, Settings};
use crate::cluster::agent::{Frame, Socket, frame, join, register};
use crate::cluster::etcd::Etcd;
use crate::cluster::regent::Regent;
use crate::cluster::{Cluster, MEMBERS};
use crate::grpc::{Channel, Receiver, Sender};
use crate::load;
use crate::measure::{Latencies, Metric, Values};
use crate::pace::Timer;
use crate::rpc::{
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseRevokeRequest,
    LeaseRevokeResponse,
};

/// The TTL of every lease.
const TTL: Duration = Duration::from_secs(15);
/// Requests of one stream that are under way at a time while leases are made and released.
const PREPARING: usize = 64;
/// How long making or releasing all leases may take.
const PREPARE_WITHIN: Duration = Duration::from_mins(2);

pub(super) async fn run(cluster: &Cluster, settings: &Settings) -> anyhow::Result<Vec<Result>> {
    let count = settings.streams.min(settings.leases);
    ensure!(count > 0, "keepalives need leases and streams");
    let share = |number: usize| settings.leases / count + usize::from(number < settings.leases % count);
    let opened = async {
        match cluster {
            Cluster::Etcd(etcd) => {
                let opening = (0..count).map(|number| EtcdStream::open(etcd, number, share(number)));
                let streams = futures_util::future::try_join_all(opening).await?;
                keep(cluster, streams, settings).await
            }
            Cluster::Regent(regent) => {
                let opening = (0..count).map(|number| RegentStream::open(regent, number, share(number)));
                let streams = futures_util::future::try_join_all(opening).await?;
                keep(cluster, streams, settings).await
            }
        }
    };
    let within = 2 * PREPARE_WITHIN + settings.plan.warm_up + settings.plan.measure;
    let (values, failure) = tokio::time::timeout(within, opened)
        .await
        .context("the keepalives did not come to an end")??;
    Ok(vec![Result {
        row: 0,
        values,
        failure,
    }])
}

/// A connection that keeps leases alive.
trait Stream: Send + 'static {
    fn leases(&self) -> usize;
    /// Sends a keepalive for a lease, by its index; gives the key that its answer will have.
    fn keepalive(&mut self, lease: usize, n: u64) -> impl Future<Output = anyhow::Result<u64>> + Send;
    /// The key of the next answer; `None` for a lease that is lost. May be dropped while it waits.
    fn answer(&mut self) -> impl Future<Output = anyhow::Result<Option<u64>>> + Send;
    /// Gives all leases up.
    fn release(self) -> impl Future<Output = anyhow::Result<()>> + Send;
}

struct Tally {
    latencies: Latencies,
    answers: u64,
    lost: u64,
    unanswered: u64,
}

async fn keep<S: Stream>(
    cluster: &Cluster,
    streams: Vec<S>,
    settings: &Settings,
) -> anyhow::Result<(Values, Option<String>)> {
    cluster.settle(settings.settle).await;
    let count = streams.len();
    let start = Instant::now();
    let begin = start + settings.plan.warm_up;
    let end = begin + settings.plan.measure;
    let every = Duration::from_secs_f64(count as f64 / settings.keepalives);
    let mut tasks = Vec::new();
    for (number, stream) in streams.into_iter().enumerate() {
        let first = start + every.mul_f64(number as f64 / count as f64);
        let kept = Kept {
            stream,
            begin,
            end,
            grace: settings.plan.timeout,
        };
        tasks.push(tokio::spawn(kept.run(first, every)));
    }
    let used = load::watch(cluster, begin, end).await?;
    let mut all = Tally {
        latencies: Latencies::new(),
        answers: 0,
        lost: 0,
        unanswered: 0,
    };
    let mut streams = Vec::new();
    for task in tasks {
        let (tally, stream) = task.await??;
        all.latencies.add(&tally.latencies);
        all.answers += tally.answers;
        all.lost += tally.lost;
        all.unanswered += tally.unanswered;
        streams.push(stream);
    }
    let mut values = Values::new();
    values.insert(Metric::Rate, all.answers as f64 / used.seconds);
    all.latencies.write(&mut values);
    used.write(&mut values);
    values.insert(Metric::Failed, (all.lost + all.unanswered) as f64);
    let failure = (all.lost + all.unanswered > 0).then(|| {
        format!(
            "{} leases lost, {} keepalives not answered",
            all.lost, all.unanswered
        )
    });
    // They would run out in the middle of what is measured next.
    futures_util::future::try_join_all(streams.into_iter().map(Stream::release)).await?;
    Ok((values, failure))
}

struct Kept<S> {
    stream: S,
    begin: Instant,
    end: Instant,
    /// How long what is open at the end is waited for.
    grace: Duration,
}

impl<S: Stream> Kept<S> {
    async fn run(mut self, first: Instant, every: Duration) -> anyhow::Result<(Tally, S)> {
        let timer = Timer::new()?;
        let mut tally = Tally {
            latencies: Latencies::new(),
            answers: 0,
            lost: 0,
            unanswered: 0,
        };
        let mut open: HashMap<u64, Instant> = HashMap::new();
        let (mut n, mut due) = (0_u64, first);
        loop {
            let sending = due < self.end;
            if !sending && open.is_empty() {
                break;
            }
            let wake = if sending { due } else { self.end + self.grace };
            tokio::select! {
                biased;
                answer = self.stream.answer() => {
                    let Some(key) = answer? else {
                        tally.lost += 1;
                        continue;
                    };
                    let now = Instant::now();
                    if let Some(due) = open.remove(&key) {
                        if due >= self.begin {
                            tally.latencies.record(now - due);
                        }
                        if now >= self.begin && now < self.end {
                            tally.answers += 1;
                        }
                    }
                }
                woken = timer.until(wake) => {
                    woken?;
                    if !sending {
                        break;
                    }
                    let lease = usize::try_from(n)? % self.stream.leases();
                    let key = self.stream.keepalive(lease, n).await?;
                    // A lease whose last keepalive has no answer yet.
                    tally.unanswered += u64::from(open.insert(key, due).is_some());
                    n += 1;
                    due += every;
                }
            }
        }
        tally.unanswered += open.len() as u64;
        Ok((tally, self.stream))
    }
}

struct EtcdStream {
    channel: Channel,
    sender: Sender<LeaseKeepAliveRequest>,
    receiver: Receiver<LeaseKeepAliveResponse>,
    leases: Vec<i64>,
}

impl EtcdStream {
    async fn open(etcd: &Etcd, number: usize, count: usize) -> anyhow::Result<Self> {
        let channel = Channel::open(etcd.members[number % MEMBERS].address).await?;
        let mut leases = Vec::with_capacity(count);
        let ttl = i64::try_from(TTL.as_secs())?;
        while leases.len() < count {
            let more = (count - leases.len()).min(PREPARING);
            let asked = LeaseGrantRequest { ttl, id: 0 };
            let granted = (0..more).map(|_| channel.once::<_, LeaseGrantResponse>(GRANT_PATH, &asked));
            for granted in futures_util::future::join_all(granted).await {
                leases.push(granted?.id);
            }
        }
        let first = LeaseKeepAliveRequest { id: leases[0] };
        let (sender, mut receiver) = channel
            .stream("/etcdserverpb.Lease/LeaseKeepAlive", &first)
            .await?;
        receiver.next().await?;
        Ok(Self {
            channel,
            sender,
            receiver,
            leases,
        })
    }
}

impl Stream for EtcdStream {
    fn leases(&self) -> usize {
        self.leases.len()
    }

    async fn keepalive(&mut self, lease: usize, _: u64) -> anyhow::Result<u64> {
        let id = self.leases[lease];
        self.sender.send(&LeaseKeepAliveRequest { id })?;
        Ok(id.cast_unsigned())
    }

    async fn answer(&mut self) -> anyhow::Result<Option<u64>> {
        let answer = self.receiver.next().await?;
        Ok((answer.ttl > 0).then_some(answer.id.cast_unsigned()))
    }

    async fn release(self) -> anyhow::Result<()> {
        for leases in self.leases.chunks(PREPARING) {
            let revoked = leases.iter().map(async |id| {
                let asked = LeaseRevokeRequest { id: *id };
                self.channel
                    .once::<_, LeaseRevokeResponse>(REVOKE_PATH, &asked)
                    .await
            });
            for revoked in futures_util::future::join_all(revoked).await {
                revoked?;
            }
        }
        Ok(())
    }
}

struct RegentStream {
    socket: Socket,
    leases: Vec<(String, u64)>,
    heartbeat: Duration,
    last_heartbeat: Instant,
}

/// The parts that are needed of `lease_granted` and `lease_renewed`.
#[derive(Deserialize)]
struct Granted {
    name: String,
    token: u64,
}

#[derive(Deserialize)]
struct Renewed {
    seq: u64,
}

impl RegentStream {
    async fn open(regent: &Regent, number: usize, count: usize) -> anyhow::Result<Self> {
        let id = format!("bench-leases-{number}");
        // Nothing is placed in a region that nobody asks for.
        let key = register(regent, &id, "leases").await?;
        let address = regent.members[number % MEMBERS].address;
        let (socket, heartbeat) = join(address, &id, &key, &[]).await?;
        let mut stream = Self {
            socket,
            leases: Vec::with_capacity(count),
            heartbeat,
            last_heartbeat: Instant::now(),
        };
        let ttl_ms = TTL.as_millis();
        let mut asked = 0;
        while stream.leases.len() < count {
            while asked < count && asked - stream.leases.len() < PREPARING {
                let campaign = json!({ "name": format!("bench/{number}/{asked}"), "ttlMs": ttl_ms });
                stream.socket.send(frame("lease_campaign", &campaign)).await?;
                asked += 1;
            }
            let granted = stream
                .next("lease_granted")
                .await?
                .context("a lease is refused or lost")?;
            let granted: Granted = serde_json::from_str(&granted)?;
            stream.leases.push((granted.name, granted.token));
            stream.beat().await?;
        }
        Ok(stream)
    }

    /// A heartbeat, when one is due.
    async fn beat(&mut self) -> anyhow::Result<()> {
        if self.last_heartbeat.elapsed() >= self.heartbeat {
            self.last_heartbeat = Instant::now();
            self.socket.feed(frame("heartbeat", &json!({}))).await?;
        }
        Ok(())
    }

    /// The payload of the next frame of this type; `None` for a lease that is refused or lost.
    async fn next(&mut self, kind: &str) -> anyhow::Result<Option<String>> {
        loop {
            let Message::Text(text) = self
                .socket
                .next()
                .await
                .context("the node closed the connection")??
            else {
                continue;
            };
            let frame: Frame<'_> = serde_json::from_str(&text)?;
            match frame.kind {
                found if found == kind => {
                    return Ok(Some(frame.payload.context("an empty frame")?.get().to_owned()));
                }
                "lease_refused" | "lease_lost" => return Ok(None),
                "superseded" => bail!("{text}"),
                _ => {}
            }
        }
    }
}

impl Stream for RegentStream {
    fn leases(&self) -> usize {
        self.leases.len()
    }

    async fn keepalive(&mut self, lease: usize, n: u64) -> anyhow::Result<u64> {
        self.beat().await?;
        let (name, token) = &self.leases[lease];
        let keepalive = format!(
            r#"{{"type":"lease_keepalive","payload":{{"name":"{name}","token":{token},"seq":{n}}}}}"#
        );
        self.socket.send(Message::text(keepalive)).await?;
        Ok(n)
    }

    async fn answer(&mut self) -> anyhow::Result<Option<u64>> {
        let Some(renewed) = self.next("lease_renewed").await? else {
            return Ok(None);
        };
        Ok(Some(serde_json::from_str::<Renewed>(&renewed)?.seq))
    }

    async fn release(mut self) -> anyhow::Result<()> {
        for leases in self.leases.chunks(PREPARING) {
            for (name, token) in leases {
                let release = json!({ "name": name, "token": token });
                self.socket.feed(frame("lease_release", &release)).await?;
            }
            self.socket.flush().await?;
        }
        self.socket.close(None).await?;
        // The node closes once it has read all of it.
        while let Some(Ok(_)) = self.socket.next().await {}
        Ok(())
    }
}
