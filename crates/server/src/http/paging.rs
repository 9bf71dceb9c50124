//! Pages of lists. A cursor is opaque to callers: it names the list and the last key of the page before,
//! so that a page goes on right where the last one ended, on any node and whatever was removed meanwhile.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::problem::{Failure, Result};

/// Records on a page when the caller does not say.
const DEFAULT_LIMIT: usize = 100;
/// Most records on a page: bounds what one answer takes to build.
pub(super) const MAX_LIMIT: usize = 1_000;
/// Longest key that any list has (a lease name of 200 characters, at four bytes each), with room.
const MAX_KEY_BYTES: usize = 1_024;

/// Which page is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Page {
    list: &'static str,
    limit: usize,
    after: Option<String>,
}

impl Page {
    /// Checks what the query said. `list` is the name of the list, such as `sessions`.
    pub(super) fn new(list: &'static str, limit: Option<usize>, cursor: Option<&str>) -> Result<Self> {
        let limit = limit.unwrap_or(DEFAULT_LIMIT);
        if !(1..=MAX_LIMIT).contains(&limit) {
            return Err(Failure::field("limit", format!("must be from 1 to {MAX_LIMIT}")));
        }
        let after = cursor.map(|cursor| decode(list, cursor)).transpose()?;
        Ok(Self { list, limit, after })
    }

    /// Takes the page out of records that come in the order of their keys. Gives the page, how many
    /// records there are in all, and the cursor of the next page if there is one.
    pub(super) fn take<T, K, I>(&self, records: I, key: K) -> (Vec<T>, u64, Option<String>)
    where
        I: Iterator<Item = T>,
        K: Fn(&T) -> String,
    {
        let (mut page, mut total, mut more) = (Vec::new(), 0, false);
        for record in records {
            total += 1;
            if page.len() == self.limit {
                more = true; // the rest is only counted
                continue;
            }
            if self.after.as_ref().is_none_or(|after| key(&record) > *after) {
                page.push(record);
            }
        }
        let next = if more {
            page.last().map(|last| encode(self.list, &key(last)))
        } else {
            None
        };
        (page, total, next)
    }
}

fn encode(list: &str, key: &str) -> String {
    URL_SAFE_NO_PAD.encode(format!("{list}\n{key}"))
}

fn decode(list: &str, cursor: &str) -> Result<String> {
    let decoded = || {
        if cursor.len() > MAX_KEY_BYTES * 2 {
            return None;
        }
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(cursor).ok()?).ok()?;
        let (of, key) = text.split_once('\n')?;
        (of == list).then(|| key.to_owned())
    };
    decoded().ok_or_else(|| Failure::field("cursor", "is not a `nextCursor` of this list"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[allow(clippy::trivially_copy_pass_by_ref)] // as `take` wants it
    fn key(n: &u32) -> String {
        format!("{n:08}")
    }

    #[test]
    fn pages_cover_everything_once_and_end() {
        let mut cursor: Option<String> = None;
        let (mut seen, mut pages) = (Vec::new(), 0);
        loop {
            let page = Page::new("numbers", Some(3), cursor.as_deref()).unwrap();
            let (records, total, next) = page.take(0..10u32, key);
            assert_eq!(total, 10);
            seen.extend(records);
            pages += 1;
            cursor = next;
            if cursor.is_none() {
                break;
            }
        }
        assert_eq!((seen, pages), ((0..10).collect::<Vec<_>>(), 4));
    }

    #[test]
    fn a_page_goes_on_where_the_last_one_ended_even_if_that_record_is_gone() {
        let page = Page::new("numbers", Some(3), None).unwrap();
        let (_, _, next) = page.take(0..10u32, key);
        let page = Page::new("numbers", Some(3), next.as_deref()).unwrap();
        let (records, total, _) = page.take((0..10u32).filter(|n| *n != 2), key);
        assert_eq!((records, total), (vec![3, 4, 5], 9));
    }

    #[test]
    fn a_full_last_page_has_no_next() {
        let (records, _, next) = Page::new("numbers", Some(10), None).unwrap().take(0..10u32, key);
        assert_eq!((records.len(), next), (10, None));
    }

    #[test]
    fn cursors_of_other_lists_and_nonsense_are_refused() {
        let foreign = encode("sessions", "a");
        for cursor in ["", "x", "%%%", &foreign, &"A".repeat(5_000)] {
            assert!(
                Page::new("numbers", None, Some(cursor)).is_err(),
                "{cursor:?} was taken"
            );
        }
        assert!(Page::new("numbers", Some(0), None).is_err());
        assert!(Page::new("numbers", Some(MAX_LIMIT + 1), None).is_err());
    }
}
