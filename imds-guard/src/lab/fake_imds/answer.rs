//! Which request gets which answer. No sockets here, and no state but the tokens.

use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{
    ACCEPT_RANGES, ALLOW, CONTENT_TYPE, HeaderName, HeaderValue, LAST_MODIFIED, SERVER,
};
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use jiff::Timestamp;

use super::tokens::Tokens;
use super::{HttpTokens, Settings, tree};

const TOKEN_PATH: &str = "/latest/api/token";
pub(super) const TOKEN: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token");
const TTL: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token-ttl-seconds");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The longest that a token can live.
const MAX_TTL: u64 = 21_600;

/// What a request is to the service's statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `PUT` for a session token.
    TokenPut,
    /// Without a session token.
    V1,
    /// With a session token, valid or not.
    V2,
    /// Any other `PUT`.
    OtherPut,
}

impl Kind {
    pub(super) fn of<B>(request: &Request<B>) -> Self {
        if *request.method() != Method::PUT {
            return if request.headers().contains_key(&TOKEN) {
                Self::V2
            } else {
                Self::V1
            };
        }
        match request.uri().path() {
            TOKEN_PATH => Self::TokenPut,
            _ => Self::OtherPut,
        }
    }
}

/// Why a request is refused, or the text and the token's remaining seconds.
type Outcome = Result<(String, Option<u64>), StatusCode>;

/// The answer to a request.
pub(super) fn answer<B>(
    settings: &Settings,
    tokens: &Tokens,
    request: &Request<B>,
) -> Response<Full<Bytes>> {
    let outcome = match Kind::of(request) {
        _ if !settings.enabled => Err(StatusCode::FORBIDDEN),
        Kind::TokenPut => issue(tokens, request.headers()),
        _ => document(settings.http_tokens, tokens, request),
    };
    let mut response = Response::default();
    let headers = response.headers_mut();
    let (status, content_type, text) = match outcome {
        Ok((text, ttl)) => {
            headers.extend(ttl.map(|ttl| (TTL, ttl.into())));
            headers.insert(ACCEPT_RANGES, HeaderValue::from_static("none"));
            let now = Timestamp::now().strftime("%a, %d %b %Y %H:%M:%S GMT");
            let now = HeaderValue::try_from(now.to_string());
            headers.extend(now.map(|now| (LAST_MODIFIED, now)));
            (StatusCode::OK, "text/plain", text)
        }
        Err(status) => {
            if status == StatusCode::METHOD_NOT_ALLOWED {
                let allowed = match request.uri().path() {
                    TOKEN_PATH => "OPTIONS, PUT",
                    _ => "GET, HEAD",
                };
                headers.insert(ALLOW, HeaderValue::from_static(allowed));
            }
            (status, "text/html", error_page(status))
        }
    };
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(SERVER, HeaderValue::from_static("EC2ws"));
    *response.status_mut() = status;
    *response.body_mut() = text.into();
    response
}

fn issue(tokens: &Tokens, headers: &HeaderMap) -> Outcome {
    if headers.contains_key(&FORWARDED_FOR) {
        return Err(StatusCode::FORBIDDEN);
    }
    let ttl = headers
        .get(&TTL)
        .and_then(|value| value.to_str().ok())
        .filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))
        .and_then(|text| text.parse().ok())
        .filter(|ttl| (1..=MAX_TTL).contains(ttl))
        .ok_or(StatusCode::BAD_REQUEST)?;
    let token = tokens
        .issue(Duration::from_secs(ttl))
        .map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    Ok((token, Some(ttl)))
}

fn document<B>(http_tokens: HttpTokens, tokens: &Tokens, request: &Request<B>) -> Outcome {
    let path = request.uri().path();
    let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
    if !is_read || path == TOKEN_PATH {
        return Err(StatusCode::METHOD_NOT_ALLOWED);
    }
    let mut ttl = None;
    for value in request.headers().get_all(&TOKEN) {
        let token = value.to_str().map_err(|_| StatusCode::UNAUTHORIZED)?;
        let left = tokens.remaining(token).ok_or(StatusCode::UNAUTHORIZED)?;
        // Rounded up: a token that was just issued has all of its seconds left.
        ttl = Some(left.as_millis().div_ceil(1000) as u64);
    }
    if ttl.is_none() && http_tokens == HttpTokens::Required {
        return Err(StatusCode::UNAUTHORIZED);
    }
    let text = tree::look_up(path).ok_or(StatusCode::NOT_FOUND)?;
    Ok((text, ttl))
}

fn error_page(status: StatusCode) -> String {
    let code = status.as_u16();
    let reason = status.canonical_reason().unwrap_or_default();
    format!(
        r#"<?xml version="1.0" encoding="iso-8859-1"?>
<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN"
	"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd">
<html xmlns="http://www.w3.org/1999/xhtml" xml:lang="en" lang="en">
 <head>
  <title>{code} - {reason}</title>
 </head>
 <body>
  <h1>{code} - {reason}</h1>
 </body>
</html>
"#
    )
}
