//! What a request asks for, in canonical form.

use clap::ValueEnum;
use hyper::{
    HeaderMap, Method, Uri,
    header::{HeaderName, HeaderValue, UPGRADE},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::path::Path;

/// Carries a session token.
pub const TOKEN_HEADER: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token");
/// Says for how many seconds a session token is wanted; in answers, for how many it is still valid.
pub const TTL_HEADER: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token-ttl-seconds");
/// Proxies add it; the service refuses tokens to requests that carry it.
const FORWARDED_HEADER: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Asks for HTTP/2 on the same connection (RFC 7540, 3.2.1).
const HTTP2_HEADER: HeaderName = HeaderName::from_static("http2-settings");

/// The longest that a session token can live, in seconds.
pub const MAX_TTL: u32 = 21_600;

/// Which version of the protocol a request speaks.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Imds {
    /// No session token.
    V1,
    /// With a session token; whether it is valid only the service knows.
    V2,
    /// Asks for a session token: every `PUT`, whatever its path, as the service knows no other. How
    /// it reads a path that is written differently is not for the guard to guess.
    Token,
}

impl Imds {
    /// As in rules and events.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
            Self::Token => "token",
        }
    }
}

/// Why a request is not judged but refused.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, thiserror::Error,
)]
#[serde(rename_all = "snake_case")]
pub enum Malformed {
    /// A line ends with a bare CR or LF, or holds a NUL.
    #[error("a line does not end with CR LF")]
    LineEnding,
    /// The first line is not `METHOD target HTTP/1.x`, or its target is of a kind that has no
    /// meaning here.
    #[error("the first line is no HTTP request")]
    RequestLine,
    /// Neither HTTP/1.0 nor HTTP/1.1.
    #[error("the version is neither HTTP/1.0 nor HTTP/1.1")]
    Version,
    /// A header that is not `name: value`.
    #[error("a header is not `name: value`")]
    Header,
    /// A header that goes on in the next line.
    #[error("a header is folded into several lines")]
    Folded,
    /// Where the body ends is not clear: repeated or odd `Content-Length` or `Transfer-Encoding`.
    #[error("where the body ends is not clear")]
    Framing,
    /// More than one `Host`, or one that names no host.
    #[error("the Host header names no host, or is repeated")]
    Host,
    /// More or longer headers than any client sends.
    #[error("the headers are too large")]
    Oversized,
    /// `CONNECT`, `OPTIONS *` and the like.
    #[error("the target is not a path")]
    Target,
    /// The target is longer than anything the service has.
    #[error("the target is too long")]
    TooLong,
    /// A path that could be read in several ways: see [`Path`](super::path::Path).
    #[error("the path can be read in several ways")]
    Path,
    /// More than one session token, or more than one time for it to live.
    #[error("a session token's header is repeated")]
    RepeatedToken,
    /// Asks to change the protocol.
    #[error("the request asks for another protocol")]
    Upgrade,
    /// The body is larger than any the service takes, or did not arrive.
    #[error("the body is too large or incomplete")]
    Body,
}

/// What the service itself refuses, whoever asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// Neither `GET` nor `HEAD`, nor a `PUT` for a token (405).
    Method,
    /// Asks for a token without saying how long it is to live, or for longer than 6 hours (400).
    Ttl,
}

/// A request as it is judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// The version of the protocol.
    pub imds: Imds,
    /// Whether a proxy says that it passed this on.
    pub forwarded: bool,
    /// What the service would refuse anyway.
    pub flaw: Option<Flaw>,
    /// What it asks for.
    pub path: Path<'a>,
    /// The session token, if there is one.
    pub token: Option<&'a HeaderValue>,
}

impl<'a> Request<'a> {
    /// Brings a request into canonical form.
    ///
    /// # Errors
    /// What cannot be judged unambiguously is [`Malformed`].
    pub fn classify(
        method: &Method,
        target: &'a Uri,
        headers: &'a HeaderMap,
    ) -> Result<Self, Malformed> {
        if method == Method::CONNECT || !target.path().starts_with('/') {
            return Err(Malformed::Target);
        }
        if headers.contains_key(UPGRADE) || headers.contains_key(HTTP2_HEADER) {
            return Err(Malformed::Upgrade);
        }
        let path = Path::read(target.path())?;
        let token = single(headers, TOKEN_HEADER)?;
        let token = token.filter(|token| !token.as_bytes().trim_ascii().is_empty());
        let ttl = single(headers, TTL_HEADER)?;
        let imds = match token {
            _ if method == Method::PUT => Imds::Token,
            Some(_) => Imds::V2,
            None => Imds::V1,
        };
        let flaw = match imds {
            Imds::Token if !path.is_token() => Some(Flaw::Method),
            Imds::Token if !ttl.is_some_and(is_ttl) => Some(Flaw::Ttl),
            Imds::Token => None,
            _ if method == Method::GET || method == Method::HEAD => None,
            _ => Some(Flaw::Method),
        };
        let forwarded = headers.contains_key(FORWARDED_HEADER);
        Ok(Self {
            imds,
            forwarded,
            flaw,
            path,
            token,
        })
    }
}

fn single(headers: &HeaderMap, name: HeaderName) -> Result<Option<&HeaderValue>, Malformed> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (value, None) => Ok(value),
        _ => Err(Malformed::RepeatedToken),
    }
}

/// 1 to 21600 seconds (EC2 User Guide, "Use the Instance Metadata Service").
fn is_ttl(value: &HeaderValue) -> bool {
    let text = value.to_str().unwrap_or_default().trim();
    let seconds: Option<u32> = text
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| text.parse().ok())
        .flatten();
    seconds.is_some_and(|seconds| (1..=MAX_TTL).contains(&seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Headers = Vec<(&'static str, &'static str)>;
    type Reading = Result<(Imds, bool, Option<Flaw>), Malformed>;

    fn classify(method: &str, target: &str, headers: &[(&str, &str)]) -> Reading {
        let method = method.parse().unwrap();
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(HeaderName::try_from(*name).unwrap(), value.parse().unwrap());
        }
        let target = target.parse().unwrap();
        let request = Request::classify(&method, &target, &map)?;
        assert_eq!(request.token.is_some(), request.imds == Imds::V2);
        Ok((request.imds, request.forwarded, request.flaw))
    }

    #[test]
    fn every_request_has_one_meaning() {
        let token = ("X-aws-ec2-metadata-token", "AQAEAxyz==");
        let ttl = |seconds| ("X-aws-ec2-metadata-token-ttl-seconds", seconds);
        let hour = ttl("3600");
        let via = ("X-Forwarded-For", "10.0.0.1");
        let put = "/latest/api/token";
        let role = "/latest/meta-data/iam/security-credentials/r";
        let asks = Ok((Imds::Token, false, None));
        let bad_ttl = Ok((Imds::Token, false, Some(Flaw::Ttl)));
        let no_method = |imds| Ok((imds, false, Some(Flaw::Method)));
        let v1 = Ok((Imds::V1, false, None));
        let v2 = Ok((Imds::V2, false, None));
        #[rustfmt::skip]
        let table: Vec<(&str, &str, Headers, Reading)> = vec![
            ("PUT", put, vec![hour], asks),
            ("PUT", "/2021-07-15/api/token", vec![hour], asks),
            ("PUT", "http://other.example/latest/api/token", vec![hour], asks),
            ("PUT", "/latest/api/%74oken", vec![hour], asks),
            ("PUT", "//latest/./api//token/", vec![hour], asks),
            ("PUT", put, vec![ttl("1")], asks),
            ("PUT", put, vec![ttl("21600")], asks),
            ("PUT", put, vec![hour, via], Ok((Imds::Token, true, None))),
            ("PUT", put, vec![], bad_ttl),
            ("PUT", put, vec![ttl("0")], bad_ttl),
            ("PUT", put, vec![ttl("21601")], bad_ttl),
            ("PUT", put, vec![ttl("99999999999999999999")], bad_ttl),
            ("PUT", put, vec![ttl("")], bad_ttl),
            ("PUT", put, vec![ttl("-1")], bad_ttl),
            ("PUT", put, vec![ttl("+60")], bad_ttl),
            ("PUT", put, vec![ttl("60s")], bad_ttl),
            ("PUT", put, vec![ttl("1e3")], bad_ttl),
            ("PUT", "/latest/api", vec![hour], no_method(Imds::Token)),
            ("PUT", role, vec![hour], no_method(Imds::Token)),
            ("GET", role, vec![], v1),
            ("GET", role, vec![hour], v1),
            ("GET", "/?X-aws-ec2-metadata-token=AQAE", vec![], v1),
            ("GET", role, vec![(token.0, "")], v1),
            ("GET", role, vec![(token.0, " \t ")], v1),
            ("GET", put, vec![], v1),
            ("HEAD", "/", vec![], v1),
            ("GET", "/latest/meta-data/", vec![token], v2),
            ("GET", "/1.0/user-data?x", vec![token], v2),
            ("GET", "/latest/../unknown", vec![token], v2),
            ("HEAD", "/", vec![token], v2),
            ("GET", role, vec![token, via], Ok((Imds::V2, true, None))),
            ("POST", put, vec![hour], no_method(Imds::V1)),
            ("POST", put, vec![hour, token], no_method(Imds::V2)),
            ("DELETE", role, vec![token], no_method(Imds::V2)),
            ("OPTIONS", role, vec![token], no_method(Imds::V2)),
            ("TRACE", role, vec![], no_method(Imds::V1)),
            ("get", role, vec![], no_method(Imds::V1)),
            ("PUT", put, vec![hour, hour], Err(Malformed::RepeatedToken)),
            ("GET", role, vec![token, token], Err(Malformed::RepeatedToken)),
            ("GET", role, vec![(token.0, ""), token], Err(Malformed::RepeatedToken)),
            ("GET", role, vec![token, ("Upgrade", "h2c")], Err(Malformed::Upgrade)),
            ("GET", role, vec![token, ("HTTP2-Settings", "AAMAAABk")], Err(Malformed::Upgrade)),
            ("CONNECT", "169.254.169.254:80", vec![token], Err(Malformed::Target)),
            ("OPTIONS", "*", vec![], Err(Malformed::Target)),
            ("GET", "/latest/%2e%2e%2f", vec![token], Err(Malformed::Path)),
        ];
        for (method, target, headers, expected) in table {
            let got = classify(method, target, &headers);
            assert_eq!(got, expected, "{method} {target} {headers:?}");
        }
    }

    proptest::proptest! {
        /// Whatever is sent, a request without a token header is never taken for v2.
        #[test]
        fn no_token_is_never_v2(
            method in "[A-Z]{1,8}",
            target in "/[!-~]{0,64}",
            name in "x-[a-z-]{1,20}",
            value in "[ -~]{0,40}",
        ) {
            proptest::prop_assume!(name != "x-aws-ec2-metadata-token");
            if target.parse::<Uri>().is_ok() {
                let got = classify(&method, &target, &[(&name, &value)]);
                proptest::prop_assert_ne!(got.map(|(imds, ..)| imds), Ok(Imds::V2));
            }
        }
    }
}
