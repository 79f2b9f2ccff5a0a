//! Cases by hand, on the simulated disk and the real one; the random ones are in `wal/chaos.rs`.

use super::sim::{Rng, SimDisk};
use super::*;
use std::sync::mpsc::{Receiver, Sender, channel};

pub(super) fn options(segment_bytes: u64) -> WalOptions {
    WalOptions { segment_bytes, reserve_retry: Duration::from_millis(5), ..WalOptions::default() }
}

pub(super) fn entry(term: u64, index: u64, payload: impl Into<Bytes>) -> LogEntry {
    LogEntry { id: LogId { term, node: 1, index }, payload: payload.into() }
}

fn id(term: u64, index: u64) -> LogId {
    LogId { term, node: 1, index }
}

pub(super) fn open(disk: &Arc<SimDisk>, options: WalOptions) -> Result<(Wal, Recovered)> {
    let (wal, recovered) = Wal::read_on(disk.clone(), options)?;
    wal.accept()?;
    Ok((wal, recovered))
}

/// Makes callbacks that report to one channel, with what they belong to.
struct Answers {
    sender: Sender<(u64, Result<()>)>,
    receiver: Receiver<(u64, Result<()>)>,
}

impl Answers {
    fn new() -> Self {
        let (sender, receiver) = channel();
        Self { sender, receiver }
    }

    fn done(&self, tag: u64) -> Done {
        let sender = self.sender.clone();
        Box::new(move |result| {
            let _ = sender.send((tag, result));
        })
    }

    fn next(&self) -> (u64, Result<()>) {
        self.receiver.recv_timeout(Duration::from_secs(60)).expect("a callback within a minute")
    }

    fn wait(&self, tag: u64) {
        let (got, result) = self.next();
        assert_eq!(got, tag);
        result.expect("durable");
    }
}

/// Waits until the segment after this one is prepared, whose syncs and writes would be counted otherwise.
fn wait_for_next_segment(wal: &Wal) {
    while wal.shared.lock().next.is_none() {
        std::thread::yield_now();
    }
}

fn append(wal: &Wal, answers: &Answers, indexes: std::ops::Range<u64>, size: usize) {
    for index in indexes {
        wal.append(vec![entry(1, index, vec![index as u8; size])], answers.done(index)).expect("accepted");
        answers.wait(index);
    }
}

#[test]
fn a_group_is_one_sync() {
    let disk = SimDisk::new(1);
    let (wal, _) = open(&disk, options(1 << 20)).unwrap();
    let answers = Answers::new();
    append(&wal, &answers, 0..1, 10);
    // The second segment is being prepared meanwhile; its syncs must be over before they are counted.
    wait_for_next_segment(&wal);
    let before = disk.file_syncs();
    disk.hold_syncs(true);
    wal.append(vec![entry(1, 1, "first")], answers.done(1)).unwrap();
    disk.wait_for_held();
    for index in 2..100 {
        wal.append(vec![entry(1, index, "x")], answers.done(index)).unwrap();
    }
    wal.save_vote("v".into(), answers.done(100)).unwrap();
    assert_eq!(wal.entries(.., usize::MAX).unwrap().len(), 100, "readable before they are durable");
    assert!(wal.queued_bytes() > 0);
    disk.hold_syncs(false);
    for index in 1..=100 {
        answers.wait(index); // in order
    }
    assert_eq!(disk.file_syncs() - before, 2);
    assert_eq!(wal.queued_bytes(), 0);
    wal.close().unwrap();
    assert!(matches!(wal.append(vec![entry(1, 100, "x")], answers.done(0)), Err(Error::Stopped)));
}

#[test]
fn a_failed_sync_ends_the_log_and_is_not_tried_again() {
    for write in [false, true] {
        let disk = SimDisk::new(2);
        let (wal, _) = open(&disk, options(1 << 16)).unwrap();
        let answers = Answers::new();
        append(&wal, &answers, 0..3, 100);
        wait_for_next_segment(&wal);
        // Wait for the mark too, so that the failing operation is the one meant.
        wal.append(vec![], answers.done(99)).unwrap();
        answers.wait(99);
        if write {
            disk.fail_write_in(0)
        } else {
            disk.fail_sync_in(0)
        }
        let accepted = wal.append(vec![entry(1, 3, "lost?")], answers.done(3));
        if accepted.is_ok() {
            let (_, result) = answers.next();
            assert!(matches!(result, Err(Error::Io { .. })), "{result:?}");
        }
        assert!(matches!(wal.failed(), Some(Error::Io { .. })));
        let syncs = disk.file_syncs();
        assert!(matches!(wal.append(vec![entry(1, 4, "x")], answers.done(4)), Err(Error::Io { .. })));
        assert!(matches!(wal.save_vote("x".into(), answers.done(5)), Err(Error::Io { .. })));
        assert!(wal.close().is_err());
        assert_eq!(disk.file_syncs(), syncs);
        drop(wal);
        // What the kernel still shows is written again before it is trusted: a cut right after opening must not take it back.
        let (wal, recovered) = open(&disk, options(1 << 16)).unwrap();
        disk.cut_now();
        drop(wal);
        disk.power_on();
        let (_wal, again) = open(&disk, options(1 << 16)).unwrap();
        assert_eq!(again.state, recovered.state);
        assert!(recovered.state.next() >= 3);
    }
}

/// What the log leaves on a scant disk is the state's, which must be written in order that the log can be cut off.
#[test]
fn a_segment_is_made_whole_only_where_another_fits_beside_it() {
    const SEGMENT: u64 = 64 << 10;
    for (free, expected) in [(3 * SEGMENT, SEGMENT), (3 * SEGMENT - 1, SEGMENT / 2), (SEGMENT + SEGMENT / 4, SEGMENT / 8)] {
        let disk = SimDisk::new(1);
        // The first one takes its own of it.
        disk.set_free(free);
        let (wal, _) = open(&disk, options(SEGMENT)).unwrap();
        wait_for_next_segment(&wal);
        assert_eq!(wal.shared.lock().next.as_ref().unwrap().capacity, expected, "{free} bytes free at the start");
        wal.close().unwrap();
    }
}

#[test]
fn a_full_disk_refuses_growth_and_heals() {
    let disk = SimDisk::new(3);
    disk.set_free(2 * 8192);
    let (wal, _) = open(&disk, options(8192)).unwrap();
    let answers = Answers::new();
    // Appends until one is refused. It is known before each whether there is a next segment: what is accepted while that is open would
    // wait for space instead.
    let fill = |most: u64| {
        for _ in 0..most {
            while wal.shared.lock().next.is_none() && !wal.space_low() {
                std::thread::yield_now();
            }
            let index = wal.log_state().next();
            match wal.append(vec![entry(1, index, vec![7; 200])], answers.done(index)) {
                Ok(()) => answers.wait(index),
                Err(error) => {
                    assert_eq!(wal.log_state().next(), index, "a refused append leaves nothing");
                    return Some(error);
                }
            }
        }
        None
    };
    let refused = fill(100).expect("16 KiB hold no hundred entries");
    assert!(refused.is_disk_full(), "{refused}");
    assert!(wal.space_low());
    assert!(wal.failed().is_none());
    // Votes still go, and so does the purge that makes space: the first segment is used again.
    wal.save_vote("vote".into(), answers.done(1000)).unwrap();
    answers.wait(1000);
    wal.purge(id(1, wal.log_state().next() - 2), answers.done(1001)).unwrap();
    answers.wait(1001);
    while wal.space_low() {
        std::thread::yield_now();
    }
    assert!(fill(5).is_none());
    // The other way to heal: space from elsewhere, which is noticed by itself.
    assert!(fill(100).is_some());
    disk.set_free(1 << 20);
    while wal.space_low() {
        std::thread::yield_now();
    }
    assert!(fill(50).is_none());
    let state = wal.log_state();
    drop(wal);
    let (_wal, recovered) = open(&disk, options(8192)).unwrap();
    assert_eq!(recovered.state, state);
}

#[test]
fn a_purge_overtakes_entries_that_wait_for_space() {
    let disk = SimDisk::new(4);
    disk.set_free(2 * 8192);
    let (wal, _) = open(&disk, options(8192)).unwrap();
    let answers = Answers::new();
    // Into the second segment, and stop the preparation of the third before its outcome is known.
    let mut index = 0;
    wait_for_next_segment(&wal);
    disk.hold_creates(true);
    while wal.shared.lock().segments.len() < 2 {
        append(&wal, &answers, index..index + 1, 500);
        index += 1;
    }
    disk.wait_for_held();
    let first = index;
    while index < first + 18 {
        wal.append(vec![entry(1, index, vec![1; 500])], answers.done(index)).expect("nobody knows yet that there is no space");
        index += 1;
    }
    // They need more than the second segment, and only the purge, asked for last, brings the space of the first one back.
    wal.purge(id(1, first - 2), answers.done(9999)).unwrap();
    disk.hold_creates(false);
    let mut tags = Vec::new();
    while tags.len() < 19 {
        let (tag, result) = answers.next();
        result.unwrap();
        tags.push(tag);
    }
    let purge = tags.iter().position(|tag| *tag == 9999).unwrap();
    assert!((1..18).contains(&purge), "{tags:?}");
    tags.remove(purge);
    assert!(tags.is_sorted());
    let state = wal.log_state();
    assert_eq!(state.next(), index);
    wal.close().unwrap();
    drop(wal);
    let (_wal, recovered) = open(&disk, options(8192)).unwrap();
    assert_eq!(recovered.state, state);
}

#[test]
fn closing_tells_those_who_wait_for_space() {
    let disk = SimDisk::new(5);
    disk.set_free(4096);
    disk.hold_creates(false);
    let (wal, _) = open(&disk, options(4096)).unwrap();
    let answers = Answers::new();
    // Accepted or refused depends on whether the failure is known yet; told in any case.
    let mut accepted = 0;
    let mut refused = 0;
    for index in 0..50 {
        match wal.append(vec![entry(1, accepted, vec![1; 500])], answers.done(index)) {
            Ok(()) => accepted += 1,
            Err(error) => {
                assert!(error.is_disk_full());
                refused += 1;
            }
        }
    }
    assert!(refused > 0 || accepted == 50);
    wal.close().unwrap();
    let results: Vec<_> = (0..accepted).map(|_| answers.next().1).collect();
    let durable = results.iter().take_while(|result| result.is_ok()).count();
    assert!(results[durable..].iter().all(|result| result.as_ref().is_err_and(Error::is_disk_full)));
    drop(wal);
    let (_wal, recovered) = open(&disk, options(4096)).unwrap();
    assert_eq!(recovered.state.next(), durable as u64);
}

#[test]
fn an_entry_larger_than_a_segment_gets_its_own() {
    let disk = SimDisk::new(6);
    let (wal, _) = open(&disk, WalOptions { cache_bytes: 0, ..options(4096) }).unwrap();
    let answers = Answers::new();
    append(&wal, &answers, 0..3, 300);
    append(&wal, &answers, 3..4, 100_000);
    append(&wal, &answers, 4..12, 300);
    assert_eq!(wal.entries(3..4, 1).unwrap()[0].payload.len(), 100_000);
    let too_large = wal.append(vec![entry(1, 12, vec![0; MAX_ENTRY_BYTES + 1])], answers.done(0));
    assert!(matches!(too_large, Err(Error::Apply(ApplyError::RequestTooLarge))));
    let all = wal.entries(.., usize::MAX).unwrap();
    drop(wal);
    let (wal, _) = open(&disk, options(4096)).unwrap();
    assert_eq!(wal.entries(.., usize::MAX).unwrap(), all);
    // An oversized file is not kept for reuse.
    wal.purge(id(1, 11), answers.done(77)).unwrap();
    answers.wait(77);
    while wal.disk_bytes() > 5 * 4096 || wal.shared.lock().next.is_none() {
        std::thread::yield_now();
    }
}

#[test]
fn files_are_used_again_and_stay_few() {
    let disk = SimDisk::new(7);
    let (wal, _) = open(&disk, options(4096)).unwrap();
    let answers = Answers::new();
    for round in 0..100 {
        append(&wal, &answers, round * 10..round * 10 + 10, 150);
        wal.purge(id(1, round * 10 + 8), answers.done(1 << 40)).unwrap();
        answers.wait(1 << 40);
    }
    while !wal.shared.lock().dropped.is_empty() {
        std::thread::yield_now();
    }
    wal.close().unwrap();
    assert!(disk.names().len() <= 2 + 1 + MAX_SPARES + 1, "{:?}", disk.names());
    assert_eq!(wal.entries(.., usize::MAX).unwrap().len(), 1);
    drop(wal);
    let (wal, recovered) = open(&disk, options(4096)).unwrap();
    assert_eq!((recovered.state.first, recovered.state.next()), (999, 1000));
    assert_eq!(recovered.torn, None);
    assert_eq!(wal.log_id(998), Some(id(1, 998)), "the purged one is still known");
    assert_eq!(wal.log_id(997), None);
}

#[test]
fn reads_come_from_cache_and_disk_alike() {
    let disk = SimDisk::new(8);
    let (wal, _) = open(&disk, WalOptions { cache_bytes: 1000, ..options(8192) }).unwrap();
    let answers = Answers::new();
    append(&wal, &answers, 0..200, 90);
    assert!(wal.metrics().cache_bytes <= 1000 + 200);
    for (start, end) in [(0, 200), (0, 1), (150, 200), (199, 200), (50, 60)] {
        let entries = wal.entries(start..end, usize::MAX).unwrap();
        assert_eq!(entries.len() as u64, end - start);
        assert!(entries.iter().zip(start..).all(|(e, index)| e.id.index == index && e.payload == vec![index as u8; 90]));
    }
    assert_eq!(wal.entries(0..200, 0).unwrap().len(), 1, "never nothing");
    assert!((2..5).contains(&wal.entries(0..200, 300).unwrap().len()));
    assert_eq!(wal.entries(200..300, 1).unwrap(), vec![]);
    assert_eq!(wal.entries(..=3, usize::MAX).unwrap().len(), 4);
    // Damage under a reader is named.
    wal.shared.lock().places.get(7).unwrap();
    disk.tamper(&segment_one(), |bytes| bytes[200..2000].fill(1));
    assert!(matches!(wal.entries(7..8, 1), Err(Error::Corrupt { .. })));
}

fn segment_one() -> String {
    state::segment_name(1)
}

#[test]
fn calls_that_make_no_sense_are_refused_and_change_nothing() {
    let disk = SimDisk::new(9);
    let (wal, _) = open(&disk, options(8192)).unwrap();
    let answers = Answers::new();
    append(&wal, &answers, 0..10, 10);
    wal.purge(id(1, 4), answers.done(50)).unwrap();
    answers.wait(50);
    let before = wal.log_state();
    let refused = |result: Result<()>| assert!(matches!(result, Err(Error::Failed(_))), "{result:?}");
    refused(wal.append(vec![entry(1, 11, "gap")], answers.done(0)));
    refused(wal.append(vec![entry(1, 10, "fine"), entry(1, 12, "gap")], answers.done(0)));
    refused(wal.append(vec![entry(0, 10, "older term")], answers.done(0)));
    refused(wal.append(vec![entry(1, u64::MAX, "no index")], answers.done(0)));
    refused(wal.truncate_after(Some(3), answers.done(0)));
    refused(wal.truncate_after(None, answers.done(0)));
    refused(wal.purge(id(1, u64::MAX), answers.done(0)));
    let large = Bytes::from(vec![0; MAX_OPAQUE_BYTES + 1]);
    assert!(matches!(wal.save_vote(large.clone(), answers.done(0)), Err(Error::Apply(ApplyError::RequestTooLarge))));
    assert!(matches!(wal.save_committed(large), Err(Error::Apply(ApplyError::RequestTooLarge))));
    assert_eq!(wal.log_state(), before);
    // Harmless: an older purge, and a truncation after the end.
    wal.purge(id(1, 2), answers.done(60)).unwrap();
    answers.wait(60);
    wal.truncate_after(Some(100), answers.done(61)).unwrap();
    answers.wait(61);
    assert_eq!(wal.log_state(), before);
    assert!(matches!(open(&disk, options(100)), Err(Error::Config(_))));
}

#[test]
fn the_queue_is_bounded() {
    let disk = SimDisk::new(10);
    let (wal, _) = open(&disk, options(1 << 28)).unwrap();
    let answers = Answers::new();
    disk.hold_syncs(true);
    let megabyte = Bytes::from(vec![0; 1 << 20]);
    let mut index = 0;
    let error = loop {
        match wal.append(vec![entry(1, index, megabyte.clone())], answers.done(index)) {
            Ok(()) => index += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Apply(ApplyError::TooManyRequests)), "{error}");
    assert_eq!(index, 63);
    wal.save_vote("votes are small and must go".into(), answers.done(index)).unwrap();
    disk.hold_syncs(false);
    for index in 0..=index {
        answers.wait(index);
    }
    append(&wal, &answers, index..index + 1, 10);
}

#[test]
fn the_last_handle_may_go_in_a_callback() {
    let disk = SimDisk::new(11);
    let (wal, _) = open(&disk, options(8192)).unwrap();
    let wal = Arc::new(wal);
    let (sender, receiver) = channel();
    let held = wal.clone();
    disk.hold_syncs(true);
    let done = move |result: Result<()>| {
        drop(held);
        let _ = sender.send(result);
    };
    wal.append(vec![entry(1, 0, "x")], Box::new(done)).unwrap();
    drop(wal);
    disk.hold_syncs(false);
    receiver.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
}

#[test]
fn a_committed_mark_needs_no_sync_but_is_written_when_idle() {
    let disk = SimDisk::new(12);
    let (wal, _) = open(&disk, options(8192)).unwrap();
    let answers = Answers::new();
    append(&wal, &answers, 0..2, 10);
    wait_for_next_segment(&wal);
    let syncs = disk.file_syncs();
    wal.save_committed("c1".into()).unwrap();
    while !disk.content(&segment_one()).windows(2).any(|bytes| bytes == b"c1") {
        std::thread::yield_now();
    }
    assert_eq!(disk.file_syncs(), syncs);
    // The next frame overwrites the mark, and takes the committed one along.
    append(&wal, &answers, 2..3, 10);
    disk.kill();
    drop(wal);
    disk.power_on();
    let (_wal, recovered) = open(&disk, options(8192)).unwrap();
    assert_eq!(recovered.state.committed.as_deref(), Some(&b"c1"[..]));
}

/// Other disks may have an entry, and a quorum have committed it, before it is on this one.
#[test]
fn a_committed_mark_is_not_ahead_of_the_entries() {
    let disk = SimDisk::new(1);
    let (wal, _) = open(&disk, options(16 << 20)).unwrap();
    let answers = Answers::new();
    append(&wal, &answers, 0..1, 10);
    wait_for_next_segment(&wal);
    disk.hold_syncs(true);
    wal.append(vec![entry(1, 1, "first")], answers.done(1)).unwrap();
    disk.wait_for_held();
    // Taken together, and each too large to share a frame.
    for index in 2..6 {
        wal.append(vec![entry(1, index, vec![7; 3 << 20])], answers.done(index)).unwrap();
    }
    wal.save_committed("entry 5".into()).unwrap();
    disk.fail_sync_in(2);
    disk.hold_syncs(false);
    // How many frames came to the disk before depends on how the thread took them.
    let mut last = 0;
    loop {
        match answers.next() {
            (index, Ok(())) => last = index,
            (index, Err(_)) => break assert_eq!(index, last + 1),
        }
    }
    assert!(last < 5);
    drop(wal);
    disk.cut_losing_all();
    disk.power_on();
    let (wal, recovered) = open(&disk, options(16 << 20)).unwrap();
    assert_eq!((recovered.state.last, recovered.state.committed), (Some(id(1, last)), None));
    wal.close().unwrap();
}

#[test]
fn another_release_is_named() {
    let disk = SimDisk::new(13);
    drop(open(&disk, options(8192)).unwrap());
    disk.tamper(&segment_one(), |bytes| {
        bytes[8..12].copy_from_slice(&2u32.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..60]);
        bytes[60..64].copy_from_slice(&crc.to_le_bytes());
    });
    let error = open(&disk, options(8192)).err().unwrap();
    assert_eq!(error.to_string(), "log/0000000000000001.log: log format 2; this release reads format 1");
}

#[test]
fn the_real_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("member/log");
    let answers = Answers::new();
    let expected;
    {
        let (wal, _) = Wal::open(&path, options(64 << 10)).unwrap();
        append(&wal, &answers, 0..50, 5000);
        wal.truncate_after(Some(44), answers.done(1000)).unwrap();
        answers.wait(1000);
        append(&wal, &answers, 45..60, 100);
        wal.purge(id(1, 30), answers.done(1001)).unwrap();
        answers.wait(1001);
        wal.save_vote("vote".into(), answers.done(1002)).unwrap();
        answers.wait(1002);
        wal.save_committed("committed".into()).unwrap();
        expected = wal.entries(.., usize::MAX).unwrap();
        wal.close().unwrap();
        assert!(wal.disk_bytes() >= 64 << 10);
    }
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
    let (recovered, entries) = dump(&path).unwrap();
    assert_eq!(entries.collect::<Result<Vec<_>>>().unwrap(), expected);
    assert_eq!(recovered.state.vote.as_deref(), Some(&b"vote"[..]));
    assert_eq!(recovered.state.committed.as_deref(), Some(&b"committed"[..]));
    assert_eq!((recovered.state.first, recovered.state.next()), (31, 60));
    let (wal, again) = Wal::open(&path, WalOptions { cache_bytes: 0, ..options(64 << 10) }).unwrap();
    assert_eq!(again, recovered);
    assert_eq!(wal.entries(.., usize::MAX).unwrap(), expected);
    wal.close().unwrap();
    // A file cut short is damage, not a torn tail.
    let last = std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "log"));
    let last = last.max().unwrap();
    std::fs::OpenOptions::new().write(true).open(last).unwrap().set_len(100).unwrap();
    assert!(matches!(Wal::open(&path, options(64 << 10)), Err(Error::Corrupt { offset: Some(100), .. })));
    assert!(matches!(dump(dir.path().join("nowhere")), Err(Error::Io { .. })));
}

#[test]
fn the_decoder_refuses_frames_out_of_order() {
    let header = frame::SegmentHeader { sequence: 4, salt: 99, capacity: 4096 };
    let build = |sequences: &[(u64, bool)]| {
        let mut bytes = header.encode().to_vec();
        let mut buf = frame::FrameBuf::default();
        for (sequence, mark) in sequences {
            buf.begin(99, MAX_FRAME_BYTES);
            buf.vote(b"some vote");
            bytes.extend_from_slice(if *mark { buf.finish_mark(*sequence) } else { buf.finish(*sequence) });
        }
        bytes.resize(4096, 0);
        bytes
    };
    let decode = |bytes: &[u8], expected| decode_segment(bytes, expected, &mut |_| Ok(()));
    let fine = decode(&build(&[(7, false), (8, false), (8, true)]), None).unwrap();
    assert_eq!((fine.frames, fine.last_frame, fine.tail), (2, 8, Tail::Marked));
    assert_eq!(decode(&build(&[(7, false)]), Some(6)).unwrap_err(), Flaw::Gap { expected: 6, found: 7 });
    assert_eq!(decode(&build(&[]), Some(6)).unwrap().frames, 0);
    let damaged = |result| assert!(matches!(result, Err(Flaw::Damaged { .. })), "{result:?}");
    damaged(decode(&build(&[]), None));
    damaged(decode(&build(&[(7, false), (9, false)]), None));
    damaged(decode(&build(&[(7, false), (8, true)]), None));
    damaged(decode(&build(&[(7, false), (7, true), (8, false)]), None));
    // The visitor's objection is damage at that record.
    let objected = decode_segment(&build(&[(7, false)]), None, &mut |_| Err("no".into())).unwrap_err();
    assert_eq!(objected, Flaw::Damaged { offset: 104, what: "no".into() });
}

/// Prints appends a second at several batch sizes beside the least that the same bytes can cost: one thread that writes them to a file
/// already filled with zeros and calls fdatasync. Both take turns, so that a busy machine hits both.
/// `WAL_BENCH_DIR=dir cargo test --release --lib -- --ignored --nocapture prints_figures`
#[test]
#[ignore = "prints figures; takes a while, and means something in release builds only"]
fn prints_figures() {
    use std::os::unix::fs::FileExt;
    use std::time::Instant;
    let dir = std::env::var("WAL_BENCH_DIR").map_or_else(|_| tempfile::tempdir(), tempfile::tempdir_in).unwrap();
    let payload = Bytes::from(vec![0xab; 300]);
    let settle = |wal: &Wal| {
        // Past the small first segment, with the next one ready, as in a server that has been up for a while.
        let (sender, receiver) = channel();
        for index in 0..5 {
            let sender = sender.clone();
            let megabyte = entry(1, index, vec![0; 1 << 20]);
            wal.append(vec![megabyte], Box::new(move |result| sender.send(result).unwrap())).unwrap();
            receiver.recv().unwrap().unwrap();
        }
        while wal.shared.lock().segments.len() < 2 || wal.shared.lock().next.is_none() {
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    let zeros = vec![0; 64 << 20];
    let file = std::fs::File::create(dir.path().join("plain")).unwrap();
    for (batch, rounds) in [(1u64, 2000u64), (16, 2000), (64, 1500), (256, 1500)] {
        file.write_all_at(&zeros, 0).unwrap();
        file.sync_all().unwrap();
        let (wal, _) = Wal::open(dir.path().join(batch.to_string()), WalOptions::default()).unwrap();
        settle(&wal);
        let (sender, receiver) = channel();
        let (mut ours, mut plain, mut index, mut at) = (Duration::ZERO, Duration::ZERO, 5, 0);
        let bytes = vec![0xab; batch as usize * 333 + 48];
        for _ in 0..10 {
            let start = Instant::now();
            for _ in 0..rounds / 10 {
                let entries = (index..index + batch).map(|index| entry(1, index, payload.clone())).collect();
                index += batch;
                let sender = sender.clone();
                wal.append(entries, Box::new(move |result| sender.send(result).unwrap())).unwrap();
                receiver.recv().unwrap().unwrap();
            }
            ours += start.elapsed();
            wal.purge(id(1, index - 1), Box::new(|_| ())).unwrap();
            let start = Instant::now();
            for _ in 0..rounds / 10 {
                file.write_all_at(&bytes, at).unwrap();
                file.sync_data().unwrap();
                at = (at + bytes.len() as u64) % (60 << 20);
            }
            plain += start.elapsed();
        }
        let rate = |took: Duration| (rounds * batch) as f64 / took.as_secs_f64();
        let round = |took: Duration| took.as_secs_f64() * 1e6 / rounds as f64;
        println!(
            "batch {batch:3}: {:8.0} appends/s, {:5.0} us a round; plain file: {:8.0} appends/s, {:5.0} us",
            rate(ours),
            round(ours),
            rate(plain),
            round(plain)
        );
    }
    for in_flight in [64u64, 256, 1024] {
        let (wal, _) = Wal::open(dir.path().join(format!("flight{in_flight}")), WalOptions::default()).unwrap();
        settle(&wal);
        let (sender, receiver) = channel();
        let (syncs, start, total) = (wal.metrics().fsyncs, Instant::now(), 200_000);
        // One thread that keeps so many single appends in flight, as a server's runtime does.
        let (mut done, mut index) = (5, 5);
        while done < total {
            while index < total && index - done < in_flight {
                let sender = sender.clone();
                wal.append(vec![entry(1, index, payload.clone())], Box::new(move |result| sender.send(result).unwrap())).unwrap();
                index += 1;
            }
            receiver.recv().unwrap().unwrap();
            done += 1 + receiver.try_iter().map(|result| result.unwrap()).count() as u64;
        }
        let rate = total as f64 / start.elapsed().as_secs_f64();
        println!("{in_flight} single appends in flight: {rate:.0} appends/s, {} syncs", wal.metrics().fsyncs - syncs);
    }
}

mod decoder {
    use super::*;
    use proptest::prelude::*;

    /// A segment as the log writes it.
    fn valid() -> Vec<u8> {
        let disk = SimDisk::new(14);
        let (wal, _) = open(&disk, options(4096)).unwrap();
        let answers = Answers::new();
        append(&wal, &answers, 0..8, 60);
        wal.save_committed("c".into()).unwrap();
        wal.purge(id(1, 1), answers.done(9)).unwrap();
        answers.wait(9);
        wal.close().unwrap();
        disk.content(&segment_one())
    }

    proptest! {
        #[test]
        fn anything_at_all(bytes in proptest::collection::vec(any::<u8>(), 0..2000), expected in any::<Option<u64>>()) {
            let _ = decode_segment(&bytes, expected, &mut |_| Ok(()));
            let _ = frame::decode_record(&bytes, 0);
        }

        /// Changes that keep every checksum right get further in.
        #[test]
        fn a_log_with_changes(changes in proptest::collection::vec((0usize..4096, any::<u8>()), 0..6), cut in 0usize..=4096, seed in any::<u64>()) {
            let mut bytes = valid();
            let mut rng = Rng(seed);
            for (at, byte) in changes {
                bytes[if rng.below(2) == 0 { at } else { at % 1200 }] = byte;
            }
            let crc = crc32c::crc32c(&bytes[..60]);
            bytes[60..64].copy_from_slice(&crc.to_le_bytes());
            for at in (64..bytes.len() - 40).step_by(8) {
                let salt = bytes[24..32].to_vec();
                if rng.below(2) == 0 && bytes[at..].starts_with(b"q") {
                    bytes[at + 8..at + 16].copy_from_slice(&salt);
                    let crc = crc32c::crc32c(&bytes[at..at + 36]);
                    bytes[at + 36..at + 40].copy_from_slice(&crc.to_le_bytes());
                }
            }
            bytes.truncate(cut);
            let mut records = 0;
            let _ = decode_segment(&bytes, None, &mut |_| { records += 1; Ok(()) });
            prop_assert!(records <= bytes.len() / frame::RECORD_HEADER_LEN);
        }
    }
}
