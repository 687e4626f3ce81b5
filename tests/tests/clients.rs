//! Real clients, unchanged.

use imds_guard::{
    lab::{
        HttpTokens, Place,
        fake_imds::{ACCESS_KEY_ID, ROLE},
    },
    policy::{Imds, Reason, Verdict},
};
use imds_guard_tests::{Sandbox, python, run};

use crate::GUARD;

const BOTO3: &str = "
import boto3
c = boto3.Session().get_credentials()
print(c.method, c.access_key if c else None)
";

fn boto3(sandbox: &Sandbox, place: Place, mode: &str) -> std::process::Output {
    run(sandbox
        .lab
        .command(place, python())
        .args(["-c", BOTO3])
        .env_clear()
        .env("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", mode)
        .env("AWS_DEFAULT_REGION", "eu-central-1")
        .env("HOME", "/nonexistent"))
}

#[test]
fn boto3_fetches_role_credentials_over_both_families() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce", "--hop-limit", "2"]);
    sandbox.lab.imds().set_hop_limit(2);
    sandbox.lab.imds().set_http_tokens(HttpTokens::Required);
    for (place, mode) in [
        (Place::Host, "ipv4"),
        (Place::Host, "ipv6"),
        (Place::Container, "ipv4"),
    ] {
        let output = boto3(&sandbox, place, mode);
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(
            text.trim(),
            format!("iam-role {ACCESS_KEY_ID}"),
            "{output:?}"
        );

        let put = sandbox.request();
        assert_eq!((put.imds, put.status), (Some(Imds::Token), 200));
        assert!(put.user_agent.unwrap().starts_with("Boto3/"));
        for path in ["", ROLE] {
            let get = sandbox.request();
            assert_eq!((get.verdict, get.imds), (Verdict::Allow, Some(Imds::V2)));
            assert_eq!(
                get.path,
                format!("/latest/meta-data/iam/security-credentials/{path}")
            );
            assert!(get.caller.exe.as_ref().unwrap().contains("python"));
        }
    }
    assert_eq!(sandbox.lab.imds().counters().v1_requests, 0);
}

/// botocore falls back to IMDSv1 when its token request is refused.
#[test]
fn boto3_gets_no_credentials_by_falling_back_to_v1() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce", "--hop-limit", "1"]);
    sandbox.lab.imds().set_http_tokens(HttpTokens::Optional);
    let output = boto3(&sandbox, Place::Container, "ipv4");
    assert!(
        !String::from_utf8_lossy(&output.stdout).contains(ACCESS_KEY_ID),
        "{output:?}"
    );
    assert_eq!(sandbox.request().reason, Reason::HopLimit);
    let fallback = sandbox.request();
    assert_eq!(
        (fallback.imds, fallback.verdict),
        (Some(Imds::V1), Verdict::Deny)
    );
    let reached = sandbox.lab.imds().counters();
    assert_eq!((reached.v1_requests, reached.token_puts), (0, 0));
}

#[test]
fn a_shell_script_with_curl_works_as_it_is() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let script = r#"
set -e
TOKEN=$(curl -sf -X PUT http://169.254.169.254/latest/api/token -H 'X-aws-ec2-metadata-token-ttl-seconds: 21600')
get() { curl -sf -H "X-aws-ec2-metadata-token: $TOKEN" "http://169.254.169.254/latest/$1"; }
ROLE=$(get meta-data/iam/security-credentials/)
get "meta-data/iam/security-credentials/$ROLE" | grep -o '"AccessKeyId" *: *"[A-Z]*"'
get user-data | wc -c
curl -sI -H "X-aws-ec2-metadata-token: $TOKEN" http://169.254.169.254/latest/meta-data/instance-id | tr -d '\r' | grep -i '^content-length'
"#;
    let output = run(sandbox.lab.command(Place::Host, "sh").args(["-c", script]));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    let mut lines = text.lines();
    assert!(lines.next().unwrap().contains(ACCESS_KEY_ID), "{text}");
    assert_eq!(lines.next().unwrap().trim(), "16384");
    assert_eq!(lines.next().unwrap(), "Content-Length: 19");
}
