//! A state as bytes and back, in pieces of bounded size.
//!
//! A snapshot is a header, every record of every table in order, and a trailer with the number of
//! records and the content digest; each is framed by its length. Indexes are not in it: they are
//! rebuilt. The decoder takes the bytes in pieces of any size and gives a state only when the
//! trailer agrees, so that a cut or altered snapshot is never taken for a whole one.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use regent_types::Revision;

use crate::codec::{self, CodecError, FORMAT, MAX_ENCODED};
use crate::event::{Event, EventId};
use crate::faults::{self, Fault};
use crate::record::{Agent, ApiToken, Candidate, Command, Lease, Member, Restored, Session, Template, User};
use crate::state::{Identity, Recorded, State};

/// The largest piece that [`State::encode_chunks`] gives: small enough to be a network frame.
pub const MAX_CHUNK: usize = 256 << 10;

/// What is not in a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Header {
    revision_base: u64,
    revision: Revision,
    now: u64,
    digest: u64,
    identity: Option<Identity>,
    events_floor: EventId,
}

/// One record of a snapshot. Variants are only appended; [`ItemRef`] is its borrowed twin.
#[derive(Deserialize)]
pub(crate) enum Item {
    Header(Header),
    Session(Arc<Session>),
    Agent(Arc<Agent>),
    Command(Arc<Command>),
    Lease(Arc<Lease>),
    Template(Arc<Template>),
    User(Arc<User>),
    ApiToken(Arc<ApiToken>),
    Recorded([u8; 16], Arc<Recorded>),
    Event(EventId, Arc<Event>),
    Trailer { records: u64, content: u64 },
    Candidate(Arc<Candidate>),
    Member(Arc<Member>),
    Restored(Arc<Restored>),
}

#[derive(Serialize)]
pub(crate) enum ItemRef<'a> {
    Header(Header),
    Session(&'a Session),
    Agent(&'a Agent),
    Command(&'a Command),
    Lease(&'a Lease),
    Template(&'a Template),
    User(&'a User),
    ApiToken(&'a ApiToken),
    Recorded(&'a [u8; 16], &'a Recorded),
    Event(&'a EventId, &'a Event),
    Trailer { records: u64, content: u64 },
    Candidate(&'a Candidate),
    Member(&'a Member),
    Restored(&'a Restored),
}

impl State {
    /// The whole state in pieces of at most [`MAX_CHUNK`] bytes, for a snapshot.
    pub fn encode_chunks(&self) -> impl Iterator<Item = Vec<u8>> {
        let mut items = self.items();
        let mut content = Content::new(self);
        let mut pending = vec![FORMAT];
        frame(&mut pending, &ItemRef::Header(self.header()));
        let mut ended = false;
        std::iter::from_fn(move || {
            while pending.len() < MAX_CHUNK && !ended {
                if let Some(item) = items.next() {
                    let at = frame(&mut pending, &item);
                    content.item(&pending[at..]);
                } else {
                    let (records, content) = content.finish();
                    frame(&mut pending, &ItemRef::Trailer { records, content });
                    ended = true;
                }
            }
            if pending.is_empty() {
                return None;
            }
            let rest = pending.split_off(pending.len().min(MAX_CHUNK));
            Some(std::mem::replace(&mut pending, rest))
        })
    }

    /// A hash over the whole content: all tables in order, and the cluster's identity. Equal
    /// contents give equal values, however they came about; where the log is (revision, time,
    /// rolling digest) is not part of it. Costs the encoding of everything.
    pub fn content_digest(&self) -> u64 {
        let mut content = Content::new(self);
        let mut buffer = Vec::new();
        for item in self.items() {
            buffer.clear();
            codec::append(&mut buffer, &item);
            content.item(&buffer);
        }
        content.finish().1
    }

    fn header(&self) -> Header {
        Header {
            revision_base: self.revision_base,
            revision: self.revision,
            now: self.now,
            digest: self.digest,
            identity: self.identity.clone(),
            events_floor: self.events_floor,
        }
    }

    fn items(&self) -> impl Iterator<Item = ItemRef<'_>> {
        let sessions = self.sessions.values().map(|r| ItemRef::Session(r));
        let agents = self.agents.values().map(|r| ItemRef::Agent(r));
        let commands = self.commands.values().map(|r| ItemRef::Command(r));
        let leases = self.leases.values().map(|r| ItemRef::Lease(r));
        let leases = leases.filter(|_| !faults::seeded(Fault::SnapshotDropsTable));
        let candidates = self.candidates().map(|r| ItemRef::Candidate(r));
        let templates = self.templates.values().map(|r| ItemRef::Template(r));
        let users = self.users.values().map(|r| ItemRef::User(r));
        let tokens = self.tokens.values().map(|r| ItemRef::ApiToken(r));
        let recorded = self.recorded.iter().map(|(key, r)| ItemRef::Recorded(key, r));
        let events = self.events.iter().map(|(id, r)| ItemRef::Event(id, r));
        let members = self.members.values().map(|r| ItemRef::Member(r));
        // Absent in a cluster that began empty: its snapshots are as they were before there was such a record.
        let restored = self.restored.iter().map(|r| ItemRef::Restored(r));
        sessions
            .chain(agents)
            .chain(commands)
            .chain(leases)
            .chain(candidates)
            .chain(templates)
            .chain(users)
            .chain(tokens)
            .chain(recorded)
            .chain(events)
            .chain(members)
            .chain(restored)
    }
}

/// Appends one item with its length before it; gives where the item itself begins.
pub(crate) fn frame(buffer: &mut Vec<u8>, item: &ItemRef<'_>) -> usize {
    let start = buffer.len();
    buffer.extend_from_slice(&[0; 4]);
    codec::append(buffer, item);
    let length = u32::try_from(buffer.len() - start - 4).expect("a record is far below 4 GiB");
    buffer[start..start + 4].copy_from_slice(&length.to_le_bytes());
    start + 4
}

/// The content digest while it is being computed.
struct Content {
    hash: Xxh3,
    records: u64,
}

impl Content {
    fn new(state: &State) -> Self {
        let mut buffer = Vec::new();
        codec::append(
            &mut buffer,
            &(state.revision_base, &state.identity, &state.events_floor),
        );
        let mut hash = Xxh3::new();
        hash.update(&buffer);
        Self { hash, records: 0 }
    }

    fn item(&mut self, encoded: &[u8]) {
        self.records += 1;
        self.hash.update(encoded);
    }

    fn finish(&self) -> (u64, u64) {
        (self.records, self.hash.digest())
    }
}

/// Puts a state together from the pieces that [`State::encode_chunks`] gave.
#[derive(Debug)]
pub struct StateDecoder {
    state: State,
    pending: Vec<u8>,
    begun: bool,
    header: bool,
    records: u64,
    trailer: Option<(u64, u64)>,
    /// The manifests seen: thousands of sessions have that of one template, and share it.
    manifests: BTreeSet<Arc<str>>,
}

impl Default for StateDecoder {
    fn default() -> Self {
        Self::new()
    }
}

impl StateDecoder {
    /// Begins with nothing.
    pub fn new() -> Self {
        Self {
            state: State::new(),
            pending: Vec::new(),
            begun: false,
            header: false,
            records: 0,
            trailer: None,
            manifests: BTreeSet::new(),
        }
    }

    /// Takes the next piece. After an error the decoder is of no further use.
    pub fn push(&mut self, chunk: &[u8]) -> Result<(), CodecError> {
        self.pending.extend_from_slice(chunk);
        let mut at = 0;
        if !self.begun {
            match self.pending.first() {
                None => return Ok(()),
                Some(&FORMAT) => at = 1,
                Some(&found) => return Err(CodecError::Version { found }),
            }
            self.begun = true;
        }
        while let Some(length) = self.pending.get(at..at + 4) {
            let length = u32::from_le_bytes(length.try_into().expect("four bytes"));
            if u64::from(length) > MAX_ENCODED {
                return Err(CodecError::TooLarge {
                    bytes: u64::from(length),
                });
            }
            let (from, to) = (at + 4, at + 4 + length as usize);
            if self.pending.len() < to {
                break;
            }
            let item = codec::read(&self.pending[from..to])?;
            self.item(item)?;
            at = to;
        }
        self.pending.drain(..at);
        Ok(())
    }

    /// The state, if all of it has come and it is what was written.
    pub fn finish(mut self) -> Result<State, CodecError> {
        let Some((records, content)) = self.trailer else {
            return Err(CodecError::Truncated);
        };
        if !self.pending.is_empty() {
            return Err(CodecError::Snapshot(format!(
                "{} bytes follow its end",
                self.pending.len()
            )));
        }
        if self.records != records {
            return Err(CodecError::Snapshot(format!(
                "{} records of {records}",
                self.records
            )));
        }
        self.state.rebuild_indexes();
        let found = self.state.content_digest();
        if found != content {
            return Err(CodecError::Snapshot(format!(
                "its content is {found:016x}, not {content:016x}"
            )));
        }
        Ok(self.state)
    }

    /// The trailer with which what has come so far would be whole.
    pub(crate) fn trailer_that_fits(&self) -> (u64, u64) {
        (self.records, self.state.content_digest())
    }

    fn item(&mut self, item: Item) -> Result<(), CodecError> {
        if self.trailer.is_some() {
            return Err(CodecError::Snapshot("a record follows the trailer".to_owned()));
        }
        if self.header == matches!(item, Item::Header(_)) {
            return Err(CodecError::Snapshot(
                "the header is not the first and only one".to_owned(),
            ));
        }
        self.records += 1;
        let state = &mut self.state;
        match item {
            Item::Header(header) => {
                state.revision_base = header.revision_base;
                state.revision = header.revision;
                state.now = header.now;
                state.digest = header.digest;
                state.identity = header.identity;
                state.events_floor = header.events_floor;
                self.header = true;
                self.records = 0;
            }
            Item::Session(mut r) => {
                share(&mut self.manifests, &mut Arc::make_mut(&mut r).manifest);
                state.sessions.insert(r.name.clone(), r);
            }
            Item::Agent(r) => drop(state.agents.insert(r.id.clone(), r)),
            Item::Command(r) => drop(state.commands.insert(r.id.clone(), r)),
            Item::Lease(r) => drop(state.leases.insert(r.name.clone(), r)),
            Item::Template(mut r) => {
                share(&mut self.manifests, &mut Arc::make_mut(&mut r).manifest);
                state.templates.insert(r.name.clone(), r);
            }
            Item::User(r) => drop(state.users.insert(r.name.clone(), r)),
            Item::ApiToken(r) => drop(state.tokens.insert(r.id.clone(), r)),
            Item::Recorded(key, r) => drop(state.recorded.insert(key, r)),
            Item::Event(id, r) => {
                if !state.events.push(id, r) {
                    return Err(CodecError::Snapshot(format!("event {id} is out of order")));
                }
            }
            Item::Candidate(r) => drop(
                state
                    .candidates
                    .entry(r.lease.clone())
                    .or_default()
                    .insert(r.place, r),
            ),
            Item::Member(r) => drop(state.members.insert(r.id, r)),
            Item::Restored(r) => state.restored = Some(r),
            Item::Trailer { records, content } => {
                self.records -= 1;
                self.trailer = Some((records, content));
            }
        }
        Ok(())
    }
}

/// Makes equal texts one.
fn share(seen: &mut BTreeSet<Arc<str>>, text: &mut Arc<str>) {
    match seen.get(text) {
        Some(same) => *text = same.clone(),
        None => drop(seen.insert(text.clone())),
    }
}
