//! TLS: who may talk to whom, and how each shows who it is.
//!
//! [`Tls::open`] reads what the configuration names, once, and gives each plane its part: an [`Acceptor`] for listeners, a [`Connector`]
//! for connections to other members; [`connector`] makes one for a client, and [`peers`] both for a node that has no member yet. TLS itself is spoken by rustls. Its cryptography is *ring*: it
//! needs nothing but a C compiler to build, while aws-lc-rs brings CMake and several times the code, for hybrid key exchanges and FIPS, which
//! nobody has asked for here.
//!
//! ```text
//! socket -> Acceptor::accept: handshake, in bounded time and number -> its certificate: CA, names, address -> bytes, parsed only now
//! URL    -> Connector: TCP, handshake, the other's certificate: CA, host of the URL, names                 -> bytes
//! ```
//!
//! Files are read again when they change ([`files`]): a new certificate or CA counts from the next handshake on, connections that are
//! open stay.
//!
//! # Invariants
//! - Where a CA is named, nobody without a certificate from it gets a byte past the handshake. There is no resumption: each connection
//!   shows its certificate anew, and one that has expired meanwhile, or whose CA has gone, is refused.
//! - A stranger holds a handshake for [`HANDSHAKE_TIMEOUT`](accept::HANDSHAKE_TIMEOUT) at most, and when too many do, it is theirs that are
//!   given up, and not the newcomer's.
//! - Errors at the start name the setting, its file, and what is wrong with it. Keys are in no log line and no error.
//! - Without TLS nothing here is touched by any connection.
//!
//! # Room for users
//! When there are users and roles, a client's certificate says who it is by its common name: [`certificate::common_name`].
//!
//! # Caveats
//! - rustls is stricter than Go: a certificate that is a CA's own is not taken as a server's, and one without subject alternative names
//!   stands for no host.
//! - Revocation lists are not read.
//! - A peer's certificate that is made out to wildcard names is taken from any address: to check it the address' own name would have to
//!   be asked for, and who has the address has that, too.

mod accept;
mod certificate;
mod connect;
mod files;
mod settings;

use crate::config::tls::FileNames;
use crate::config::{Config, TlsFiles, Url};
use crate::error::Result;

pub(crate) use accept::{Acceptor, ServerStream};
pub(crate) use connect::Connector;
use settings::Settings;

/// What a client connects with. Its files are called `names` where they were set.
///
/// # Errors
/// `Config`: a file is missing, cannot be read, or is not what it should be.
pub(crate) fn connector(names: FileNames, files: &TlsFiles) -> Result<Connector> {
    Connector::open(Settings::of_client(names, files)?)
}

/// What a node speaks with the peer ports of others, and on its own, while it has no server there: the same as its server will, by the peer
/// plane of `config`. The files are called `names` where they were set.
///
/// # Errors
/// `Config`: a file is missing, cannot be read, or is not what it should be.
pub(crate) fn peers(names: FileNames, config: &Config) -> Result<(Acceptor, Connector)> {
    let settings = Settings::new("peer-", &config.peer_transport_security, config)?.called(names);
    let check_address = !config.peer_transport_security.skip_client_san_verification;
    Ok((Acceptor::open("peer", settings.clone(), check_address)?, Connector::open(settings)?))
}

/// What the planes of a member need. Each is there if something asks for it.
pub(crate) struct Tls {
    /// For the listeners of clients that have `https` URLs.
    pub client: Option<Acceptor>,
    /// For those of peers.
    pub peer: Option<Acceptor>,
    /// For the connections to members that have `https` URLs.
    pub connector: Option<Connector>,
}

impl Tls {
    /// Reads the files that the configuration names, as far as they are used.
    ///
    /// # Errors
    /// `Config`: a file cannot be read, or is not what it should be.
    pub fn open(config: &Config) -> Result<Tls> {
        let clients = Settings::new("", &config.client_transport_security, config)?;
        let peers = Settings::new("peer-", &config.peer_transport_security, config)?;
        let (serves_clients, serves_peers) = (config.client_plane().any(Url::is_tls), config.listen_peer_urls.iter().any(Url::is_tls));
        for (serves, plane, auth) in [
            (serves_clients, &config.client_transport_security, config.client_plane().find(|url| !url.is_tls())),
            (serves_peers, &config.peer_transport_security, config.listen_peer_urls.iter().find(|url| !url.is_tls())),
        ] {
            if let Some(url) = auth.filter(|_| serves && plane.asks_for_certificates()) {
                tracing::warn!(%url, "this URL is not https: nobody is asked for a certificate there");
            } else if !serves && plane.cert_file.is_some() {
                tracing::warn!("there is a certificate, but no https URL to listen on with it");
            }
        }
        let client = if serves_clients { Some(Acceptor::open("client", clients, false)?) } else { None };
        let check_address = !config.peer_transport_security.skip_client_san_verification;
        let connector = if peers.has_ca() { Some(Connector::open(peers.clone())?) } else { None };
        let peer = if serves_peers { Some(Acceptor::open("peer", peers, check_address)?) } else { None };
        Ok(Tls { client, peer, connector })
    }
}
