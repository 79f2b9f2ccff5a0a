//! TLS on both planes: members in one process, with certificates of the tests' own, over loopback; and etcdctl.
#![cfg(feature = "tls")]

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use quorate::config::TransportSecurity;
use quorate::proto::etcdserverpb::kv_client::KvClient;
use quorate::proto::etcdserverpb::{PutRequest, RangeRequest};
use quorate::{Client, Config, Server};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

use certificates::{Ca, Signed, replace};
use three::{insist, ports, start_all, stop_all};

#[path = "common/certificates.rs"]
mod certificates;
#[path = "common/ports.rs"]
mod ports;
#[allow(dead_code, reason = "shared with other tests")]
#[path = "common/three.rs"]
mod three;

/// What anything may take. A test that waits longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a test speaks TLS with.
#[derive(Clone)]
struct Speaker {
    config: Arc<ClientConfig>,
    addr: std::net::SocketAddr,
}

impl Speaker {
    /// Trusts a CA, shows a certificate if there is one, and speaks a protocol.
    fn new(addr: std::net::SocketAddr, ca: &Ca, shows: Option<&Signed>, protocol: &str) -> Speaker {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca.pem.as_bytes()).unwrap()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
        let builder = builder.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
        let mut config = match shows {
            Some(signed) => {
                let chain = vec![CertificateDer::from_pem_slice(signed.cert.as_bytes()).unwrap()];
                builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(signed.key.as_bytes()).unwrap()).unwrap()
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
        Speaker { config: Arc::new(config), addr }
    }

    async fn connect(&self) -> std::io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(self.addr).await?;
        TlsConnector::from(self.config.clone()).connect(ServerName::try_from("localhost").unwrap(), stream).await
    }

    /// Asks for `/health` over HTTP/1.1. The error is what a client sees that is refused.
    async fn health(&self) -> std::io::Result<String> {
        let mut stream = self.connect().await?;
        stream.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    async fn kv(&self) -> Result<KvClient<Channel>, tonic::transport::Error> {
        let channel = Endpoint::from_static("https://localhost").connect_with_connector(self.clone()).await?;
        Ok(KvClient::new(channel).max_decoding_message_size(usize::MAX))
    }
}

impl tonic::codegen::Service<http::Uri> for Speaker {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = std::io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Uri) -> Self::Future {
        let this = self.clone();
        Box::pin(async move { this.connect().await.map(TokioIo::new) })
    }
}

/// A CA, and the files of a server's certificate from it.
struct Pki {
    dir: tempfile::TempDir,
    ca: Ca,
    ca_file: PathBuf,
    cert: PathBuf,
    key: PathBuf,
}

impl Pki {
    fn new() -> Pki {
        let (dir, ca) = (tempfile::tempdir().unwrap(), Ca::new("the CA"));
        let ca_file = dir.path().join("ca.crt");
        replace(&ca_file, &ca.pem);
        let (cert, key) = ca.sign("a server", &["localhost", "127.0.0.1"]).write(dir.path(), "server");
        Pki { dir, ca, ca_file, cert, key }
    }

    fn fill(&self, files: &mut TransportSecurity) {
        files.cert_file = Some(self.cert.clone());
        files.key_file = Some(self.key.clone());
        files.trusted_ca_file = Some(self.ca_file.clone());
        files.client_cert_auth = true;
    }

    /// A member by itself, which asks its clients for certificates.
    fn config(&self) -> Config {
        let mut config = Config::default();
        config.data_dir = Some(self.dir.path().join("data"));
        config.listen_client_urls = vec!["https://127.0.0.1:0".parse().unwrap()];
        config.listen_peer_urls.clear();
        self.fill(&mut config.client_transport_security);
        config
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// That someone is refused: at the handshake, or when the first answer is due.
async fn refused(speaker: &Speaker) -> String {
    match tokio::time::timeout(PATIENCE, speaker.health()).await.unwrap() {
        Err(err) => err.to_string(),
        Ok(answer) => panic!("it was answered: {answer}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_show_who_they_are() {
    let pki = Pki::new();
    let server = Server::start(pki.config()).await.unwrap();
    let addr = server.client_addrs()[0];
    let good = pki.ca.sign("a client", &[]);
    let speaker = |shows: Option<&Signed>, protocol| Speaker::new(addr, &pki.ca, shows, protocol);
    assert!(speaker(Some(&good), "http/1.1").health().await.unwrap().ends_with("{\"health\":\"true\",\"reason\":\"\"}"));

    // gRPC, with answers that are larger than what fits into any buffer.
    let mut kv = speaker(Some(&good), "h2").kv().await.unwrap();
    for at in 0..16 {
        let put = PutRequest { key: format!("k{at}").into(), value: vec![at; 1 << 20].into(), ..Default::default() };
        // A busy disk may take longer for one than a request may.
        let mut tries = 0;
        while let Err(status) = kv.put(put.clone()).await {
            tries += 1;
            assert!(tries < 10, "{status}");
        }
    }
    let all = kv.range(RangeRequest { key: "k".into(), range_end: "l".into(), ..Default::default() }).await.unwrap().into_inner();
    assert_eq!((all.count, server.client().get("k7").await.unwrap().unwrap().value.len()), (16, 1 << 20));

    let (other, expired) = (Ca::new("another CA").sign("a client", &[]), pki.ca.sign_expired("a client", &[]));
    let none = refused(&speaker(None, "http/1.1")).await;
    assert!(none.contains("CertificateRequired"), "{none}");
    let strange = refused(&speaker(Some(&other), "http/1.1")).await;
    assert!(strange.contains("UnknownCA") || strange.contains("CertificateRequired"), "{strange}");
    let late = refused(&speaker(Some(&expired), "http/1.1")).await;
    assert!(late.contains("CertificateExpired"), "{late}");
    // Who does not speak TLS at all is not answered in plain.
    let mut plain = TcpStream::connect(addr).await.unwrap();
    plain.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");

    // A client with none of the CAs that this server's certificate is from turns away by itself.
    let stranger = Speaker::new(addr, &Ca::new("another CA"), Some(&good), "http/1.1");
    assert!(refused(&stranger).await.contains("UnknownIssuer"));
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn only_those_who_are_named() {
    let pki = Pki::new();
    let mut config = pki.config();
    config.client_transport_security.allowed_cn = vec!["alice".into(), "bob".into()];
    let server = Server::start(config).await.unwrap();
    let addr = server.client_addrs()[0];
    let speaker = |name| Speaker::new(addr, &pki.ca, Some(&pki.ca.sign(name, &[])), "http/1.1");
    assert!(speaker("bob").health().await.unwrap().contains("true"));
    let why = refused(&speaker("mallory")).await;
    assert!(why.contains("BadCertificate"), "{why}");
    server.shutdown().await.unwrap();

    let mut config = pki.config();
    config.client_transport_security.allowed_hostname = vec!["alice.example.org".into()];
    let server = Server::start(config).await.unwrap();
    let addr = server.client_addrs()[0];
    let speaker = |host: &str| Speaker::new(addr, &pki.ca, Some(&pki.ca.sign("x", &[host])), "http/1.1");
    assert!(speaker("*.example.org").health().await.unwrap().contains("true"));
    assert!(refused(&speaker("alice.example.com")).await.contains("BadCertificate"));
    server.shutdown().await.unwrap();
}

/// Those who begin a handshake and do not go on keep nobody out.
#[tokio::test(flavor = "multi_thread")]
async fn strangers_do_not_hold_the_server() {
    let pki = Pki::new();
    let server = Server::start(pki.config()).await.unwrap();
    let addr = server.client_addrs()[0];
    let mut idle = Vec::new();
    for at in 0..700 {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        // Some of them even say something.
        if at % 2 == 0 {
            stream.write_all(&[22, 3, 1, 2, 0, 1]).await.unwrap();
        }
        idle.push(stream);
    }
    let good = pki.ca.sign("a client", &[]);
    assert!(Speaker::new(addr, &pki.ca, Some(&good), "http/1.1").health().await.unwrap().contains("true"));
    // The oldest were given up for the newest.
    let ended = tokio::time::timeout(PATIENCE, idle[0].read(&mut [0])).await.unwrap();
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    server.shutdown().await.unwrap();
}

/// A certificate, and then the CA, are replaced while the server runs; what is broken in between does no harm.
#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_renewed_without_a_restart() {
    let pki = Pki::new();
    let server = Server::start(pki.config()).await.unwrap();
    let addr = server.client_addrs()[0];
    let good = pki.ca.sign("a client", &[]);
    let speaker = Speaker::new(addr, &pki.ca, Some(&good), "http/1.1");
    let shown = async || speaker.connect().await.unwrap().get_ref().1.peer_certificates().unwrap()[0].to_vec();
    let der = |signed: &Signed| CertificateDer::from_pem_slice(signed.cert.as_bytes()).unwrap().to_vec();
    let mut open = Speaker::new(addr, &pki.ca, Some(&good), "h2").kv().await.unwrap();
    let first = shown().await;

    replace(&pki.cert, "-----BEGIN CERTIFICATE-----\nbroken\n");
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(2500) {
        assert_eq!(shown().await, first);
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    let renewed = pki.ca.sign("a server", &["localhost"]);
    renewed.write(pki.path(), "server");
    let began = Instant::now();
    while shown().await != der(&renewed) {
        assert!(began.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    // Another CA for clients: those of the old one are refused from then on, but for the connection that is open.
    let next = Ca::new("the next CA");
    replace(&pki.ca_file, &next.pem);
    let began = Instant::now();
    while speaker.health().await.is_ok() {
        assert!(began.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let new = next.sign("a client", &[]);
    assert!(Speaker::new(addr, &pki.ca, Some(&new), "http/1.1").health().await.unwrap().contains("true"));
    open.put(PutRequest { key: "still".into(), value: "open".into(), ..Default::default() }).await.unwrap();
    server.shutdown().await.unwrap();
}

/// What is wrong with which file.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_file_is_named() {
    let pki = Pki::new();
    let said = async |change: &dyn Fn(&mut TransportSecurity)| {
        let mut config = pki.config();
        change(&mut config.client_transport_security);
        Server::start(config).await.expect_err("it does not start").to_string()
    };
    let at = |name: &str| pki.path().join(name);
    let missing = said(&|files| files.cert_file = Some(at("none"))).await;
    assert!(missing.contains(&format!("cert-file is {}; it cannot be read: No such file", at("none").display())), "{missing}");
    std::fs::write(at("empty"), "").unwrap();
    let empty = said(&|files| files.trusted_ca_file = Some(at("empty"))).await;
    assert!(empty.contains(&format!("trusted-ca-file is {}; there is no certificate in it", at("empty").display())), "{empty}");
    let keyless = said(&|files| files.key_file = files.cert_file.clone()).await;
    assert!(keyless.contains("key-file is") && keyless.contains("there is no private key in it"), "{keyless}");
    let (_, other) = pki.ca.sign("x", &[]).write(pki.path(), "other");
    let unlike = said(&|files| files.key_file = Some(other.clone())).await;
    assert!(unlike.contains("server.crt; the key in key-file is not its own"), "{unlike}");
    // Nothing was touched.
    assert!(!pki.path().join("data").exists());
}

/// One of three members that speak TLS with each other.
fn member(pki: &Pki, dir: &Path, ports: &[u16; 3], at: usize) -> Config {
    let mut config = three::config(dir, ports, at);
    let secure = |url: &quorate::Url| url.to_string().replace("http://", "https://").parse().unwrap();
    config.listen_peer_urls = config.listen_peer_urls.iter().map(secure).collect();
    config.initial_advertise_peer_urls = config.listen_peer_urls.clone();
    config.listen_client_urls = config.listen_client_urls.iter().map(secure).collect();
    config.initial_cluster = config.initial_cluster.replace("http://", "https://");
    pki.fill(&mut config.peer_transport_security);
    pki.fill(&mut config.client_transport_security);
    config
}

#[tokio::test(flavor = "multi_thread")]
async fn members_speak_tls_with_each_other() {
    let (pki, dir, ports) = (Pki::new(), tempfile::tempdir().unwrap(), ports());
    let mut servers = start_all(|at| member(&pki, dir.path(), &ports, at)).await;
    let put = async |client: &Client, key: &str| {
        insist("a put", || client.put(key.to_owned(), "x")).await;
    };
    for (at, server) in servers.iter().enumerate() {
        put(&server.client(), &format!("from {at}")).await;
    }
    // Strangers at a peer port: one in plain, one without a certificate, one with that of another CA.
    let peer = std::net::SocketAddr::from(([127, 0, 0, 1], ports[0]));
    let mut plain = TcpStream::connect(peer).await.unwrap();
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer).await;
    // A TLS alert at most.
    assert!(answer.is_empty() || answer[0] == 21, "{answer:?}");
    refused(&Speaker::new(peer, &pki.ca, None, "http/1.1")).await;
    refused(&Speaker::new(peer, &pki.ca, Some(&Ca::new("another CA").sign("x", &["127.0.0.1"])), "http/1.1")).await;
    // One that is made out to another address than it comes from.
    let elsewhere = Speaker::new(peer, &pki.ca, Some(&pki.ca.sign("x", &["192.0.2.1"])), "http/1.1");
    let _ = refused_or_closed(&elsewhere).await;
    // And one that is one of us, as far as TLS goes.
    let good = Speaker::new(peer, &pki.ca, Some(&pki.ca.sign("x", &["127.0.0.1"])), "http/1.1");
    assert!(good.health().await.unwrap().contains("true"));

    // One goes and comes back with another certificate.
    servers.pop().unwrap().shutdown().await.unwrap();
    put(&servers[0].client(), "without c").await;
    pki.ca.sign("c", &["localhost", "127.0.0.1"]).write(pki.path(), "server");
    servers.push(Server::start(member(&pki, dir.path(), &ports, 2)).await.unwrap());
    let back = servers[2].client();
    assert!(insist("a get", || back.get("without c")).await.is_some());
    stop_all(servers).await;
}

/// The address is looked at when the handshake is over: the connection is closed without an answer.
async fn refused_or_closed(speaker: &Speaker) {
    let answer = tokio::time::timeout(PATIENCE, speaker.health()).await.unwrap();
    assert!(answer.as_ref().map_or(true, String::is_empty), "{answer:?}");
}

/// A member whose certificate the others do not take does not get in, and says why.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_with_a_strange_certificate_stays_out() {
    let (pki, other, dir, ports) = (Pki::new(), Pki::new(), tempfile::tempdir().unwrap(), ports());
    let mut servers = Vec::new();
    for (at, pki) in [&pki, &pki, &other].into_iter().enumerate() {
        servers.push(Server::start(member(pki, dir.path(), &ports, at)).await.unwrap());
    }
    for client in [servers[0].client(), servers[1].client()] {
        insist("a put", || client.put("k", "v")).await;
    }
    assert_eq!(servers[2].client().revision(), 1, "it has heard of nothing");
    assert!(servers[2].client().get("k").await.is_err());
    stop_all(servers).await;
}

/// What an operator types.
#[tokio::test(flavor = "multi_thread")]
async fn etcdctl_over_tls() {
    let Some(dir) = std::env::var_os("QUORATE_REFERENCE_DIR") else {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "QUORATE_REFERENCE_DIR must be set when CI=true");
        println!("skipped: QUORATE_REFERENCE_DIR is not set");
        return;
    };
    let etcdctl = PathBuf::from(dir).join("etcdctl");
    let pki = Pki::new();
    let server = Server::start(pki.config()).await.unwrap();
    let url = format!("https://{}", server.client_addrs()[0]);
    let (cert, key) = pki.ca.sign("root", &[]).write(pki.path(), "client");
    let (cacert, cert, key) = (pki.ca_file.display().to_string(), cert.display().to_string(), key.display().to_string());
    let run = |with: &[&str], words: &str| {
        let mut command = std::process::Command::new(&etcdctl);
        command.args(["--endpoints", &url, "--dial-timeout=2s", "--command-timeout=5s"]).args(with).args(words.split(' '));
        let out = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (out.status.success(), text(&out.stdout), text(&out.stderr))
    };
    let known = ["--cacert", &cacert, "--cert", &cert, "--key", &key];
    assert_eq!(run(&known, "put greeting hello").1, "OK\n");
    assert_eq!(run(&known, "get greeting").1, "greeting\nhello\n");
    let (_, out, err) = run(&known, "endpoint health");
    assert!((out + &err).contains("is healthy"));
    assert!(run(&known, "member list").1.contains(&url));
    assert!(!run(&["--cacert", &cacert], "get greeting").0, "without a certificate");
    assert!(!run(&[], "get greeting").0, "without the CA");
    server.shutdown().await.unwrap();
}
