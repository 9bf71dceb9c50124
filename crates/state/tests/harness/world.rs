//! A state, its log, and the clock of a story. After every operation the state's invariants are
//! checked, and that a rejection changed nothing; at the end, that a replica fed with the encoded
//! log, and one that continues from a snapshot, come to the same.

use std::fmt::Write as _;

use regent_state::{
    Applied, Caller, EventId, Idempotency, Leadership, Meta, Operation, Rejection, Request, State,
    StateDecoder,
};
use regent_types::{NodeId, Revision, TokenId};

use super::{show, step};

/// When stories begin: time is shown relative to it.
pub const BEGIN: u64 = 1_700_000_000_000;

pub struct World {
    pub state: State,
    pub now: u64,
    pub leadership: Leadership,
    pub caller: Caller,
    pub idempotency: Option<Idempotency>,
    log: Vec<(Meta, Vec<u8>)>,
    outcomes: Vec<Applied>,
    snapshot: Option<(usize, Vec<Vec<u8>>)>,
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    pub fn new() -> Self {
        Self {
            state: State::new(),
            now: BEGIN,
            leadership: Leadership {
                term: 1,
                node: NodeId(1),
            },
            caller: Caller::Node(NodeId(1)),
            idempotency: None,
            log: Vec::new(),
            outcomes: Vec::new(),
            snapshot: None,
        }
    }

    /// Does one line of a story; gives what it shows.
    pub fn step(&mut self, line: &str) -> String {
        step::run(self, line)
    }

    /// Applies an operation as the present caller and shows what came of it.
    pub fn apply(&mut self, operation: Operation) -> String {
        let (revision, applied) = self.apply_quietly(operation);
        let mut text = format!("@{revision} {}\n", show::applied(&applied));
        for (id, event) in self.state.events().from(EventId(revision, 0)) {
            assert_eq!(id.0, revision, "an event of another revision");
            writeln!(text, "   {}", show::event(event)).unwrap();
        }
        text
    }

    pub fn apply_quietly(&mut self, operation: Operation) -> (Revision, Applied) {
        let request = Request {
            caller: self.caller.clone(),
            idempotency: self.idempotency.clone(),
            operation,
        };
        let meta = Meta {
            revision: Revision(self.log.len() as u64 + 1),
            leadership: self.leadership,
            at: self.now,
        };
        let (before, keys) = (self.state.content_digest(), self.state.idempotency_count());
        let digest = self.state.digest();
        let applied = self.state.apply(&meta, &request);
        self.log.push((meta, request.encode()));
        self.outcomes.push(applied.clone());
        self.state
            .check()
            .unwrap_or_else(|e| panic!("after {request:?}: {e}"));
        assert_ne!(self.state.digest(), digest, "the digest covers every operation");
        if applied.is_err() && keys == self.state.idempotency_count() {
            assert_eq!(
                before,
                self.state.content_digest(),
                "{request:?} was rejected, but changed something"
            );
        }
        (meta.revision, applied)
    }

    pub fn as_token<T>(&mut self, token: &str, act: impl FnOnce(&mut Self) -> T) -> T {
        let caller = std::mem::replace(&mut self.caller, Caller::Token(TokenId::new(token).unwrap()));
        let result = act(self);
        self.caller = caller;
        result
    }

    /// All requests so far.
    pub fn requests(&self) -> impl Iterator<Item = Request> {
        self.log.iter().map(|(_, bytes)| Request::decode(bytes).unwrap())
    }

    /// What came of them.
    pub fn outcomes(&self) -> impl Iterator<Item = &Applied> {
        self.outcomes.iter()
    }

    /// Takes a snapshot here: `verify` continues from it.
    pub fn take_snapshot(&mut self) {
        self.snapshot = Some((self.log.len(), self.state.encode_chunks().collect()));
    }

    /// Checks that other replicas come to the same.
    pub fn verify(&self) {
        let mut replica = State::new();
        self.replay(&mut replica, 0);
        if let Some((at, chunks)) = &self.snapshot {
            let mut restored = decode(chunks);
            self.replay(&mut restored, *at);
        }
        let copy = decode(&self.state.encode_chunks().collect::<Vec<_>>());
        copy.check().unwrap();
        assert_eq!(
            bytes(&copy),
            bytes(&self.state),
            "a snapshot that was read is another"
        );
    }

    fn replay(&self, replica: &mut State, from: usize) {
        for (meta, request) in &self.log[from..] {
            let _: Result<_, Rejection> = replica.apply(meta, &Request::decode(request).unwrap());
        }
        assert_eq!(replica.digest(), self.state.digest(), "the digests differ");
        assert_eq!(bytes(replica), bytes(&self.state), "the states differ");
    }
}

pub fn decode(chunks: &[Vec<u8>]) -> State {
    let mut decoder = StateDecoder::new();
    for chunk in chunks {
        decoder.push(chunk).unwrap();
    }
    decoder.finish().unwrap()
}

pub fn bytes(state: &State) -> Vec<u8> {
    state.encode_chunks().flatten().collect()
}
