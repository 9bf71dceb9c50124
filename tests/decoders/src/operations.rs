//! Operations: what a log entry holds, and the state machine behind it.
//!
//! The leader checks what it proposes, but apply must be total all the same: an entry at which it panics would stop
//! every node, and again at each start.

use std::collections::BTreeMap;

use regent_state::operation::{AgentConnected, CreateCommand, CreateSession, InitCluster, RegisterAgent};
use regent_state::record::{Capacity, Placement};
use regent_state::{
    Caller, Leadership, Meta, Operation, Request, State, StateDecoder, decode_applied, encode_applied,
};
use regent_types::{
    AgentId, ClusterId, CommandId, NodeId, ReplicaName, Revision, SessionName, TokenId, UserName,
};

const NODE: NodeId = NodeId(1);
/// Operations of one input.
const MAX_OPERATIONS: usize = 64;

/// Applies operations, each behind its length in two bytes and a byte by which time goes on, to a state that has a
/// session already.
pub(crate) fn apply(bytes: &[u8]) {
    let mut log = Log::new();
    let mut rest = bytes;
    for _ in 0..MAX_OPERATIONS {
        let Some((head, after)) = rest.split_first_chunk::<3>() else {
            break;
        };
        let length = usize::from(u16::from_le_bytes([head[0], head[1]])).min(after.len());
        let (request, after) = after.split_at(length);
        rest = after;
        log.now += u64::from(head[2]) * 1_000;
        let Ok(request) = Request::decode(request) else {
            continue;
        };
        let encoded = request.encode();
        assert_eq!(Request::decode(&encoded).ok().as_ref(), Some(&request));
        log.apply(&request);
        if let Err(error) = log.state.check() {
            panic!("the state contradicts itself after {request:?}: {error}");
        }
    }
    log.snapshot();
    if let Ok(applied) = decode_applied(bytes) {
        let again = encode_applied(&applied);
        assert_eq!(decode_applied(&again).ok(), Some(applied));
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let one = |request: &Request| {
        let encoded = request.encode();
        let length = u16::try_from(encoded.len()).expect("samples are short");
        [&length.to_le_bytes()[..], &[1], &encoded].concat()
    };
    let requests = requests();
    let mut seeds: Vec<Vec<u8>> = requests.iter().map(one).collect();
    seeds.push(requests.iter().flat_map(one).collect());
    seeds
}

/// States with something in them.
pub(crate) fn states() -> Vec<State> {
    vec![State::new(), Log::new().state]
}

struct Log {
    state: State,
    now: u64,
}

impl Log {
    fn new() -> Self {
        let mut log = Self {
            state: State::new(),
            now: 1_000_000,
        };
        for request in requests() {
            log.apply(&request);
        }
        log
    }

    fn apply(&mut self, request: &Request) {
        let meta = Meta {
            revision: Revision(self.state.revision().0 + 1),
            leadership: Leadership { term: 1, node: NODE },
            at: self.now,
        };
        let applied = self.state.apply(&meta, request);
        let encoded = encode_applied(&applied);
        assert_eq!(decode_applied(&encoded).ok(), Some(applied));
    }

    /// What was reached by applying must come through a snapshot.
    fn snapshot(&self) {
        let mut decoder = StateDecoder::new();
        for chunk in self.state.encode_chunks() {
            decoder.push(&chunk).expect("what was encoded decodes");
        }
        let again = decoder.finish().expect("what was encoded is whole");
        again.check().expect("a state is sound after a snapshot too");
        assert_eq!(again.content_digest(), self.state.content_digest());
    }
}

fn requests() -> Vec<Request> {
    let agent = || AgentId::new("dev").expect("it is one");
    let token = || TokenId::new("t").expect("it is one");
    let own = |operation| Request {
        caller: Caller::Node(NODE),
        idempotency: None,
        operation,
    };
    let admin = |operation| Request {
        caller: Caller::Token(token()),
        idempotency: None,
        operation,
    };
    let init = InitCluster {
        cluster_id: ClusterId::new("c").expect("it is one"),
        feature_level: 1,
        admin: UserName::new("admin").expect("it is one"),
        password_hash: None,
        token: Some((token(), [1; 32])),
    };
    let register = RegisterAgent {
        id: agent(),
        platform: "process".to_owned(),
        region: String::new(),
        capacity: Capacity {
            max_sessions: Some(10),
            cpu: Some(8_000),
            memory: None,
        },
        labels: BTreeMap::new(),
        metadata: String::new(),
    };
    let connected = AgentConnected {
        agent: agent(),
        replica: ReplicaName::new("").expect("it is one"),
        node: NODE,
        token: token(),
        protocol: 3,
        stale_ms: 4_000,
        runtime_id: "r".to_owned(),
        sessions: Some(Vec::new()),
        command_seed: CommandId::new("seed").expect("it is one"),
    };
    let session = CreateSession {
        name: SessionName::new("admin-demo-1").expect("it is one"),
        command: CommandId::new("c-1").expect("it is one"),
        user: UserName::new("admin").expect("it is one"),
        template: "demo".parse().expect("it is one"),
        cpu: Some(500),
        memory: Some(1 << 30),
        persistent_home: false,
        idle_timeout: Some(60_000),
        max_duration: Some(600_000),
        tags: vec!["a".to_owned()].into(),
        placement: Placement::default(),
        queue: true,
    };
    let command = CreateCommand {
        id: CommandId::new("note-1").expect("it is one"),
        agent: agent(),
        session: None,
        action: "note".to_owned(),
        payload: "{}".to_owned(),
        expires_ms: Some(60_000),
    };
    vec![
        own(Operation::InitCluster(init)),
        admin(Operation::RegisterAgent(register)),
        own(Operation::AgentConnected(connected)),
        admin(Operation::CreateSession(session)),
        admin(Operation::CreateCommand(command)),
        admin(Operation::AcquireLease {
            name: "jobs".parse().expect("it is one"),
            holder: "h".to_owned(),
            ttl_ms: 5_000,
        }),
    ]
}
