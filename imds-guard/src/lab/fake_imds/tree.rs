//! What the service has to tell.

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

/// The role whose credentials are to be had.
pub const ROLE: &str = "demo-role";
/// The instance that the service describes.
pub const INSTANCE_ID: &str = "i-0123456789abcdef0";
/// The role's access key.
pub const ACCESS_KEY_ID: &str = "ASIAFAKEFAKEFAKEFAKE";
/// The role's secret key.
pub const SECRET_ACCESS_KEY: &str = "fake/secret/access/key/that/opens/no/one";
/// The role's session token.
pub const SESSION_TOKEN: &str = "IQoJb3JpZ2luX2VjFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKE\
                                 FAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKE\
                                 FAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFAKEFA==";
/// Stands in the user data.
pub const USER_DATA_SECRET: &str = "fake-password-in-user-data";
/// All of the above that no log may ever show.
pub const SECRETS: [&str; 4] = [
    ACCESS_KEY_ID,
    SECRET_ACCESS_KEY,
    SESSION_TOKEN,
    USER_DATA_SECRET,
];

/// The size of the user data, the largest that the real service takes.
const USER_DATA_SIZE: usize = 16 * 1024;

/// How long credentials are still valid when they are asked for.
const CREDENTIALS_VALID: SignedDuration = SignedDuration::from_hours(6);

/// All versions, the oldest first.
const VERSIONS: &str = "1.0 2007-01-19 2007-03-01 2007-08-29 2007-10-10 2007-12-15 2008-02-01 \
    2008-09-01 2009-04-04 2011-01-01 2011-05-01 2012-01-12 2014-02-25 2014-11-05 2015-10-20 \
    2016-04-19 2016-06-30 2016-09-02 2018-03-28 2018-08-17 2018-09-24 2019-10-01 2020-10-27 \
    2021-01-03 2021-03-23 2021-07-15 2022-09-24 2024-04-11 latest";

/// A document below a version.
#[derive(Clone, Copy)]
enum Document {
    Text(&'static str),
    InstanceProfile,
    Credentials,
    Identity,
    UserData,
}
use Document::{Credentials, Identity, InstanceProfile, Text, UserData};

/// All documents, in the order in which listings name them. Directories follow from the paths.
const DOCUMENTS: [(&str, Document); 14] = [
    ("dynamic/instance-identity/document", Identity),
    ("meta-data/ami-id", Text("ami-0123456789abcdef0")),
    ("meta-data/hostname", Text(HOSTNAME)),
    ("meta-data/iam/info", InstanceProfile),
    ("meta-data/iam/security-credentials/demo-role", Credentials),
    ("meta-data/instance-id", Text(INSTANCE_ID)),
    ("meta-data/instance-type", Text(INSTANCE_TYPE)),
    ("meta-data/local-hostname", Text(HOSTNAME)),
    ("meta-data/local-ipv4", Text(LOCAL_IPV4)),
    ("meta-data/mac", Text("0a:00:00:00:00:10")),
    ("meta-data/placement/availability-zone", Text(ZONE)),
    ("meta-data/placement/region", Text(REGION)),
    ("meta-data/services/domain", Text("amazonaws.com")),
    ("user-data", UserData),
];

const HOSTNAME: &str = "ip-172-31-16-10.eu-west-1.compute.internal";
const INSTANCE_TYPE: &str = "m7i.large";
const LOCAL_IPV4: &str = "172.31.16.10";
const REGION: &str = "eu-west-1";
const ZONE: &str = "eu-west-1a";

/// What a GET of `path` is answered with; `None` when there is no such thing.
///
/// How the real service reads percent-encoding, `//` and `..` is not documented. This one resolves
/// them all, so that whoever guards it has to expect the worst.
pub(super) fn look_up(path: &str) -> Option<String> {
    let segments = resolve(&percent_decode(path));
    let Some((version, below)) = segments.split_first() else {
        return Some(VERSIONS.replace(' ', "\n"));
    };
    if !VERSIONS.split(' ').any(|known| known == version) {
        return None;
    }
    let path = below.join("/");
    match DOCUMENTS.iter().find(|(name, _)| *name == path) {
        Some((_, document)) => Some(render(*document)),
        None => list(&path),
    }
}

fn percent_decode(path: &str) -> String {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let escaped = (*first == b'%')
            .then(|| tail.get(..2))
            .flatten()
            .and_then(|digits| str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(escaped.unwrap_or(*first));
        rest = &tail[if escaped.is_some() { 2 } else { 0 }..];
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn resolve(path: &str) -> Vec<String> {
    let mut segments = Vec::new();
    for segment in path.split('/') {
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()),
            name => segments.push(name.to_owned()),
        }
    }
    segments
}

/// The names in a directory; those of directories end with a slash, except at the top.
fn list(directory: &str) -> Option<String> {
    let prefix = match directory {
        "" => String::new(),
        _ => format!("{directory}/"),
    };
    let mut names: Vec<&str> = DOCUMENTS
        .iter()
        .filter_map(|(path, _)| path.strip_prefix(&prefix))
        .map(|rest| match rest.find('/') {
            Some(slash) if prefix.is_empty() => &rest[..slash],
            Some(slash) => &rest[..=slash],
            None => rest,
        })
        .collect();
    names.dedup();
    (!names.is_empty()).then(|| names.join("\n"))
}

fn render(document: Document) -> String {
    let now = Timestamp::now();
    match document {
        Text(text) => text.to_owned(),
        UserData => user_data(),
        InstanceProfile => json(&ProfileDocument {
            code: "Success",
            last_updated: time(now),
            instance_profile_arn: "arn:aws:iam::123456789012:instance-profile/demo-role",
            instance_profile_id: "AIPAFAKEFAKEFAKEFAKE",
        }),
        Credentials => json(&CredentialsDocument {
            code: "Success",
            last_updated: time(now),
            kind: "AWS-HMAC",
            access_key_id: ACCESS_KEY_ID,
            secret_access_key: SECRET_ACCESS_KEY,
            token: SESSION_TOKEN,
            expiration: time(now + CREDENTIALS_VALID),
        }),
        Identity => json(&IdentityDocument {
            account_id: "123456789012",
            architecture: "x86_64",
            availability_zone: ZONE,
            image_id: "ami-0123456789abcdef0",
            instance_id: INSTANCE_ID,
            instance_type: INSTANCE_TYPE,
            pending_time: time(now),
            private_ip: LOCAL_IPV4,
            region: REGION,
            version: "2017-09-30",
        }),
    }
}

fn user_data() -> String {
    let mut text = format!("#!/bin/sh\nPASSWORD={USER_DATA_SECRET}\n");
    while text.len() < USER_DATA_SIZE {
        text.push_str("# User data can be as long as sixteen kibibytes.\n");
    }
    text.truncate(USER_DATA_SIZE);
    text
}

/// A time as the service writes it: RFC 3339 in UTC, to the second.
fn time(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn json(document: &impl Serialize) -> String {
    // Cannot fail: the documents are plain structs of strings.
    serde_json::to_string_pretty(document).unwrap_or_default()
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct ProfileDocument {
    code: &'static str,
    last_updated: String,
    instance_profile_arn: &'static str,
    instance_profile_id: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct CredentialsDocument {
    code: &'static str,
    last_updated: String,
    #[serde(rename = "Type")]
    kind: &'static str,
    access_key_id: &'static str,
    secret_access_key: &'static str,
    token: &'static str,
    expiration: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct IdentityDocument {
    account_id: &'static str,
    architecture: &'static str,
    availability_zone: &'static str,
    image_id: &'static str,
    instance_id: &'static str,
    instance_type: &'static str,
    pending_time: String,
    private_ip: &'static str,
    region: &'static str,
    version: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listings_follow_from_the_documents() {
        assert_eq!(look_up("/latest").unwrap(), "dynamic\nmeta-data\nuser-data");
        assert_eq!(
            look_up("/latest/meta-data/iam/").unwrap(),
            "info\nsecurity-credentials/"
        );
        assert_eq!(
            look_up("/2021-07-15/meta-data/iam/security-credentials").unwrap(),
            ROLE
        );
        assert!(look_up("/").unwrap().ends_with("latest"));
        for path in ["/latest/meta", "/newest/", "/latest/meta-data/ami-id/x"] {
            assert_eq!(look_up(path), None, "{path}");
        }
    }

    #[test]
    fn odd_spellings_reach_the_same_document() {
        for path in [
            "/1.0/meta-data/instance-id",
            "//latest//meta-data/./instance-id/",
            "/latest/user-data/../meta-data/instance-id",
            "/latest/meta%2Ddata%2finstance-id",
            "/latest/%2e%2E/latest/meta-data/instance-id",
        ] {
            assert_eq!(look_up(path).as_deref(), Some(INSTANCE_ID), "{path}");
        }
        assert_eq!(percent_decode("%4g%2"), "%4g%2");
    }

    #[test]
    fn credentials_have_the_real_shape() {
        let text = look_up("/latest/meta-data/iam/security-credentials/demo-role").unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["Type"], "AWS-HMAC");
        assert_eq!(json["AccessKeyId"].as_str().unwrap().len(), 20);
        assert_eq!(json["SecretAccessKey"].as_str().unwrap().len(), 40);
        let expiration: Timestamp = json["Expiration"].as_str().unwrap().parse().unwrap();
        assert!(expiration.duration_since(Timestamp::now()) > SignedDuration::from_hours(5));
        assert_eq!(look_up("/latest/user-data").unwrap().len(), USER_DATA_SIZE);
    }
}
