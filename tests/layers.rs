//! The order of the layers: a file uses only what stands below it, so that the house stays one tower without a cycle.
//!
//! Each row may use the rows before it, and files of the same row in the same folder may use each other. A new file has to
//! be given its place here, or the test fails.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// From the ground up.
const LAYERS: &[&[&str]] = &[
    &["error", "lock", "pace", "proto", "testing"],
    &["world"],
    &["storage", "config", "cork", "lease", "metrics", "slow"],
    &["mvcc", "snapshot", "cli", "tls"],
    &["raft"],
    &["background", "listing"],
    &["node"],
    &["api"],
    &["client"],
    &["server"],
    &["backup"],
    &["embed", "sim"],
    &["lib", "main", "backups", "embedding", "logging", "internals"],
];

#[test]
fn files_use_only_what_is_below_them() {
    let mut rank = BTreeMap::new();
    for (layer, names) in LAYERS.iter().enumerate() {
        for name in *names {
            rank.insert(*name, layer);
        }
    }
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    for file in rust_files(&src) {
        let relative = file.strip_prefix(&src).unwrap();
        let own = relative.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        let Some(&own_rank) = rank.get(own) else {
            wrong.push(format!("{} has no place in the layers", relative.display()));
            continue;
        };
        let text = fs::read_to_string(&file).unwrap();
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap();
            for used in uses(code) {
                match rank.get(used.as_str()) {
                    Some(&used_rank) if used == own || used_rank < own_rank => {}
                    Some(_) => {
                        wrong.push(format!("{}:{} uses `{used}`, which does not stand below `{own}`", relative.display(), number + 1))
                    }
                    // What `lib.rs` re-exports at the top: errors and the configuration.
                    None if used.starts_with(char::is_uppercase) => {}
                    None => wrong.push(format!("{}:{} uses `{used}`, which has no place in the layers", relative.display(), number + 1)),
                }
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// The modules that a line names as `crate::module`, or as one of `crate::{module, ...}`.
fn uses(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for rest in code.split("crate::").skip(1) {
        let names: Vec<&str> = match rest.strip_prefix('{') {
            Some(list) => list.split('}').next().unwrap().split(',').collect(),
            None => vec![rest],
        };
        for name in names {
            let name: String = name.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if !name.is_empty() {
                found.push(name);
            }
        }
    }
    found
}

fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}
