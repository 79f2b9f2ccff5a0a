//! What unit tests share: the runner of golden scripts.
//!
//! A script is a text file under `tests/scripts/<room>/`. A line that begins with `> ` is a command; the lines below it, up
//! to the next command, a comment or an empty line, are the output it must give. Lines that begin with `#` are comments.
//! Run the tests with `UPDATE_SCRIPTS=1` to write what came out into the files, and look at the difference.

use std::fmt::Write;
use std::fs;
use std::path::Path;

/// Runs every script of a room; `new` makes the state that one script's commands work on.
pub(crate) fn run_scripts<F>(room: &str, new: impl Fn(String) -> F)
where
    F: FnMut(&[&str]) -> String,
{
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts").join(room);
    let mut paths: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "no scripts in {}", dir.display());
    for path in paths {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let script = fs::read_to_string(&path).unwrap();
        let mut run = new(name.clone());
        let mut out = String::new();
        let mut skipping = false;
        for line in script.lines() {
            if let Some(command) = line.strip_prefix("> ") {
                writeln!(out, "{line}").unwrap();
                let words: Vec<&str> = command.split_whitespace().collect();
                let output = run(&words);
                out.push_str(&output);
                skipping = true;
            } else if line.is_empty() || line.starts_with('#') {
                skipping = false;
                writeln!(out, "{line}").unwrap();
            } else if !skipping {
                writeln!(out, "{line}").unwrap();
            }
        }
        if std::env::var_os("UPDATE_SCRIPTS").is_some() {
            fs::write(&path, out).unwrap();
        } else {
            assert_eq!(out, script, "{room}/{name}: the left side is what came out");
        }
    }
}
