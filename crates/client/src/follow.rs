//! A stream of events that outlives any node, whichever route gives it.
//!
//! Invariant: from the first connection on no event is missed and none comes twice, whichever node the
//! stream goes on at: each reconnect names the last event that was handed out. Before the first event a
//! stream from "now on" names the revision at which it began, and one that begins with the state as it is
//! begins anew.

use std::collections::VecDeque;
use std::time::Duration;

use futures::stream::{self, BoxStream, StreamExt};
use regent_types::cluster::INDEX_HEADER;
use regent_types::event::Event;
use regent_types::{Code, Problem};

use crate::backoff::FullJitter;
use crate::call::Call;
use crate::sse::Parser;
use crate::{Client, Error};

/// A node that sends nothing for this long, not even a comment, is taken for gone: nodes send a comment
/// every 15 s at the latest.
const SILENCE: Duration = Duration::from_secs(45);
/// The ceiling of the first wait before a reconnect.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// The ceiling of later waits.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// What a stream begins with that is opened without the id of a last event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Begins {
    /// With what happens after the revision that the answer's head names.
    FromNowOn,
    /// With an event that is the state as it is.
    WithTheState,
}

struct Follow {
    client: Client,
    call: Call,
    begins: Begins,
    last_id: Option<String>,
    server: usize,
    backoff: FullJitter,
    connection: Option<(BoxStream<'static, reqwest::Result<Vec<u8>>>, Parser)>,
    ready: VecDeque<Event>,
    over: bool,
    failed: Option<Error>,
}

/// The events of a route, after the one with this id. The stream reconnects by itself; it ends after an
/// error that waiting does not cure: `gone` (410), or a refusal.
pub(crate) fn follow(
    client: &Client,
    call: Call,
    begins: Begins,
    after: Option<String>,
) -> BoxStream<'static, Result<Event, Error>> {
    let follow = Follow {
        server: client.preferred(),
        client: client.clone(),
        call,
        begins,
        last_id: after,
        backoff: FullJitter::new(FIRST_WAIT, LONGEST_WAIT),
        connection: None,
        ready: VecDeque::new(),
        over: false,
        failed: None,
    };
    stream::unfold(follow, |mut follow| async move {
        Some((follow.next().await?, follow))
    })
    .boxed()
}

impl Follow {
    async fn next(&mut self) -> Option<Result<Event, Error>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                self.last_id = Some(event.id.clone());
                return Some(Ok(event));
            }
            if self.over {
                return self.failed.take().map(Err);
            }
            if self.connection.is_none()
                && let Err(error) = self.connect().await
            {
                self.server += 1;
                if !error.is_retryable() {
                    self.over = true;
                    return Some(Err(error));
                }
                tracing::debug!(%error, "no events from this server, asking the next");
                tokio::time::sleep(self.backoff.next_delay()).await;
                continue;
            }
            if let Err(error) = self.receive().await {
                self.over = true;
                // What came before it in the same piece is still handed out.
                self.failed = Some(error);
            }
        }
    }

    async fn connect(&mut self) -> Result<(), Error> {
        let response = self
            .client
            .open_stream(&self.call, self.server, self.last_id.as_deref())
            .await?;
        if self.last_id.is_none() && self.begins == Begins::FromNowOn {
            // A stream from "now on" begins after the last event of the revision that the answer names.
            let index = response
                .headers()
                .get(INDEX_HEADER)
                .and_then(|value| value.to_str().ok());
            self.last_id = index.map(|index| format!("{index}.{}", u32::MAX));
        }
        let bytes = response.bytes_stream().map(|piece| piece.map(Vec::from)).boxed();
        self.connection = Some((bytes, Parser::default()));
        Ok(())
    }

    async fn receive(&mut self) -> Result<(), Error> {
        let Some((bytes, parser)) = &mut self.connection else {
            return Ok(());
        };
        let piece = match tokio::time::timeout(SILENCE, bytes.next()).await {
            Ok(Some(Ok(piece))) => piece,
            ended => {
                tracing::debug!(?ended, "event stream ended, going on at the next server");
                self.connection = None;
                self.server += 1;
                tokio::time::sleep(self.backoff.next_delay()).await;
                return Ok(());
            }
        };
        self.backoff.reset();
        let server = || self.client.servers()[self.server % self.client.server_count()].clone();
        let messages = parser.feed(&piece).map_err(|_| Error::NotRegent {
            server: server(),
            status: 200,
            body: "an event without end".to_owned(),
        })?;
        for message in messages {
            if message.kind.as_deref() == Some("gone") {
                return Err(Error::Problem(Box::new(Problem::new(Code::Gone, message.data))));
            }
            let event = serde_json::from_str(&message.data).map_err(|source| Error::BadAnswer {
                server: server(),
                source,
            })?;
            self.ready.push_back(event);
        }
        Ok(())
    }
}
