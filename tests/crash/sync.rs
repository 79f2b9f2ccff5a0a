//! Syncs and writes that fail with EIO, by strace.
//!
//! A failed fsync leaves pages that look clean and are not on disk, so it must never be tried again: from the failure on nothing may
//! be acknowledged, the member says why and ends, and without the fault everything acknowledged is there again.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::kill::start_again;
use crate::ledger::Ledger;
use crate::load::{Load, Outcome, Shape};
use crate::member::{Home, LIMIT, Member, subject, tail};
use crate::{random, run, setting, unavailable};

/// An strace at work on a member. Dropped, it lets go of it.
struct Fault {
    strace: Child,
    trace: PathBuf,
    complaints: PathBuf,
    /// The thread whose calls are meant; none: any.
    thread: Option<String>,
}

impl Fault {
    /// Makes these calls fail with EIO, in all threads, each counted by itself. It has struck when one of `thread` has failed, if there is one
    /// of that name.
    fn inject(member: &Member, home: &Home, inject: &str, thread: Option<&str>) -> Result<Fault, String> {
        let (trace, complaints) = (home.path().join("trace"), home.path().join("strace"));
        let _ = std::fs::remove_file(&trace);
        let log = File::create(&complaints).map_err(|err| err.to_string())?;
        let mut command = Command::new("strace");
        command.arg("-f").args(["-p", &member.pid().as_raw_nonzero().to_string()]).arg("-o").arg(&trace);
        let calls = inject.split(':').next().unwrap_or(inject);
        command.args(["-e", &format!("trace={calls}"), "-e", &format!("inject={inject}")]);
        let strace = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().map_err(|err| format!("strace: {err}"))?;
        let tasks = std::fs::read_dir(format!("/proc/{}/task", member.pid().as_raw_nonzero())).map_err(|err| err.to_string())?;
        let is_meant = |task: &std::fs::DirEntry| {
            std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| thread.is_some_and(|thread| name.trim_end() == thread))
        };
        let thread = tasks.flatten().find(is_meant).map(|task| task.file_name().to_string_lossy().into_owned());
        Ok(Fault { strace, trace, complaints, thread })
    }

    fn has_struck(&self) -> bool {
        let trace = std::fs::read(&self.trace).unwrap_or_default();
        let is_meant = |line: &str| self.thread.as_ref().is_none_or(|thread| line.split_whitespace().next() == Some(thread));
        String::from_utf8_lossy(&trace).lines().any(|line| line.contains("(INJECTED)") && is_meant(line))
    }

    /// Waits until a call has failed. It says what went wrong if strace cannot do its work here.
    async fn strike(&mut self, member: &mut Member) -> Result<(), String> {
        let begun = Instant::now();
        while !self.has_struck() && member.exited().is_none() {
            let ended = self.strace.try_wait().expect("one may wait for one's own child");
            if let Some(status) = ended
                && member.exited().is_none()
            {
                return Err(format!("strace: {status}: {}", std::fs::read_to_string(&self.complaints).unwrap_or_default()));
            }
            assert!(begun.elapsed() < LIMIT, "no such call within {LIMIT:?}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        // It ends with what it traces, or now; a traced process goes on when its tracer is gone.
        let _ = self.strace.kill();
        let _ = self.strace.wait();
    }
}

/// One kind of failure.
struct Kind {
    what: &'static str,
    inject: &'static str,
    /// Whether the member must end.
    fatal: bool,
    /// Whether the log itself is struck, so that nothing may be acknowledged from then on. The log's syncs are part of its writes, which go past
    /// the page cache; what fdatasync brings to the disk is the state, which the log has, too. A single write may be of either.
    log: bool,
}

impl Kind {
    const fn log(what: &'static str, inject: &'static str) -> Kind {
        Kind { what, inject, fatal: true, log: true }
    }

    const fn state(what: &'static str, inject: &'static str) -> Kind {
        Kind { what, inject, fatal: true, log: false }
    }
}

const KINDS: [Kind; 6] = [
    Kind::log("every write fails", "pwrite64,pwritev,pwritev2:error=EIO"),
    Kind::state("one write fails, the next would not", "pwrite64,pwritev,pwritev2:error=EIO:when=1"),
    Kind::log("writes fail after a while", "pwrite64,pwritev,pwritev2:error=EIO:when=20+"),
    Kind::state("every sync fails", "fdatasync,fsync:error=EIO"),
    Kind::state("one sync fails, the next would not", "fdatasync,fsync:error=EIO:when=1"),
    Kind { fatal: false, ..Kind::state("what the store takes for a sync fails", "sync_file_range:error=EIO") },
];

#[test]
fn after_a_failed_sync_nothing_is_acknowledged_or_lost() {
    run(async {
        let mut rng = random();
        let (home, program) = (Home::new("sync"), subject());
        for kind in &KINDS {
            if program.is_etcd && !kind.fatal {
                continue; // etcd has no such call.
            }
            let mut ledger = Ledger::new();
            let data = home.path().join("data");
            let _ = std::fs::remove_dir_all(&data);
            let mut member = Member::new(&program, home.path(), &data, &[]);
            member.start().await;
            for _ in 0..setting("QUORATE_SYNC_ROUNDS", 1, 3) {
                println!("{} ({})", kind.what, kind.inject);
                let shape = Shape { writers: 4, heavy: false, compact: true, defragment: false };
                let load = Load::start(&member, &ledger, shape, &mut rng).await;
                while load.acknowledged() < 100 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                // Others write, too, and may be struck first: the state's thread, and the one that makes the log's files.
                let mut fault = match Fault::inject(&member, &home, kind.inject, kind.log.then_some("quorate-log")) {
                    Ok(fault) => fault,
                    Err(why) => return unavailable(&why),
                };
                if let Err(why) = fault.strike(&mut member).await {
                    return unavailable(&why);
                }
                let struck = Instant::now();
                if kind.fatal {
                    // The load goes on until the member has ended, or says that it is not well.
                    let status = member.wait().await;
                    assert!(!status.success(), "{status}, as if all were well");
                    let log = member.log();
                    assert!(
                        program.is_etcd || log.contains("Input/output error") || log.contains("os error 5"),
                        "no reason given:\n{}",
                        tail(&log)
                    );
                } else {
                    tokio::time::sleep(Duration::from_secs(2)).await;
                    member.kill();
                }
                drop(fault);
                let round = load.finish().await;
                if kind.log || program.is_etcd {
                    let late = round.entries().find(|entry| entry.sent > struck && matches!(entry.outcome, Outcome::Done(_)));
                    assert!(late.is_none(), "acknowledged after the failure: {late:?}");
                }
                start_again(&mut member, &mut ledger, &mut rng).await;
                ledger.settle(&member, round, &mut rng).await;
            }
            println!("{}", ledger.summary(&format!("sync, {}", kind.what)));
        }
    });
}
