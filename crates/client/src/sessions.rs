//! Sessions.

use regent_types::session::{CreateSession, PatchSession, Session, SessionAction, SessionList, SessionState};
use regent_types::{AgentId, SessionName, UserName};
use reqwest::Method;

use crate::call::{Call, Repeat};
use crate::page::{Page, fetch_all};
use crate::{Client, Error};

/// Which sessions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SessionFilter {
    /// Only this user's.
    pub user: Option<UserName>,
    /// Only those in this state.
    pub state: Option<SessionState>,
    /// Only those placed on this agent.
    pub agent: Option<AgentId>,
    /// Only those with this tag.
    pub tag: Option<String>,
}

impl SessionFilter {
    fn query(&self) -> Vec<(&'static str, String)> {
        [
            ("user", self.user.as_ref().map(ToString::to_string)),
            ("state", self.state.map(|state| state.as_str().to_owned())),
            ("agent", self.agent.as_ref().map(ToString::to_string)),
            ("tag", self.tag.clone()),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
        .collect()
    }
}

/// A record with the tag by which a later change can demand that it is still the same.
#[derive(Debug, Clone, PartialEq)]
pub struct Tagged<T> {
    /// The record.
    pub record: T,
    /// For `If-Match`.
    pub etag: Option<String>,
}

impl Client {
    /// Makes a session.
    pub async fn create_session(&self, session: &CreateSession) -> Result<Session, Error> {
        self.fetch(Call::post(["sessions"]).body(session)).await
    }

    /// One page of the sessions that match.
    pub async fn sessions(&self, filter: &SessionFilter, page: &Page) -> Result<SessionList, Error> {
        self.fetch(Call::get(["sessions"]).query(filter.query()).query(page.query()))
            .await
    }

    /// All sessions that match.
    pub async fn all_sessions(&self, filter: &SessionFilter) -> Result<Vec<Session>, Error> {
        fetch_all(|page| async move {
            let list = self.sessions(filter, &page).await?;
            Ok((list.sessions, list.next_cursor))
        })
        .await
    }

    /// One session.
    pub async fn session(&self, name: &SessionName) -> Result<Session, Error> {
        self.fetch(Call::get(["sessions", name.as_str()])).await
    }

    /// One session with its tag.
    pub async fn session_tagged(&self, name: &SessionName) -> Result<Tagged<Session>, Error> {
        let answer = self.send(Call::get(["sessions", name.as_str()])).await?;
        Ok(Tagged {
            record: answer.json()?,
            etag: answer.etag(),
        })
    }

    /// Changes a session; with `if_match` only if it is still the one that had this tag.
    pub async fn patch_session(
        &self,
        name: &SessionName,
        patch: &PatchSession,
        if_match: Option<&str>,
    ) -> Result<Session, Error> {
        self.fetch(
            Call::new(Method::PATCH, ["sessions", name.as_str()])
                .body(patch)
                .if_match(if_match),
        )
        .await
    }

    /// Ends a session. A second call answers with the same command.
    pub async fn stop_session(&self, name: &SessionName) -> Result<SessionAction, Error> {
        self.fetch(Call::delete(["sessions", name.as_str()])).await
    }

    /// Puts a running session to sleep.
    pub async fn hibernate_session(&self, name: &SessionName) -> Result<SessionAction, Error> {
        self.fetch(Call::put(["sessions", name.as_str(), "hibernate"]))
            .await
    }

    /// Wakes a session that sleeps.
    pub async fn wake_session(&self, name: &SessionName) -> Result<SessionAction, Error> {
        self.fetch(Call::put(["sessions", name.as_str(), "wake"])).await
    }

    /// Tells that the session's user is active, so that it does not hibernate.
    pub async fn touch_session(&self, name: &SessionName) -> Result<(), Error> {
        self.send(Call::post(["sessions", name.as_str(), "heartbeat"]).repeat(Repeat::Freely))
            .await
            .map(drop)
    }
}
