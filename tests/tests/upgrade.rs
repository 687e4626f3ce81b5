//! IMDSv1 that a rule carries over, and IMDSv1 that a refused token leads to.

use std::fs;

use imds_guard::{
    lab::{Guard, HttpTokens, Lab, Place, fake_imds::INSTANCE_ID},
    policy::{Imds, Reason, Verdict},
    record::AnsweredBy,
};
use imds_guard_tests::{Sandbox, lab, run};

use crate::{ADDRESSES, GUARD, INSTANCE_ID_PATH};

/// A v1 request of a user.
fn ask(lab: &Lab, place: Place, uid: &str, address: &str, header: &str) -> (String, String) {
    let output = run(lab
        .command(place, "setpriv")
        .args(["--reuid", uid, "--clear-groups", "curl", "-sg", "-i"])
        .args(["--max-time", "20", "-H", header])
        .arg(format!("http://{address}{INSTANCE_ID_PATH}")));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let status = text.split(' ').nth(1).unwrap_or_default().to_owned();
    (status, text)
}

#[test]
fn a_rule_carries_v1_over_to_an_instance_that_requires_tokens() {
    let lab = lab();
    lab.imds().set_http_tokens(HttpTokens::Required);
    lab.imds().set_hop_limit(2);
    let rules = lab.config();
    fs::write(
        &rules,
        "[[rule]]\nname = 'old agent'\nuid = 65534\nhop_limit = 2\naction = 'upgrade'\n",
    )
    .unwrap();
    let mut command = lab.guard_command(GUARD);
    command.args(["--mode", "enforce"]);
    let guard = Guard::spawn(&mut command).unwrap();

    for address in [ADDRESSES[0], ADDRESSES[1], ADDRESSES[0]] {
        let (status, text) = ask(&lab, Place::Host, "65534", address, "X: y");
        assert_eq!(status, "200", "{text}");
        assert!(text.ends_with(INSTANCE_ID), "{text}");
        let text = text.to_ascii_lowercase();
        assert!(!text.contains("x-aws-ec2-metadata-token"), "{text}");
        let event = guard.request().unwrap();
        assert_eq!(
            (event.verdict, event.reason, event.imds),
            (Verdict::Upgrade, Reason::Upgraded, Some(Imds::V1))
        );
        assert_eq!(event.rule.as_deref(), Some("old agent"));
        assert_eq!(event.answered_by, AnsweredBy::Service);
    }
    assert_eq!(lab.imds().counters().tokens_issued, 1, "one does for all");

    // The service forgets its tokens, as after a restart: the client notices nothing.
    lab.imds().expire_tokens();
    let (status, _) = ask(&lab, Place::Host, "65534", ADDRESSES[0], "X: y");
    assert_eq!(status, "200");
    assert_eq!(guard.request().unwrap().verdict, Verdict::Upgrade);
    assert_eq!(lab.imds().counters().tokens_issued, 2);

    // Neither for others, nor for a proxy's visitors, nor from further away, whatever the limit.
    lab.imds().forget();
    for (place, uid, header) in [
        (Place::Host, "0", "X: y"),
        (Place::Host, "65534", "X-Forwarded-For: 10.0.0.1"),
        (Place::Container, "65534", "X: y"),
    ] {
        let (status, text) = ask(&lab, place, uid, ADDRESSES[0], header);
        assert_eq!(status, "401", "{text}");
        let event = guard.request().unwrap();
        assert_eq!(
            (event.verdict, event.reason),
            (Verdict::Deny, Reason::NoToken)
        );
    }
    assert_eq!(lab.imds().counters().requests, 0);
}

/// A process that was refused a token and then speaks v1 would have spoken v2; another one would not.
#[test]
fn v1_after_a_refused_token_is_a_fallback() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let script = format!(
        r"
import http.client
def ask(method, path, headers):
    c = http.client.HTTPConnection('169.254.169.254', timeout=20)
    c.request(method, path, headers=headers)
    return c.getresponse().status
print(ask('GET', '{INSTANCE_ID_PATH}', {{}}))
print(ask('PUT', '/latest/api/token', {{'X-aws-ec2-metadata-token-ttl-seconds': '60'}}))
print(ask('GET', '{INSTANCE_ID_PATH}', {{}}))
"
    );
    assert_eq!(sandbox.python(Place::Container, &script), "401\n403\n401");
    let events = [0; 3].map(|_| sandbox.request());
    let marks = events.each_ref().map(|event| event.fallback);
    assert_eq!(marks, [false, false, true]);
    assert_eq!(events[1].reason, Reason::HopLimit);
    let (_, text) = ask(&sandbox.lab, Place::Container, "0", ADDRESSES[0], "X: y");
    assert!(!sandbox.request().fallback, "{text}");
}
