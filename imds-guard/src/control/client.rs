//! The side of the command line.

use std::{
    io::{BufRead as _, BufReader, ErrorKind, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use serde::de::DeserializeOwned;

use super::{Call, Reply, Request, SOCKET, VERSION};
use crate::failure::Failure;

/// How long a guard may take to answer: it may be stopped, or its host out of memory.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection to a guard.
pub struct Client(BufReader<UnixStream>);

impl Client {
    /// To the guard that keeps its things in this directory; `None` if there is none.
    ///
    /// # Errors
    /// It cannot be reached; most often for want of privileges.
    pub fn connect(run_dir: &Path) -> Result<Option<Self>, Failure> {
        let path = run_dir.join(SOCKET);
        match UnixStream::connect(&path) {
            Ok(stream) => Ok(Some(Self(BufReader::new(stream)))),
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(Failure::Control { path, error }),
        }
    }

    /// As [`Client::connect`], where it is an error that there is none.
    ///
    /// # Errors
    /// No guard is running, or it cannot be reached.
    pub fn required(run_dir: &Path) -> Result<Self, Failure> {
        Self::connect(run_dir)?.ok_or_else(|| Failure::NotRunning {
            path: run_dir.join(SOCKET),
        })
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// What the guard has against it.
    pub fn ask<T: DeserializeOwned>(&mut self, request: Request) -> Result<T, Failure> {
        let mut line = serde_json::to_vec(&Call {
            v: VERSION,
            request,
        })
        .map_err(anyhow::Error::from)?;
        line.push(b'\n');
        let stream = self.0.get_mut();
        let patience = stream.set_read_timeout(Some(PATIENCE));
        patience
            .and_then(|()| stream.set_write_timeout(Some(PATIENCE)))
            .and_then(|()| stream.write_all(&line))
            .context("the guard does not listen")?;
        let answer = self.line()?.ok_or_else(|| anyhow!("the guard hangs up"))?;
        // Events may be long in coming.
        self.0
            .get_ref()
            .set_read_timeout(None)
            .context("the guard hangs up")?;
        let reply: Reply = serde_json::from_str(&answer).context("the guard's answer")?;
        match (reply.ok, reply.error) {
            (Some(ok), _) => Ok(serde_json::from_value(ok).context("the guard's answer")?),
            (None, Some(error)) => Err(Failure::Refused(error)),
            (None, None) => Err(anyhow!("the guard's answer is empty").into()),
        }
    }

    /// The next line; `None` when the guard has hung up.
    ///
    /// # Errors
    /// The connection breaks.
    pub fn line(&mut self) -> Result<Option<String>, Failure> {
        let mut line = String::new();
        let read = self
            .0
            .read_line(&mut line)
            .map_err(|error| match error.kind() {
                ErrorKind::WouldBlock => anyhow!("the guard does not answer within {PATIENCE:?}"),
                _ => anyhow!("the guard hangs up: {error}"),
            })?;
        Ok((read > 0).then_some(line))
    }
}
