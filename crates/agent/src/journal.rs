//! What an agent began and how it came out, so that a command which comes again is not done again.
//!
//! One small synced file for each (command id, run) in `DATA/journal`: the intent before acting, the
//! outcome after. The files are the only truth and nothing is cached, as the replicas of one host share
//! the folder: who takes over reads what the other wrote.
//!
//! Invariant: when [`Journal::begin`] has returned, the intent survives a crash; an outcome that was
//! recorded is what every later delivery of that run is answered with. A damaged file is set aside and
//! reported; it costs the memory of one command, never the agent.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use regent_types::{CommandId, SessionName, Token};
use serde::{Deserialize, Serialize};

use crate::files;

/// How long an entry is kept when nobody asks to remove it: no control plane redelivers a command that
/// is older, since its own record is pruned by then.
pub const MAX_AGE_MS: u64 = 24 * 60 * 60 * 1000;

/// The most entries that are kept; beyond it the oldest finished ones go. About 4 KiB of disk each.
pub const MAX_ENTRIES: usize = 10_000;

/// The most damaged files that are kept for a person to look at.
const MAX_DAMAGED: usize = 100;

/// Names one run of a command: a redelivery has the same run, a retry a higher one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RunKey {
    /// The command.
    pub command: CommandId,
    /// Its run.
    pub run: u32,
}

/// What is about to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// The session it concerns, if any.
    pub session: Option<SessionName>,
    /// The session's generation.
    pub generation: u64,
    /// The action's name, such as `start_session`.
    pub action: String,
    /// The fencing token under which it is done.
    pub token: Token,
    /// When it was begun, in milliseconds since the Unix epoch.
    pub begun_at_ms: u64,
}

/// How it came out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// Done.
    Completed {
        /// The result as reported.
        result: serde_json::Value,
    },
    /// Not done.
    Failed {
        /// Why, for a person.
        error: String,
        /// Whether the same command may succeed later.
        retryable: bool,
    },
}

/// One file of the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Which run of which command.
    pub key: RunKey,
    /// What was about to be done.
    pub intent: Intent,
    /// How it came out; `None` if it was cut off, or is being done.
    pub outcome: Option<Outcome>,
}

/// All that was found when a journal was loaded.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The entries, oldest first.
    pub entries: Vec<Entry>,
    /// Files that could not be read as entries; they were set aside under these paths.
    pub damaged: Vec<PathBuf>,
}

/// A handle to the journal of a data folder. Cheap; its calls block for syncs.
#[derive(Debug, Clone)]
pub struct Journal {
    folder: PathBuf,
}

impl Journal {
    /// Opens, and makes if missing, the journal of this data folder.
    pub fn open(data: &Path) -> io::Result<Self> {
        let folder = data.join("journal");
        fs::create_dir_all(folder.join("damaged"))?;
        files::sync_folder(data)?;
        Ok(Self { folder })
    }

    /// Reads everything, sets damaged files aside and prunes what is too old or too much.
    pub fn load(&self, now_ms: u64) -> io::Result<Loaded> {
        self.load_at_most(now_ms, MAX_ENTRIES)
    }

    fn load_at_most(&self, now_ms: u64, max_entries: usize) -> io::Result<Loaded> {
        let mut loaded = Loaded::default();
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            let Some(name) = path.file_name() else { continue };
            if name == "damaged" || files::is_aside(name) {
                continue;
            }
            match files::read_json::<Entry>(&path) {
                Ok(Some(entry)) if self.path(&entry.key) == path => loaded.entries.push(entry),
                // Removed by another replica meanwhile.
                Ok(None) => {}
                Ok(Some(_)) => self.set_aside(&path, "it names another command", &mut loaded.damaged)?,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    self.set_aside(&path, &error.to_string(), &mut loaded.damaged)?;
                }
                Err(error) => return Err(error),
            }
        }
        loaded
            .entries
            .sort_by(|a, b| (a.intent.begun_at_ms, &a.key).cmp(&(b.intent.begun_at_ms, &b.key)));
        self.prune(&mut loaded.entries, now_ms, max_entries)?;
        Ok(loaded)
    }

    /// The entry of a run, if it was begun. A damaged one counts as never begun, and is set aside.
    pub fn get(&self, key: &RunKey) -> io::Result<Option<Entry>> {
        let path = self.path(key);
        match files::read_json::<Entry>(&path) {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                self.set_aside(&path, &error.to_string(), &mut Vec::new())?;
                Ok(None)
            }
            other => Ok(other?.filter(|entry| entry.key == *key)),
        }
    }

    /// Records an intent, before anything is done. An entry that is there is left as it is and returned:
    /// the run was begun before, and is over if it has an outcome.
    pub fn begin(&self, key: &RunKey, intent: Intent) -> io::Result<Option<Entry>> {
        if let Some(before) = self.get(key)? {
            return Ok(Some(before));
        }
        let entry = Entry {
            key: key.clone(),
            intent,
            outcome: None,
        };
        files::write_json(&self.path(key), &entry)?;
        Ok(None)
    }

    /// Records an outcome. The first one stands; the one that stands is returned.
    pub fn finish(&self, key: &RunKey, intent: Intent, outcome: Outcome) -> io::Result<Outcome> {
        if let Some(Entry {
            outcome: Some(before),
            ..
        }) = self.get(key)?
        {
            return Ok(before);
        }
        let entry = Entry {
            key: key.clone(),
            intent,
            outcome: Some(outcome.clone()),
        };
        files::write_json(&self.path(key), &entry)?;
        Ok(outcome)
    }

    /// Removes an entry, once the control plane has said that it knows the outcome.
    pub fn forget(&self, key: &RunKey) -> io::Result<()> {
        files::remove_synced(&self.path(key)).map(drop)
    }

    /// `entries` are oldest first.
    fn prune(&self, entries: &mut Vec<Entry>, now_ms: u64, max_entries: usize) -> io::Result<()> {
        let mut surplus = entries.len().saturating_sub(max_entries);
        let mut kept = Vec::with_capacity(entries.len());
        for entry in entries.drain(..) {
            let old = now_ms.saturating_sub(entry.intent.begun_at_ms) > MAX_AGE_MS;
            if old || (surplus > 0 && entry.outcome.is_some()) {
                surplus = surplus.saturating_sub(1);
                // Not synced one by one: an entry that comes back is pruned again.
                match fs::remove_file(self.path(&entry.key)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            } else {
                kept.push(entry);
            }
        }
        *entries = kept;
        Ok(())
    }

    fn set_aside(&self, path: &Path, why: &str, damaged: &mut Vec<PathBuf>) -> io::Result<()> {
        let folder = self.folder.join("damaged");
        let aside = folder.join(path.file_name().unwrap_or_default());
        tracing::error!(path = %path.display(), why, "damaged journal entry is set aside");
        if fs::read_dir(&folder)?.count() < MAX_DAMAGED {
            fs::rename(path, &aside)?;
            damaged.push(aside);
        } else {
            fs::remove_file(path)?;
            damaged.push(path.to_owned());
        }
        Ok(())
    }

    fn path(&self, key: &RunKey) -> PathBuf {
        self.folder.join(format!(
            "{}.{}.json",
            files::folder_name(key.command.as_str()),
            key.run
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(command: &str, run: u32) -> RunKey {
        RunKey {
            command: CommandId::new(command).unwrap(),
            run,
        }
    }

    fn intent(begun_at_ms: u64) -> Intent {
        Intent {
            session: Some(SessionName::new("alice-demo-1").unwrap()),
            generation: 1,
            action: "start_session".to_owned(),
            token: Token(3),
            begun_at_ms,
        }
    }

    fn done(what: &str) -> Outcome {
        Outcome::Completed {
            result: serde_json::json!({ "url": what }),
        }
    }

    #[test]
    fn a_run_that_comes_again_is_answered_with_its_first_outcome() {
        let data = tempfile::tempdir().unwrap();
        let journal = Journal::open(data.path()).unwrap();
        let key = key("c-1", 1);
        assert_eq!(journal.begin(&key, intent(5)).unwrap(), None);
        let cut_off = Journal::open(data.path())
            .unwrap()
            .begin(&key, intent(6))
            .unwrap()
            .unwrap();
        assert_eq!((cut_off.intent.begun_at_ms, cut_off.outcome), (5, None));
        assert_eq!(journal.finish(&key, intent(5), done("a")).unwrap(), done("a"));
        assert_eq!(journal.finish(&key, intent(5), done("b")).unwrap(), done("a"));
        let again = Journal::open(data.path())
            .unwrap()
            .begin(&key, intent(7))
            .unwrap()
            .unwrap();
        assert_eq!(again.outcome, Some(done("a")));
        // A retry is another run.
        assert_eq!(journal.begin(&self::key("c-1", 2), intent(8)).unwrap(), None);
        journal.forget(&key).unwrap();
        journal.forget(&key).unwrap();
        let left: Vec<RunKey> = journal
            .load(10)
            .unwrap()
            .entries
            .into_iter()
            .map(|e| e.key)
            .collect();
        assert_eq!(left, [self::key("c-1", 2)]);
    }

    #[test]
    fn damaged_files_are_set_aside_and_the_others_are_loaded() {
        let data = tempfile::tempdir().unwrap();
        let journal = Journal::open(data.path()).unwrap();
        for n in 0..3 {
            journal.begin(&key(&format!("c-{n}"), 1), intent(n)).unwrap();
        }
        fs::write(data.path().join("journal/c-1.1.json"), b"{\"key\"").unwrap();
        fs::copy(
            data.path().join("journal/c-2.1.json"),
            data.path().join("journal/c-9.1.json"),
        )
        .unwrap();
        fs::write(data.path().join("journal/.c-4.1.json.7.0.tmp"), b"half").unwrap();
        let loaded = journal.load(10).unwrap();
        let keys: Vec<RunKey> = loaded.entries.into_iter().map(|entry| entry.key).collect();
        assert_eq!(keys, [key("c-0", 1), key("c-2", 1)]);
        assert_eq!(loaded.damaged.len(), 2);
        assert!(loaded.damaged.iter().all(|path| path.exists()));
        assert!(journal.load(10).unwrap().damaged.is_empty(), "set aside once");
        assert_eq!(journal.get(&key("c-1", 1)).unwrap(), None);
    }

    #[test]
    fn old_entries_and_a_surplus_of_finished_ones_are_pruned() {
        let data = tempfile::tempdir().unwrap();
        let journal = Journal::open(data.path()).unwrap();
        journal.begin(&key("old", 1), intent(0)).unwrap();
        journal.begin(&key("new", 1), intent(MAX_AGE_MS)).unwrap();
        let keys: Vec<RunKey> = journal
            .load(MAX_AGE_MS + 1)
            .unwrap()
            .entries
            .into_iter()
            .map(|entry| entry.key)
            .collect();
        assert_eq!(keys, [key("new", 1)]);
        assert_eq!(journal.get(&key("old", 1)).unwrap(), None);

        for n in 0..8 {
            journal.begin(&key(&format!("c-{n}"), 1), intent(n)).unwrap();
            if n != 2 {
                journal
                    .finish(&key(&format!("c-{n}"), 1), intent(n), done("x"))
                    .unwrap();
            }
        }
        let loaded = journal.load_at_most(MAX_AGE_MS, 4).unwrap();
        assert_eq!(loaded.entries.len(), 4);
        assert_eq!(loaded.entries[0].key, key("c-2", 1), "what is not finished stays");
    }
}
