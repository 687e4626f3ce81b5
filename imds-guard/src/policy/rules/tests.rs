//! What rules match, and what comes of it.

use std::collections::BTreeMap;

use hyper::StatusCode;
use proptest::{prelude::*, sample::select};

use super::*;
use crate::policy::{
    Imds, RuleAction,
    caller::{Container, Missing, Netns, Parent, Pod},
    path::Path,
};

const NOW: Timestamp = Timestamp::UNIX_EPOCH;
const CREDENTIALS: &str = "/latest/meta-data/iam/security-credentials/role";

fn caller() -> Caller {
    Caller {
        pid: 7,
        uid: 33,
        gid: 34,
        comm: "curl".into(),
        resolved: true,
        exe: Some("/usr/bin/curl".into()),
        exe_verified: true,
        exe_sha256: Some("ab".repeat(32)),
        parents: vec![
            parent(6, "/usr/bin/bash", true),
            parent(5, "/usr/sbin/cron", true),
            parent(1, "/usr/sbin/sshd", false),
        ],
        cgroup: Some("/system.slice/web.service".into()),
        user: Some("www-data".into()),
        group: Some("web".into()),
        systemd_unit: Some("web.service".into()),
        ..Caller::default()
    }
}

fn parent(pid: u32, exe: &str, exe_verified: bool) -> Parent {
    Parent {
        pid,
        exe: Some(exe.into()),
        exe_verified,
    }
}

fn in_pod() -> Caller {
    Caller {
        netns: Netns::Other,
        exe: Some("/app".into()),
        exe_verified: false,
        container_id: Some("c0ffee".into()),
        container: Some(Arc::new(Container {
            name: Some("web".into()),
            image: Some("registry/team/web:1.2".into()),
        })),
        pod_uid: Some("a-pod".into()),
        pod: Some(Arc::new(Pod {
            name: "web-5d".into(),
            namespace: "shop".into(),
            owner: None,
            service_account: Some("web".into()),
            labels: BTreeMap::from([("app".into(), "web".into()), ("tier".into(), "1".into())]),
        })),
        user: None,
        group: None,
        systemd_unit: None,
        ..caller()
    }
}

fn rule(toml: &str) -> Rule {
    let rule: Rule = toml::from_str(&format!("name = \"r\"\n{toml}")).unwrap();
    rule
}

fn subject(caller: &Caller) -> Subject<'_> {
    Subject {
        caller,
        endpoint: "ipv4",
        hops: if caller.netns == Netns::Host { 1 } else { 2 },
    }
}

#[test]
fn a_selector_matches_whom_it_names() {
    use Fit::{No, Unknown, Yes};
    let gone = Caller {
        resolved: false,
        exe: None,
        exe_verified: false,
        cgroup: None,
        user: None,
        group: None,
        systemd_unit: None,
        parents: Vec::new(),
        ..caller()
    };
    let other_file = Caller {
        exe_verified: false,
        ..caller()
    };
    let late = Caller {
        pod: None,
        container: None,
        exe_sha256: None,
        missing: Missing {
            sha256: true,
            container: true,
            pod: true,
            ..Missing::default()
        },
        ..in_pod()
    };
    let digest = format!("sha256 = '{}'", "ab".repeat(32));
    #[rustfmt::skip]
    let table = [
        // selector                              host  pod  gone     faked late
        ("",                                     Yes, Yes, Yes,     Yes, Yes),
        ("uid = 33",                             Yes, Yes, Yes,     Yes, Yes),
        ("uid = [0, 33]",                        Yes, Yes, Yes,     Yes, Yes),
        ("uid = '!33'",                          No,  No,  No,      No,  No),
        ("uid = 0",                              No,  No,  No,      No,  No),
        ("gid = 34",                             Yes, Yes, Yes,     Yes, Yes),
        ("user = 'www-data'",                    Yes, No,  Unknown, Yes, No),
        ("user = 'www-*'",                       Yes, No,  Unknown, Yes, No),
        ("user = '!root'",                       Yes, Yes, Unknown, Yes, Yes),
        ("group = 'web'",                        Yes, No,  Unknown, Yes, No),
        ("comm = 'curl'",                        Yes, Yes, Yes,     Yes, Yes),
        ("exe = '/usr/bin/curl'",                Yes, No,  Unknown, No,  No),
        ("exe = '/usr/bin/*'",                   Yes, No,  Unknown, No,  No),
        ("exe = '/usr/*'",                       No,  No,  Unknown, No,  No),
        ("exe = ['/usr/bin/*', '!/usr/bin/curl']", No, No, Unknown, No,  No),
        ("exe = '!/usr/bin/wget'",               Yes, No,  Unknown, No,  No),
        ("exe = '!/usr/bin/wget'\naction = 'deny'", Yes, Yes, Unknown, Yes, Yes),
        ("exe = '!/usr/bin/curl'\naction = 'deny'", No, Yes, Unknown, Yes, Yes),
        ("exe = '/usr/bin/curl'\naction = 'deny'", Yes, No, Unknown, No,  No),
        ("exe = '/usr/bin/curl'\nnamespace = '!kube-system'", Yes, No, Unknown, No, No),
        ("exe = '!/usr/bin/wget'\nnamespace = '!kube-system'", Yes, Yes, Unknown, No, Unknown),
        ("exe = '/app'\nnamespace = 'shop'",     No,  Yes, Unknown, No,  Unknown),
        (digest.as_str(),                        Yes, Yes, Yes,     Yes, Unknown),
        ("ancestor_exe = '/usr/sbin/cron'",      Yes, Yes, Unknown, Yes, Yes),
        ("ancestor_exe = '/usr/sbin/sshd'",      No,  No,  Unknown, No,  No),
        ("cgroup = '/system.slice/web.service'", Yes, Yes, Unknown, Yes, Yes),
        ("cgroup = '/system.slice'",             Yes, Yes, Unknown, Yes, Yes),
        ("cgroup = '/system.slice/web'",         No,  No,  Unknown, No,  No),
        ("cgroup = '/system'",                   No,  No,  Unknown, No,  No),
        ("systemd_unit = 'web.service'",         Yes, No,  Unknown, Yes, No),
        ("container_id = 'c0ffee'",              No,  Yes, Unknown, No,  Yes),
        ("container_image = 'registry/team/*:1.*'", No, Yes, Unknown, No, Unknown),
        ("pod_uid = 'a-pod'",                    No,  Yes, Unknown, No,  Yes),
        ("pod = 'web-*'",                        No,  Yes, Unknown, No,  Unknown),
        ("namespace = '!kube-system'",           Yes, Yes, Unknown, Yes, Unknown),
        ("service_account = 'web'",              No,  Yes, Unknown, No,  Unknown),
        ("labels = {app = 'web'}",               No,  Yes, Unknown, No,  Unknown),
        ("labels = {app = 'web', tier = '2'}",   No,  No,  Unknown, No,  Unknown),
        ("netns = 'host'",                       Yes, No,  Yes,     Yes, No),
        ("hops = [2, 3]",                        No,  Yes, No,      No,  Yes),
        ("endpoint = 'ipv6'",                    No,  No,  No,      No,  No),
        ("pod_uid = 'a-pod'\nuid = 0",           No,  No,  No,      No,  No),
    ];
    for (selectors, host, pod, of_gone, faked, of_late) in table {
        let rule = rule(selectors);
        let callers = [&caller(), &in_pod(), &gone, &other_file, &late];
        let got = callers.map(|caller| rule.fits(&subject(caller)));
        assert_eq!(got, [host, pod, of_gone, faked, of_late], "{selectors}");
    }
}

/// What nobody can look at may be what is excluded: an exception is not for it, and a ban is.
#[test]
fn what_is_not_verified_never_gains_by_that() {
    use Fit::{No, Yes};
    // Its path is longer than the kernel can say.
    let nameless = |caller| Caller {
        exe: None,
        exe_verified: false,
        ..caller
    };
    let of = |parents: &[(u32, &str, bool)]| Caller {
        parents: parents
            .iter()
            .map(|(pid, exe, verified)| parent(*pid, exe, *verified))
            .collect(),
        ..caller()
    };
    let cron = "/usr/sbin/cron";
    let init = Caller { pid: 1, ..of(&[]) };
    #[rustfmt::skip]
    let table = [
        // selector, caller                                                       allow deny
        ("exe = '!/usr/bin/wget'", nameless(caller()),                            No,  Yes),
        ("exe = '!/usr/bin/wget'\nnamespace = 'shop'", nameless(in_pod()),        No,  Yes),
        ("exe = ['/usr/bin/*', '!/usr/bin/wget']", nameless(caller()),            No,  No),
        ("ancestor_exe = '!/usr/sbin/cron'", of(&[(6, "/bin/sh", true), (1, "/init", true)]), Yes, Yes),
        ("ancestor_exe = '!/usr/sbin/cron'", init,                                Yes, Yes),
        ("ancestor_exe = '!/usr/sbin/cron'", of(&[(6, cron, true), (1, "/init", true)]),  No, No),
        ("ancestor_exe = '!/usr/sbin/cron'", of(&[(6, cron, true), (1, "/init", false)]), No, No),
        ("ancestor_exe = '!/usr/sbin/cron'", of(&[(6, cron, false), (1, "/init", true)]), No, Yes),
        ("ancestor_exe = '!/usr/sbin/cron'", of(&[(6, "/bin/sh", true)]),         No,  Yes),
        ("ancestor_exe = '!/usr/sbin/cron'", of(&[]),                             No,  Yes),
        ("ancestor_exe = ['/bin/*', '!/bin/dash']", of(&[(6, "/bin/sh", false)]), No,  No),
    ];
    for (selectors, caller, allow, deny) in table {
        for (action, expected) in [("allow", allow), ("deny", deny)] {
            let rule = rule(&format!("{selectors}\naction = '{action}'"));
            let got = rule.fits(&subject(&caller));
            assert_eq!(got, expected, "{selectors} {action} {:?}", caller.parents);
        }
    }
}

/// Who is waited for, when only the kernel has told of a caller: only where it decides.
#[test]
fn what_is_wanted_is_what_a_rule_still_turns_on() {
    let unknown = Caller {
        exe: Some("/usr/bin/curl".into()),
        exe_sha256: None,
        pod: None,
        container: None,
        missing: Missing {
            exe: true,
            ancestors: true,
            sha256: true,
            container: true,
            pod: true,
        },
        parents: vec![parent(1, "/usr/sbin/cron", false)],
        ..in_pod()
    };
    let nothing = Missing::default();
    let (exe, sha256) = (true, true);
    let (ancestors, container, pod) = (true, true, true);
    let digest = format!("sha256 = '{}'", "ab".repeat(32));
    #[rustfmt::skip]
    let table = [
        (String::new(), nothing),
        ("exe = '/usr/bin/curl'".into(), Missing { exe, ..nothing }),
        ("exe = '/usr/bin/wget'".into(), nothing),
        ("exe = '!/usr/bin/wget'".into(), Missing { exe, ..nothing }),
        ("exe = '!/usr/bin/wget'\naction = 'deny'".into(), nothing),
        ("exe = '!/usr/bin/curl'\naction = 'deny'".into(), Missing { exe, ..nothing }),
        ("ancestor_exe = '/usr/sbin/cron'".into(), Missing { ancestors, ..nothing }),
        ("ancestor_exe = '!/usr/sbin/cron'".into(), nothing),
         ("ancestor_exe = '!/usr/sbin/sshd'".into(), Missing { ancestors, ..nothing }),
        ("ancestor_exe = '/usr/sbin/sshd'".into(), nothing),
        (digest.clone(), Missing { sha256, ..nothing }),
        (format!("{digest}\nuid = 0"), nothing),
        ("container_image = 'a'".into(), Missing { container, ..nothing }),
        ("namespace = 'a'".into(), Missing { pod, ..nothing }),
        ("namespace = 'a'\nnetns = 'host'".into(), nothing),
        ("labels = {a = 'b'}\ncontainer_image = '*'".into(), Missing { container, pod, ..nothing }),
    ];
    for (selectors, expected) in table {
        // Behind a rule that ends it nothing is asked.
        for (before, expected) in [(None, expected), (Some(rule("action = 'deny'")), nothing)] {
            let rules = before.into_iter().chain([rule(&selectors)]).collect();
            let rules = Rules::new(rules);
            let candidates = rules.candidates(&subject(&unknown));
            let wanted = rules.wanted(&candidates, &unknown);
            assert_eq!(wanted, expected, "{selectors}");
        }
    }
}

fn policy(mode: Mode, rules: &str) -> Policy {
    #[derive(serde::Deserialize)]
    struct File {
        rule: Vec<Rule>,
    }
    let rules: File = toml::from_str(rules).unwrap();
    Policy {
        mode,
        hop_limit: 1,
        hop_limit_action: HopLimitAction::Reject,
        token_binding: None,
        rules: Arc::new(Rules::new(rules.rule)),
    }
}

/// What becomes of a request, and by which rule.
fn judged(
    policy: &Policy,
    caller: &Caller,
    imds: Imds,
    path: &str,
) -> (Verdict, Reason, Option<String>) {
    let request = Request {
        imds,
        forwarded: false,
        flaw: None,
        path: Path::read(path).unwrap(),
        token: None,
    };
    let ask = Ask {
        imds,
        method: "GET",
        path: &request.path,
    };
    let subject = subject(caller);
    let candidates = policy.rules.candidates(&subject);
    let terms = policy.terms(&candidates, NOW);
    let token = SessionToken::Plain;
    let judged = policy.judge(
        &candidates,
        terms,
        (&request, &ask),
        subject.hops,
        token,
        NOW,
    );
    let explained = policy.explain(&subject, (&request, &ask), NOW);
    let rule = judged.rule.map(|rule| rule.name.to_string());
    assert_eq!(explained.rule, rule, "explained otherwise");
    assert_eq!(
        explained.verdict, judged.decision.verdict,
        "explained otherwise"
    );
    (judged.decision.verdict, judged.decision.reason, rule)
}

const RULES: &str = "
    [[rule]]
    name = 'over'
    expires = 1969-12-30
    user = 'www-data'
    action = 'deny'
    [[rule]]
    name = 'no credentials'
    user = 'www-data'
    path = 'meta-data/iam'
    action = 'deny'
    [[rule]]
    name = 'legacy'
    user = 'www-data'
    imds = 'v1'
    path = ['meta-data', '!meta-data/local-ipv4']
    action = 'allow'
    [[rule]]
    name = 'far'
    namespace = 'shop'
    hop_limit = 2
    [[rule]]
    name = 'late'
    uid = 33
    action = 'deny'";

#[test]
fn the_first_rule_that_matches_decides_and_the_mode_at_the_end() {
    use {Imds::*, Reason::*, Verdict::*};
    let table = [
        (
            caller(),
            V1,
            "/latest/meta-data/instance-id",
            Allow,
            Rule,
            Some("legacy"),
        ),
        (
            caller(),
            V1,
            "/latest/meta-data/local-ipv4",
            Deny,
            Rule,
            Some("late"),
        ),
        (
            caller(),
            V1,
            CREDENTIALS,
            Deny,
            Rule,
            Some("no credentials"),
        ),
        (
            caller(),
            V2,
            CREDENTIALS,
            Deny,
            Rule,
            Some("no credentials"),
        ),
        (caller(), V2, "/latest/user-data", Deny, Rule, Some("late")),
        (
            in_pod(),
            Token,
            "/latest/api/token",
            Allow,
            TokenRequest,
            Some("far"),
        ),
        (
            in_pod(),
            V1,
            "/latest/user-data",
            Deny,
            NoToken,
            Some("far"),
        ),
    ];
    let enforce = policy(Mode::Enforce, RULES);
    for (caller, imds, path, verdict, reason, rule) in table {
        let got = judged(&enforce, &caller, imds, path);
        assert_eq!(
            got,
            (verdict, reason, rule.map(str::to_owned)),
            "{imds:?} {path}"
        );
    }
    let stranger = Caller {
        uid: 1,
        user: None,
        ..caller()
    };
    let audit = policy(Mode::Audit, RULES);
    let got = judged(&enforce, &stranger, V1, CREDENTIALS);
    assert_eq!(got, (Deny, NoToken, None));
    let got = judged(&audit, &stranger, V1, CREDENTIALS);
    assert_eq!(got, (Audit, NoToken, None));
    let got = judged(&audit, &caller(), V2, CREDENTIALS);
    assert_eq!(got.0, Deny, "a rule is a rule in audit mode, too");
}

#[test]
fn what_is_not_known_is_decided_for_the_worse_in_enforce_mode() {
    use {Imds::*, Reason::*, Verdict::*};
    let late = Caller {
        pod: None,
        missing: Missing {
            pod: true,
            ..Missing::default()
        },
        ..in_pod()
    };
    let rules = "
        [[rule]]
        name = 'exception'
        namespace = 'shop'
        imds = 'v1'
        action = 'allow'
        [[rule]]
        name = 'no credentials'
        namespace = 'test'
        path = 'meta-data/iam'
        action = 'deny'";
    let enforce = policy(Mode::Enforce, rules);
    let got = |imds, path| {
        let (verdict, reason, _) = judged(&enforce, &late, imds, path);
        (verdict, reason)
    };
    assert_eq!(
        got(V1, "/latest/meta-data/instance-id"),
        (Deny, UnknownCaller)
    );
    assert_eq!(
        got(V2, "/latest/meta-data/instance-id"),
        (Allow, SessionToken)
    );
    assert_eq!(got(V2, CREDENTIALS), (Deny, UnknownCaller));
    let audit = policy(Mode::Audit, rules);
    let (verdict, reason, rule) = judged(&audit, &late, V2, CREDENTIALS);
    assert_eq!((verdict, reason, rule), (Allow, SessionToken, None));
    // On the host nobody is in a namespace, and that is certain.
    let (verdict, ..) = judged(&enforce, &caller(), V2, CREDENTIALS);
    assert_eq!(verdict, Allow);
}

/// A rule that may match is not passed over for a later one that gives away more.
#[test]
fn the_terms_of_who_is_not_known_are_the_worse_in_enforce_mode() {
    let late = Caller {
        pod: None,
        missing: Missing {
            pod: true,
            ..Missing::default()
        },
        ..in_pod()
    };
    let narrow = "namespace = 'shop'\nhop_limit = 2\ntoken_binding = 'cgroup'";
    let wide = "namespace = 'shop'\nhop_limit = 9\ntoken_binding = 'off'";
    let pod = "container_id = 'c0ffee'\nhop_limit = 5\ntoken_binding = 'netns'";
    let over = "expires = 1969-12-30\nnamespace = 'shop'\nhop_limit = 1";
    let about_requests = "namespace = 'shop'\npath = 'user-data'\naction = 'deny'";
    use Binding::{Cgroup, Container, Netns, Off};
    #[rustfmt::skip]
    let table: [(&[&str], _, _); 7] = [
        // rules               enforce         audit
        (&[wide],              (3, Container), (3, Off)),
        (&[narrow],            (2, Cgroup),    (3, Off)),
        (&[narrow, pod],       (2, Cgroup),    (5, Netns)),
        (&[wide, pod],         (5, Netns),     (5, Netns)),
        (&[wide, narrow, pod], (2, Cgroup),    (5, Netns)),
        (&[pod, narrow],       (5, Netns),     (5, Netns)),
        (&[over, about_requests, pod], (5, Netns), (5, Netns)),
    ];
    for (rules, enforce, audit) in table {
        let rules = (0..)
            .zip(rules)
            .map(|(number, rule): (u32, _)| format!("[[rule]]\nname = '{number}'\n{rule}\n"));
        let rules: String = rules.collect();
        for (mode, expected) in [(Mode::Enforce, enforce), (Mode::Audit, audit)] {
            let policy = Policy {
                hop_limit: 3,
                ..policy(mode, &rules)
            };
            let candidates = policy.rules.candidates(&subject(&late));
            let terms = policy.terms(&candidates, NOW);
            let got = (terms.hop_limit, terms.token_binding);
            assert_eq!(got, expected, "{mode} {rules}");
        }
    }
}

#[test]
fn a_rule_about_callers_sets_their_terms_though_another_decides() {
    let policy = policy(
        Mode::Enforce,
        "[[rule]]
         name = 'no user data'
         path = 'user-data'
         action = 'deny'
         answer = 404
         [[rule]]
         name = 'driver'
         container_id = 'c0ffee'
         hop_limit = 3
         token_binding = 'cgroup'",
    );
    let pod = in_pod();
    let candidates = policy.rules.candidates(&subject(&pod));
    let terms = policy.terms(&candidates, NOW);
    assert_eq!((terms.hop_limit, terms.token_binding), (3, Binding::Cgroup));
    let of_host = caller();
    let terms = policy.terms(&policy.rules.candidates(&subject(&of_host)), NOW);
    assert_eq!(
        (terms.hop_limit, terms.token_binding),
        (1, Binding::Container)
    );
    let refused = policy.rules.list()[0].answer.unwrap_or_default().action();
    assert_eq!(refused, Action::Refuse(StatusCode::NOT_FOUND));
}

/// One of the rules that there may be many of: some can be looked up, some not.
fn any_rule() -> impl Strategy<Value = Rule> {
    let selectors = select(vec![
        "exe = '/usr/bin/curl'",
        "exe = ['/usr/bin/wget', '/app', '!/usr/bin/curl']",
        "exe = '/usr/bin/*'",
        "uid = 33",
        "uid = [1, 2]",
        "uid = '!33'",
        "user = 'www-data'",
        "systemd_unit = ['web.service', 'db.service']",
        "namespace = 'shop'",
        "namespace = 's*'",
        "container_image = 'registry/team/web:1.2'",
        "pod_uid = 'a-pod'\nuid = 33",
        "container_id = 'other'",
        "comm = 'curl'",
        "pod = 'web-5d'\nimds = 'v1'",
        "path = 'meta-data'",
        "",
    ]);
    selectors.prop_map(|selectors| rule(&format!("{selectors}\naction = 'allow'")))
}

proptest! {
    #[test]
    fn looking_rules_up_finds_what_trying_them_all_does(
        list in proptest::collection::vec(any_rule(), 0..40),
        is_pod: bool,
    ) {
        prop_assert!(list.iter().all(|rule| rule.action == Some(RuleAction::Allow)));
        let caller = if is_pod { in_pod() } else { caller() };
        let rules = Rules::new(list);
        let subject = subject(&caller);
        let mut expected = Vec::new();
        for (number, rule) in (0..).zip(rules.list()) {
            if rule.fits(&subject) == Fit::Yes {
                let is_about_requests = rule.is_about_requests();
                expected.push(Candidate { rule: number, is_certain: true, is_about_requests });
                if !is_about_requests {
                    break;
                }
            }
        }
        prop_assert_eq!(rules.candidates(&subject), Candidates(expected));
    }
}
