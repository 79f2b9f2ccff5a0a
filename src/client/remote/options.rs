//! Where a remote client's members are, and how it goes about calling them.

use std::fmt;
use std::time::Duration;

use tokio::sync::watch::Receiver;

use crate::config::tls::FileNames;
use crate::config::{TlsFiles, Url};
use crate::error::{Error, Result};

/// Where members are: a list, or one that somebody keeps up to date.
///
/// ```
/// # fn main() -> quorate::Result<()> {
/// use quorate::client::Endpoints;
/// let fixed = Endpoints::from(vec!["http://127.0.0.1:2379".parse()?]);
/// let (known, changing) = tokio::sync::watch::channel(vec!["http://127.0.0.1:2379".parse()?]);
/// let followed = Endpoints::from(changing);
/// known.send_replace(vec!["http://127.0.0.1:2381".parse()?]); // its clients leave a member that is not among them any more
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Endpoints(pub(super) Receiver<Vec<Url>>);

impl From<Vec<Url>> for Endpoints {
    fn from(urls: Vec<Url>) -> Self {
        Endpoints(tokio::sync::watch::channel(urls).1)
    }
}

impl From<Url> for Endpoints {
    fn from(url: Url) -> Self {
        vec![url].into()
    }
}

impl From<Receiver<Vec<Url>>> for Endpoints {
    fn from(urls: Receiver<Vec<Url>>) -> Self {
        Endpoints(urls)
    }
}

/// A text that is never shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Hides a text.
    pub fn new(text: impl Into<String>) -> Secret {
        Secret(text.into())
    }

    /// The text, for whoever must send it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "none" } else { "(hidden)" })
    }
}

/// How a remote client goes about it.
///
/// ```
/// use quorate::client::{RemoteOptions, Secret, TlsFiles};
/// let mut options = RemoteOptions::default();
/// options.follow_members = true;
/// options.request_timeout = std::time::Duration::from_secs(30);
/// // For endpoints with https:// URLs; without a certificate where they ask for none.
/// options.tls = TlsFiles { ca: Some("ca.crt".into()), cert: Some("client.crt".into()), key: Some("client.key".into()) };
/// // For an etcd with users.
/// options.username = "storage".into();
/// options.password = Secret::new("a secret");
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RemoteOptions {
    /// How long a call may take, all its attempts together: 10 s. What the server itself gives a request is 7 s by default. Physical
    /// compactions, defragmentation, hashes and backups may take longer.
    pub request_timeout: Duration,
    /// How long making a connection to one endpoint may take, with TLS and the member's first word: 2 s.
    pub connect_timeout: Duration,
    /// After how long a silence a member is pinged while a call is under way: 6 s. An etcd takes offence at less than 5 s.
    pub keep_alive_interval: Duration,
    /// How long the answer to a ping may take before the connection is given up: 3 s.
    pub keep_alive_timeout: Duration,
    /// Whether to ask the members for each other, and to use those, too: so a client that knows one finds all, and keeps finding them as they
    /// change. Off by default, for the addresses that members advertise need not be reachable from here.
    pub follow_members: bool,
    /// The files for endpoints with `https` URLs. An endpoint that has an `http` URL is spoken to in plain text whatever is here.
    pub tls: TlsFiles,
    /// The user to log in as, where the members have users. Empty: nobody.
    pub username: String,
    /// Its password. It is sent as it is: give endpoints with `https` URLs, unless the network is to be trusted.
    pub password: Secret,
    /// The cluster that is meant, if that is known: a member of another one refuses the calls.
    pub(crate) cluster: Option<u64>,
}

/// What the files are called in complaints.
pub(super) const FILE_NAMES: FileNames = FileNames { ca: "tls.ca", cert: "tls.cert", key: "tls.key" };

impl RemoteOptions {
    /// # Errors
    /// `Config`: an option that makes no sense.
    pub(super) fn validate(&self) -> Result<()> {
        for (name, value) in [("request_timeout", self.request_timeout), ("connect_timeout", self.connect_timeout)] {
            if value.is_zero() {
                return Err(Error::Config(format!("{name} is 0: nothing could be done in that time")));
            }
        }
        if self.username.is_empty() && self.password != Secret::default() {
            return Err(Error::Config("password is set, and username is not: nobody can log in with it alone".into()));
        }
        Ok(())
    }
}

impl Default for RemoteOptions {
    fn default() -> Self {
        RemoteOptions {
            request_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(2),
            keep_alive_interval: Duration::from_secs(6),
            keep_alive_timeout: Duration::from_secs(3),
            follow_members: false,
            tls: TlsFiles::default(),
            username: String::new(),
            password: Secret::default(),
            cluster: None,
        }
    }
}
