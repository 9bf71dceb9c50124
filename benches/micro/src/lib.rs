//! What the benches here measure on: a state with an admin, and sessions that wait for room, as the load generator has
//! them too. A panic is a bench that cannot begin.
#![allow(clippy::expect_used, clippy::missing_panics_doc)]

use std::sync::Arc;

use regent_state::operation::{CreateSession, InitCluster, PatchSession};
use regent_state::record::Placement;
use regent_state::{Caller, Leadership, Meta, Operation, Outcome, Request, State};
use regent_types::{ClusterId, CommandId, NodeId, Revision, SessionName, TemplateName, TokenId, UserName};

/// Sessions that there are; fewer than may wait, so that there is room for one more.
pub const SESSIONS: usize = 9_000;

/// A state and the position of its last operation.
#[derive(Clone, Debug)]
pub struct World {
    /// The state.
    pub state: State,
    revision: u64,
}

impl World {
    /// With all sessions.
    pub fn filled() -> Self {
        let mut world = Self {
            state: State::new(),
            revision: 0,
        };
        world.apply(&Request {
            caller: Caller::Node(NodeId(1)),
            idempotency: None,
            operation: Operation::InitCluster(InitCluster {
                cluster_id: ClusterId::new("0123456789abcdef").expect("sixteen digits are an id"),
                feature_level: 1,
                admin: admin(),
                password_hash: None,
                token: Some((token(), [7; 32])),
            }),
        });
        for number in 0..SESSIONS {
            world.apply(&create(number));
        }
        world
    }

    /// Applies the next operation, which must not be refused.
    pub fn apply(&mut self, request: &Request) -> Outcome {
        self.revision += 1;
        let meta = Meta {
            revision: Revision(self.revision),
            leadership: Leadership {
                term: 1,
                node: NodeId(1),
            },
            at: self.revision,
        };
        self.state.apply(&meta, request).expect("nothing here is refused")
    }
}

/// By the admin.
pub fn request(operation: Operation) -> Request {
    Request {
        caller: Caller::Token(token()),
        idempotency: None,
        operation,
    }
}

/// A session that no agent has room for.
pub fn create(number: usize) -> Request {
    request(Operation::CreateSession(CreateSession {
        name: session(number),
        command: CommandId::new(format!("command-{number}")).expect("a word is an id"),
        user: admin(),
        template: TemplateName::new("sleep").expect("a word is a name"),
        cpu: None,
        memory: None,
        persistent_home: false,
        idle_timeout: None,
        max_duration: None,
        tags: Arc::default(),
        placement: Placement::default(),
        queue: true,
    }))
}

/// 256 bytes of tags for a session.
pub fn patch(number: usize) -> Request {
    let tag = |part: usize| format!("{part}{number:063}");
    request(Operation::PatchSession(PatchSession {
        name: session(number % SESSIONS),
        if_match: None,
        tags: Some((0..4).map(tag).collect()),
        idle_timeout: None,
        max_duration: None,
    }))
}

fn session(number: usize) -> SessionName {
    SessionName::new(format!("session-{number}")).expect("a word is a name")
}

fn admin() -> UserName {
    UserName::new("admin").expect("a word is a name")
}

fn token() -> TokenId {
    TokenId::new("root").expect("a word is an id")
}
