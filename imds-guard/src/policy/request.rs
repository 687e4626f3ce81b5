//! What a request asks for, in canonical form.

use hyper::{HeaderMap, Method, Uri, header::HeaderName};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Carries a session token.
pub const TOKEN_HEADER: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token");
/// Proxies add it; the service refuses tokens to requests that carry it.
const FORWARDED_HEADER: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Longest request target that is looked at, in bytes; real paths stay below 200.
const MAX_TARGET: usize = 2048;

/// Which version of the protocol a request speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
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

/// Why a request is not judged but refused.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, thiserror::Error,
)]
#[serde(rename_all = "snake_case")]
pub enum Malformed {
    /// `CONNECT`, `OPTIONS *` and the like.
    #[error("the target is not a path")]
    Target,
    /// The target is longer than anything the service has.
    #[error("the target is too long")]
    TooLong,
    /// More than one session token.
    #[error("more than one session token")]
    RepeatedToken,
    /// Asks to change the protocol.
    #[error("the request asks for another protocol")]
    Upgrade,
    /// The body is larger than any the service takes, or did not arrive.
    #[error("the body is too large or incomplete")]
    Body,
}

/// A request as it is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The version of the protocol.
    pub imds: Imds,
    /// Whether a proxy says that it passed this on.
    pub forwarded: bool,
}

impl Request {
    /// Brings a request into canonical form.
    ///
    /// # Errors
    /// What cannot be judged unambiguously is [`Malformed`].
    pub fn classify(method: &Method, target: &Uri, headers: &HeaderMap) -> Result<Self, Malformed> {
        if method == Method::CONNECT || !target.path().starts_with('/') {
            return Err(Malformed::Target);
        }
        if target.path_and_query().map_or(0, |pq| pq.as_str().len()) > MAX_TARGET {
            return Err(Malformed::TooLong);
        }
        if headers.contains_key(hyper::header::UPGRADE) {
            return Err(Malformed::Upgrade);
        }
        let mut tokens = headers.get_all(TOKEN_HEADER).iter();
        let token = tokens.next();
        if tokens.next().is_some() {
            return Err(Malformed::RepeatedToken);
        }
        let imds = if method == Method::PUT {
            Imds::Token
        } else if token.is_some_and(|token| !token.as_bytes().trim_ascii().is_empty()) {
            Imds::V2
        } else {
            Imds::V1
        };
        let forwarded = headers.contains_key(FORWARDED_HEADER);
        Ok(Self { imds, forwarded })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classify(method: Method, target: &str, headers: &[(&str, &str)]) -> Result<Imds, Malformed> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(HeaderName::try_from(*name).unwrap(), value.parse().unwrap());
        }
        Request::classify(&method, &target.parse().unwrap(), &map).map(|request| request.imds)
    }

    #[test]
    fn versions_are_told_apart() {
        let token = ("X-aws-ec2-metadata-token", "AQAEAxyz==");
        let ttl = ("X-aws-ec2-metadata-token-ttl-seconds", "60");
        let long = format!("/{}", "a".repeat(MAX_TARGET));
        let put = "/latest/api/token";
        let role = "/latest/meta-data/iam/security-credentials/r";
        let table = [
            (Method::PUT, put, vec![ttl], Ok(Imds::Token)),
            (Method::PUT, put, vec![], Ok(Imds::Token)),
            (Method::PUT, put, vec![token], Ok(Imds::Token)),
            (
                Method::PUT,
                "http://other.example/latest/api/token",
                vec![ttl],
                Ok(Imds::Token),
            ),
            (
                Method::PUT,
                "/latest/api/%74oken",
                vec![token],
                Ok(Imds::Token),
            ),
            (
                Method::PUT,
                "//latest/api/token",
                vec![token],
                Ok(Imds::Token),
            ),
            (Method::GET, put, vec![ttl], Ok(Imds::V1)),
            (Method::POST, put, vec![ttl], Ok(Imds::V1)),
            (Method::GET, "/latest/meta-data/", vec![token], Ok(Imds::V2)),
            (Method::HEAD, "/", vec![token], Ok(Imds::V2)),
            (Method::GET, role, vec![], Ok(Imds::V1)),
            (Method::GET, role, vec![ttl], Ok(Imds::V1)),
            (
                Method::GET,
                "/?X-aws-ec2-metadata-token=AQAE",
                vec![],
                Ok(Imds::V1),
            ),
            (Method::GET, role, vec![(token.0, "")], Ok(Imds::V1)),
            (Method::GET, role, vec![(token.0, " \t ")], Ok(Imds::V1)),
            (
                Method::GET,
                role,
                vec![token, token],
                Err(Malformed::RepeatedToken),
            ),
            (
                Method::GET,
                role,
                vec![(token.0, ""), token],
                Err(Malformed::RepeatedToken),
            ),
            (
                Method::GET,
                role,
                vec![token, ("Upgrade", "h2c")],
                Err(Malformed::Upgrade),
            ),
            (
                Method::CONNECT,
                "169.254.169.254:80",
                vec![token],
                Err(Malformed::Target),
            ),
            (Method::OPTIONS, "*", vec![], Err(Malformed::Target)),
            (Method::GET, &long, vec![token], Err(Malformed::TooLong)),
        ];
        for (method, target, headers, expected) in table {
            let got = classify(method.clone(), target, &headers);
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
            if let (Ok(method), Ok(_)) = (Method::from_bytes(method.as_bytes()), target.parse::<Uri>()) {
                let got = classify(method, &target, &[(&name, &value)]);
                proptest::prop_assert_ne!(got, Ok(Imds::V2));
            }
        }
    }
}
