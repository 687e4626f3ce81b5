//! One file that needs nothing else: for a browser, by day and night, and for paper.

use std::fmt::Write as _;

use super::{Report, Row, Wanted, chart, chart::escape, grouped, short};

const STYLE: &str = include_str!("report.css");
/// Names shown in a cell of the table.
const MOST_NAMES: usize = 6;

pub fn html(report: &Report) -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>Who uses IMDSv1</title>\n<style>{STYLE}</style>\n</head>\n<body>\n\
         <h1>Who uses IMDSv1</h1>\n<p class=\"range\">{} to {} UTC, from {} events of {} hosts</p>\n",
        escape(&short(&report.from)),
        escape(&short(&report.to)),
        grouped(report.events),
        grouped(report.hosts as u64),
    );
    numbers(&mut out, report);
    if report.v1_callers.is_empty() {
        out.push_str("<p>Nobody used IMDSv1.</p>\n");
    } else {
        section(
            &mut out,
            "Over time",
            "",
            &chart::timeline(&report.timeline),
        );
        let legend = "<p class=\"legend\"><span class=\"v1\"></span> answered \
                      <span class=\"refused\"></span> refused</p>";
        section(
            &mut out,
            "Callers",
            legend,
            &chart::callers(&report.v1_callers),
        );
        section(
            &mut out,
            "On which hosts",
            "",
            &chart::hosts(&report.v1_callers),
        );
        table(&mut out, report);
    }
    let _infallible = write!(
        out,
        "<footer>imds-guard {}</footer>\n</body>\n</html>\n",
        env!("CARGO_PKG_VERSION")
    );
    out
}

fn numbers(out: &mut String, report: &Report) {
    let calls = &report.calls;
    out.push_str("<dl class=\"numbers\">\n");
    for (id, name, value) in [
        ("v1", "calls without a session token", calls.v1),
        ("v1-denied", "of these refused", calls.v1_denied),
        (
            "v1-upgraded",
            "carried over by the guard",
            calls.v1_upgraded,
        ),
        ("v2", "calls with one", calls.v2),
        ("token", "requests for tokens", calls.token),
        (
            "v1-callers",
            "callers of IMDSv1",
            report.v1_callers.len() as u64,
        ),
        ("hosts", "hosts", report.hosts as u64),
    ] {
        let _infallible = writeln!(
            out,
            "<div><dt>{name}</dt><dd id=\"{id}\">{}</dd></div>",
            grouped(value)
        );
    }
    out.push_str("</dl>\n");
}

fn section(out: &mut String, title: &str, note: &str, chart: &str) {
    let _infallible = writeln!(
        out,
        "<section><h2>{title}</h2>\n{note}<figure>{chart}</figure></section>"
    );
}

fn table(out: &mut String, report: &Report) {
    out.push_str(
        "<section><h2>What to do</h2>\n<table id=\"callers\">\n<thead><tr><th>caller</th>\
         <th class=\"number\">v1 calls</th><th class=\"number\">hosts</th><th>asked for</th>\
         <th>started by</th><th>what to do</th></tr></thead>\n<tbody>\n",
    );
    for row in &report.v1_callers {
        add_row(out, row);
    }
    out.push_str("</tbody>\n</table></section>\n");
}

fn add_row(out: &mut String, row: &Row) {
    let place = row.identity.place();
    let _infallible = write!(
        out,
        "<tr><td><code>{}</code><br>{}<br><small>{} to {}</small></td>",
        escape(&row.identity.what()),
        escape(&place),
        escape(&short(&row.first)),
        escape(&short(&row.last)),
    );
    let refused = match row.calls.v1_denied {
        0 => String::new(),
        count => format!("<br><small>{} refused</small>", grouped(count)),
    };
    let _infallible = write!(
        out,
        "<td class=\"number\"><span class=\"count\">{}</span>{refused}</td>\
         <td class=\"number\" title=\"{}\">{}</td><td>",
        grouped(row.calls.v1),
        escape(&list(row.hosts.iter().map(|it| it.name.as_str()))),
        grouped(row.hosts.len() as u64),
    );
    for path in row.paths.iter().take(MOST_NAMES) {
        let class = match path.wanted {
            Wanted::Credentials => "secret",
            Wanted::UserData | Wanted::Identity => "private",
            Wanted::Other => "plain",
        };
        let _infallible = write!(
            out,
            "<code class=\"{class}\">{}</code> <small>{}</small><br>",
            escape(&path.path),
            grouped(path.calls)
        );
    }
    if row.paths.len() > MOST_NAMES {
        let more = row.paths.len() - MOST_NAMES;
        let _infallible = write!(out, "<small>and {more} more</small>");
    }
    let parents = list(row.parents.iter().map(|it| it.name.as_str()));
    let via = list(row.via.iter().map(String::as_str));
    let _infallible = writeln!(
        out,
        "</td><td>{}<br><small>{}</small></td><td>{}</td></tr>",
        escape(&parents),
        escape(&via),
        escape(&row.advice.text),
    );
}

fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    super::table::names(names, MOST_NAMES)
}
