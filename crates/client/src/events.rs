//! Events as a stream that outlives any node.
//!
//! Invariant: from the first connection on no event is missed and none comes twice, whichever node the
//! stream goes on at: each reconnect names the last event that was handed out, or, before the first, the
//! revision at which the stream began.

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

/// Which events.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EventFilter {
    /// Only what came after the event with this id, `REVISION.N`; from now on when absent.
    pub after: Option<String>,
    /// Only these kinds, such as `session.running`; all when empty.
    pub kinds: Vec<String>,
}

struct Watch {
    client: Client,
    kinds: Vec<String>,
    last_id: Option<String>,
    server: usize,
    backoff: FullJitter,
    connection: Option<(BoxStream<'static, reqwest::Result<Vec<u8>>>, Parser)>,
    ready: VecDeque<Event>,
    over: bool,
    failed: Option<Error>,
}

impl Client {
    /// Events as they happen. The stream reconnects by itself; it ends after an error that waiting does
    /// not cure: `gone` (410) when the place to go on from is pruned or of another cluster, or a refusal.
    pub fn events(&self, filter: EventFilter) -> BoxStream<'static, Result<Event, Error>> {
        let watch = Watch {
            server: self.preferred(),
            client: self.clone(),
            kinds: filter.kinds,
            last_id: filter.after,
            backoff: FullJitter::new(FIRST_WAIT, LONGEST_WAIT),
            connection: None,
            ready: VecDeque::new(),
            over: false,
            failed: None,
        };
        stream::unfold(
            watch,
            |mut watch| async move { Some((watch.next().await?, watch)) },
        )
        .boxed()
    }
}

impl Watch {
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
        let kinds = (!self.kinds.is_empty()).then(|| ("kinds", self.kinds.join(",")));
        let after = self.last_id.clone().map(|id| ("after", id));
        let call = Call::get(["events"]).query(kinds).query(after);
        let response = self
            .client
            .open_stream(&call, self.server, self.last_id.as_deref())
            .await?;
        if self.last_id.is_none() {
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
        let server = || self.client.servers()[self.server % self.client.servers().len()].clone();
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
