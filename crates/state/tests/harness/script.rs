//! Runs story files and compares, or writes anew, what they give.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use super::world::World;

/// Runs every story; gives what differs.
pub fn run_all(update: bool) -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stories");
    let mut files: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "txt"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "there are no stories in {}", folder.display());
    let mut differences = Vec::new();
    for file in files {
        let written = fs::read_to_string(&file).unwrap();
        let result = run(&written);
        if result == written {
            continue;
        }
        if update {
            fs::write(&file, result).unwrap();
        } else {
            differences.push(difference(&file, &written, &result));
        }
    }
    differences
}

/// Runs a story in a world of its own; gives the story with the results as they are.
pub fn run(story: &str) -> String {
    let mut world = World::new();
    let mut result = String::new();
    let mut output = String::new();
    let mut in_output = false;
    let mut pending = false;
    for line in story.lines().chain([""]) {
        let blank = line.trim().is_empty();
        if in_output {
            in_output = !blank;
            if blank {
                result.push('\n');
            }
            continue;
        }
        if line == "---" || (blank && pending) {
            writeln!(result, "---").unwrap();
            result.push_str(&std::mem::take(&mut output));
            pending = false;
            in_output = line == "---";
            if blank {
                result.push('\n');
            }
            continue;
        }
        writeln!(result, "{line}").unwrap();
        if !blank && !line.starts_with('#') {
            output.push_str(&world.step(line));
            pending = true;
        }
    }
    world.verify();
    format!("{}\n", result.trim_end())
}

fn difference(file: &Path, written: &str, result: &str) -> String {
    let mut text = format!("{} comes out otherwise:\n", file.display());
    let (mut was, mut is) = (written.lines(), result.lines());
    let mut shown = 0;
    for number in 1.. {
        match (was.next(), is.next()) {
            (None, None) => break,
            (a, b) if a == b => {}
            (a, b) => {
                writeln!(
                    text,
                    "  line {number}\n    written {}\n    now     {}",
                    a.unwrap_or(""),
                    b.unwrap_or("")
                )
                .unwrap();
                shown += 1;
            }
        }
        if shown == 20 {
            text.push_str("  and so on\n");
            break;
        }
    }
    text
}
