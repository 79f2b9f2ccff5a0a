//! What a server is told of TLS: the certificates of its two planes, and how TLS is spoken.
//!
//! The *client plane* is every listener but the peers' (`listen-client-urls`, `listen-client-http-urls`, `listen-metrics-urls`), the *peer
//! plane* is `listen-peer-urls` and the connections to other members. Whether a listener speaks TLS is said by its URL, `https`; the files
//! of its plane say with what.
//!
//! ```
//! use quorate::Config;
//!
//! # #[cfg(feature = "tls")] {
//! let mut config = Config::default();
//! config.listen_client_urls = vec!["https://127.0.0.1:0".parse()?];
//! let complaint = config.validate().unwrap_err().to_string();
//! assert!(complaint.contains("TLS key/cert (--cert-file, --key-file) must be provided"), "{complaint}");
//!
//! config.client_transport_security.cert_file = Some("server.crt".into());
//! config.client_transport_security.key_file = Some("server.key".into());
//! config.client_transport_security.trusted_ca_file = Some("ca.crt".into()); // from here on clients need a certificate, too
//! config.validate()?; // the files are read at the start, and whenever they change
//! # }
//! # Ok::<(), quorate::Error>(())
//! ```

#[cfg(feature = "tls")]
use std::path::Path;
use std::path::PathBuf;

use super::{Config, Url, bad};
use crate::error::Result;

/// The files of one plane, by etcd's names. The flags of the peer plane have `peer-` before them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TransportSecurity {
    /// The server's certificate, in PEM, followed by those between it and its CA. Needed for an `https` listener.
    pub cert_file: Option<PathBuf>,
    /// The private key of `cert_file`, in PEM.
    pub key_file: Option<PathBuf>,
    /// Ask who connects for a certificate. It needs `trusted_ca_file`, which by itself asks for one already, as in etcd.
    pub client_cert_auth: bool,
    /// The CAs, in PEM, whose certificates are good here. Who connects needs one; and so does, in the peer plane, who is connected to.
    pub trusted_ca_file: Option<PathBuf>,
    /// Of these certificates only those whose common name is one of these. Empty: all.
    pub allowed_cn: Vec<String>,
    /// Of these certificates only those that are made out to one of these host names or addresses. Empty: all.
    pub allowed_hostname: Vec<String>,
    /// Peer plane: the certificate to show to other members. `None`: `cert_file`.
    pub client_cert_file: Option<PathBuf>,
    /// Peer plane: the private key of `client_cert_file`.
    pub client_key_file: Option<PathBuf>,
    /// Peer plane: take a certificate from wherever it comes, and not only from the addresses it is made out to.
    pub skip_client_san_verification: bool,
}

/// What a client speaks TLS with: files, in PEM. They are read again when they change, and count for connections that are made from then on.
///
/// That TLS is spoken, and with whom, the URLs of its endpoints say: those that begin with `https://`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// The CAs whose certificates are good for who is connected to, which has to be made out to the host in the URL. Needed for `https`;
    /// the CAs of the operating system are none unless their file is named here.
    pub ca: Option<PathBuf>,
    /// The certificate to show, followed by those between it and its CA.
    pub cert: Option<PathBuf>,
    /// The private key of `cert`.
    pub key: Option<PathBuf>,
}

impl TlsFiles {
    /// Whether there are any.
    pub fn is_empty(&self) -> bool {
        *self == TlsFiles::default()
    }
}

/// What the files of a client are called where they were set, for complaints about them.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(feature = "tls"), allow(dead_code, reason = "then no file is read"))]
pub(crate) struct FileNames {
    pub ca: &'static str,
    pub cert: &'static str,
    pub key: &'static str,
}

/// A version of TLS. None is spoken that is older.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsVersion {
    /// TLS 1.2.
    V1_2,
    /// TLS 1.3.
    V1_3,
}

/// The cipher suites that can be chosen, by their registered names. Those of TLS 1.3 are always spoken where it is.
pub const CIPHER_SUITES: [&str; 9] = [
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
];

/// The registered name of a suite that is spoken here. Go, and so etcd, has shorter names for two of them as well.
pub(crate) fn cipher_suite(name: &str) -> Option<&'static str> {
    let of_go = |known: &str| known.contains("CHACHA20") && known.strip_suffix("_SHA256") == Some(name);
    CIPHER_SUITES.into_iter().find(|known| *known == name || of_go(known))
}

impl TransportSecurity {
    /// Whether who connects is asked for a certificate.
    pub fn asks_for_certificates(&self) -> bool {
        self.client_cert_auth || self.trusted_ca_file.is_some()
    }

    /// The certificate and the key to show to other members.
    #[cfg(feature = "tls")]
    pub(crate) fn shown(&self) -> (Option<&Path>, Option<&Path>) {
        match &self.client_cert_file {
            Some(cert) => (Some(cert), self.client_key_file.as_deref()),
            None => (self.cert_file.as_deref(), self.key_file.as_deref()),
        }
    }

    /// Checks one plane, whose settings have `prefix` before their names and that has these listeners.
    fn validate(&self, prefix: &str, listeners: &[&Url]) -> Result<()> {
        let named = |name: &str| format!("{prefix}{name}");
        let files = [
            ("cert-file", &self.cert_file),
            ("key-file", &self.key_file),
            ("trusted-ca-file", &self.trusted_ca_file),
            ("client-cert-file", &self.client_cert_file),
            ("client-key-file", &self.client_key_file),
        ];
        for (name, path) in files {
            if path.as_ref().is_some_and(|path| path.as_os_str().is_empty()) {
                return Err(bad(&named(name), "empty", "name a file or leave it unset"));
            }
        }
        for (name, path, other_name, other) in [
            ("cert-file", &self.cert_file, "key-file", &self.key_file),
            ("key-file", &self.key_file, "cert-file", &self.cert_file),
            ("client-cert-file", &self.client_cert_file, "client-key-file", &self.client_key_file),
            ("client-key-file", &self.client_key_file, "client-cert-file", &self.client_cert_file),
        ] {
            if let (Some(path), None) = (path, other) {
                let right = format!("{} must be given, too: KeyFile and CertFile must both be present", named(other_name));
                return Err(bad(&named(name), path.display(), right));
            }
        }
        if self.trusted_ca_file.is_none() {
            let without = format!("give {}: without it there is nobody whose certificates could be trusted", named("trusted-ca-file"));
            if self.client_cert_auth {
                return Err(bad(&named("client-cert-auth"), true, without));
            }
            let cert_before = if prefix.is_empty() { "client-" } else { prefix };
            for (name, allowed) in [("cert-allowed-cn", &self.allowed_cn), ("cert-allowed-hostname", &self.allowed_hostname)] {
                if !allowed.is_empty() {
                    return Err(bad(&format!("{cert_before}{name}"), allowed.join(","), without));
                }
            }
        }
        if !self.allowed_cn.is_empty() && !self.allowed_hostname.is_empty() {
            let before = if prefix.is_empty() { "client-" } else { prefix };
            let right = format!("{before}cert-allowed-hostname is set as well, and they are mutually exclusive");
            return Err(bad(&format!("{before}cert-allowed-cn"), self.allowed_cn.join(","), right));
        }
        // etcd warns, and lets everybody in.
        if self.client_cert_auth
            && let Some(url) = listeners.first()
            && !listeners.iter().any(|url| url.is_tls())
        {
            let right = format!("nobody can be asked for a certificate at {url}; listen on an https:// URL");
            return Err(bad(&named("client-cert-auth"), true, right));
        }
        Ok(())
    }
}

impl Config {
    /// The listeners of the client plane.
    pub(crate) fn client_plane(&self) -> impl Iterator<Item = &Url> {
        self.listen_client_urls.iter().chain(&self.listen_client_http_urls).chain(&self.listen_metrics_urls)
    }

    pub(super) fn validate_tls(&self) -> Result<()> {
        let (clients, peers) = (&self.client_transport_security, &self.peer_transport_security);
        clients.validate("", &self.client_plane().collect::<Vec<_>>())?;
        peers.validate("peer-", &self.listen_peer_urls.iter().collect::<Vec<_>>())?;
        // Members who are told by URLs that ask for it have to be recognised.
        let others = self.initial_members()?.into_iter().filter(|(name, _)| *name != self.name);
        if let Some(url) = others.flat_map(|(_, urls)| urls).find(Url::is_tls)
            && peers.trusted_ca_file.is_none()
        {
            let right = format!("{url} is spoken to in TLS: name the file of the CA that its certificate is from");
            return Err(bad("peer-trusted-ca-file", "not set", right));
        }
        let least = self.tls_min_version;
        if let Some(most) = self.tls_max_version.filter(|most| *most < least) {
            let right = format!("it must be no less than tls-min-version, which is {}", least.as_str());
            return Err(bad("tls-max-version", most.as_str(), right));
        }
        for name in &self.cipher_suites {
            if cipher_suite(name).is_none() {
                let right = format!("it is none that is spoken here; choose from {}", CIPHER_SUITES.join(", "));
                return Err(bad("cipher-suites", name, right));
            }
        }
        if !self.cipher_suites.is_empty() && least == TlsVersion::V1_3 {
            let right = "with tls-min-version TLS1.3 there is nothing to choose: leave it out";
            return Err(bad("cipher-suites", self.cipher_suites.join(","), right));
        }
        Ok(())
    }

    /// Checks that a listener's URL can be listened on as it says.
    pub(super) fn validate_listener(&self, setting: &str, url: &Url) -> Result<()> {
        if !url.is_tls() {
            return Ok(());
        }
        if url.socket_path().is_some() {
            return Err(bad(setting, url, "TLS over a Unix socket is not built, use unix://"));
        }
        if !cfg!(feature = "tls") {
            return Err(bad(setting, url, "this build has no TLS (the cargo feature `tls`), use http://"));
        }
        let (files, flags) = match setting {
            "listen-peer-urls" => (&self.peer_transport_security, "--peer-cert-file, --peer-key-file"),
            _ => (&self.client_transport_security, "--cert-file, --key-file"),
        };
        if files.cert_file.is_none() {
            return Err(bad(setting, url, format!("TLS key/cert ({flags}) must be provided for a URL with the HTTPS scheme")));
        }
        Ok(())
    }
}

impl TlsVersion {
    /// As it stands in the flags.
    pub fn as_str(self) -> &'static str {
        match self {
            TlsVersion::V1_2 => "TLS1.2",
            TlsVersion::V1_3 => "TLS1.3",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A configuration whose planes both speak TLS.
    fn both() -> Config {
        let mut config = Config {
            listen_client_urls: vec!["https://127.0.0.1:2379".parse().unwrap()],
            listen_peer_urls: vec!["https://127.0.0.1:2380".parse().unwrap()],
            ..Config::default()
        };
        for files in [&mut config.client_transport_security, &mut config.peer_transport_security] {
            files.cert_file = Some("c".into());
            files.key_file = Some("k".into());
            files.trusted_ca_file = Some("ca".into());
            files.client_cert_auth = true;
        }
        config
    }

    #[test]
    #[cfg(feature = "tls")]
    fn each_wrong_setting_is_named() {
        both().validate().unwrap();
        type Change = fn(&mut Config);
        let cases: &[(Change, &str)] = &[
            (|c| c.client_transport_security.key_file = None, "cert-file is c; key-file must be given"),
            (|c| c.peer_transport_security.key_file = None, "peer-cert-file is c; peer-key-file must be given"),
            (|c| c.peer_transport_security.client_cert_file = Some("x".into()), "peer-client-cert-file is x; peer-client-key-file must"),
            (|c| c.client_transport_security.trusted_ca_file = None, "client-cert-auth is true; give trusted-ca-file"),
            (|c| c.peer_transport_security.trusted_ca_file = None, "peer-client-cert-auth is true; give peer-trusted-ca-file"),
            (|c| c.client_transport_security.cert_file = Some("".into()), "cert-file is empty"),
            (|c| c.listen_client_urls = vec!["http://127.0.0.1:1".parse().unwrap()], "client-cert-auth is true; nobody can be asked"),
            (|c| c.listen_client_urls.push("unixs://x".parse().unwrap()), "listen-client-urls is unixs://x"),
            (|c| c.client_transport_security = TransportSecurity::default(), "listen-client-urls is https://127.0.0.1:2379; TLS key/cert"),
            (|c| c.peer_transport_security = TransportSecurity::default(), "listen-peer-urls is https://127.0.0.1:2380; TLS key/cert"),
            (
                |c| {
                    c.peer_transport_security.allowed_cn = vec!["a".into()];
                    c.peer_transport_security.allowed_hostname = vec!["b".into()];
                },
                "peer-cert-allowed-cn is a; peer-cert-allowed-hostname is set as well",
            ),
            (
                |c| {
                    c.client_transport_security.client_cert_auth = false;
                    c.client_transport_security.trusted_ca_file = None;
                    c.client_transport_security.allowed_hostname = vec!["b".into()];
                },
                "client-cert-allowed-hostname is b; give trusted-ca-file",
            ),
            (
                |c| {
                    c.initial_cluster = "default=https://127.0.0.1:2380,b=https://127.0.0.1:2381".into();
                    c.peer_transport_security.client_cert_auth = false;
                    c.peer_transport_security.trusted_ca_file = None;
                },
                "peer-trusted-ca-file is not set; https://127.0.0.1:2381",
            ),
            (
                |c| c.cipher_suites = vec!["TLS_RSA_WITH_AES_128_CBC_SHA".into()],
                "cipher-suites is TLS_RSA_WITH_AES_128_CBC_SHA; it is none",
            ),
            (
                |c| {
                    c.tls_min_version = TlsVersion::V1_3;
                    c.cipher_suites = vec!["TLS_AES_128_GCM_SHA256".into()];
                },
                "cipher-suites is TLS_AES_128_GCM_SHA256; with tls-min-version",
            ),
            (
                |c| {
                    c.tls_min_version = TlsVersion::V1_3;
                    c.tls_max_version = Some(TlsVersion::V1_2);
                },
                "tls-max-version is TLS1.2; it must be no less",
            ),
        ];
        for (change, want) in cases {
            let mut config = both();
            change(&mut config);
            let got = config.validate().expect_err(want).to_string();
            assert!(got.strip_prefix("invalid configuration: ").is_some_and(|got| got.starts_with(want)), "{got}, wanted {want}");
        }
        assert_eq!(cipher_suite("TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305"), Some("TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256"));
    }

    #[test]
    #[cfg(not(feature = "tls"))]
    fn what_is_not_built_is_refused() {
        assert!(both().validate().unwrap_err().to_string().contains("this build has no TLS"));
    }
}
