//! Which engine keeps the log of a data folder.
//!
//! A folder stays with the store that it was begun with. Opened with the other one it would look empty, and
//! a node that comes back empty could vote a second time; so that is refused.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use super::segments::SegmentsEngine;
use super::sled::SledEngine;
use super::{Engine, LogError, segments};

/// What keeps the log, the vote and small metadata on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogStore {
    /// The sled database.
    #[default]
    Sled,
    /// Plain segment files.
    Segments,
}

impl LogStore {
    /// The word for it on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sled => "sled",
            Self::Segments => "segments",
        }
    }

    /// What a data folder was begun with, if it was. For who starts nodes; a node checks for itself.
    pub fn begun_in(data: &Path) -> Option<Self> {
        [Self::Sled, Self::Segments]
            .into_iter()
            .find(|store| is_begun(data, *store).unwrap_or(false))
    }

    /// Name of its folder in the data folder.
    fn folder(self) -> &'static str {
        match self {
            Self::Sled => "log",
            Self::Segments => segments::FOLDER,
        }
    }
}

impl fmt::Display for LogStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Opens the log of a data folder, which is locked until the engine is dropped.
pub(crate) fn open(data: &Path, store: LogStore) -> Result<Arc<dyn Engine>, LogError> {
    check(data, store)?;
    Ok(match store {
        LogStore::Sled => Arc::new(SledEngine::open(data)?),
        LogStore::Segments => Arc::new(SegmentsEngine::open(data)?),
    })
}

/// Refuses a folder that was begun with the other store.
fn check(data: &Path, store: LogStore) -> Result<(), LogError> {
    let other = match store {
        LogStore::Sled => LogStore::Segments,
        LogStore::Segments => LogStore::Sled,
    };
    match (is_begun(data, store)?, is_begun(data, other)?) {
        (_, false) => Ok(()),
        (false, true) => Err(LogError::OtherStore {
            data: data.to_owned(),
            begun: other,
            asked: store,
        }),
        (true, true) => Err(LogError::Damaged {
            place: data.display().to_string(),
            what: format!(
                "it holds the logs of two stores, {} and {}",
                store.folder(),
                other.folder()
            ),
        }),
    }
}

/// Whether the store has a folder with something in it.
fn is_begun(data: &Path, store: LogStore) -> Result<bool, LogError> {
    let path = data.join(store.folder());
    match fs::read_dir(&path) {
        Ok(mut items) => Ok(items.next().is_some()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(source) => Err(LogError::File {
            path,
            what: "cannot look into the folder of a raft log",
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::tests::engine_on_disk;
    use crate::log::{ONE_SLED, Promise};

    #[tokio::test]
    async fn a_folder_stays_with_the_store_that_it_was_begun_with() {
        let _alone = ONE_SLED.lock().await;
        for (begun, asked) in [
            (LogStore::Sled, LogStore::Segments),
            (LogStore::Segments, LogStore::Sled),
        ] {
            let data = tempfile::tempdir().unwrap();
            // What a crash in the first moment may leave is no beginning.
            fs::create_dir(data.path().join(asked.folder())).unwrap();
            let engine = open(data.path(), begun).unwrap();
            engine.sync(&Promise::default()).unwrap();
            drop(engine);
            assert_eq!(LogStore::begun_in(data.path()), Some(begun));

            let refused = open(data.path(), asked).err().expect("it is the other's");
            assert!(matches!(&refused, LogError::OtherStore { begun: b, .. } if *b == begun));
            let text = refused.to_string();
            assert!(
                text.contains(&format!("begun with the log store {begun}")),
                "{text}"
            );
            assert!(text.contains(&format!("--log-store {begun}")), "{text}");
            assert!(
                fs::read_dir(data.path().join(asked.folder()))
                    .unwrap()
                    .next()
                    .is_none()
            );
            drop(engine_on_disk(begun, data.path()).unwrap());

            fs::write(data.path().join(asked.folder()).join("x"), b"").unwrap();
            for store in [begun, asked] {
                let refused = open(data.path(), store).err().expect("which one is it?");
                assert!(refused.to_string().contains("two stores"), "{refused}");
            }
        }
    }

    /// The watermark outlives the log: without its folder the log is gone, not new.
    #[tokio::test]
    async fn a_log_that_is_gone_is_not_begun_anew_by_either_store() {
        let _alone = ONE_SLED.lock().await;
        for begun in [LogStore::Sled, LogStore::Segments] {
            for next in [LogStore::Sled, LogStore::Segments] {
                let data = tempfile::tempdir().unwrap();
                let engine = open(data.path(), begun).unwrap();
                let vote = crate::config::Vote::new(1, 1);
                let promise = Promise {
                    last: None,
                    vote: Some(vote),
                };
                engine.sync(&promise).unwrap();
                drop(engine);
                fs::remove_dir_all(data.path().join(begun.folder())).unwrap();
                let refused = open(data.path(), next).and_then(crate::log::Log::open).err();
                let refused = refused.expect("what was promised is gone");
                assert!(
                    matches!(refused, LogError::Damaged { .. }),
                    "{begun} then {next}: {refused}"
                );
            }
        }
    }
}
