//! The metadata service is down, slow or wrong: the client hears of it, soon.

use imds_guard::{lab::Place, policy::Verdict, record::UpstreamFailureKind};
use imds_guard_tests::Sandbox;

use crate::{GUARD, INSTANCE_ID_PATH};

#[test]
fn a_service_that_is_down_is_a_502_and_comes_back_by_itself() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "audit"]);
    let urls = ["169.254.169.254", "[fd00:ec2::254]"]
        .map(|host| format!("http://{host}{INSTANCE_ID_PATH}"));
    sandbox.lab.imds().refuse().unwrap();
    for url in &urls {
        let answer = sandbox.curl(Place::Host, &[url]);
        assert_eq!((answer.exit, answer.status), (0, 502));
        let event = sandbox.request();
        assert_eq!((event.verdict, event.status), (Verdict::Audit, 502));
        let failure = event.upstream_failure.unwrap();
        assert_eq!(failure.kind, UpstreamFailureKind::Unreachable);
        assert!(failure.message.contains("refused"), "{}", failure.message);
    }
    sandbox.lab.imds().listen().unwrap();
    for url in &urls {
        assert_eq!(sandbox.curl(Place::Host, &[url]).status, 200);
        assert_eq!(sandbox.request().upstream_failure, None);
    }
}

#[test]
fn a_service_that_does_not_answer_is_a_504() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "audit"]);
    sandbox
        .lab
        .imds()
        .set_delay(std::time::Duration::from_secs(600));
    let answer = sandbox.curl(
        Place::Host,
        &[format!("http://169.254.169.254{INSTANCE_ID_PATH}")],
    );
    assert_eq!((answer.exit, answer.status), (0, 504));
    let failure = sandbox.request().upstream_failure.unwrap();
    assert_eq!(failure.kind, UpstreamFailureKind::TimedOut);
}

#[test]
fn a_service_that_cannot_be_reached_is_a_504() {
    // Packets to this address of the lab's network get no answer at all.
    let sandbox = Sandbox::new(GUARD, &["--mode", "audit", "--upstream", "172.31.16.77:80"]);
    let answer = sandbox.curl(
        Place::Host,
        &[format!("http://169.254.169.254{INSTANCE_ID_PATH}")],
    );
    assert_eq!((answer.exit, answer.status), (0, 504));
    let failure = sandbox.request().upstream_failure.unwrap();
    assert_eq!(
        failure.kind,
        UpstreamFailureKind::TimedOut,
        "{}",
        failure.message
    );
}

#[test]
fn idle_connections_that_the_service_has_closed_do_no_harm() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "audit"]);
    sandbox.lab.imds().set_keep_alive(false);
    for _ in 0..5 {
        let url = format!("http://169.254.169.254{INSTANCE_ID_PATH}");
        assert_eq!(sandbox.curl(Place::Host, &[url]).status, 200);
    }
    assert_eq!(sandbox.lab.imds().counters().connections, 5);
}
