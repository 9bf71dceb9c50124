//! What crosses a public wire: ids, REST bodies, agent frames, problem codes.
//!
//! Nothing here decides anything. A value of one of these types has been parsed and is within
//! its limits; what it means is decided in `regent-state`. JSON is camelCase, times are RFC 3339.
//! The feature `openapi` adds the schemas that the server publishes.

pub mod agent;
pub mod auth;
pub mod cluster;
pub mod command;
pub mod duration;
pub mod event;
pub mod frame;
pub mod id;
pub mod lease;
pub mod problem;
pub mod quantity;
pub mod session;
pub mod template;
pub mod time;

pub use id::{
    AgentId, CandidateId, ClusterId, CommandId, Epoch, IdError, LeaseName, NodeId, Principal, ReplicaName,
    Revision, SessionName, TemplateName, Token, TokenId, UserName,
};
pub use problem::{Code, FieldError, Problem};
pub use quantity::{Cpu, Memory};
pub use time::Time;
