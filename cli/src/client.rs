//! The connection to the server's `AdminService`, and its errors in plain words.

use std::{sync::Arc, time::Duration};

use fwpush_keys::tls;
use fwpush_proto::v1::admin_service_client::AdminServiceClient;
use tonic::{Code, Response, Status, transport::Channel};

use crate::{
    config::OperatorConfig,
    connect,
    failure::{Failure, Result},
    limits,
};

/// The generated client over one connection. Clones share it.
pub type Admin = AdminServiceClient<Channel>;

/// An operator's connection. It does not come back by itself: see [`Client::reconnect`].
#[derive(Debug)]
pub struct Client {
    pub config: OperatorConfig,
    tls: Arc<rustls::ClientConfig>,
    admin: Admin,
}

impl Client {
    /// Reads certificates and connects.
    pub async fn connect(config: OperatorConfig) -> Result<Self> {
        let tls = Arc::new(connect::settings(&config)?);
        let admin = connect::connect(&config, &tls).await?;
        Ok(Self { config, tls, admin })
    }

    /// Connects anew after the connection was lost.
    pub async fn reconnect(&mut self) -> Result<()> {
        self.admin = connect::connect(&self.config, &self.tls).await?;
        Ok(())
    }

    /// A handle for one call, with no time limit on it.
    pub fn admin(&self) -> Admin {
        self.admin.clone()
    }

    /// One unary call with a time limit; `what` names it in the error ("publish the release").
    pub async fn call<T>(
        &self,
        what: &str,
        call: impl AsyncFnOnce(&mut Admin) -> Result<Response<T>, Status>,
    ) -> Result<T> {
        self.call_within(limits::CALL_TIME, what, call).await
    }

    /// Like [`Client::call`], for one that may take longer.
    pub async fn call_within<T>(
        &self,
        limit: Duration,
        what: &str,
        call: impl AsyncFnOnce(&mut Admin) -> Result<Response<T>, Status>,
    ) -> Result<T> {
        self.answer_within(limit, call)
            .await
            .map_err(|status| self.refused(what, &status))
    }

    /// One unary call that may run twice without harm: where the connection is lost, tried again over new ones.
    pub async fn call_again<T>(
        &mut self,
        what: &str,
        call: impl AsyncFn(&mut Admin) -> Result<Response<T>, Status>,
    ) -> Result<T> {
        let mut backoff = Backoff::default();
        for _ in 1..limits::CALL_ATTEMPTS {
            match self.try_call(&call).await {
                Err(status) if is_lost(&status) => {
                    backoff.wait().await;
                    // When this fails, so does the next attempt.
                    let _ = self.reconnect().await;
                }
                answer => return answer.map_err(|status| self.refused(what, &status)),
            }
        }
        self.call(what, &call).await
    }

    /// Like [`Client::call`], for callers that tell one status from another.
    pub async fn try_call<T>(
        &self,
        call: impl AsyncFnOnce(&mut Admin) -> Result<Response<T>, Status>,
    ) -> Result<T, Status> {
        self.answer_within(limits::CALL_TIME, call).await
    }

    async fn answer_within<T>(
        &self,
        limit: Duration,
        call: impl AsyncFnOnce(&mut Admin) -> Result<Response<T>, Status>,
    ) -> Result<T, Status> {
        let mut admin = self.admin();
        match tokio::time::timeout(limit, call(&mut admin)).await {
            Ok(answer) => answer.map(Response::into_inner),
            Err(_) => Err(Status::deadline_exceeded(format!(
                "no answer within {} s",
                limit.as_secs()
            ))),
        }
    }

    /// A status in plain words, with the next step where the code tells it.
    pub fn refused(&self, what: &str, status: &Status) -> Failure {
        let server = &self.config.server;
        if let Some(source) = std::error::Error::source(status) {
            let why = tls::explain(source);
            return Failure::new(format!(
                "{what}: the connection to {server} was lost: {why}"
            ))
            .next("Look at the server's log. Repeating the command is safe.");
        }
        let message = match status.message() {
            "" => status.code().description(),
            message => message,
        };
        let failure = Failure::new(format!("{what}: {message}"));
        // The server knows best what can be done about its own refusal.
        let next = status.metadata().get("fwpush-next");
        if let Some(next) = next.and_then(|next| next.to_str().ok()) {
            return failure.next(next);
        }
        match status.code() {
            Code::Unauthenticated | Code::PermissionDenied => failure.next(format!(
                "This command acts as operator {} with the certificate {}.",
                self.config.operator,
                self.config.certificate.display()
            )),
            Code::Unimplemented => failure.next(format!(
                "{server} does not offer this: is it the operators' address, and a server of this version?"
            )),
            code => failure.next(next_step(code)),
        }
    }
}

/// What can be done about a refusal of which nothing but its kind is known.
fn next_step(code: Code) -> &'static str {
    match code {
        Code::Unavailable | Code::DeadlineExceeded => {
            "Look at the server's log if it stays so. Repeating the command is safe."
        }
        Code::InvalidArgument | Code::OutOfRange => {
            "Correct what the message names; the command's --help shows what it takes."
        }
        Code::NotFound => {
            "`fwpush device list`, `fwpush release list` and `fwpush rollout list` show what there is."
        }
        Code::AlreadyExists => "Choose another name, or go on with what is there.",
        Code::FailedPrecondition => "Change what the message names, then repeat the command.",
        Code::ResourceExhausted | Code::Aborted => {
            "The server is busy with others: repeat the command in a while."
        }
        _ => "The server's log says more. Repeating the command is safe.",
    }
}

/// Whether a call failed because the connection or the server did for now, so that it may be tried again on a new
/// connection.
pub fn is_lost(status: &Status) -> bool {
    status.code() == Code::Unavailable || std::error::Error::source(status).is_some()
}

/// Waits that grow from [`limits::RETRY_FIRST`] to [`limits::RETRY_MOST`].
#[derive(Debug)]
pub struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(limits::RETRY_FIRST)
    }
}

impl Backoff {
    pub async fn wait(&mut self) {
        tokio::time::sleep(self.0).await;
        self.0 = (self.0 * 2).min(limits::RETRY_MOST);
    }
}
