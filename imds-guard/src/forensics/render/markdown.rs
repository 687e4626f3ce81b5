//! For tickets and wikis.

use std::fmt::Write as _;

use super::{Report, grouped, plain, short, table::names};

pub fn markdown(report: &Report) -> String {
    let mut out = String::new();
    let calls = &report.calls;
    let _infallible = writeln!(
        out,
        "# Who uses IMDSv1\n\n\
         {} to {} UTC, {} hosts, {} events.\n\n\
         | calls | |\n|---|---:|\n\
         | without a session token (v1) | {} |\n\
         | of these refused | {} |\n\
         | of these carried over by the guard | {} |\n\
         | with one (v2) | {} |\n\
         | for tokens | {} |\n",
        short(&report.from),
        short(&report.to),
        grouped(report.hosts as u64),
        grouped(report.events),
        grouped(calls.v1),
        grouped(calls.v1_denied),
        grouped(calls.v1_upgraded),
        grouped(calls.v2),
        grouped(calls.token),
    );
    if report.v1_callers.is_empty() {
        out.push_str("Nobody used IMDSv1.\n");
        return out;
    }
    out.push_str(
        "| caller | where | v1 calls | refused | hosts | asked for | seen | what to do |\n\
         |---|---|---:|---:|---:|---|---|---|\n",
    );
    for row in &report.v1_callers {
        let paths = names(row.paths.iter().map(|it| it.path.as_str()), 3);
        let _infallible = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} | {} to {} | {} |",
            code(&row.identity.what()),
            code(&row.identity.place()),
            grouped(row.calls.v1),
            grouped(row.calls.v1_denied),
            grouped(row.hosts.len() as u64),
            code(&paths),
            short(&row.first),
            short(&row.last),
            code_free(&row.advice.text),
        );
    }
    out
}

/// Text in a cell that stays text, whoever chose it.
fn code(text: &str) -> String {
    match plain(text).replace('`', "'").replace('|', "\\|") {
        text if text.is_empty() => text,
        text => format!("`{text}`"),
    }
}

/// Our own words, in which a version number may be a caller's.
fn code_free(text: &str) -> String {
    plain(text).replace('|', "\\|").replace('<', "&lt;")
}
