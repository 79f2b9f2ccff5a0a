//! Giving a state to a member that has lost its own: it asks for a snapshot, piece by piece, before it takes part in anything.
//!
//! A leader sends a snapshot to who lags, and that one's Raft takes it in. A member without a state has no Raft running, for it could
//! neither say how far it has come nor apply what follows: so it fetches the state from whoever has one. See `server/rebuild.rs`.
//!
//! ```text
//! GetSnapshot {id 7, offset 0}        ->  512 KiB, of entry 900
//! GetSnapshot {id 7, offset 524288}   ->  the connection breaks
//! GetSnapshot {id 7, offset 524288}   ->  the same piece again
//! GetSnapshot {id 7, offset 1048576}  ->  the rest, and that it is the end
//! ```
//!
//! # Invariants
//! - One at a time is given. What it holds, the revision and the history below it, is let go of when nobody has asked for
//!   [`OFFER_IDLE`]; whoever asks later begins anew.
//! - A member of which it is known that its state is wrong gives none.

use bytes::Bytes;

use super::*;
use crate::proto::peer::{GetSnapshotRequest, GetSnapshotResponse};
use crate::raft::log_id_to_proto;
use crate::raft::outgoing::{Sending, Writer};

/// How long a snapshot waits for its next piece to be asked for. Beyond it, it is given up.
const OFFER_IDLE: Duration = Duration::from_secs(30);

/// A snapshot that a member fetches.
pub(super) struct Offer {
    id: u64,
    last: LogId,
    /// None while a piece is made, and after that has failed.
    writer: Option<Writer>,
    /// The newest piece, where it begins, and whether it is the last: it may have been lost on its way.
    piece: Bytes,
    at: u64,
    end: bool,
    touched: Instant,
    #[allow(dead_code, reason = "kept for its drop: the log is kept for who fetches")]
    sending: Sending,
}

impl Offer {
    fn answer(&self) -> GetSnapshotResponse {
        GetSnapshotResponse {
            bytes: self.piece.clone(),
            crc32c: crc32c::crc32c(&self.piece),
            end: self.end,
            last: Some(log_id_to_proto(self.last)),
            refused: String::new(),
        }
    }
}

impl Node {
    /// Gives a piece of a snapshot.
    pub async fn peer_get_snapshot(&self, request: GetSnapshotRequest) -> Result<GetSnapshotResponse> {
        self.check_running()?;
        let refused = |what: &str| Ok(GetSnapshotResponse { refused: what.into(), ..GetSnapshotResponse::default() });
        if self.is_condemned() {
            return refused("its own state is known to be wrong");
        }
        let Ok(mut offer) = self.offer.try_lock() else { return refused("it is making a piece of a snapshot") };
        if request.offset == 0 && offer.as_ref().is_none_or(|offer| offer.id != request.id) {
            if offer.as_ref().is_some_and(|offer| !offer.end && offer.touched.elapsed() < OFFER_IDLE) {
                return refused("another snapshot is being fetched from it");
            }
            *offer = None;
            let machine = self.machine.clone();
            // Between two entries, as for any snapshot.
            let taken = self.raft.with_state_machine(move |_| Box::pin(async move { machine.begin_snapshot(true) }));
            let start = taken.await.map_err(|err| Error::Failed(err.to_string()))??;
            let Some(last) = start.position.log_id else { return refused("it has no state yet") };
            let sending = start.sendings.begin();
            let writer = Writer::new(self.identity.cluster_id, self.identity.member_id, 0, start)?;
            tracing::info!(id = %format_args!("{:x}", request.id), entry = last.index, "a member that has lost its state fetches this one's");
            let (piece, touched) = (Bytes::new(), Instant::now());
            *offer = Some(Offer { id: request.id, last, writer: Some(writer), piece, at: 0, end: false, touched, sending });
        }
        let Some(current) = offer.as_mut().filter(|offer| offer.id == request.id) else {
            return refused("there is no such snapshot any more");
        };
        current.touched = Instant::now();
        if request.offset == current.at && !current.piece.is_empty() {
            return Ok(current.answer());
        }
        if request.offset != current.at + current.piece.len() as u64 || current.end {
            return refused("it is not at that piece");
        }
        let Some(mut writer) = current.writer.take() else { return refused("the snapshot was given up") };
        let made = self.blocking(move || writer.piece().map(|piece| (writer, piece)));
        let (writer, piece) = made.await??;
        (current.at, current.end, current.piece) = (request.offset, writer.is_finished(), piece);
        self.counters().snapshot_sent_bytes.add(current.piece.len() as u64);
        if current.end {
            self.counters().snapshots_sent.inc();
        } else {
            current.writer = Some(writer);
        }
        Ok(current.answer())
    }

    /// Lets go of a snapshot that nobody fetches any more.
    pub(super) async fn give_up_offer(&self) {
        if let Ok(mut offer) = self.offer.try_lock()
            && offer.as_ref().is_some_and(|offer| offer.touched.elapsed() >= OFFER_IDLE)
        {
            *offer = None;
        }
    }
}
