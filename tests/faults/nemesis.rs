//! Makes things go wrong, and right again.
//!
//! A fault that is going on is a value that ends it: [`Ongoing::heal`] leaves nothing of it behind, so that what is
//! not well afterwards is the cluster's doing.

use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use regent_types::NodeId;
use rustix::process::Signal;
use tokio::task::JoinHandle;

use crate::cluster::{Cluster, REPLICAS, SNAPSHOT_EVERY, replica_name};
use crate::harness::eventually;
use crate::network::Cut;
use crate::plan::{Nemesis, Who};
use crate::strace::Tracer;
use crate::{members, programs};

/// How often a flapping link changes.
const FLAP_EVERY: Duration = Duration::from_millis(150);
/// How long something may take that takes a moment.
const SOON: Duration = Duration::from_secs(25);
/// How long a change of the members may take with everything healed: a node must be well for five seconds before it gets
/// a vote, and one that is told that it is no member ends in good order.
const CHANGES_WITHIN: Duration = Duration::from_mins(1);
/// How long the clients may take to write so much that a node is behind: a loaded machine writes little.
const BEHIND_WITHIN: Duration = Duration::from_mins(2);
/// The file that takes all the room of a disk.
const BALLAST: &str = "ballast";

/// A fault that is going on.
pub(crate) struct Ongoing {
    cluster: Arc<Cluster>,
    what: Nemesis,
    /// Whom it is about.
    nodes: Vec<usize>,
    replica: Option<usize>,
    tracers: Vec<Tracer>,
    task: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
    /// Members come and go.
    change: Option<JoinHandle<Result<(), String>>>,
}

impl Ongoing {
    /// Begins it; what it has found out by itself is a violation.
    pub(crate) async fn begin(cluster: &Arc<Cluster>, what: Nemesis) -> Result<Self, String> {
        let mut ongoing = Self {
            cluster: cluster.clone(),
            nodes: Vec::new(),
            replica: None,
            tracers: Vec::new(),
            task: None,
            change: None,
            what: what.clone(),
        };
        ongoing.inject(&what).await?;
        eprintln!(
            "    {what}: nodes {:?}, replica {:?}",
            ongoing.names(),
            ongoing.replica
        );
        Ok(ongoing)
    }

    /// The ids of the nodes that it is about.
    fn names(&self) -> Vec<u64> {
        let nodes = self.nodes.iter();
        nodes.filter_map(|node| self.cluster.id(*node)).collect()
    }

    async fn resolve(&self, who: Who) -> usize {
        let members = self.cluster.members();
        let leader = async || {
            let leader = self.cluster.leader().await;
            leader.and_then(|leader| members.iter().position(|member| *member == leader))
        };
        let at = match who {
            Who::Node(node) => node,
            Who::Leader => leader().await.unwrap_or(0),
            Who::Follower => leader().await.unwrap_or(0) + 1,
        };
        members[at % members.len()]
    }

    async fn resolve_all(&self, who: &[Who]) -> Vec<usize> {
        let mut nodes = Vec::new();
        for who in who {
            nodes.push(self.resolve(*who).await);
        }
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }

    fn others(&self, than: &[usize]) -> Vec<usize> {
        let mut others = self.cluster.members();
        others.retain(|node| !than.contains(node));
        others
    }

    /// The hosts of others, of those too that may come meanwhile.
    fn other_hosts(&self, than: &[usize]) -> Vec<usize> {
        let hosts = 0..self.cluster.plan.seats();
        hosts.filter(|host| !than.contains(host)).collect()
    }

    async fn inject(&mut self, what: &Nemesis) -> Result<(), String> {
        let cluster = self.cluster.clone();
        match what {
            Nemesis::Kill(who) => {
                self.nodes = self.resolve_all(who).await;
                self.nodes
                    .iter()
                    .for_each(|node| cluster.kill(&cluster.name(*node)));
            }
            Nemesis::KillAll => {
                self.nodes = self.others(&[]);
                // All at the same moment: none may make up for another.
                for signal in [Signal::STOP, Signal::KILL] {
                    self.nodes.iter().for_each(|node| {
                        cluster.may_end(&cluster.name(*node));
                        cluster.signal(&cluster.name(*node), signal);
                    });
                }
            }
            Nemesis::Freeze(who) => {
                self.nodes = self.resolve_all(who).await;
                for node in &self.nodes {
                    cluster.signal(&cluster.name(*node), Signal::STOP);
                }
            }
            Nemesis::Restart(who) => {
                self.nodes = vec![self.resolve(*who).await];
                cluster.stop(&cluster.name(self.nodes[0])).await?;
            }
            Nemesis::RollingRestart => {
                for node in cluster.members() {
                    cluster.stop(&cluster.name(node)).await?;
                    cluster.start_node(node);
                    let client = cluster.client_of(node);
                    soon("node that serves again", || async { client.readyz().await.ok() }).await?;
                }
            }
            Nemesis::Transfers(every) => {
                let leader = Arc::new(Mutex::new(None));
                self.keep_on(*every, move |turn| {
                    let (cluster, leader) = (cluster.clone(), leader.clone());
                    async move {
                        // Away from who leads, then back to it: a node that leads again must not go on where it was.
                        let to = if turn % 2 == 0 {
                            *lock(&leader) = cluster.leader().await;
                            None
                        } else {
                            let back = *lock(&leader);
                            back.and_then(|node| cluster.id(node)).map(NodeId)
                        };
                        let members = cluster.members();
                        let client = cluster.client(members[turn % members.len()]);
                        let _ = client.with_deadline(Duration::from_secs(1)).transfer(to).await;
                    }
                });
            }
            Nemesis::Partition(who) => {
                self.nodes = self.resolve_all(who).await;
                let others = self.other_hosts(&self.nodes);
                for node in &self.nodes {
                    cluster.network.cut(*node, &others, Cut::Both);
                }
            }
            Nemesis::OneWay(who, cut) => {
                self.nodes = vec![self.resolve(*who).await];
                cluster
                    .network
                    .cut(self.nodes[0], &self.other_hosts(&self.nodes), *cut);
            }
            Nemesis::Bridge(who) => {
                let middle = self.resolve(*who).await;
                self.nodes = self.other_hosts(&[middle]);
                for node in &self.nodes {
                    cluster
                        .network
                        .cut(*node, &self.other_hosts(&[middle, *node]), Cut::Both);
                }
            }
            Nemesis::Flap(who) => {
                self.nodes = vec![self.resolve(*who).await];
                let (node, others) = (self.nodes[0], self.other_hosts(&self.nodes));
                self.keep_on(FLAP_EVERY, move |turn| {
                    if turn % 2 == 0 {
                        cluster.network.cut(node, &others, Cut::Both);
                    } else {
                        cluster.network.heal(node);
                    }
                    std::future::ready(())
                });
            }
            Nemesis::Delay(up_to) => cluster.lateness.set(*up_to),
            Nemesis::SlowDisk(who, by) => {
                self.nodes = vec![self.resolve(*who).await];
                self.trace(&format!("delay_enter={}ms", by.as_millis()))?;
            }
            Nemesis::FailingSync(who) => {
                self.nodes = vec![self.resolve(*who).await];
                cluster.may_end(&cluster.name(self.nodes[0]));
                self.trace("error=EIO")?;
            }
            Nemesis::FullDisk(who) => {
                self.nodes = vec![self.resolve(*who).await];
                cluster.may_end(&cluster.name(self.nodes[0]));
                fill(&cluster.data(self.nodes[0]).join(BALLAST));
            }
            Nemesis::ClockJump(who, by) => {
                self.nodes = vec![self.resolve(*who).await];
                cluster.move_clock(self.nodes[0], *by);
            }
            Nemesis::Behind(who) => {
                self.nodes = vec![self.resolve(*who).await];
                cluster.kill(&cluster.name(self.nodes[0]));
                self.until_it_is_behind().await?;
            }
            Nemesis::KillAgent => {
                self.replica = self.leading_replica().await;
                cluster.kill(&replica_name(self.replica.unwrap_or(0)));
            }
            Nemesis::FreezeAgent => {
                self.replica = self.leading_replica().await;
                cluster.signal(&replica_name(self.replica.unwrap_or(0)), Signal::STOP);
            }
            Nemesis::RestartAgent => {
                self.replica = self.leading_replica().await;
                cluster.stop(&replica_name(self.replica.unwrap_or(0))).await?;
            }
            Nemesis::CutAgent(who) => {
                self.nodes = vec![self.resolve(*who).await];
                cluster.network.cut(cluster.agents(), &self.nodes, Cut::Both);
            }
            Nemesis::LoseHost => cluster.lose_agents_host()?,
            Nemesis::Join => {
                cluster.is_to_change(members::JOINED);
                self.change = Some(tokio::spawn(async move { members::join(&cluster).await }));
            }
            Nemesis::Leave(who) => {
                cluster.is_to_change(members::LEFT);
                let node = self.resolve(*who).await;
                self.nodes = vec![node];
                self.change = Some(tokio::spawn(async move { members::leave(&cluster, node).await }));
            }
            Nemesis::Replace(who) => {
                cluster.is_to_change(members::LOST);
                let node = self.resolve(*who).await;
                self.nodes = vec![node];
                self.change = Some(tokio::spawn(
                    async move { members::replace(&cluster, node).await },
                ));
            }
            Nemesis::Exchange(who) => {
                cluster.is_to_change(programs::EXCHANGED);
                let node = self.resolve(*who).await;
                self.nodes = vec![programs::exchange(&cluster, node).await?];
            }
        }
        Ok(())
    }

    async fn leading_replica(&self) -> Option<usize> {
        let leading = tokio::time::timeout(Duration::from_secs(2), self.cluster.leading_replica());
        leading
            .await
            .ok()
            .flatten()
            .filter(|replica| *replica < REPLICAS.len())
    }

    /// Writes by the other clients fill the log beyond what is kept behind a snapshot.
    async fn until_it_is_behind(&self) -> Result<(), String> {
        let others = self.others(&self.nodes);
        let client = self.cluster.client_of(others[0]);
        let index = async || client.index().await.ok().flatten().map(|index| index.0);
        let begun = soon("index", index).await?;
        within(
            BEHIND_WITHIN,
            "log without the entries that the node lacks",
            || async {
                let now = index().await?;
                (now >= begun + 3 * SNAPSHOT_EVERY).then_some(())
            },
        )
        .await
    }

    fn trace(&mut self, inject: &str) -> Result<(), String> {
        let name = self.cluster.name(self.nodes[0]);
        let pid = self
            .cluster
            .pid(&name)
            .ok_or_else(|| format!("{name} does not run"))?;
        let inject = format!("inject=fdatasync,fsync:{inject}");
        let nowhere = std::path::Path::new("/dev/null");
        let flags = ["-e", "trace=fdatasync,fsync", "-e", &inject];
        let tracer = Tracer::attach(pid, nowhere, &flags);
        self.tracers
            .push(tracer.ok_or_else(|| format!("strace does not attach to {name}"))?);
        Ok(())
    }

    fn keep_on<F>(&mut self, every: Duration, mut turn: impl FnMut(usize) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send,
    {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut count = 0;
            while !stopped.load(Ordering::Relaxed) {
                turn(count).await;
                count += 1;
                tokio::time::sleep(every).await;
            }
        });
        self.task = Some((stop, task));
    }

    /// Ends it. What was killed is started by whoever ends the round.
    pub(crate) async fn heal(&mut self) -> Result<(), String> {
        if let Some((stop, task)) = self.task.take() {
            stop.store(true, Ordering::Relaxed);
            let _ = task.await;
        }
        self.tracers.clear();
        let cluster = &self.cluster;
        match &self.what {
            Nemesis::Freeze(_) => {
                for node in &self.nodes {
                    cluster.signal(&cluster.name(*node), Signal::CONT);
                }
            }
            Nemesis::FreezeAgent => {
                cluster.signal(&replica_name(self.replica.unwrap_or(0)), Signal::CONT);
            }
            Nemesis::Partition(_) | Nemesis::OneWay(..) | Nemesis::Bridge(_) | Nemesis::Flap(_) => {
                self.nodes.iter().for_each(|node| cluster.network.heal(*node));
            }
            Nemesis::CutAgent(_) => cluster.network.heal(cluster.agents()),
            Nemesis::Delay(_) => cluster.lateness.set(Duration::ZERO),
            Nemesis::FullDisk(_) => {
                let _ = std::fs::remove_file(cluster.data(self.nodes[0]).join(BALLAST));
                return self.end_what_failed().await;
            }
            Nemesis::FailingSync(_) => return self.end_what_failed().await,
            Nemesis::ClockJump(..) => cluster.move_clock(self.nodes[0], 0),
            Nemesis::Kill(_)
            | Nemesis::KillAll
            | Nemesis::Restart(_)
            | Nemesis::RollingRestart
            | Nemesis::Transfers(_)
            | Nemesis::SlowDisk(..)
            | Nemesis::Behind(_)
            | Nemesis::KillAgent
            | Nemesis::RestartAgent
            | Nemesis::LoseHost
            | Nemesis::Join
            | Nemesis::Leave(_)
            | Nemesis::Replace(_)
            | Nemesis::Exchange(_) => {}
        }
        Ok(())
    }

    /// Waits for a change of the members. With everything healed nothing is in its way, and all must agree on what it led
    /// to.
    pub(crate) async fn finish(&mut self) -> Result<(), String> {
        let Some(mut change) = self.change.take() else {
            return Ok(());
        };
        let what = &self.what;
        let Ok(changed) = tokio::time::timeout(CHANGES_WITHIN, &mut change).await else {
            change.abort();
            return Err(format!(
                "{what} was not done {CHANGES_WITHIN:?} after everything was healed"
            ));
        };
        changed.map_err(|panic| format!("{what}: {panic}"))??;
        members::agreed(&self.cluster).await
    }

    /// A node whose disk has failed ends by itself, unless nothing was written meanwhile. Whether it is still at it is
    /// not for this test to guess: it is ended, so that the next round begins with a node that is well.
    async fn end_what_failed(&self) -> Result<(), String> {
        self.cluster.stop(&self.cluster.name(self.nodes[0])).await
    }
}

/// Waits for it, and says so when it does not come: what was recorded until then may say why.
pub(crate) async fn soon<T, F: Future<Output = Option<T>>>(
    what: &str,
    look: impl FnMut() -> F,
) -> Result<T, String> {
    within(SOON, what, look).await
}

async fn within<T, F: Future<Output = Option<T>>>(
    time: Duration,
    what: &str,
    look: impl FnMut() -> F,
) -> Result<T, String> {
    let waited = tokio::time::timeout(time, eventually(what, look)).await;
    waited.map_err(|_| format!("there was no {what} within {time:?}"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes all the room that is left.
fn fill(path: &std::path::Path) {
    let mut file = std::fs::File::create(path).unwrap();
    let piece = vec![0; 1 << 20];
    while file.write_all(&piece).is_ok() {}
    // The last bytes too.
    while file.write_all(&[0; 64]).is_ok() {}
}
