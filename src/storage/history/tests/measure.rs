//! Figures in CPU time, not checks: `cargo test --release -- --ignored --nocapture measure`.

use std::time::Duration;

use super::*;

/// As cheap a backend as can be, so that what is measured is the history.
#[derive(Default)]
struct Plain {
    values: RwLock<Values>,
}

impl Backend for Plain {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>> {
        Ok(self.values.read().unwrap().get(key).map(|value| Bytes::copy_from_slice(value)))
    }

    fn scan(&self, start: &[u8], end: &[u8], visit: &mut Visit<'_>) -> Result<()> {
        for (key, value) in self.values.read().unwrap().range(start.to_vec()..) {
            if (!end.is_empty() && key.as_slice() >= end) || !visit(key, value)? {
                break;
            }
        }
        Ok(())
    }

    fn apply(&self, batch: &Batch) -> Result<()> {
        change(&mut self.values.write().unwrap(), batch);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn disk_bytes(&self) -> u64 {
        0
    }

    fn reopen(&self) -> Result<()> {
        Ok(())
    }

    fn rewrite_step(&self, _: usize) -> Result<bool> {
        Ok(false)
    }

    fn start_rewrite(&self) -> Result<()> {
        Ok(())
    }
}

/// What this thread has run for: other work on the machine does not count. Linux only.
struct Instant(Duration);

impl Instant {
    fn now() -> Instant {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        Instant(Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap()))
    }

    fn elapsed(&self) -> Duration {
        Instant::now().0 - self.0
    }
}

fn per(time: Duration, count: usize) -> String {
    format!("{:.0} ns", time.as_nanos() as f64 / count as f64)
}

#[test]
#[ignore = "a measurement"]
fn measure() {
    println!("-- in memory");
    measure_on(Arc::new(Plain::default()));
    println!("-- sled");
    let dir = tempfile::tempdir().unwrap();
    measure_on(Arc::new(crate::storage::sled::Sled::open(dir.path()).unwrap()));
}

fn measure_on(backend: Arc<dyn Backend>) {
    const RECORDS: usize = 1_000_000;
    const A_BATCH: usize = 4000;
    const GETS: usize = 100_000;
    let opts = |cache_bytes| HistoryOptions { cache_bytes, gate: None };
    let open = |cache_bytes| {
        let mut records = 0usize;
        let visit = &mut |_, _: &Record| {
            records += 1;
            Ok(())
        };
        let (history, _) = History::open(backend.clone(), opts(cache_bytes), visit).unwrap();
        (history, records)
    };
    let (history, _) = open(64 << 20);
    let payload = Bytes::from(vec![7u8; 300]);
    let (mut appending, mut writing) = (Duration::ZERO, Duration::ZERO);
    for batch in 0..RECORDS / A_BATCH {
        let start = Instant::now();
        for index in 0..A_BATCH {
            history.append(rev((batch * A_BATCH + index + 2) as i64), Record { bytes: payload.clone(), tombstone: false });
            history.commit(Bytes::from_static(b"a log id"));
        }
        appending += start.elapsed();
        let start = Instant::now();
        history.write_out().unwrap();
        writing += start.elapsed();
    }
    println!("append + commit {}, write_out {} a record", per(appending, RECORDS), per(writing, RECORDS));
    println!("{:?}", history.stats());
    drop(history);

    for cache_bytes in [64 << 20, 1 << 30] {
        let start = Instant::now();
        let (history, records) = open(cache_bytes);
        println!("open of {records} records, cache {} MiB: {:?}", cache_bytes >> 20, start.elapsed());
        let mut random = 1u64;
        let mut next = || {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            rev((random >> 33) as i64 % RECORDS as i64 + 2)
        };
        let start = Instant::now();
        (0..GETS).for_each(|_| assert!(history.get(next()).unwrap().is_some()));
        println!("random get, {} MiB cached: {}", history.stats().cache_bytes >> 20, per(start.elapsed(), GETS));
        for among in [10, 1000] {
            let hot: Vec<Revision> = (0..among).map(|_| next()).collect();
            hot.iter().for_each(|rev| drop(history.get(*rev)));
            let start = Instant::now();
            (0..RECORDS).for_each(|index| assert!(history.get(hot[index % hot.len()]).unwrap().is_some()));
            println!("get of one of {among}: {}", per(start.elapsed(), RECORDS));
        }
        let start = Instant::now();
        let mut seen = 0;
        let count = &mut |_, _: &Record| {
            seen += 1;
            Ok(true)
        };
        history.scan(rev(0), END, count).unwrap();
        println!("scan of {seen}: {}", per(start.elapsed(), seen));
    }

    // A cache of nothing: each get is a miss.
    let (history, _) = open(0);
    let start = Instant::now();
    (0..10_000).for_each(|index| assert!(history.get(rev(index * 97 % RECORDS as i64 + 2)).unwrap().is_some()));
    println!("get of what is not cached: {}", per(start.elapsed(), 10_000));
    drop(history);

    let (history, _) = open(64 << 20);
    let dying: Vec<Revision> = (0..RECORDS as i64).filter(|main| main % 4 != 0).map(|main| rev(main + 2)).collect();
    let start = Instant::now();
    for dying in dying.chunks(10_000) {
        history.mark_dead(dying);
        history.commit(Bytes::from_static(b"a log id"));
    }
    let marking = start.elapsed();
    let start = Instant::now();
    history.write_out().unwrap();
    println!("mark_dead {} a record, write_out {}", per(marking, dying.len()), per(start.elapsed(), dying.len()));
    let (start, mut steps) = (Instant::now(), 1);
    while history.collect(1 << 20).unwrap() {
        steps += 1;
    }
    println!("collect in {steps} steps: {:?}, {:?}", start.elapsed(), history.stats());
}
