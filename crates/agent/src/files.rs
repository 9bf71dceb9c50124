//! Small files that are either the old content or the new, also after a crash.
//!
//! What an agent must not forget (intents, results, the fence, how a program ended) is a few hundred
//! bytes each, so it is one file each: written aside, synced, renamed over the old, folder synced.
//! Invariant: when [`write_synced`] has returned, a reader finds the whole new content, whatever dies next.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

/// A larger file than this is not one of ours; reading stops there. Ours hold one specification or
/// result, and control-plane frames are at most 1 MiB.
pub const MAX_SMALL_FILE: u64 = 4 * 1024 * 1024;

/// The longest folder name that [`folder_name`] makes; Linux allows 255 bytes.
const MAX_FOLDER_NAME: usize = 120;

/// Replaces `path` by `bytes`, durably.
pub fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path
        .parent()
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let aside = aside(path)?;
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&aside, path)
    })();
    if written.is_err() {
        // The first error is the one to tell; the file aside is overwritten by the next try anyway.
        let _ = fs::remove_file(&aside);
        return written;
    }
    sync_folder(folder)
}

/// Replaces `path` by the JSON of `value`, durably.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    write_synced(path, &serde_json::to_vec(value)?)
}

/// Reads a JSON file; `None` if it does not exist, `InvalidData` if it is not what it should be.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    let mut bytes = Vec::new();
    match File::open(path) {
        Ok(file) => file.take(MAX_SMALL_FILE + 1).read_to_end(&mut bytes)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if bytes.len() as u64 > MAX_SMALL_FILE {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "larger than any file of ours",
        ));
    }
    from_json(&bytes).map(Some)
}

/// Decodes what such a file holds.
///
/// # Errors
/// `InvalidData` when it is not what was written.
pub(crate) fn from_json<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    serde_json::from_slice(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Removes a file, durably; `false` if there was none.
pub fn remove_synced(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => {
            if let Some(folder) = path.parent() {
                sync_folder(folder)?;
            }
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Makes entries made, renamed or removed in this folder durable.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// A folder or file name for any text: letters, digits, `_`, `-` and inner `.` stay, every other byte
/// becomes `%XX`, and a long name is cut and told apart by a hash of the whole.
///
/// Two texts never get one name, and none can be a path (`..`, `a/b`): user names that no file
/// system, shell or DNS would like were a fault of the system that came before.
pub fn folder_name(text: &str) -> String {
    use std::fmt::Write as _;
    let mut name = String::with_capacity(text.len());
    for (at, byte) in text.bytes().enumerate() {
        if byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-' || (byte == b'.' && at > 0) {
            name.push(char::from(byte));
        } else {
            write!(name, "%{byte:02X}").expect("writing to a string never fails");
        }
    }
    if name.is_empty() {
        return "%".to_owned();
    }
    if name.len() > MAX_FOLDER_NAME {
        let hash = Sha256::digest(text.as_bytes());
        // `%%` cannot come out of the loop above, so a cut name never meets one that was not cut.
        name.truncate(MAX_FOLDER_NAME - 2 - 32);
        name.push_str("%%");
        for byte in &hash[..16] {
            write!(name, "{byte:02x}").expect("writing to a string never fails");
        }
    }
    name
}

fn aside(path: &Path) -> io::Result<PathBuf> {
    use std::sync::atomic::{AtomicU64, Ordering};
    // Replicas share the folder: neither threads nor processes may write each other's file aside.
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut aside = std::ffi::OsString::from(".");
    aside.push(name);
    aside.push(format!(
        ".{}.{}.tmp",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    ));
    Ok(path.with_file_name(aside))
}

/// Whether this is a file that [`write_synced`] left when its process died half way.
pub fn is_aside(name: &std::ffi::OsStr) -> bool {
    let bytes = name.as_encoded_bytes();
    bytes.starts_with(b".") && bytes.ends_with(b".tmp")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_file_is_read_back_and_nothing_is_left_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write_json(&path, &1).unwrap();
        write_json(&path, &2).unwrap();
        assert_eq!(read_json::<u32>(&path).unwrap(), Some(2));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(remove_synced(&path).unwrap());
        assert!(!remove_synced(&path).unwrap());
        assert_eq!(read_json::<u32>(&path).unwrap(), None);
    }

    #[test]
    fn a_torn_file_is_invalid_data() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        fs::write(&path, b"{\"a\":").unwrap();
        let error = read_json::<serde_json::Value>(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn odd_user_names_become_folders_fault_17() {
        let long = "x".repeat(400);
        let long_too = format!("{long}y");
        let odd = [
            "", ".", "..", "a/b", "a%2Fb", "Ä", "a b", "\n", "-rf", "%", "%%", &long, &long_too,
        ];
        let mut names: Vec<String> = odd.iter().map(|text| folder_name(text)).collect();
        for name in &names {
            assert!(!name.is_empty() && name != "." && name != ".." && name.len() <= MAX_FOLDER_NAME);
            assert!(!name.contains('/') && name.is_ascii());
        }
        names.sort();
        names.dedup();
        assert_eq!(names.len(), odd.len(), "two names met in one folder");
        assert_eq!(folder_name("alice.b-1"), "alice.b-1");
    }
}
