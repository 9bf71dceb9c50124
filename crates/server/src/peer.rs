//! Questions between nodes: how they are written, and who answers them.
//!
//! The peer transport carries bytes; here they become [`Ask`] and [`Answer`]. The encoding begins with a
//! version byte and is positional, so variants are only appended.

use std::sync::Arc;
use std::time::Duration;

use bincode::Options as _;
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use regent_raft::PeerService;
use regent_types::NodeId;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use crate::leader::{Answer, Ask, Leader};

/// Version of the encoding of questions and answers.
const VERSION: u8 = 1;
/// How long the leader works on a question; the caller asks again after that.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

impl Ask {
    /// As it travels.
    pub(crate) fn encode(&self) -> Bytes {
        encode(self)
    }
}

impl Answer {
    /// Reads what [`Service`] wrote; `None` when it is of another version or broken.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        decode(bytes)
    }
}

fn encode(value: &impl Serialize) -> Bytes {
    let mut bytes = vec![VERSION];
    bincode::DefaultOptions::new()
        .serialize_into(&mut bytes, value)
        .expect("our own types have known lengths, and a Vec takes every byte");
    bytes.into()
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    let (&version, body) = bytes.split_first()?;
    if version != VERSION {
        return None;
    }
    bincode::DefaultOptions::new()
        .with_limit(body.len() as u64)
        .deserialize(body)
        .ok()
}

/// Answers other nodes.
pub(crate) struct Service {
    leader: Arc<Leader>,
}

impl Service {
    pub(crate) fn new(leader: Arc<Leader>) -> Self {
        Self { leader }
    }
}

impl PeerService for Service {
    fn call(&self, from: NodeId, body: Bytes) -> BoxFuture<'_, Result<Bytes, String>> {
        async move {
            let ask: Ask =
                decode(&body).ok_or_else(|| format!("node {from} asks in a form that is not known here"))?;
            let answer = self.leader.answer(ask, Instant::now() + ANSWER_WITHIN).await;
            answer
                .map(|answer| encode(&answer))
                .map_err(|error| error.to_string())
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use regent_types::{LeaseName, Token};

    #[test]
    fn what_is_written_is_read_back_and_nothing_else_is() {
        let ask = Ask::Renew(vec![(LeaseName::new("agent/dev").unwrap(), Token(7))]);
        let bytes = ask.encode();
        assert_eq!(decode::<Ask>(&bytes), Some(ask));
        assert_eq!(decode::<Ask>(&bytes[..bytes.len() - 1]), None);
        assert_eq!(decode::<Ask>(&[2]), None);
        assert_eq!(decode::<Ask>(&[]), None);
        let answer = Answer::Times(vec![Some(3), None]);
        assert_eq!(Answer::decode(&encode(&answer)), Some(answer));
    }
}
