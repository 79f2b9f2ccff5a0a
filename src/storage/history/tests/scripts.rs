//! Golden scripts: `tests/scripts/history/*.txt`. A line `> command` is carried out; the lines up to the next one are what
//! it answered. With `UPDATE_SCRIPTS` set the files are written anew instead of compared.

use super::*;

/// Carries out one command and says what came of it.
fn command(history: &mut History, backend: &Arc<Nasty>, line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    let number =
        |index: usize| words.get(index).and_then(|word| word.parse::<i64>().ok()).unwrap_or_else(|| panic!("a number in {line:?}"));
    let mut out = String::new();
    match words[0] {
        // append FROM TO BYTES: a record for each revision from FROM to TO
        "append" => (number(1)..=number(2)).for_each(|main| history.append(rev(main), record(rev(main), number(3) as usize))),
        // dead FROM TO STEP
        "dead" => history.mark_dead(&(number(1)..=number(2)).step_by(number(3) as usize).map(rev).collect::<Vec<_>>()),
        "meta" => history.put_meta(words[1].as_bytes(), words.get(2).map(|value| Bytes::from(value.to_string()))),
        "commit" => history.commit(Bytes::from(words[1].to_string())),
        "write" => {
            let before = backend.values();
            let answer = match history.write_out() {
                Ok(true) => "written".to_string(),
                Ok(false) => "nothing to write".to_string(),
                Err(error) => error.to_string(),
            };
            writeln!(out, "{answer}").unwrap();
            difference(&before, &backend.values(), &mut out);
        }
        "collect" => {
            let before = backend.values();
            let more = history.collect(number(1) as usize).unwrap();
            writeln!(out, "{}", if more { "more to do" } else { "done" }).unwrap();
            difference(&before, &backend.values(), &mut out);
        }
        "restart" => {
            let (next, saved, records) = open(backend, 1 << 20).unwrap();
            let meta: Vec<String> =
                saved.meta.iter().map(|(key, value)| format!("{}={}", key.escape_ascii(), value.escape_ascii())).collect();
            let applied = saved.applied.map_or("nothing".to_string(), |bytes| bytes.escape_ascii().to_string());
            writeln!(out, "{} records, applied {applied}, meta {meta:?}", records.len()).unwrap();
            *history = next;
        }
        "stats" => {
            let stats = history.stats();
            writeln!(out, "{} live records of {} bytes, {} in the tail", stats.live_records, stats.live_bytes, stats.tail_records).unwrap();
        }
        "blocks" => {
            for (first, line) in history.map().iter() {
                writeln!(out, "{}: {} of {} records live", first.main, line.meta.live(), line.meta.records).unwrap();
            }
        }
        other => panic!("no command {other:?}"),
    }
    history.check_invariants();
    out
}

/// What a batch has changed on the backend, but for the summary, which every batch writes.
fn difference(before: &Values, after: &Values, out: &mut String) {
    let keys: BTreeSet<&Vec<u8>> = before.keys().chain(after.keys()).collect();
    for key in keys {
        let name = match Key::decode(key) {
            Some(Key::Block(rev)) => format!("block {}", rev.main),
            Some(Key::Dead(rev)) => format!("dead mark of block {}", rev.main),
            Some(Key::Chunk(rev, number)) => format!("chunk {number} of {}", rev.main),
            Some(Key::Meta(name)) => format!("meta {}", name.escape_ascii()),
            Some(Key::Summary) => continue,
            None => panic!("key {key:02x?}"),
        };
        match (before.get(key), after.get(key)) {
            (None, Some(value)) => writeln!(out, "+ {name}, {} bytes", value.len()).unwrap(),
            (Some(_), None) => writeln!(out, "- {name}").unwrap(),
            (Some(old), Some(new)) if old != new => writeln!(out, "~ {name}, {} bytes, was {}", new.len(), old.len()).unwrap(),
            _ => {}
        }
    }
}

#[test]
fn golden_scripts() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scripts/history");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    for file in files {
        let script = std::fs::read_to_string(&file).unwrap();
        let backend = Nasty::new(Values::new());
        let (mut history, ..) = open(&backend, 1 << 20).unwrap();
        let mut transcript = String::new();
        for line in script.lines() {
            // Comments and empty lines stay; answers are made anew.
            if line.starts_with('#') || line.is_empty() {
                writeln!(transcript, "{line}").unwrap();
            } else if let Some(line) = line.strip_prefix("> ") {
                let answer = command(&mut history, &backend, line);
                write!(transcript, "> {line}\n{answer}").unwrap();
            }
        }
        if std::env::var_os("UPDATE_SCRIPTS").is_some() {
            std::fs::write(&file, transcript).unwrap();
        } else {
            assert_eq!(transcript, script, "{}", file.display());
        }
    }
}
