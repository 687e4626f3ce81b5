//! For a terminal.

use std::fmt::Write as _;

use super::{Report, grouped, plain, short};

pub fn table(report: &Report) -> String {
    let mut out = String::new();
    let calls = &report.calls;
    let _infallible = writeln!(
        out,
        "{} to {} UTC: {} events of {} hosts\n\
         {} calls without a session token ({} of them refused, {} carried over), {} with one, {} for tokens",
        short(&report.from),
        short(&report.to),
        grouped(report.events),
        grouped(report.hosts as u64),
        grouped(calls.v1),
        grouped(calls.v1_denied),
        grouped(calls.v1_upgraded),
        grouped(calls.v2),
        grouped(calls.token),
    );
    if report.skipped > 0 {
        let _infallible = writeln!(out, "{} lines are no events", grouped(report.skipped));
    }
    if report.v1_callers.is_empty() {
        out.push_str("\nNobody used IMDSv1.\n");
    }
    for row in &report.v1_callers {
        let place = row.identity.place();
        let _infallible = writeln!(
            out,
            "\n{:>10}  {}{}{}",
            grouped(row.calls.v1),
            plain(&row.identity.what()),
            if place.is_empty() { "" } else { "  " },
            plain(&place),
        );
        let mut say = |what: &str, text: String| {
            if !text.is_empty() {
                let _infallible = writeln!(out, "{:>12}{what:<9}{}", "", plain(&text));
            }
        };
        say(
            "seen",
            format!("{} to {}", short(&row.first), short(&row.last)),
        );
        for (what, count) in [
            ("refused", row.calls.v1_denied),
            ("carried", row.calls.v1_upgraded),
        ] {
            if count > 0 {
                say(what, grouped(count));
            }
        }
        say(
            "hosts",
            names(row.hosts.iter().map(|it| it.name.as_str()), 4),
        );
        let paths = row
            .paths
            .iter()
            .map(|it| format!("{} ({})", it.path, it.calls));
        say("paths", names(paths, 4));
        let mut started: Vec<_> = row.parents.iter().map(|it| it.name.clone()).collect();
        started.extend(row.via.iter().map(|via| format!("[{via}]")));
        say("started", names(started, 3));
        say(
            "agent",
            names(row.user_agents.iter().map(|it| it.name.as_str()), 2),
        );
        say("rules", names(&row.rules, 3));
        say("do", row.advice.text.clone());
    }
    out
}

/// The first few, and how many more there are.
pub fn names<T: AsRef<str>>(names: impl IntoIterator<Item = T>, most: usize) -> String {
    let names: Vec<T> = names.into_iter().collect();
    let shown: Vec<_> = names.iter().take(most).map(AsRef::as_ref).collect();
    match names.len().saturating_sub(most) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
