//! Lists: a page at a time, or all of them.

use std::future::Future;

use crate::Error;

/// As many records as one request of [`fetch_all`] asks for; the server may give fewer.
const PAGE_SIZE: u32 = 500;

/// [`fetch_all`] stops here: no cluster holds this many pages, so the cursor runs in a circle.
const MAX_PAGES: usize = 10_000;

/// Which part of a list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    /// As many records at most; the server's default when absent.
    pub limit: Option<u32>,
    /// From here on: `nextCursor` of the page before.
    pub cursor: Option<String>,
}

impl Page {
    pub(crate) fn query(&self) -> Vec<(&'static str, String)> {
        let mut query = Vec::new();
        if let Some(limit) = self.limit {
            query.push(("limit", limit.to_string()));
        }
        if let Some(cursor) = &self.cursor {
            query.push(("cursor", cursor.clone()));
        }
        query
    }
}

/// Gathers all pages. `get` fetches one and gives its records and the cursor of the next.
///
/// The pages are not one consistent view: what is made or removed meanwhile may be missed or be in it.
pub async fn fetch_all<T, F, A>(mut get: F) -> Result<Vec<T>, Error>
where
    F: FnMut(Page) -> A,
    A: Future<Output = Result<(Vec<T>, Option<String>), Error>>,
{
    let mut all = Vec::new();
    let mut cursor = None;
    for _ in 0..MAX_PAGES {
        let (records, next) = get(Page {
            limit: Some(PAGE_SIZE),
            cursor: cursor.take(),
        })
        .await?;
        all.extend(records);
        if next.is_none() {
            return Ok(all);
        }
        cursor = next;
    }
    Err(Error::Configuration(format!(
        "a list did not end after {MAX_PAGES} pages"
    )))
}
