//! The strict reading of a request's head, byte by byte, before any parser has made something of it.
//!
//! What two readers could read differently is refused: request smuggling lives on that difference
//! (RFC 9112, 11.2). The HTTP library reads the head once more; it never sees one that failed here.

use hyper::{Uri, http::uri::Authority};

use super::Malformed;

/// Longest line of a head, in bytes; a session token has some 300.
const MAX_LINE: usize = 8 * 1024;
/// Longest request target, in bytes; real ones stay below 200.
const MAX_TARGET: usize = 2048;

/// What follows a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// So many bytes, and then the next head.
    Length(u64),
    /// Chunks. Where they end is not looked at: whatever comes after them is not served.
    Chunked,
}

/// Where the head ends that `bytes` begin with; `None` if it goes on. The first `seen` bytes were
/// looked at before.
///
/// # Errors
/// [`Malformed::LineEnding`] as soon as a line ends with anything but CR LF, and
/// [`Malformed::Oversized`] as soon as one is too long.
pub fn end(bytes: &[u8], seen: usize) -> Result<Option<usize>, Malformed> {
    // What was the last byte then may mean something else now that others follow.
    for at in seen.saturating_sub(1)..bytes.len() {
        let (before, next) = (at.checked_sub(1).map(|i| bytes[i]), bytes.get(at + 1));
        match bytes[at] {
            b'\n' if before != Some(b'\r') => return Err(Malformed::LineEnding),
            b'\r' if next.is_some_and(|next| *next != b'\n') => return Err(Malformed::LineEnding),
            0 => return Err(Malformed::LineEnding),
            b'\n' if bytes[..at].ends_with(b"\r\n\r") => return Ok(Some(at + 1)),
            _ => {}
        }
    }
    let line = bytes.iter().rev().take_while(|byte| **byte != b'\n');
    if line.take(MAX_LINE + 1).count() > MAX_LINE {
        return Err(Malformed::Oversized);
    }
    Ok(None)
}

/// Reads a whole head, from the request line to the empty line.
///
/// # Errors
/// The first thing in it that is not as RFC 9112 has it, or that others could read differently.
pub fn check(head: &[u8]) -> Result<Body, Malformed> {
    let head = head.strip_suffix(b"\r\n").ok_or(Malformed::LineEnding)?;
    let mut lines = head.split_inclusive(|byte| *byte == b'\n').map(|line| {
        let line = line.strip_suffix(b"\r\n").ok_or(Malformed::LineEnding)?;
        match line.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0)) {
            true => Err(Malformed::LineEnding),
            false if line.len() > MAX_LINE => Err(Malformed::Oversized),
            false => Ok(line),
        }
    });
    let is_1_0 = request_line(lines.next().ok_or(Malformed::RequestLine)??)?;

    let (mut hosts, mut length, mut chunked) = (0, None, false);
    for line in lines {
        let (name, value) = field(line?)?;
        if name.eq_ignore_ascii_case(b"host") {
            hosts += 1;
            if hosts > 1 || !is_host(value) {
                return Err(Malformed::Host);
            }
        } else if name.eq_ignore_ascii_case(b"content-length") {
            let digits = str::from_utf8(value).ok().filter(|value| {
                value.len() <= 18 && value.bytes().all(|byte| byte.is_ascii_digit())
            });
            let given = digits.and_then(|digits| digits.parse().ok());
            if length.replace(given.ok_or(Malformed::Framing)?).is_some() {
                return Err(Malformed::Framing);
            }
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if is_1_0 || chunked || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(Malformed::Framing);
            }
            chunked = true;
        }
    }
    match (length, chunked) {
        (Some(_), true) => Err(Malformed::Framing),
        (_, true) => Ok(Body::Chunked),
        (length, false) => Ok(Body::Length(length.unwrap_or(0))),
    }
}

/// `METHOD SP target SP HTTP/1.x`. Returns whether it is HTTP/1.0.
fn request_line(line: &[u8]) -> Result<bool, Malformed> {
    let mut words = line.split(|byte| *byte == b' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(Malformed::RequestLine);
    };
    if !is_token(method) || target.is_empty() || !target.iter().all(u8::is_ascii_graphic) {
        return Err(Malformed::RequestLine);
    }
    let is_1_0 = match version {
        b"HTTP/1.0" => true,
        b"HTTP/1.1" => false,
        _ => return Err(Malformed::Version),
    };
    if target.len() > MAX_TARGET {
        return Err(Malformed::TooLong);
    }
    let uri: Uri = target.try_into().map_err(|_| Malformed::RequestLine)?;
    // An absolute form is for a proxy; a path alone, `*` and CONNECT's host are judged later.
    let is_absolute = uri.scheme().is_some();
    let names_user = uri.authority().is_some_and(|it| it.as_str().contains('@'));
    if names_user || target.contains(&b'#') || (is_absolute && uri.scheme_str() != Some("http")) {
        return Err(Malformed::RequestLine);
    }
    Ok(is_1_0)
}

/// `name: value`, without the white space around the value.
fn field(line: &[u8]) -> Result<(&[u8], &[u8]), Malformed> {
    if matches!(line.first(), Some(b' ' | b'\t')) {
        return Err(Malformed::Folded);
    }
    let colon = line.iter().position(|byte| *byte == b':');
    let (name, value) = line.split_at(colon.ok_or(Malformed::Header)?);
    let value = &value[1..];
    let is_text = |byte: &u8| matches!(byte, b'\t' | b' '..=b'~' | 0x80..);
    if !is_token(name) || !value.iter().all(is_text) {
        return Err(Malformed::Header);
    }
    Ok((name, value.trim_ascii()))
}

/// RFC 9110, 5.6.2.
fn is_token(text: &[u8]) -> bool {
    !text.is_empty()
        && text
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte))
}

/// A host and perhaps a port, or nothing, as RFC 9112, 3.2 allows. Whose it is does not matter: no
/// request goes anywhere but to the service, which answers to any name, and hosts have given it some.
fn is_host(value: &[u8]) -> bool {
    let Ok(text) = str::from_utf8(value) else {
        return false;
    };
    text.is_empty() || {
        let is_one = |authority: Authority| authority.as_str() == text;
        !text.contains(['@', ',']) && text.parse().is_ok_and(is_one)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(head: &str) -> Result<Body, Malformed> {
        match end(head.as_bytes(), 0)? {
            Some(end) => check(&head.as_bytes()[..end]),
            None => panic!("no end: {head:?}"),
        }
    }

    #[test]
    fn ambiguous_heads_are_refused() {
        let none = Ok(Body::Length(0));
        let long = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(MAX_LINE));
        let far = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(MAX_TARGET));
        #[rustfmt::skip]
        let table = [
            ("GET / HTTP/1.1\r\n\r\n", none),
            ("GET /a?b HTTP/1.0\r\nHost: 169.254.169.254\r\n\r\n", none),
            ("GET http://169.254.169.254/a HTTP/1.1\r\nHost: [fd00:ec2::254]:80\r\n\r\n", none),
            ("OPTIONS * HTTP/1.1\r\nHost:\r\n\r\n", none),
            ("CONNECT a:80 HTTP/1.1\r\n\r\n", none),
            ("PUT / HTTP/1.1\r\ncontent-LENGTH: 12\r\n\r\n", Ok(Body::Length(12))),
            ("PUT / HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n", Ok(Body::Chunked)),
            ("GET / HTTP/1.1\r\nX-Name: caf\u{e9}\ttab\r\n\r\n", none),

            ("GET / HTTP/1.1\nHost: x\n\n", Err(Malformed::LineEnding)),
            ("GET / HTTP/1.1\r\nA: b\nC: d\r\n\r\n", Err(Malformed::LineEnding)),
            ("GET / HTTP/1.1\r\nA: b\rC: d\r\n\r\n", Err(Malformed::LineEnding)),
            ("GET / HTTP/1.1\r\nA: b\0c\r\n\r\n", Err(Malformed::LineEnding)),
            ("\r\nGET / HTTP/1.1\r\n\r\n", Err(Malformed::RequestLine)),
            ("GET  / HTTP/1.1\r\n\r\n", Err(Malformed::RequestLine)),
            ("GET /\tHTTP/1.1\r\n\r\n", Err(Malformed::RequestLine)),
            ("GET /a b HTTP/1.1\r\n\r\n", Err(Malformed::RequestLine)),
            ("GET /a#b HTTP/1.1\r\n\r\n", Err(Malformed::RequestLine)),
            ("GET /\u{e9} HTTP/1.1\r\n\r\n", Err(Malformed::RequestLine)),
            ("G(T / HTTP/1.1\r\n\r\n", Err(Malformed::RequestLine)),
            ("GET /\r\n\r\n", Err(Malformed::RequestLine)),
            ("GET http://u@169.254.169.254/ HTTP/1.1\r\n\r\n", Err(Malformed::RequestLine)),
            ("GET ftp://169.254.169.254/ HTTP/1.1\r\n\r\n", Err(Malformed::RequestLine)),
            ("GET file:///etc/passwd HTTP/1.1\r\n\r\n", Err(Malformed::RequestLine)),
            ("PRI * HTTP/2.0\r\n\r\n", Err(Malformed::Version)),
            ("GET / HTTP/1.2\r\n\r\n", Err(Malformed::Version)),
            ("GET / http/1.1\r\n\r\n", Err(Malformed::Version)),
            (&far, Err(Malformed::TooLong)),
            (&long, Err(Malformed::Oversized)),
            ("GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n", Err(Malformed::Folded)),
            ("GET / HTTP/1.1\r\n A: b\r\n\r\n", Err(Malformed::Folded)),
            ("GET / HTTP/1.1\r\nA : b\r\n\r\n", Err(Malformed::Header)),
            ("GET / HTTP/1.1\r\n: b\r\n\r\n", Err(Malformed::Header)),
            ("GET / HTTP/1.1\r\nA\r\n\r\n", Err(Malformed::Header)),
            ("GET / HTTP/1.1\r\nA: \u{7f}\r\n\r\n", Err(Malformed::Header)),
            ("GET / HTTP/1.1\r\nHost:\u{c} x\r\n\r\n", Err(Malformed::Header)),
            ("PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", Err(Malformed::Framing)),
            ("PUT / HTTP/1.1\r\nContent-Length: 1\r\ncontent-length: 2\r\n\r\n", Err(Malformed::Framing)),
            ("PUT / HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\n", Err(Malformed::Framing)),
            ("PUT / HTTP/1.1\r\nContent-Length: +1\r\n\r\n", Err(Malformed::Framing)),
            ("PUT / HTTP/1.1\r\nContent-Length: 0x1\r\n\r\n", Err(Malformed::Framing)),
            ("PUT / HTTP/1.1\r\nContent-Length:\r\n\r\n", Err(Malformed::Framing)),
            ("PUT / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", Err(Malformed::Framing)),
            ("PUT / HTTP/1.1\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n", Err(Malformed::Framing)),
            ("PUT / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", Err(Malformed::Framing)),
            ("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", Err(Malformed::Framing)),
            ("PUT / HTTP/1.1\r\nTransfer-Encoding: x\u{b}chunked\r\n\r\n", Err(Malformed::Header)),
            ("PUT / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", Err(Malformed::Framing)),
            ("GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", Err(Malformed::Host)),
            ("GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", Err(Malformed::Host)),
            ("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", Err(Malformed::Host)),
            ("GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", Err(Malformed::Host)),
            ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", Err(Malformed::Host)),
            ("GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", Err(Malformed::Host)),
        ];
        for (head, expected) in table {
            assert_eq!(read(head), expected, "{:?}", &head[..head.len().min(100)]);
        }
    }

    #[test]
    fn a_head_may_come_in_pieces() {
        let head = b"GET / HTTP/1.1\r\nHost: x\r\n\r\nrest\n";
        for first in 0..27 {
            for second in first..27 {
                assert_eq!(end(&head[..first], 0), Ok(None));
                assert_eq!(end(&head[..second], first), Ok(None), "{first} {second}");
                assert_eq!(end(head, second), Ok(Some(27)), "{first} {second}");
            }
        }
        // A carriage return at the end may still be followed by the right thing, or not.
        assert_eq!(end(b"GET / HTTP/1.1\r", 0), Ok(None));
        assert_eq!(end(b"GET / HTTP/1.1\rx", 15), Err(Malformed::LineEnding));
    }

    proptest::proptest! {
        /// No bytes make it panic, and what it takes, the HTTP library reads the same way.
        #[test]
        fn what_passes_is_read_the_same_way(
            head in "(GET|PUT|G T) [!-~]{1,20} HTTP/1\\.[01](\r\n[!-~]{0,12}: ?[ -~\t\r\n]{0,12}){0,4}\r\n\r\n"
        ) {
            if let Ok(Some(end)) = end(head.as_bytes(), 0)
                && check(&head.as_bytes()[..end]).is_ok()
            {
                let mut fields = [httparse::EMPTY_HEADER; 16];
                let mut request = httparse::Request::new(&mut fields);
                let read = request.parse(&head.as_bytes()[..end]);
                proptest::prop_assert_eq!(read, Ok(httparse::Status::Complete(end)));
                let lines = head[..end].split("\r\n").count() - 3;
                proptest::prop_assert_eq!(request.headers.len(), lines);
            }
        }
    }
}
