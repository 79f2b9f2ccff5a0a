//! What is needed to try TLS and users out: a CA with certificates from it, and the users of an etcd.

use std::path::{Path, PathBuf};

use quorate::Config;
use quorate::client::{RemoteOptions, TlsFiles};
use quorate::config::TransportSecurity;
use quorate::proto::authpb::permission::Type;
use quorate::proto::authpb::{Permission, UserAddOptions};
use quorate::proto::etcdserverpb::auth_client::AuthClient;
use quorate::proto::etcdserverpb::{
    AuthDisableRequest, AuthEnableRequest, AuthRoleAddRequest, AuthRoleGrantPermissionRequest, AuthUserAddRequest,
    AuthUserChangePasswordRequest, AuthUserGrantRoleRequest, AuthenticateRequest,
};
use tempfile::TempDir;
use tonic::Request;
use tonic::transport::{Channel, Endpoint};

use crate::certificates::{Ca, replace};
use crate::common::Process;

/// The password of `root`, who may do everything.
pub const ROOT_PASSWORD: &str = "the root of all";

/// A CA, and files of a server's certificate and a client's from it.
pub struct Pki {
    pub dir: TempDir,
    pub ca: Ca,
    pub ca_file: PathBuf,
    pub server: (PathBuf, PathBuf),
    pub client: (PathBuf, PathBuf),
}

impl Pki {
    pub fn new() -> Pki {
        let (dir, ca) = (tempfile::tempdir().unwrap(), Ca::new("the CA"));
        let ca_file = dir.path().join("ca.crt");
        replace(&ca_file, &ca.pem);
        let server = ca.sign("a server", &["localhost", "127.0.0.1"]).write(dir.path(), "server");
        let client = ca.sign("a client", &[]).write(dir.path(), "client");
        Pki { dir, ca, ca_file, server, client }
    }

    /// The server's certificate and key, and the CA.
    pub fn server_files(&self) -> [&Path; 3] {
        [&self.server.0, &self.server.1, &self.ca_file]
    }

    pub fn fill(&self, files: &mut TransportSecurity) {
        files.cert_file = Some(self.server.0.clone());
        files.key_file = Some(self.server.1.clone());
        files.trusted_ca_file = Some(self.ca_file.clone());
        files.client_cert_auth = true;
    }

    /// A member by itself, which asks its clients for certificates.
    pub fn server(&self, dir: &Path) -> Config {
        let mut config = Config::default();
        config.data_dir = Some(dir.join("data"));
        config.listen_client_urls = vec!["https://127.0.0.1:0".parse().unwrap()];
        config.listen_peer_urls.clear();
        self.fill(&mut config.client_transport_security);
        config
    }

    /// What a client shows and trusts.
    pub fn client_files(&self) -> TlsFiles {
        TlsFiles { ca: Some(self.ca_file.clone()), cert: Some(self.client.0.clone()), key: Some(self.client.1.clone()) }
    }

    pub fn options(&self) -> RemoteOptions {
        let mut options = RemoteOptions::default();
        options.tls = self.client_files();
        options
    }
}

/// The users of an etcd, as its operator has them.
pub struct Users {
    auth: AuthClient<Channel>,
    token: Option<String>,
}

impl Users {
    pub async fn of(process: &Process) -> Users {
        let channel = Endpoint::from_shared(process.url()).unwrap().connect().await.unwrap();
        Users { auth: AuthClient::new(channel), token: None }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = &self.token {
            request.metadata_mut().insert("token", token.parse().unwrap());
        }
        request
    }

    /// From now on only users are served; root is the first of them.
    pub async fn enable(&mut self) {
        if self.token.is_none() {
            self.add("root", ROOT_PASSWORD).await;
            self.auth.role_add(AuthRoleAddRequest { name: "root".into() }).await.unwrap();
            self.grant("root", "root").await;
        }
        self.auth.auth_enable(AuthEnableRequest {}).await.unwrap();
        self.log_in().await;
    }

    async fn log_in(&mut self) {
        let request = AuthenticateRequest { name: "root".into(), password: ROOT_PASSWORD.into() };
        self.token = Some(self.auth.authenticate(request).await.unwrap().into_inner().token);
    }

    /// Everybody is served, and no token is good any more.
    pub async fn disable(&mut self) {
        self.log_in().await;
        let request = self.request(AuthDisableRequest {});
        self.auth.auth_disable(request).await.unwrap();
    }

    pub async fn add(&mut self, name: &str, password: &str) {
        let (name, password) = (name.to_owned(), password.to_owned());
        let options = Some(UserAddOptions { no_password: false });
        let request = self.request(AuthUserAddRequest { name, password, options, hashed_password: String::new() });
        self.auth.user_add(request).await.unwrap();
        if self.token.is_some() {
            self.log_in().await;
        }
    }

    pub async fn change_password(&mut self, name: &str, password: &str) {
        let (name, password) = (name.to_owned(), password.to_owned());
        let request = self.request(AuthUserChangePasswordRequest { name, password, hashed_password: String::new() });
        self.auth.user_change_password(request).await.unwrap();
        // The token is as old as the password now.
        self.log_in().await;
    }

    /// A role that may read and write the keys with that prefix.
    pub async fn add_role(&mut self, name: &str, prefix: &str) {
        let request = self.request(AuthRoleAddRequest { name: name.to_owned() });
        self.auth.role_add(request).await.unwrap();
        // The token is as old as the role now.
        self.log_in().await;
        let (key, range_end) = (prefix.to_owned().into(), quorate::client::prefix_end(prefix.as_bytes()));
        let perm = Some(Permission { perm_type: Type::Readwrite as i32, key, range_end });
        let request = self.request(AuthRoleGrantPermissionRequest { name: name.to_owned(), perm });
        self.auth.role_grant_permission(request).await.unwrap();
        self.log_in().await;
    }

    pub async fn grant(&mut self, user: &str, role: &str) {
        let request = self.request(AuthUserGrantRoleRequest { user: user.to_owned(), role: role.to_owned() });
        self.auth.user_grant_role(request).await.unwrap();
        if self.token.is_some() {
            self.log_in().await;
        }
    }
}
