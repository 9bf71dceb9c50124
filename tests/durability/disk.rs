//! What a crash leaves of a folder.
//!
//! From a trace of all that a process did to its files this knows, for any moment, what was certainly on disk and
//! what was on its way. What a file has after a crash is what was written before a sync that was done, and of the
//! rest anything: nothing, all, some of the sectors of some of the writes. That is more than most disks and file
//! systems do to anybody. Only names keep their order, as every journal keeps them: a file's name is there once the
//! file or its folder was synced (`fsync`), and then so is every change of names before it.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use crate::strace::{Call, Trace};
use crate::workload::Random;

/// What a disk writes whole or not at all.
const SECTOR: usize = 512;

/// The calls that this needs to see.
pub(crate) const CALLS: &str = "trace=open,openat,creat,write,writev,pwrite64,pwritev,pwritev2,lseek,ftruncate,\
    truncate,fallocate,rename,renameat,renameat2,link,linkat,unlink,unlinkat,mkdir,mkdirat,rmdir,fsync,fdatasync,\
    copy_file_range,sendfile,sendto,sendmsg";

/// Files by their path in the folder; a folder is `None`.
pub(crate) type Image = BTreeMap<PathBuf, Option<Vec<u8>>>;

/// What happened to the files of one folder, in the order in which it began.
pub(crate) struct History {
    base: Image,
    events: Vec<Event>,
    /// Files that there were in the beginning, by their path.
    known: BTreeMap<PathBuf, usize>,
}

struct Event {
    entered: usize,
    /// Where it was done; never, when the process ended in it.
    left: usize,
    what: What,
}

enum What {
    Write {
        file: usize,
        at: usize,
        bytes: Vec<u8>,
    },
    SetLen {
        file: usize,
        len: usize,
    },
    /// The data and length of the file; of `fsync` also its name.
    Sync {
        file: usize,
        names: bool,
    },
    SyncFolder,
    Create {
        path: PathBuf,
        file: usize,
    },
    Folder {
        path: PathBuf,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
    },
    Remove {
        path: PathBuf,
    },
}

impl What {
    fn is_name(&self) -> bool {
        matches!(
            self,
            Self::Create { .. } | Self::Folder { .. } | Self::Rename { .. } | Self::Remove { .. }
        )
    }

    fn changes(&self, wanted: usize) -> bool {
        matches!(self, Self::Write { file, .. } | Self::SetLen { file, .. } if *file == wanted)
    }
}

/// What becomes of the writes that no sync covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rest {
    /// None of them is there: the power went.
    Lost,
    /// All of them are there: only the process went.
    Kept,
    /// Some sectors of some of them are there. The number chooses.
    Torn(u64),
}

impl History {
    /// Reads what a trace says of `folder`, which held `base` in the beginning.
    pub(crate) fn read(base: Image, folder: &Path, trace: &Trace) -> Self {
        let mut reader = Reader {
            folder,
            names: BTreeMap::new(),
            files: 0,
            offsets: HashMap::new(),
            events: Vec::new(),
        };
        for (path, content) in &base {
            if content.is_some() {
                reader.new_file(path);
            }
        }
        let known = reader.names.clone();
        for call in &trace.calls {
            reader.take(call);
        }
        let events = reader.events;
        Self { base, events, known }
    }

    /// The moments at which something changes: where each sync is entered and where it is done, and the end.
    pub(crate) fn moments(&self) -> Vec<usize> {
        let mut moments: Vec<usize> = self
            .events
            .iter()
            .filter(|event| matches!(event.what, What::Sync { .. } | What::SyncFolder))
            .flat_map(|event| [event.entered, event.left.saturating_add(1)])
            .filter(|moment| *moment != usize::MAX)
            .collect();
        moments.sort_unstable();
        moments.dedup();
        moments
    }

    /// What a crash leaves at a moment: before the line of that number in the trace.
    pub(crate) fn image(&self, moment: usize, rest: Rest) -> Image {
        let begun: Vec<&Event> = self
            .events
            .iter()
            .take_while(|event| event.entered < moment)
            .collect();
        let mut choice = Choice::new(rest, moment);

        // Names: those that are certain, then some more of them, in their order.
        let certain = begun
            .iter()
            .rposition(|event| match event.what {
                What::Sync { names, .. } => names && event.left < moment,
                What::SyncFolder => event.left < moment,
                _ => false,
            })
            .map_or(0, |sync| {
                let entered = begun[sync].entered;
                begun
                    .iter()
                    .filter(|e| e.what.is_name() && e.left < entered)
                    .count()
            });
        let names: Vec<&What> = begun
            .iter()
            .map(|event| &event.what)
            .filter(|what| what.is_name())
            .collect();
        let there = certain + choice.of(names.len() - certain);
        let mut files: BTreeMap<PathBuf, Option<usize>> = self
            .base
            .keys()
            .map(|path| (path.clone(), self.known.get(path).copied()))
            .collect();
        for name in &names[..there] {
            match name {
                What::Create { path, file } => {
                    files.insert(path.clone(), Some(*file));
                }
                What::Folder { path } => {
                    files.insert(path.clone(), None);
                }
                What::Rename { from, to } => {
                    let moved = files.remove(from).expect("what is renamed is there");
                    files.insert(to.clone(), moved);
                }
                What::Remove { path } => {
                    files.remove(path);
                }
                _ => unreachable!("only names are here"),
            }
        }
        files
            .into_iter()
            .map(|(path, file)| {
                let content = file.map(|file| self.content(file, &begun, moment, &mut choice));
                (path, content)
            })
            .collect()
    }

    fn content(&self, file: usize, begun: &[&Event], moment: usize, choice: &mut Choice) -> Vec<u8> {
        let mut content = self
            .known
            .iter()
            .find(|(_, known)| **known == file)
            .and_then(|(path, _)| self.base[path].clone())
            .unwrap_or_default();
        let synced = begun
            .iter()
            .filter(|e| {
                matches!(e.what, What::Sync { file: synced, .. } if synced == file) && e.left < moment
            })
            .map(|e| e.entered)
            .max()
            .unwrap_or(0);
        for event in begun.iter().filter(|event| event.what.changes(file)) {
            let certain = event.left < synced;
            match &event.what {
                What::Write { at, bytes, .. } if certain => write(&mut content, *at, bytes),
                What::Write { at, bytes, .. } => choice.write(&mut content, *at, bytes),
                What::SetLen { len, .. } if certain || choice.of(1) == 1 => content.resize(*len, 0),
                _ => {}
            }
        }
        content
    }
}

fn write(content: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    let end = at + bytes.len();
    if content.len() < end {
        content.resize(end, 0);
    }
    content[at..end].copy_from_slice(bytes);
}

/// Decides about what no sync covers, the same way each time.
struct Choice {
    rest: Rest,
    random: Random,
}

impl Choice {
    fn new(rest: Rest, moment: usize) -> Self {
        let seed = match rest {
            Rest::Torn(seed) => seed,
            Rest::Lost | Rest::Kept => 0,
        };
        Self {
            rest,
            random: Random(seed << 32 ^ moment as u64),
        }
    }

    /// How many of so many things are there.
    fn of(&mut self, count: usize) -> usize {
        match self.rest {
            Rest::Lost => 0,
            Rest::Kept => count,
            Rest::Torn(_) => usize::try_from(self.random.below(count as u64 + 1)).expect("a small number"),
        }
    }

    /// Leaves what is there of a write: nothing, all, its beginning, its end, or any of its sectors.
    fn write(&mut self, content: &mut Vec<u8>, at: usize, bytes: &[u8]) {
        let first = at / SECTOR;
        let sectors = (at + bytes.len()).div_ceil(SECTOR) - first;
        let way = match self.rest {
            Rest::Lost => return,
            Rest::Kept => 0,
            Rest::Torn(_) => self.random.below(6),
        };
        let cut = self.of(sectors);
        for sector in 0..sectors {
            let there = match way {
                0 => true,
                1 => false,
                2 => sector < cut,
                3 => sector >= cut,
                _ => self.random.below(2) == 0,
            };
            let begin = ((first + sector) * SECTOR).max(at);
            let end = ((first + sector + 1) * SECTOR).min(at + bytes.len());
            if there {
                write(content, begin, &bytes[begin - at..end - at]);
            } else if way == 5 && content.len() < end {
                // The length of the file is there, what was written is not.
                content.resize(end, 0);
            }
        }
    }
}

/// Turns calls into events.
struct Reader<'a> {
    folder: &'a Path,
    /// The files that have a name now.
    names: BTreeMap<PathBuf, usize>,
    files: usize,
    /// Where the next plain write of a descriptor goes.
    offsets: HashMap<i32, usize>,
    events: Vec<Event>,
}

impl Reader<'_> {
    fn new_file(&mut self, path: &Path) -> usize {
        let file = self.files;
        self.files += 1;
        self.names.insert(path.to_owned(), file);
        file
    }

    fn inside(&self, path: &Path) -> Option<PathBuf> {
        path.strip_prefix(self.folder).ok().map(Path::to_owned)
    }

    fn named(&self, call: &Call, string: usize) -> Option<PathBuf> {
        let path = String::from_utf8_lossy(call.strings.get(string)?).into_owned();
        self.inside(Path::new(&path))
    }

    fn take(&mut self, call: &Call) {
        let failed = call.left.is_some() && call.result.is_none_or(|result| result < 0);
        if failed {
            return;
        }
        let of = self.inside(&call.path);
        let file = of.as_ref().and_then(|path| self.names.get(path).copied());
        let what = match (call.name.as_str(), file) {
            ("open" | "openat" | "creat", _) => return self.open(call),
            ("lseek", Some(_)) => {
                let fd = call.fd.expect("it is of a descriptor");
                self.offsets.insert(fd, position(call.result));
                return;
            }
            ("pwrite64", Some(file)) => What::Write {
                file,
                at: position(i64::try_from(call.last_number()).ok()),
                bytes: written(call),
            },
            ("write" | "writev", Some(file)) => {
                let bytes = written(call);
                let offset = self
                    .offsets
                    .entry(call.fd.expect("it is of a descriptor"))
                    .or_default();
                let at = *offset;
                *offset += bytes.len();
                What::Write { file, at, bytes }
            }
            ("ftruncate", Some(file)) => What::SetLen {
                file,
                len: position(i64::try_from(call.last_number()).ok()),
            },
            ("fsync" | "fdatasync", Some(file)) => What::Sync {
                file,
                names: call.name == "fsync",
            },
            ("fsync", None) if of.is_some() => What::SyncFolder,
            ("rename" | "renameat" | "renameat2", _) => {
                let (Some(from), Some(to)) = (self.named(call, 0), self.named(call, 1)) else {
                    return;
                };
                let file = self.names.remove(&from).expect("a file that is renamed is known");
                self.names.insert(to.clone(), file);
                What::Rename { from, to }
            }
            ("unlink" | "unlinkat", _) => {
                let Some(path) = self.named(call, 0) else { return };
                self.names.remove(&path);
                What::Remove { path }
            }
            ("mkdir" | "mkdirat", _) => {
                let Some(path) = self.named(call, 0) else { return };
                What::Folder { path }
            }
            (_, Some(_)) => panic!(
                "{} is done to a file of the folder, and not understood here",
                call.name
            ),
            (_, None) => return,
        };
        self.event(call, what);
    }

    fn open(&mut self, call: &Call) {
        let Some(path) = self.named(call, 0) else { return };
        let fd = i32::try_from(call.result.unwrap_or(0)).expect("a descriptor is a small number");
        self.offsets.insert(fd, 0);
        match self.names.get(&path).copied() {
            Some(file) if call.has_flag("O_TRUNC") => self.event(call, What::SetLen { file, len: 0 }),
            None if call.has_flag("O_CREAT") => {
                let file = self.new_file(&path);
                self.event(call, What::Create { path, file });
            }
            // It is there already, or a folder.
            Some(_) | None => {}
        }
    }

    fn event(&mut self, call: &Call, what: What) {
        self.events.push(Event {
            entered: call.entered,
            left: call.left.unwrap_or(usize::MAX),
            what,
        });
    }
}

/// What a write wrote, which may be less than it was given.
fn written(call: &Call) -> Vec<u8> {
    let mut bytes = call.bytes();
    if let Some(result) = call.result {
        bytes.truncate(position(Some(result)));
    }
    bytes
}

fn position(number: Option<i64>) -> usize {
    usize::try_from(number.expect("the call is done")).expect("no position is negative")
}

/// Reads a folder.
pub(crate) fn read_folder(folder: &Path) -> Image {
    fn read(root: &Path, folder: &Path, into: &mut Image) {
        for item in std::fs::read_dir(folder).unwrap() {
            let path = item.unwrap().path();
            let name = path.strip_prefix(root).unwrap().to_owned();
            if path.is_dir() {
                into.insert(name, None);
                read(root, &path, into);
            } else {
                into.insert(name, Some(std::fs::read(&path).unwrap()));
            }
        }
    }
    let mut image = Image::new();
    read(folder, folder, &mut image);
    image
}

/// Writes an image into a folder that is not there yet, and that nobody else may enter, as a node wants it.
pub(crate) fn write_folder(image: &Image, folder: &Path) {
    std::fs::DirBuilder::new().mode(0o700).create(folder).unwrap();
    for (path, content) in image {
        let path = folder.join(path);
        match content {
            None => std::fs::create_dir(path).unwrap(),
            Some(content) => std::fs::write(path, content).unwrap(),
        }
    }
}
