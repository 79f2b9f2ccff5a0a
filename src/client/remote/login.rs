//! Who the client is, where the members have users.
//!
//! ```text
//! first call             ── Authenticate {name, password} -> token      kept, for all calls and all members
//! each call and watch    ── header token: ...
//! refused, for the token is old or stands for nobody -> it is dropped, Authenticate again, the call again
//! no users there         ── goes on without a token; when there are some, it is refused as with an old one
//! ```
//!
//! # Invariants
//! - A call that was refused because of its token has done nothing, so that a write, too, may be made again.
//! - Many calls that need a token at the same time ask for one. One that was made meanwhile is not thrown away with an older one: each has
//!   a [`Ticket`].
//! - Password and token are in no log line and no error.

use std::sync::{Arc, Mutex};

use http::HeaderValue;
use tonic::{Code, Status};

use super::dial::{Line, chain};
use super::led;
use super::options::Secret;
use super::verdict::{Verdict, verdict};
use crate::error::{ApplyError, Error};
use crate::lock::lock;
use crate::proto::etcdserverpb::AuthenticateRequest;
use crate::proto::etcdserverpb::auth_client::AuthClient;

/// How often a call, or a watch, may be refused because of its token, and get another. Beyond it, it ends with the refusal: users and roles
/// change too fast for it, or the server does not know its own tokens.
pub(super) const ENTRIES_MAX: u32 = 3;

/// A user, if there is one, and what stands for it. Clones share that.
#[derive(Clone)]
pub(crate) struct Pass(Option<Arc<User>>);

struct User {
    name: String,
    password: Secret,
    held: Mutex<Held>,
    /// Held while a token is asked for.
    entering: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Held {
    /// Counts what was held.
    serial: u64,
    token: Option<Token>,
}

#[derive(Clone)]
enum Token {
    Text(HeaderValue),
    /// The members have no users.
    NotNeeded,
}

/// With what a call was made: what may be thrown away if that was refused.
#[derive(Clone, Copy)]
pub(crate) struct Ticket(u64);

/// What a call that failed says of the line that it was made over.
pub(crate) enum Fault {
    /// Nothing: the member has spoken.
    None,
    /// Its token was refused, and is thrown away. With another the call may be answered.
    Token,
    /// It is broken, and the text says why.
    Broken(String),
}

impl Pass {
    pub fn new(name: &str, password: &Secret) -> Pass {
        let user = || {
            let (held, entering) = (Mutex::default(), tokio::sync::Mutex::new(()));
            Arc::new(User { name: name.to_owned(), password: password.clone(), held, entering })
        };
        Pass((!name.is_empty()).then(user))
    }

    /// What a call has to show.
    pub fn token(&self) -> Option<HeaderValue> {
        match lock(&self.0.as_ref()?.held).token.clone()? {
            Token::Text(text) => Some(text),
            Token::NotNeeded => None,
        }
    }
}

impl User {
    fn ticket(&self) -> Option<Ticket> {
        let held = lock(&self.held);
        held.token.is_some().then_some(Ticket(held.serial))
    }
}

impl Line {
    /// Throws away what a call was refused with, and says whether there can be something better.
    pub fn renew(&self, ticket: Ticket, refusal: &Error) -> bool {
        let Some(user) = &self.pass.0 else { return false };
        let mut held = lock(&user.held);
        if held.serial != ticket.0 {
            // It was done already.
            return true;
        }
        // Who shows a token is known, and may not. Who shows none was taken for whom its certificate names.
        if matches!(refusal, Error::Apply(ApplyError::PermissionDenied)) && !matches!(held.token, Some(Token::NotNeeded)) {
            return false;
        }
        held.token = None;
        true
    }

    /// Says what a failed call means for this line.
    pub fn fault(&self, ticket: Ticket, status: &Status) -> Fault {
        match verdict(status) {
            Verdict::Entry(err) if self.renew(ticket, &err) => Fault::Token,
            _ => std::error::Error::source(status).map_or(Fault::None, |source| Fault::Broken(chain(source))),
        }
    }

    /// Logs in, unless that was done, or there is no need to.
    ///
    /// # Errors
    /// Of the call; what it was to be made for has not been sent then.
    pub async fn enter(&self) -> Result<Ticket, Status> {
        let Some(user) = &self.pass.0 else { return Ok(Ticket(0)) };
        if let Some(ticket) = user.ticket() {
            return Ok(ticket);
        }
        let _one_at_a_time = user.entering.lock().await;
        if let Some(ticket) = user.ticket() {
            return Ok(ticket);
        }
        let request = AuthenticateRequest { name: user.name.clone(), password: user.password.reveal().to_owned() };
        let token = match AuthClient::new(self.channel.clone()).authenticate(led(request)).await {
            Ok(answer) => {
                let mut text = HeaderValue::try_from(answer.into_inner().token)
                    .map_err(|_| Status::internal("the token that stands for the user cannot be sent"))?;
                text.set_sensitive(true);
                Token::Text(text)
            }
            Err(status) if ApplyError::of_text(status.message()) == Some(ApplyError::AuthNotEnabled) => Token::NotNeeded,
            Err(status) if status.code() == Code::Unimplemented => {
                let what = format!("there is nobody to log in as at this server, so not as {:?}: {}", user.name, status.message());
                return Err(Status::unimplemented(what));
            }
            Err(status) => return Err(status),
        };
        let mut held = lock(&user.held);
        held.serial += 1;
        held.token = Some(token);
        Ok(Ticket(held.serial))
    }
}
