//! Heads: what passes is read the same way by another parser, and judged by its session token alone.
#![no_main]

use hyper::{
    HeaderMap, Method, Uri,
    header::{HeaderName, HeaderValue},
};
use imds_guard::policy::{Imds, Request, head, path::Path};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(Some(end)) = head::end(bytes, 0) else {
        return;
    };
    // In pieces it ends at the same place.
    assert_eq!(head::end(bytes, end / 2), Ok(Some(end)));
    let bytes = &bytes[..end];
    if head::check(bytes).is_err() {
        return;
    }

    let mut fields = [httparse::EMPTY_HEADER; 512];
    let mut read = httparse::Request::new(&mut fields);
    match read.parse(bytes) {
        Err(httparse::Error::TooManyHeaders) => return,
        parsed => assert_eq!(parsed, Ok(httparse::Status::Complete(end))),
    }
    let lines = bytes.iter().filter(|byte| **byte == b'\n').count();
    assert_eq!(read.headers.len(), lines - 2);

    let method: Method = read.method.unwrap().parse().expect("a method");
    let target: Uri = read.path.unwrap().parse().expect("a target");
    let mut headers = HeaderMap::new();
    let mut token = false;
    for field in &*read.headers {
        let name = HeaderName::try_from(field.name).expect("a header's name");
        let value = HeaderValue::from_bytes(field.value).expect("a header's value");
        token |= name == "x-aws-ec2-metadata-token" && !value.as_bytes().trim_ascii().is_empty();
        headers.append(name, value);
    }
    let Ok(request) = Request::classify(&method, &target, &headers) else {
        return;
    };
    let expected = match (&method, token) {
        (&Method::PUT, _) => Imds::Token,
        (_, true) => Imds::V2,
        (_, false) => Imds::V1,
    };
    assert_eq!(request.imds, expected);
    // The form in which paths are compared has nothing left to resolve.
    let path = request.path.as_str();
    assert!(
        path.split('/')
            .skip(1)
            .all(|segment| !["", ".", ".."].contains(&segment))
    );
    assert!(Path::read(target.path()).is_ok_and(|again| again == request.path));
});
