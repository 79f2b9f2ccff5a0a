//! Runs the scripts under `tests/scripts/log`: a line that starts with `>` is a command, and what follows up to an empty line is what it
//! must print. With `UPDATE_SCRIPTS=1` the files are rewritten with what it does print.
//!
//! ```text
//! open [segment=BYTES]          open the log; prints its state, or why it does not open
//! append A..B term=T [size=N]   one call with these entries; waits until durable
//! truncate N | none             remove what is after N
//! purge N term=T                forget up to N
//! vote TEXT, committed TEXT     save them
//! entries A..B                  what the log holds of these
//! state                         its state, as callers see it
//! close, kill, cut              end it: in order, by SIGKILL, or by a power cut that loses all that was not synced
//! layout                        what the segment files hold, by the decoder
//! files                         the names and sizes of all files
//! flip FILE OFFSET              change the byte there
//! shorten FILE BYTES            cut the file
//! delete FILE
//! tear FRAME                    leave only the first half of that frame's bytes, as a torn write would, and nothing after it
//! ```

use super::sim::SimDisk;
use super::state::Sleep;
use super::tests::{entry, open, options};
use super::*;
use disk::Disk;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::mpsc::channel;

struct Runner {
    disk: Arc<SimDisk>,
    wal: Option<Wal>,
}

fn show_id(id: Option<LogId>) -> String {
    id.map_or("-".into(), |id| format!("{}@{}", id.index, id.term))
}

fn show_bytes(bytes: Option<&[u8]>) -> String {
    bytes.map_or("-".into(), |bytes| String::from_utf8_lossy(bytes).into_owned())
}

fn show_state(state: &LogState) -> String {
    let (vote, committed) = (show_bytes(state.vote.as_deref()), show_bytes(state.committed.as_deref()));
    format!("first={} last={} purged={} vote={vote} committed={committed}\n", state.first, show_id(state.last), show_id(state.purged))
}

/// `key=number` among the arguments.
fn option(args: &[&str], key: &str) -> Option<u64> {
    let prefix = format!("{key}=");
    args.iter().find_map(|arg| arg.strip_prefix(&prefix)).map(|value| value.parse().expect("a number"))
}

fn range(text: &str) -> std::ops::Range<u64> {
    let (start, end) = text.split_once("..").expect("A..B");
    start.parse().expect("a number")..end.parse().expect("a number")
}

impl Runner {
    fn wal(&self) -> &Wal {
        self.wal.as_ref().expect("the log is open")
    }

    /// Calls with a callback and waits for it.
    fn durable(&self, call: impl FnOnce(&Wal, Done) -> Result<()>) -> String {
        let (sender, receiver) = channel();
        let done: Done = Box::new(move |result| {
            let _ = sender.send(result);
        });
        let result = call(self.wal(), done).and_then(|()| receiver.recv_timeout(Duration::from_secs(60)).expect("an answer"));
        result.map_or_else(|error| format!("error: {error}\n"), |()| String::new())
    }

    /// Waits until both threads have nothing more to do, so that the files are the same in each run.
    fn settle(&self) {
        while let Some(wal) = &self.wal {
            let state = wal.shared.lock();
            let idle = state.queue.is_empty() && state.sleep == Sleep::Deep;
            if idle && state.next.is_some() && state.dropped.is_empty() || state.failed.is_some() {
                break;
            }
            drop(state);
            std::thread::yield_now();
        }
    }

    fn run(&mut self, line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (command, args) = words.split_first().expect("a command");
        let text = || Bytes::copy_from_slice(args[0].as_bytes());
        match *command {
            "open" => match open(&self.disk, options(option(args, "segment").unwrap_or(4096))) {
                Ok((wal, recovered)) => {
                    self.wal = Some(wal);
                    let torn = recovered.torn.map(|(path, offset)| format!("cut off: {} from byte {offset}\n", path.display()));
                    show_state(&recovered.state) + &torn.unwrap_or_default()
                }
                Err(error) => format!("error: {error}\n"),
            },
            "append" => {
                let (term, size) = (option(args, "term").expect("term"), option(args, "size").unwrap_or(10));
                let entries = range(args[0]).map(|index| entry(term, index, vec![b'x'; size as usize])).collect();
                self.durable(|wal, done| wal.append(entries, done))
            }
            "truncate" => self.durable(|wal, done| wal.truncate_after(args[0].parse().ok(), done)),
            "purge" => {
                let upto = LogId { term: option(args, "term").expect("term"), node: 1, index: args[0].parse().expect("an index") };
                self.durable(|wal, done| wal.purge(upto, done))
            }
            "vote" => self.durable(|wal, done| wal.save_vote(text(), done)),
            "committed" => self.wal().save_committed(text()).map_or_else(|error| format!("error: {error}\n"), |()| String::new()),
            "entries" => match self.wal().entries(range(args[0]), usize::MAX) {
                Ok(entries) => entries.iter().map(|e| format!("{} {} bytes\n", show_id(Some(e.id)), e.payload.len())).collect(),
                Err(error) => format!("error: {error}\n"),
            },
            "state" => show_state(&self.wal().log_state()),
            "close" => {
                self.settle();
                let closed = self.wal().close();
                self.wal = None;
                closed.map_or_else(|error| format!("error: {error}\n"), |()| String::new())
            }
            "kill" | "cut" => {
                self.settle();
                if *command == "kill" {
                    self.disk.kill()
                } else {
                    self.disk.cut_losing_all()
                }
                self.wal = None;
                self.disk.power_on();
                String::new()
            }
            "layout" => self.layout(),
            "files" => {
                self.settle();
                let size = |name: &String| self.disk.content(name).len();
                let names = self.disk.list().expect("the disk is on");
                names.iter().map(|name| if name.ends_with("e") { "a spare\n".into() } else { format!("{name} {}\n", size(name)) }).collect()
            }
            "flip" => {
                let at: usize = args[1].parse().expect("an offset");
                self.disk.tamper(args[0], |bytes| bytes[at] ^= 0x10);
                String::new()
            }
            "shorten" => {
                self.disk.tamper(args[0], |bytes| bytes.truncate(args[1].parse().expect("a size")));
                String::new()
            }
            "delete" => {
                self.disk.remove(args[0]).expect("it is there");
                Disk::sync(&*self.disk).expect("the disk is on");
                String::new()
            }
            "tear" => self.tear(args[0].parse().expect("a frame")),
            other => panic!("no such command: {other}"),
        }
    }

    fn segments(&self) -> Vec<String> {
        self.disk.names().into_iter().filter(|name| name.ends_with(".log")).collect()
    }

    fn layout(&self) -> String {
        self.settle();
        let mut out = String::new();
        let mut tail = String::new();
        let mut expected = None;
        for name in self.segments() {
            let bytes = self.disk.content(&name);
            let mut frames: BTreeMap<u64, Vec<String>> = BTreeMap::new();
            let scan = decode_segment(&bytes, expected, &mut |seen| {
                let text = match seen.record {
                    Record::Entry { id, payload } => format!("{}: entry {} of {} bytes", seen.offset, show_id(Some(id)), payload.len()),
                    Record::Truncate { last } => format!("{}: truncate after {}", seen.offset, show_id(last)),
                    Record::Purge { upto } => format!("{}: purge up to {}", seen.offset, show_id(Some(upto))),
                    Record::Vote(vote) => format!("{}: vote {}", seen.offset, show_bytes(Some(vote))),
                    Record::Committed(committed) => format!("{}: committed {}", seen.offset, show_bytes(Some(committed))),
                    Record::Opening { first, vote, committed, purged, last } => format!(
                        "{}: opening first={first} last={} purged={} vote={} committed={}",
                        seen.offset,
                        show_id(last),
                        show_id(purged),
                        show_bytes(vote),
                        show_bytes(committed)
                    ),
                };
                frames.entry(seen.frame).or_default().push(text);
                Ok(())
            });
            let _ = writeln!(out, "{name}");
            for (frame, records) in frames {
                let _ = writeln!(out, "  frame {frame}");
                for record in records {
                    let _ = writeln!(out, "    {record}");
                }
            }
            match scan {
                Ok(scan) => {
                    // What follows the last frame means something in the last segment only.
                    if scan.frames > 0 {
                        tail = format!("then: {:?}\n", scan.tail);
                    }
                    expected = if scan.frames > 0 { Some(scan.last_frame + 1) } else { expected };
                }
                Err(flaw) => {
                    let _ = writeln!(out, "  {flaw:?}");
                }
            }
        }
        out + &tail
    }

    /// Keeps the first half of a frame and zeros the rest of its segment.
    fn tear(&self, frame: u64) -> String {
        for name in self.segments() {
            let bytes = self.disk.content(&name);
            let (mut start, mut end) = (None, 0);
            let mut visit = |seen: Seen<'_>| {
                if seen.frame == frame {
                    start.get_or_insert(seen.offset as usize - frame::FRAME_HEADER_LEN);
                    end = (seen.offset + u64::from(seen.len)) as usize;
                }
                Ok(())
            };
            let _ = decode_segment(&bytes, Some(frame), &mut visit);
            let _ = decode_segment(&bytes, None, &mut visit);
            if let Some(start) = start {
                self.disk.tamper(&name, |bytes| bytes[(start + end) / 2..].fill(0));
                return String::new();
            }
        }
        panic!("no frame {frame}");
    }
}

#[test]
fn scripts() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts/log");
    let mut paths: Vec<_> = std::fs::read_dir(&dir).expect("the scripts").map(|entry| entry.expect("a file").path()).collect();
    paths.sort();
    assert!(!paths.is_empty());
    for path in paths {
        let script = std::fs::read_to_string(&path).expect("a script");
        let mut runner = Runner { disk: SimDisk::new(1), wal: None };
        let mut out = String::new();
        let mut skipping = false;
        for line in script.lines() {
            match line.strip_prefix("> ") {
                Some(command) => {
                    let _ = writeln!(out, "{line}");
                    out += &runner.run(command);
                    skipping = true;
                }
                None if line.is_empty() || line.starts_with('#') => {
                    let _ = writeln!(out, "{line}");
                    skipping = false;
                }
                None => assert!(skipping, "{}: not a command: {line}", path.display()),
            }
        }
        if std::env::var_os("UPDATE_SCRIPTS").is_some() {
            std::fs::write(&path, &out).expect("written");
        }
        let (first, _) = script.lines().zip(out.lines()).enumerate().find(|(_, (want, got))| want != got).unwrap_or((0, ("", "")));
        assert!(
            script == out || std::env::var_os("UPDATE_SCRIPTS").is_some(),
            "{} differs from line {}:\n{out}",
            path.display(),
            first + 1
        );
    }
}
