//! What must hold of locks and elections on every client when their futures are dropped, and when a session stands twice in a queue.

use std::cell::Cell;
use std::time::Duration;

use futures_util::future::join_all;
use quorate::client::Lock;
use quorate::proto::etcdserverpb::TxnRequest;
use quorate::{Client, Error};

use crate::Store;

/// Long enough for whatever may still be on its way to a store that nobody loads.
const SETTLES: Duration = Duration::from_millis(20);

async fn is_held(client: &Client, lock: &Lock) -> bool {
    client.txn(TxnRequest { compare: vec![lock.is_held()], ..Default::default() }).await.unwrap().succeeded
}

async fn waiting(client: &Client, name: &str) -> usize {
    client.list(format!("{name}/")).await.unwrap().kvs.len()
}

/// What is dropped is given up, and not what the same session takes afterwards.
pub async fn a_dropped_lock_takes_no_other_with_it(store: &Store) {
    let client = &store.client;
    let (session, other) = (client.session(60).await.unwrap(), client.session(60).await.unwrap());
    let mut last = 0;
    for round in 0..20 {
        drop(session.lock("l").await.unwrap());
        let lock = session.lock("l").await.unwrap();
        assert!(lock.revision() > last, "a token was used twice");
        last = lock.revision();
        tokio::time::sleep(SETTLES).await;
        assert!(is_held(client, &lock).await, "round {round}");
        assert!(other.try_lock("l").await.unwrap().is_none(), "round {round}");
        lock.unlock().await.unwrap();
        // And one that is only tried for.
        drop(session.try_lock("l").await.unwrap().expect("it was given up"));
        let lock = session.try_lock("l").await.unwrap().expect("it was given up, too");
        tokio::time::sleep(SETTLES).await;
        assert!(is_held(client, &lock).await, "round {round}");
        lock.unlock().await.unwrap();
    }
    // A place that was waited in, likewise.
    for round in 0..10 {
        let held = other.lock("l").await.unwrap();
        let given_up = tokio::time::timeout(Duration::from_millis(5 * round), session.lock("l")).await;
        assert!(given_up.is_err());
        let (lock, ()) = futures_util::join!(session.lock("l"), async {
            tokio::time::sleep(SETTLES).await;
            held.unlock().await.unwrap();
        });
        let lock = lock.expect("the session lives");
        assert!(is_held(client, &lock).await, "round {round}");
        lock.unlock().await.unwrap();
    }
    assert_eq!(waiting(client, "l").await, 0);
}

/// Clones of a session exclude each other as sessions do, in the order in which they came.
pub async fn a_session_holds_a_lock_once(store: &Store) {
    let client = &store.client;
    let (session, other) = (client.session(60).await.unwrap(), client.session(60).await.unwrap());
    let inside = Cell::new(false);
    let order = Cell::new(0);
    let turn = async |session: quorate::client::Session, number: usize| {
        let lock = session.lock("l").await.unwrap();
        assert!(!inside.replace(true), "two hold it");
        assert_eq!(order.replace(number + 1), number);
        client.put("step", number.to_string()).await.unwrap();
        assert!(is_held(client, &lock).await);
        inside.set(false);
        lock.unlock().await.unwrap();
    };
    join_all((0..8).map(|number| turn(session.clone(), number))).await;

    // Who tries leaves alone what another task of the session waits for.
    let held = other.lock("l").await.unwrap();
    let mut patient = std::pin::pin!(session.lock("l"));
    while waiting(client, "l").await < 2 {
        let _ = tokio::time::timeout(Duration::from_millis(1), patient.as_mut()).await;
    }
    assert!(session.try_lock("l").await.unwrap().is_none());
    assert_eq!(waiting(client, "l").await, 2, "it waits on");
    held.unlock().await.unwrap();
    let lock = patient.await.unwrap();
    assert!(session.try_lock("l").await.unwrap().is_none(), "held by the session itself");
    assert!(is_held(client, &lock).await);

    // Who waits for another task of the session may give up, and is passed over.
    let mut given_up = Box::pin(session.lock("l"));
    let mut next = Box::pin(session.lock("l"));
    assert!(futures_util::poll!(given_up.as_mut()).is_pending() && futures_util::poll!(next.as_mut()).is_pending());
    drop(given_up);
    let first = lock.revision();
    drop(lock);
    let lock = next.await.unwrap();
    assert!(lock.revision() > first);
    // The lost session is told of, whoever waits.
    let mut late = Box::pin(session.lock("l"));
    assert!(futures_util::poll!(late.as_mut()).is_pending());
    session.clone().close().await.unwrap();
    assert!(matches!(late.await, Err(Error::SessionLost)));
    assert!(matches!(lock.unlock().await, Err(Error::SessionLost)));
}

/// A lock that went before it was given up: that is said.
pub async fn a_lock_that_went_is_missed(store: &Store) {
    let client = &store.client;
    let session = client.session(60).await.unwrap();
    let lock = session.lock("l").await.unwrap();
    client.delete(lock.key().clone()).await.unwrap();
    assert!(matches!(lock.unlock().await, Err(Error::SessionLost)));
    let lead = session.election("e").campaign("one").await.unwrap();
    client.delete(lead.key().clone()).await.unwrap();
    assert!(matches!(lead.proclaim("one, still").await, Err(Error::SessionLost)));
    assert!(matches!(lead.resign().await, Err(Error::SessionLost)));
    session.lock("l").await.unwrap().unlock().await.unwrap();
}

/// Dropped wherever it stands, an observer tells the next time what it has not told.
pub async fn an_observer_may_be_dropped(store: &Store) {
    let client = &store.client;
    let session = client.session(60).await.unwrap();
    let lead = session.election("e").campaign("begin").await.unwrap();
    let mut observer = client.observe("e");
    assert_eq!(observer.next().await.unwrap().value, "begin");
    for round in 0..60u64 {
        let value = round.to_string();
        lead.proclaim(value.clone()).await.unwrap();
        if round % 2 == 0 {
            // By turns.
            let mut next = Box::pin(observer.next());
            let mut told = None;
            for _ in 0..round / 2 {
                if let std::task::Poll::Ready(leader) = futures_util::poll!(next.as_mut()) {
                    told = Some(leader.unwrap());
                    break;
                }
                tokio::task::yield_now().await;
            }
            drop(next);
            if let Some(leader) = told {
                assert_eq!(leader.value, value);
                continue;
            }
        } else if let Ok(leader) = tokio::time::timeout(Duration::from_micros(50 * round), observer.next()).await {
            assert_eq!(leader.unwrap().value, value);
            continue;
        }
        assert_eq!(observer.next().await.unwrap().value, value);
    }
}

/// One watcher that nobody reads has its own share of the connection, and no more.
pub async fn an_unread_watcher_stalls_nobody(store: &Store) {
    let client = &store.client;
    let start = client.list("").await.unwrap().revision + 1;
    let range_end = quorate::client::prefix_end(b"w/");
    let request =
        quorate::proto::etcdserverpb::WatchCreateRequest { key: "w/".into(), range_end, start_revision: start, ..Default::default() };
    let mut unread = client.watch(request).unwrap();
    unread.started().await.unwrap();
    let value = vec![7; 200 << 10];
    for number in 0..200 {
        client.put(format!("w/{number:03}"), value.clone()).await.unwrap();
    }
    assert_eq!(client.list("w/").await.unwrap().kvs.len(), 200);
    let mut seen = 0;
    while seen < 200 {
        let message = unread.next().await.unwrap().expect("the watch goes on");
        let quorate::client::WatchMessage::Events(events) = message else { continue };
        seen += events.len();
    }
}
