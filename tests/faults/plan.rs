//! What is done when: one seed fixes all of it.
//!
//! A run is a sequence of rounds. In a round one fault happens, or two at once; it lasts for a while, all of it is
//! healed, and the cluster must be well again. Every kind of fault comes up once before any comes up twice. Round N
//! of a seed is the same in every run, however long the run is.

use std::fmt;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, RngExt as _, SeedableRng as _};

use crate::network::Cut;

/// Members that a cluster has at least and at most while they change.
pub(crate) const FEWEST_MEMBERS: usize = 3;
pub(crate) const MOST_MEMBERS: usize = 5;

/// A node, as a plan names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    /// By its index from 0 among those that are members then.
    Node(usize),
    /// Whichever leads when it happens.
    Leader,
    /// One that does not.
    Follower,
}

/// Something that goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Nemesis {
    /// These are killed with -9, at the same moment.
    Kill(Vec<Who>),
    /// All are.
    KillAll,
    /// These stand still.
    Freeze(Vec<Who>),
    /// One ends in good order.
    Restart(Who),
    /// All do, one after the other, each as soon as the one before serves.
    RollingRestart,
    /// The leadership is handed over, again and again, each so long after the one before.
    Transfers(Duration),
    /// These reach one another, and nobody else.
    Partition(Vec<Who>),
    /// One is cut off in one direction.
    OneWay(Who, Cut),
    /// One reaches all others, who do not reach one another.
    Bridge(Who),
    /// One is cut off and back several times a second.
    Flap(Who),
    /// What peers send is late, by up to this, and each connection by its own: so they overtake one another.
    Delay(Duration),
    /// Every sync of one takes that much longer.
    SlowDisk(Who, Duration),
    /// A sync of one fails.
    FailingSync(Who),
    /// One has no room left.
    FullDisk(Who),
    /// The wall clock of one jumps by so many seconds.
    ClockJump(Who, i64),
    /// One is away until the log no longer has what it lacks.
    Behind(Who),
    /// The replica of the agent that leads is killed with -9.
    KillAgent,
    /// It stands still.
    FreezeAgent,
    /// It ends in good order.
    RestartAgent,
    /// The agent's host does not reach one of the nodes.
    CutAgent(Who),
    /// The agent's host loses its power: all replicas end at once, and all that runs there.
    LoseHost,
    /// A node joins with a token and gets a vote.
    Join,
    /// One is taken out.
    Leave(Who),
    /// One is lost for good: another joins, and the lost one is taken out.
    Replace(Who),
    /// One is stopped and goes on with the other program, the newer or the older.
    Exchange(Who),
}

impl fmt::Display for Nemesis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Faults that happen at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Round {
    pub(crate) number: u64,
    pub(crate) faults: Vec<Nemesis>,
    pub(crate) lasts: Duration,
    /// How long the cluster is left alone afterwards.
    pub(crate) calm: Duration,
}

/// What changes while a cluster serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    Nothing,
    /// Its members: between three and five.
    Members,
    /// Its program: so many nodes begin with the new one, the others with the previous one, and in the end all have the
    /// new one. Until then nobody can join or be taken out, so this and [`Change::Members`] are not in one run.
    Programs {
        new: usize,
    },
}

/// What a cluster is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) nodes: usize,
    pub(crate) log_store: &'static str,
    /// Peers reach one another through proxies that can be late.
    pub(crate) proxied: bool,
    /// The wall clocks can be moved.
    pub(crate) clocks: bool,
    pub(crate) change: Change,
    /// Faults that only some machines can have are left out.
    pub(crate) can: Can,
}

/// What this machine can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Can {
    pub(crate) strace: bool,
    pub(crate) faketime: bool,
}

/// The kinds of faults, to be dealt like cards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Kill,
    KillAll,
    Freeze,
    Restart,
    RollingRestart,
    Transfers,
    Partition,
    OneWay,
    Bridge,
    Flap,
    Delay,
    SlowDisk,
    FailingSync,
    FullDisk,
    ClockJump,
    Behind,
    KillAgent,
    FreezeAgent,
    RestartAgent,
    CutAgent,
    LoseHost,
    Join,
    Leave,
    Replace,
    Exchange,
}

impl Kind {
    const ALL: [Self; 25] = [
        Self::Kill,
        Self::KillAll,
        Self::Freeze,
        Self::Restart,
        Self::RollingRestart,
        Self::Transfers,
        Self::Partition,
        Self::OneWay,
        Self::Bridge,
        Self::Flap,
        Self::Delay,
        Self::SlowDisk,
        Self::FailingSync,
        Self::FullDisk,
        Self::ClockJump,
        Self::Behind,
        Self::KillAgent,
        Self::FreezeAgent,
        Self::RestartAgent,
        Self::CutAgent,
        Self::LoseHost,
        Self::Join,
        Self::Leave,
        Self::Replace,
        Self::Exchange,
    ];

    /// Whether it may happen beside another one: those that follow steps of their own may not.
    fn combines(self) -> bool {
        !matches!(self, Self::RollingRestart | Self::Behind | Self::KillAll)
    }

    /// What of the cluster it is about; two faults at once are about different things.
    fn layer(self) -> u8 {
        match self {
            // Whether a node is there and runs, and on what disk.
            Self::Kill
            | Self::KillAll
            | Self::Freeze
            | Self::Restart
            | Self::RollingRestart
            | Self::Behind
            | Self::SlowDisk
            | Self::FailingSync
            | Self::FullDisk
            | Self::Join
            | Self::Leave
            | Self::Replace
            | Self::Exchange => 0,
            Self::Transfers => 1,
            Self::Partition | Self::OneWay | Self::Bridge | Self::Flap | Self::CutAgent => 2,
            Self::Delay => 3,
            Self::ClockJump => 4,
            Self::KillAgent | Self::FreezeAgent | Self::RestartAgent | Self::LoseHost => 5,
        }
    }
}

impl Plan {
    /// The cluster of a seed. Without `nodes` it has three, or sometimes five.
    pub(crate) fn new(seed: u64, nodes: Option<usize>, can: Can) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let five = random.random_bool(0.2);
        let nodes = nodes.unwrap_or(if five { 5 } else { 3 });
        Self {
            seed,
            nodes,
            log_store: if random.random_bool(0.3) {
                "segments"
            } else {
                "sled"
            },
            proxied: random.random_bool(0.5),
            clocks: random.random_bool(0.5) && can.faketime,
            change: if random.random_bool(1.0 / 3.0) {
                Self::programs(seed, nodes)
            } else {
                Change::Members
            },
            can,
        }
    }

    /// A change of programs, as the seed has it.
    pub(crate) fn programs(seed: u64, nodes: usize) -> Change {
        let new = StdRng::seed_from_u64(seed.wrapping_add(1)).random_range(0..nodes);
        Change::Programs { new }
    }

    /// Hosts that can have a node.
    pub(crate) fn seats(&self) -> usize {
        match self.change {
            Change::Members => self.nodes.max(MOST_MEMBERS),
            Change::Nothing | Change::Programs { .. } => self.nodes,
        }
    }

    /// A round by its number, from 0.
    pub(crate) fn round(&self, number: u64) -> Round {
        let kinds = self.kinds();
        let deck = number / kinds.len() as u64;
        let mut shuffled = kinds.clone();
        shuffled.shuffle(&mut self.random(1, deck));
        let place = usize::try_from(number % kinds.len() as u64).expect("less than the length");
        let mut random = self.random(2, number);
        let first = shuffled[place];
        let mut faults = vec![self.draw(first, &mut random)];
        // The first time around each is alone, so that what it does by itself is seen. Programs are exchanged all the
        // time, for an upgrade meets whatever happens just then.
        let upgrading = matches!(self.change, Change::Programs { .. });
        if upgrading || deck > 0 || random.random_bool(0.25) {
            let second = match self.change {
                Change::Programs { .. } => Kind::Exchange,
                Change::Members if random.random_bool(0.5) => {
                    [Kind::Join, Kind::Leave, Kind::Replace][random.random_range(0..3)]
                }
                Change::Members | Change::Nothing => kinds[random.random_range(0..kinds.len())],
            };
            if first.combines() && second.combines() && second.layer() != first.layer() {
                faults.push(self.draw(second, &mut random));
            }
        }
        Round {
            number,
            faults,
            lasts: Duration::from_millis(random.random_range(500..5_000)),
            calm: Duration::from_millis(random.random_range(300..1_500)),
        }
    }

    /// Rounds until every kind of fault that this cluster can have has come up once.
    pub(crate) fn once_each(&self) -> u64 {
        self.kinds().len() as u64
    }

    fn kinds(&self) -> Vec<Kind> {
        let can = |kind: &Kind| match kind {
            Kind::Delay => self.proxied,
            Kind::ClockJump => self.clocks,
            Kind::SlowDisk | Kind::FailingSync => self.can.strace,
            Kind::Join | Kind::Leave | Kind::Replace => self.change == Change::Members,
            Kind::Exchange => matches!(self.change, Change::Programs { .. }),
            _ => true,
        };
        Kind::ALL.into_iter().filter(can).collect()
    }

    fn random(&self, stream: u64, number: u64) -> StdRng {
        let mut seed = [0; 32];
        for (place, part) in [self.seed, stream, number].into_iter().enumerate() {
            seed[place * 8..][..8].copy_from_slice(&part.to_le_bytes());
        }
        StdRng::from_seed(seed)
    }

    fn draw(&self, kind: Kind, random: &mut StdRng) -> Nemesis {
        let who = |random: &mut StdRng| {
            if random.random_bool(0.5) {
                Who::Leader
            } else {
                Who::Node(random.random_range(0..self.seats()))
            }
        };
        match kind {
            Kind::Kill => Nemesis::Kill(self.some(random)),
            Kind::KillAll => Nemesis::KillAll,
            Kind::Freeze => Nemesis::Freeze(self.some(random)),
            Kind::Restart => Nemesis::Restart(who(random)),
            Kind::RollingRestart => Nemesis::RollingRestart,
            Kind::Transfers => Nemesis::Transfers(Duration::from_millis(random.random_range(100..1_000))),
            Kind::Partition => Nemesis::Partition(self.some(random)),
            Kind::OneWay => {
                let cut = if random.random_bool(0.5) {
                    Cut::Sending
                } else {
                    Cut::Receiving
                };
                Nemesis::OneWay(who(random), cut)
            }
            Kind::Bridge => Nemesis::Bridge(who(random)),
            Kind::Flap => Nemesis::Flap(who(random)),
            Kind::Delay => Nemesis::Delay(Duration::from_millis(random.random_range(5..150))),
            Kind::SlowDisk => {
                Nemesis::SlowDisk(who(random), Duration::from_millis(random.random_range(10..400)))
            }
            Kind::FailingSync => Nemesis::FailingSync(who(random)),
            Kind::FullDisk => Nemesis::FullDisk(who(random)),
            Kind::ClockJump => {
                let minutes: i64 = random.random_range(1..90);
                let seconds = minutes * 60 * if random.random_bool(0.5) { 1 } else { -1 };
                Nemesis::ClockJump(who(random), seconds)
            }
            Kind::Behind => Nemesis::Behind(Who::Node(random.random_range(0..self.seats()))),
            Kind::KillAgent => Nemesis::KillAgent,
            Kind::FreezeAgent => Nemesis::FreezeAgent,
            Kind::RestartAgent => Nemesis::RestartAgent,
            Kind::CutAgent => Nemesis::CutAgent(who(random)),
            Kind::LoseHost => Nemesis::LoseHost,
            Kind::Join => Nemesis::Join,
            Kind::Leave => Nemesis::Leave(who(random)),
            Kind::Replace => Nemesis::Replace(who(random)),
            Kind::Exchange => Nemesis::Exchange(who(random)),
        }
    }

    /// One node, a minority or a majority, often with the leader among them.
    fn some(&self, random: &mut StdRng) -> Vec<Who> {
        let many = random.random_range(1..self.nodes);
        let mut all: Vec<usize> = (0..self.nodes).collect();
        all.shuffle(random);
        let mut some: Vec<Who> = all.into_iter().take(many).map(Who::Node).collect();
        if random.random_bool(0.5) {
            some[0] = Who::Leader;
        }
        some
    }
}

/// A seed that nobody chose.
pub(crate) fn any_seed() -> u64 {
    // Short enough to be typed.
    u64::from(rand::rng().next_u32())
}

#[test]
fn a_seed_fixes_every_round_and_every_kind_comes_up_once_before_any_comes_up_twice() {
    let can = Can {
        strace: true,
        faketime: true,
    };
    for seed in 0..50 {
        let (plan, again) = (Plan::new(seed, None, can), Plan::new(seed, None, can));
        assert_eq!(plan, again);
        let kinds = plan.kinds().len() as u64;
        let mut firsts = Vec::new();
        for number in 0..kinds * 2 {
            assert_eq!(plan.round(number), again.round(number));
            if number < kinds {
                firsts.push(std::mem::discriminant(&plan.round(number).faults[0]));
            }
        }
        let all = firsts.len();
        firsts.dedup();
        assert_eq!(firsts.len(), all);
        assert!((0..all).all(|at| !firsts[..at].contains(&firsts[at])));
    }
}
