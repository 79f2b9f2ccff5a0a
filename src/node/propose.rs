//! Proposals: from a queue of commands to entries of the log, a batch at a time, and the outcomes back to those who wait.

use openraft::errors::ClientWriteError;

use futures_util::future::BoxFuture;

use super::*;

/// A command on its way.
pub(super) enum Begun<'a> {
    /// In the queue. Until then its outcome is waited for.
    Queued(oneshot::Receiver<Outcome>, Instant),
    /// There is no room yet, or another member leads: in a box, for most commands have no use for the room that this takes.
    Slow(BoxFuture<'a, Result<Reply>>),
}

impl Node {
    /// Proposes a command and waits until it was applied. It is queued now, if there is room, and not when the future is first asked: so a
    /// future holds no copy of the command for each function on its way.
    ///
    /// # Errors
    /// Its outcome, if it is a refusal; `Timeout` and `TimeoutLeaderFail` when it is not known whether it will be applied, and `Stopped`
    /// when the member stops in the meantime, which leaves that open, too.
    pub(super) fn propose(&self, op: Op) -> impl Future<Output = Result<Reply>> + Send + '_ {
        self.end(self.begin(op))
    }

    pub(super) fn propose_command(&self, command: internal::Command) -> impl Future<Output = Result<Reply>> + Send + '_ {
        self.end(self.begin_command(command))
    }

    pub(super) fn begin(&self, op: Op) -> Result<Begun<'_>> {
        self.check_voter()?;
        self.begin_command(internal::Command { id: 0, op: Some(op) })
    }

    fn begin_command(&self, command: internal::Command) -> Result<Begun<'_>> {
        self.check_running()?;
        let bytes = command.encoded_len();
        if bytes + ENVELOPE_BYTES > self.options.max_request_bytes {
            return Err(ApplyError::RequestTooLarge.into());
        }
        let until = self.deadline();
        // The only voter has nobody to turn to.
        if !self.alone.load(Ordering::Acquire) {
            return Ok(Begun::Slow(Box::pin(self.propose_elsewhere(command, until))));
        }
        match self.room_at_once(bytes) {
            Some(room) => Ok(Begun::Queued(self.put_into_queue(command, bytes, room)?, until)),
            None => Ok(Begun::Slow(Box::pin(self.propose_here(command, until)))),
        }
    }

    pub(super) async fn end(&self, begun: Result<Begun<'_>>) -> Result<Reply> {
        let outcome = match begun? {
            Begun::Queued(wait, until) => self.outcome_of(wait, until).await,
            Begun::Slow(rest) => rest.await,
        };
        outcome.map_err(|err| match err {
            Error::Apply(ApplyError::NotLeader) => ApplyError::LeaderChanged.into(),
            err => err,
        })
    }

    /// Proposes a command to Raft, as the leader.
    ///
    /// # Errors
    /// `NotLeader` when nothing was appended, because this member does not lead, or hands over.
    pub(super) async fn propose_here(&self, command: internal::Command, until: Instant) -> Result<Reply> {
        let wait = self.enqueue(command, until).await?;
        self.outcome_of(wait, until).await
    }

    /// Puts a command into the queue, for the next entry of the log.
    ///
    /// # Errors
    /// That there is no room for it; nothing was proposed then.
    pub(super) async fn enqueue(&self, command: internal::Command, until: Instant) -> Result<oneshot::Receiver<Outcome>> {
        let bytes = command.encoded_len();
        let room = match self.room_at_once(bytes) {
            Some(room) => room,
            None => self.wait_for_room(bytes, until).await?,
        };
        self.put_into_queue(command, bytes, room)
    }

    /// As [`enqueue`](Self::enqueue), if there is room now.
    pub(super) fn enqueue_at_once(&self, command: internal::Command) -> Result<oneshot::Receiver<Outcome>> {
        let bytes = command.encoded_len();
        let room = self.room_at_once(bytes).ok_or(ApplyError::TooManyRequests)?;
        self.put_into_queue(command, bytes, room)
    }

    fn room_at_once(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        if self.is_behind() { None } else { self.queue_room.clone().try_acquire_many_owned(bytes as u32).ok() }
    }

    fn put_into_queue(&self, command: internal::Command, bytes: usize, room: OwnedSemaphorePermit) -> Result<oneshot::Receiver<Outcome>> {
        let (answer, wait) = oneshot::channel();
        let wake = {
            let mut queue = lock(&self.queue);
            // What is queued and under way will be written before this.
            if !self.has_log_room(queue.bytes + self.in_flight_bytes.load(Ordering::Relaxed) + bytes) {
                return Err(ApplyError::NoSpace.into());
            }
            if queue.waiting.len() >= QUEUE_MAX {
                return Err(ApplyError::TooManyRequests.into());
            }
            queue.bytes += bytes;
            queue.waiting.push(Waiting { command, bytes, answer, room });
            queue.waiting.len() == 1
        };
        if wake {
            self.queued.notify_one();
        }
        Ok(wait)
    }

    /// Whether the log takes so many bytes, also on a disk that is full: an append that finds no room would be the member's end.
    pub(super) fn has_log_room(&self, bytes: usize) -> bool {
        !self.wal.space_low() || self.wal.room_bytes() >= LOG_RESERVE_BYTES + 2 * bytes as u64
    }

    /// Whether what was written goes to the disk too slowly: the state's, or the log's, whose queue would be full in the end. Commits do not wait
    /// for this member's log when there are others.
    fn is_behind(&self) -> bool {
        self.store().history().is_behind() || self.wal.queued_bytes() > LOG_QUEUED_BYTES
    }

    /// Waits for a queued command's outcome.
    ///
    /// # Errors
    /// It, if it is a refusal; `Timeout` and `Stopped` leave open what becomes of it.
    pub(super) async fn outcome_of(&self, wait: oneshot::Receiver<Outcome>, until: Instant) -> Result<Reply> {
        match self.by(until, wait).await {
            Ok(Ok(outcome)) => Ok(outcome?),
            // The member stopped before it knew the outcome.
            Ok(Err(_)) | Err(Error::Stopped) => Err(Error::Stopped),
            Err(err) => {
                self.counters().proposals_failed.inc();
                Err(err)
            }
        }
    }

    /// Waits until the queue has room for a request, and the storage has kept up.
    ///
    /// # Errors
    /// `too many requests` when it does not come to that in time; `NotLeader` when another leads meanwhile.
    pub(super) async fn wait_for_room(&self, bytes: usize, until: Instant) -> Result<OwnedSemaphorePermit> {
        let waited = self.by(until, async {
            loop {
                while self.is_behind() {
                    if !self.is_leader() {
                        return Err(ApplyError::NotLeader.into());
                    }
                    self.pause(BEHIND_RETRY).await?;
                }
                let room = self.queue_room.clone().acquire_many_owned(bytes as u32).await.map_err(|_| Error::Stopped)?;
                // It may have fallen behind while others were before this one.
                if !self.is_behind() {
                    return Ok(room);
                }
            }
        });
        match waited.await {
            Err(Error::Timeout) => Err(ApplyError::TooManyRequests.into()),
            room => room?,
        }
    }

    /// Takes what is queued, as much as makes one entry; and its bytes.
    pub(super) fn take_batch(&self) -> (Vec<Waiting>, usize) {
        let mut queue = lock(&self.queue);
        let (mut bytes, mut count) = (0, 0);
        for waiting in queue.waiting.iter().take(BATCH_MAX) {
            if count > 0 && bytes + waiting.bytes > BATCH_BYTES_MAX {
                break;
            }
            bytes += waiting.bytes;
            count += 1;
        }
        self.in_flight_bytes.fetch_add(bytes, Ordering::Relaxed);
        if count == queue.waiting.len() {
            return (std::mem::take(&mut *queue).waiting, bytes);
        }
        let rest = queue.waiting.split_off(count);
        queue.bytes -= bytes;
        (std::mem::replace(&mut queue.waiting, rest), bytes)
    }

    pub(super) async fn propose_batches(self: Arc<Self>) {
        let in_flight = Arc::new(Semaphore::new(IN_FLIGHT));
        loop {
            self.queued.notified().await;
            loop {
                let Ok(place) = in_flight.clone().acquire_owned().await else { return };
                // Commits need not wait for this member's disk, and would fill its log's queue, which is the end of a member.
                while self.is_leader() && self.wal.queued_bytes() > LOG_QUEUED_BYTES {
                    if self.pause(BEHIND_RETRY).await.is_err() {
                        return;
                    }
                }
                let (batch, bytes) = self.take_batch();
                if batch.is_empty() {
                    break;
                }
                let in_flight_bytes = self.in_flight_bytes.clone();
                let (commands, answers): (Vec<_>, Vec<_>) = batch.into_iter().map(|waiting| (waiting.command, waiting.answer)).unzip();
                let machine = self.machine.clone();
                let answer = Callback(Box::new(move |result: ClientWriteResult<TypeConfig>| {
                    in_flight_bytes.fetch_sub(bytes, Ordering::Relaxed);
                    drop(place);
                    match result {
                        Ok(response) => {
                            for (answer, outcome) in answers.into_iter().zip(response.data) {
                                // Who asked may have given up waiting.
                                let _ = answer.send(outcome);
                            }
                        }
                        Err(ClientWriteError::ForwardToLeader(_)) => {
                            for answer in answers {
                                let _ = answer.send(Err(ApplyError::NotLeader));
                            }
                        }
                        Err(_) => {
                            // Not the leader any more. Whether the batch was appended, and is committed by the next leader, is not known.
                            machine.counters.proposals_failed.add(answers.len() as u64);
                            for answer in answers {
                                let _ = answer.send(Err(ApplyError::TimeoutLeaderFail));
                            }
                        }
                    }
                }));
                if let Err(err) = self.raft.client_write_ff(Proposal { commands: Arc::new(commands) }, Some(answer)).await {
                    self.fail(Error::Failed(err.to_string()));
                    return;
                }
            }
        }
    }
}
