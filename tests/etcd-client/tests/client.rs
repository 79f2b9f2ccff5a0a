//! The etcd-client crate, the widely used Rust client of etcd, against a quorate server. Run it in this folder with `cargo test`.

use quorate::proto::etcdserverpb::RangeRequest;
use quorate::{Config, Server};

/// The widely used Rust client, over the socket.
#[tokio::test]
async fn the_etcd_client_crate_works_unchanged() {
    use etcd_client::{Client, Compare, CompareOp, GetOptions, PutOptions, Txn, TxnOp, WatchOptions};

    let dir = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.data_dir = Some(dir.path().to_owned());
    config.listen_client_urls = vec!["http://127.0.0.1:0".parse().unwrap()];
    config.listen_peer_urls = vec![];
    let server = Server::start(config).await.unwrap();
    let mut client = Client::connect([server.client_addrs()[0].to_string()], None).await.unwrap();

    // KV and txn.
    client.put("k1", "v1", None).await.unwrap();
    let response = client.put("k1", "v2", Some(PutOptions::new().with_prev_key())).await.unwrap();
    assert_eq!(response.prev_key().unwrap().value(), b"v1");
    let response = client.get("k", Some(GetOptions::new().with_prefix())).await.unwrap();
    assert_eq!(response.kvs()[0].value(), b"v2");
    let txn = Txn::new()
        .when([Compare::value("k1", CompareOp::Equal, "v2")])
        .and_then([TxnOp::put("k2", "x", None), TxnOp::get("k2", None)])
        .or_else([TxnOp::get("k1", None)]);
    assert!(client.txn(txn).await.unwrap().succeeded());

    // Watch.
    let mut stream = client.watch("k2", Some(WatchOptions::new().with_start_revision(1))).await.unwrap();
    loop {
        let message = stream.message().await.unwrap().unwrap();
        if let Some(event) = message.events().first() {
            assert_eq!(event.kv().unwrap().value(), b"x");
            break;
        }
    }

    // Lease.
    let lease = client.lease_grant(60, None).await.unwrap().id();
    client.put("leased", "", Some(PutOptions::new().with_lease(lease))).await.unwrap();
    let (mut keeper, mut answers) = client.lease_keep_alive(lease).await.unwrap();
    keeper.keep_alive().await.unwrap();
    assert_eq!(answers.message().await.unwrap().unwrap().ttl(), 60);
    assert!(client.leases().await.unwrap().leases().iter().any(|status| status.id() == lease));
    client.lease_revoke(lease).await.unwrap();
    assert!(client.get("leased", None).await.unwrap().kvs().is_empty());

    // Maintenance and cluster.
    assert_eq!(client.status().await.unwrap().version(), "3.7.1");
    client.hash_kv(0).await.unwrap();
    client.defragment().await.unwrap();
    let mut snapshot = client.snapshot().await.unwrap();
    let mut bytes = 0;
    while let Some(part) = snapshot.message().await.unwrap() {
        bytes += part.blob().len();
    }
    assert_eq!(bytes % 512, 32, "padded, and a sha256 behind it");
    assert_eq!(client.member_list().await.unwrap().members().len(), 1);
    client.compact(3, None).await.unwrap();

    // The same server, without the socket.
    let all = RangeRequest { key: vec![0].into(), range_end: vec![0].into(), ..Default::default() };
    assert_eq!(server.client().range(all).await.unwrap().count, 2);
    server.shutdown().await.unwrap();
}
