//! From settings and files to what rustls takes.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier, verify_server_name};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    SupportedProtocolVersion,
};

use super::certificate;
use crate::config::tls::{FileNames, cipher_suite};
use crate::config::{Config, TlsFiles, TlsVersion, TransportSecurity};
use crate::error::{Error, Result};

/// Largest file of certificates or a key. Beyond it, it is refused: all the CAs of an operating system take a fifth of it.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What listeners take; what connections to members offer is the first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// One plane's settings. Clones are cheap enough.
#[derive(Clone)]
pub(super) struct Settings {
    /// What stands before the names of its settings.
    prefix: &'static str,
    /// What the files are called, if otherwise.
    names: Option<FileNames>,
    files: TransportSecurity,
    allowed: Allowed,
    versions: Vec<&'static SupportedProtocolVersion>,
    provider: Arc<CryptoProvider>,
}

impl Settings {
    /// # Errors
    /// `Config`, for a host name that is none.
    pub fn new(prefix: &'static str, files: &TransportSecurity, config: &Config) -> Result<Settings> {
        let host = |name: &String| {
            let before = if prefix.is_empty() { "client-" } else { prefix };
            let wrong = |_| Error::Config(format!("{before}cert-allowed-hostname is {name:?}; it must be a host name or an address"));
            ServerName::try_from(name.clone()).map_err(wrong)
        };
        let hosts = files.allowed_hostname.iter().map(host).collect::<Result<_>>()?;
        let newest = config.tls_max_version.unwrap_or(TlsVersion::V1_3);
        let known = [(TlsVersion::V1_2, &rustls::version::TLS12), (TlsVersion::V1_3, &rustls::version::TLS13)];
        let versions = known.into_iter().filter(|(version, _)| (config.tls_min_version..=newest).contains(version));
        let mut provider = rustls::crypto::ring::default_provider();
        let chosen: Vec<&str> = config.cipher_suites.iter().filter_map(|name| cipher_suite(name)).collect();
        if !chosen.is_empty() {
            // As in Go, those of TLS 1.3 are not chosen from.
            provider
                .cipher_suites
                .retain(|suite| suite.tls13().is_some() || suite.suite().as_str().is_some_and(|name| chosen.contains(&name)));
        }
        Ok(Settings {
            prefix,
            names: None,
            files: files.clone(),
            allowed: Allowed { names: files.allowed_cn.clone(), hosts },
            versions: versions.map(|(_, version)| version).collect(),
            provider: Arc::new(provider),
        })
    }

    /// Those of a client of a cluster, whose files are called `names`.
    ///
    /// # Errors
    /// `Config`, when some of them are of no use without another.
    pub fn of_client(names: FileNames, files: &TlsFiles) -> Result<Settings> {
        let FileNames { ca, cert, key } = names;
        for (name, needed, why) in [
            (ca, files.ca.is_some(), "without it there is nobody whose certificates could be trusted"),
            (cert, files.cert.is_some() || files.key.is_none(), "there is a key that belongs to it"),
            (key, files.key.is_some() || files.cert.is_none(), "there is a certificate that it belongs to"),
        ] {
            if !needed {
                return Err(Error::Config(format!("{name} is not set: {why}")));
            }
        }
        let files = TransportSecurity {
            trusted_ca_file: files.ca.clone(),
            client_cert_file: files.cert.clone(),
            client_key_file: files.key.clone(),
            ..TransportSecurity::default()
        };
        Ok(Settings { names: Some(names), ..Settings::new("", &files, &Config::default())? })
    }

    /// The same, with other names for the files.
    pub fn called(self, names: FileNames) -> Settings {
        Settings { names: Some(names), ..self }
    }

    /// Whether it is known whose certificates are good.
    pub fn has_ca(&self) -> bool {
        self.files.trusted_ca_file.is_some()
    }

    /// The files that [`server`](Self::server) reads.
    pub fn server_files(&self) -> Vec<PathBuf> {
        let files = [&self.files.cert_file, &self.files.key_file, &self.files.trusted_ca_file];
        files.into_iter().flatten().cloned().collect()
    }

    /// The files that [`client`](Self::client) reads.
    pub fn client_files(&self) -> Vec<PathBuf> {
        let (cert, key) = self.files.shown();
        [cert, key, self.files.trusted_ca_file.as_deref()].into_iter().flatten().map(Path::to_owned).collect()
    }

    /// What a listener needs.
    ///
    /// # Errors
    /// `Config`: what is wrong with which file.
    pub fn server(&self) -> Result<ServerConfig> {
        let builder = ServerConfig::builder_with_provider(self.provider.clone());
        let builder = builder.with_protocol_versions(&self.versions).map_err(|err| self.unusable(&err))?;
        let builder = match self.roots()? {
            Some(roots) => {
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, self.provider.clone()).build();
                let inner = verifier.map_err(|err| self.unusable(&err))?;
                builder.with_client_cert_verifier(Arc::new(OfClients { inner, allowed: self.allowed.clone() }))
            }
            None => builder.with_no_client_auth(),
        };
        let (chain, key) = self.identity("cert-file", "key-file", self.files.cert_file.as_deref(), self.files.key_file.as_deref())?;
        let built = builder.with_single_cert(chain, key);
        let mut config = built.map_err(|err| self.mismatch("cert-file", "key-file", self.files.cert_file.as_deref(), &err))?;
        config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
        // A certificate that was good an hour ago says nothing: each connection shows its own.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    /// What a connection to a member needs.
    ///
    /// # Errors
    /// `Config`: what is wrong with which file.
    pub fn client(&self) -> Result<ClientConfig> {
        let builder = ClientConfig::builder_with_provider(self.provider.clone());
        let builder = builder.with_protocol_versions(&self.versions).map_err(|err| self.unusable(&err))?;
        let roots = self.roots()?.unwrap_or_else(|| Arc::new(RootCertStore::empty()));
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, self.provider.clone()).build();
        let inner = verifier.map_err(|err| self.unusable(&err))?;
        let verifier = OfServers { inner, allowed: self.allowed.clone() };
        let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
        let (cert_name, key_name) =
            if self.files.client_cert_file.is_some() { ("client-cert-file", "client-key-file") } else { ("cert-file", "key-file") };
        let (cert, key) = self.files.shown();
        let mut config = if cert.is_some() {
            let (chain, private) = self.identity(cert_name, key_name, cert, key)?;
            builder.with_client_auth_cert(chain, private).map_err(|err| self.mismatch(cert_name, key_name, cert, &err))?
        } else {
            builder.with_no_client_auth()
        };
        config.alpn_protocols = PROTOCOLS.iter().take(1).map(|name| name.to_vec()).collect();
        config.resumption = Resumption::disabled();
        Ok(config)
    }

    /// A setting as whoever set it knows it.
    fn named(&self, name: &str) -> String {
        match (&self.names, name) {
            (Some(names), "trusted-ca-file") => names.ca.into(),
            (Some(names), "cert-file" | "client-cert-file") => names.cert.into(),
            (Some(names), "key-file" | "client-key-file") => names.key.into(),
            _ => format!("{}{name}", self.prefix),
        }
    }

    fn wrong(&self, name: &str, path: &Path, what: impl std::fmt::Display) -> Error {
        Error::Config(format!("{} is {}; {what}", self.named(name), path.display()))
    }

    fn unusable(&self, err: &dyn std::fmt::Display) -> Error {
        let plane = match self.names {
            _ if !self.prefix.is_empty() => "peers",
            Some(_) => "servers",
            None => "clients",
        };
        Error::Config(format!("TLS cannot be spoken with {plane}: {err}"))
    }

    /// When a certificate and a key do not fit.
    fn mismatch(&self, cert: &str, key: &str, path: Option<&Path>, err: &rustls::Error) -> Error {
        let path = path.unwrap_or(Path::new(""));
        match err {
            rustls::Error::InconsistentKeys(_) => self.wrong(cert, path, format!("the key in {} is not its own", self.named(key))),
            err => self.wrong(cert, path, format!("it cannot be used with {}: {err}", self.named(key))),
        }
    }

    fn read(&self, name: &str, path: &Path) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let read = File::open(path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes));
        read.map_err(|err| self.wrong(name, path, format!("it cannot be read: {err}")))?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            return Err(self.wrong(name, path, format!("it is larger than {FILE_BYTES_MAX} bytes")));
        }
        Ok(bytes)
    }

    fn certificates(&self, name: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>> {
        let bytes = self.read(name, path)?;
        let found = CertificateDer::pem_slice_iter(&bytes).collect::<std::result::Result<Vec<_>, _>>();
        let found = found.map_err(|err| self.wrong(name, path, format!("it is not PEM: {err}")))?;
        if found.is_empty() { Err(self.wrong(name, path, "there is no certificate in it")) } else { Ok(found) }
    }

    /// A certificate, with those behind it, and its key.
    fn identity(
        &self,
        cert_name: &str,
        key_name: &str,
        cert: Option<&Path>,
        key: Option<&Path>,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let missing = |name: &str| Error::Config(format!("{} is not set", self.named(name)));
        let (cert, key) = (cert.ok_or_else(|| missing(cert_name))?, key.ok_or_else(|| missing(key_name))?);
        let chain = self.certificates(cert_name, cert)?;
        if let Some((from, until)) = chain.first().and_then(|first| certificate::validity(first)) {
            let now = SystemTime::now();
            if now > until {
                tracing::warn!(file = %cert.display(), "the certificate has expired");
            } else if now < from {
                tracing::warn!(file = %cert.display(), "the certificate is not good yet");
            }
        }
        let private = PrivateKeyDer::from_pem_slice(&self.read(key_name, key)?);
        let private =
            private.map_err(|err| self.wrong(key_name, key, format!("there is no private key in it that could be read: {err}")))?;
        Ok((chain, private))
    }

    fn roots(&self) -> Result<Option<Arc<RootCertStore>>> {
        let Some(path) = &self.files.trusted_ca_file else { return Ok(None) };
        let mut roots = RootCertStore::empty();
        for (at, certificate) in self.certificates("trusted-ca-file", path)?.into_iter().enumerate() {
            let wrong = |err| self.wrong("trusted-ca-file", path, format!("certificate {} in it cannot be used: {err}", at + 1));
            roots.add(certificate).map_err(wrong)?;
        }
        Ok(Some(Arc::new(roots)))
    }
}

/// Whose certificates are taken, of those that are good.
#[derive(Clone, Debug, Default)]
struct Allowed {
    /// One of these common names. Empty: any.
    names: Vec<String>,
    /// One of these hosts. Empty: any.
    hosts: Vec<ServerName<'static>>,
}

impl Allowed {
    fn check(&self, certificate: &CertificateDer<'_>) -> std::result::Result<(), rustls::Error> {
        let by_name = || certificate::common_name(certificate).is_some_and(|name| self.names.contains(&name));
        let by_host = || {
            let parsed = ParsedCertificate::try_from(certificate)?;
            let known = self.hosts.iter().any(|host| verify_server_name(&parsed, host).is_ok());
            if known { Ok(()) } else { Err(rustls::Error::from(CertificateError::NotValidForName)) }
        };
        if !self.names.is_empty() && !by_name() {
            return Err(CertificateError::NotValidForName.into());
        }
        if self.hosts.is_empty() { Ok(()) } else { by_host() }
    }
}

type Signed = std::result::Result<HandshakeSignatureValid, rustls::Error>;

/// Checks those who connect.
#[derive(Debug)]
struct OfClients {
    inner: Arc<dyn ClientCertVerifier>,
    allowed: Allowed,
}

impl ClientCertVerifier for OfClients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> std::result::Result<ClientCertVerified, rustls::Error> {
        let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
        self.allowed.check(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(&self, message: &[u8], cert: &CertificateDer<'_>, dss: &DigitallySignedStruct) -> Signed {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(&self, message: &[u8], cert: &CertificateDer<'_>, dss: &DigitallySignedStruct) -> Signed {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Checks those who are connected to.
#[derive(Debug)]
struct OfServers {
    inner: Arc<WebPkiServerVerifier>,
    allowed: Allowed,
}

impl ServerCertVerifier for OfServers {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        let verified = self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        self.allowed.check(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(&self, message: &[u8], cert: &CertificateDer<'_>, dss: &DigitallySignedStruct) -> Signed {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(&self, message: &[u8], cert: &CertificateDer<'_>, dss: &DigitallySignedStruct) -> Signed {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
