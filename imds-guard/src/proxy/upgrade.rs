//! The guard's own session token, with which it carries IMDSv1 requests over.

use std::time::{Duration, Instant};

use hyper::{HeaderMap, Method, StatusCode, body::Bytes, header::HeaderValue};
use tokio::sync::Mutex;

use crate::{
    policy::{MAX_TTL, TTL_HEADER},
    record::{UpstreamFailure, UpstreamFailureKind},
};

use super::upstream::Failed;

/// How long before its end a token is not used any more.
const MARGIN: Duration = Duration::from_secs(60);

/// A session token of the guard's own, which never leaves it.
#[derive(Default)]
pub struct OwnToken(Mutex<Option<(HeaderValue, Instant)>>);

impl OwnToken {
    /// The token, or what `fetch` answers to the request for a new one. Others wait meanwhile: one
    /// token does for all.
    pub async fn get<F>(
        &self,
        fetch: impl FnOnce(Method, HeaderMap) -> F,
    ) -> Result<HeaderValue, Failed>
    where
        F: Future<Output = Result<(StatusCode, Bytes), Failed>>,
    {
        let mut own = self.0.lock().await;
        if let Some((token, until)) = &*own
            && Instant::now() < *until
        {
            return Ok(token.clone());
        }
        let mut headers = HeaderMap::new();
        headers.insert(TTL_HEADER, MAX_TTL.into());
        let (status, body) = fetch(Method::PUT, headers).await?;
        let token = HeaderValue::from_maybe_shared(body);
        let (StatusCode::OK, Ok(token)) = (status, token) else {
            let message = format!("the service gave the guard no session token: {status}");
            let kind = UpstreamFailureKind::Broken;
            return Err((StatusCode::BAD_GATEWAY, UpstreamFailure { kind, message }));
        };
        let lives = Duration::from_secs(MAX_TTL.into()) - MARGIN;
        *own = Some((token.clone(), Instant::now() + lives));
        Ok(token)
    }

    /// The service does not know this one any more.
    pub async fn forget(&self, token: &HeaderValue) {
        let mut own = self.0.lock().await;
        if own.as_ref().is_some_and(|(known, _)| known == token) {
            *own = None;
        }
    }
}
