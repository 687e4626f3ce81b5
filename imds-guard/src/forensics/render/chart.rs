//! Charts as SVG: no scripts, so that they print and need nothing from elsewhere.

use std::fmt::Write as _;

use super::{Period, Row, grouped};

/// Width of a chart, in units of its own; it is shown as wide as the page.
const WIDTH: f64 = 960.0;
/// Space for names beside a chart.
const NAMES: f64 = 330.0;
const MOST_BARS: usize = 15;
const MOST_COLUMNS: usize = 30;

/// Calls over time: IMDSv1 above, IMDSv2 below, each on a scale of its own.
pub fn timeline(periods: &[Period]) -> String {
    let v1: Vec<_> = periods.iter().map(|it| it.v1).collect();
    let v2: Vec<_> = periods.iter().map(|it| it.v2).collect();
    let (height, gap) = (110.0, 44.0);
    let mut out = open(2.0 * (height + gap), "Calls over time, by version");
    for (at, (name, class, values)) in [("IMDSv1", "v1", &v1), ("IMDSv2", "v2", &v2)]
        .into_iter()
        .enumerate()
    {
        let top = at as f64 * (height + gap) + 22.0;
        let most = values.iter().copied().max().unwrap_or_default().max(1);
        text(&mut out, (0.0, top - 8.0), "start", "name", name);
        let peak = format!("at most {}", grouped(most));
        text(&mut out, (WIDTH, top - 8.0), "end", "note", &peak);
        let step = WIDTH / values.len().max(1) as f64;
        for (place, (value, period)) in values.iter().zip(periods).enumerate() {
            let tall = height * share(*value, most);
            let x = place as f64 * step;
            let title = format!("{}: {} {name} calls", period.begin, grouped(*value));
            bar(
                &mut out,
                class,
                (x, top + height - tall, (step - 1.0).max(0.5), tall),
                &title,
            );
        }
        let base = top + height;
        let _infallible = write!(
            out,
            r#"<line class="axis" x1="0" x2="{WIDTH}" y1="{base:.1}" y2="{base:.1}"/>"#
        );
        for (place, period) in labelled(periods) {
            let x = (place as f64 + 0.5) * step;
            text(
                &mut out,
                (x, base + 15.0),
                "middle",
                "note",
                &period.begin.replace('T', " "),
            );
        }
    }
    out + "</svg>"
}

/// The callers with most IMDSv1 calls.
pub fn callers(rows: &[Row]) -> String {
    let rows = &rows[..rows.len().min(MOST_BARS)];
    let most = rows
        .iter()
        .map(|row| row.calls.v1)
        .max()
        .unwrap_or(1)
        .max(1);
    let step = 26.0;
    let mut out = open(step * rows.len() as f64, "Callers of IMDSv1");
    let room = WIDTH - NAMES - 110.0;
    for (at, row) in rows.iter().enumerate() {
        let y = at as f64 * step;
        let name = caller_name(row);
        text(&mut out, (NAMES - 8.0, y + 17.0), "end", "label", &name);
        let refused = room * share(row.calls.v1_denied, most);
        let answered = room * share(row.calls.needed_v1(), most);
        let title = format!("{name}: {} answered", grouped(row.calls.needed_v1()));
        bar(
            &mut out,
            "v1",
            (NAMES, y + 4.0, answered, step - 8.0),
            &title,
        );
        let title = format!("{name}: {} refused", grouped(row.calls.v1_denied));
        bar(
            &mut out,
            "refused",
            (NAMES + answered, y + 4.0, refused, step - 8.0),
            &title,
        );
        let x = NAMES + answered + refused + 8.0;
        text(
            &mut out,
            (x, y + 17.0),
            "start",
            "note",
            &grouped(row.calls.v1),
        );
    }
    out + "</svg>"
}

/// Which caller calls on which host. The hosts with most calls come first.
pub fn hosts(rows: &[Row]) -> String {
    let mut sums = std::collections::HashMap::<&str, u64>::new();
    for host in rows.iter().flat_map(|row| &row.hosts) {
        *sums.entry(&host.name).or_default() += host.calls;
    }
    let mut hosts: Vec<_> = sums.into_iter().collect();
    hosts.sort_by(|one, other| (other.1, one.0).cmp(&(one.1, other.0)));
    hosts.truncate(MOST_COLUMNS);
    let rows = &rows[..rows.len().min(MOST_BARS)];
    let calls = |row: &Row, host: &str| {
        let found = row.hosts.iter().find(|it| it.name == host);
        found.map_or(0, |it| it.calls)
    };
    let cells = rows
        .iter()
        .flat_map(|row| hosts.iter().map(|(host, _)| calls(row, host)));
    let most = cells.max().unwrap_or(1).max(1);
    let (step, names) = (22.0, 96.0);
    let mut out = open(step * rows.len() as f64 + names, "Callers by host");
    let wide = ((WIDTH - NAMES) / hosts.len().max(1) as f64).min(48.0);
    for (at, row) in rows.iter().enumerate() {
        let y = names + at as f64 * step;
        let name = caller_name(row);
        text(&mut out, (NAMES - 8.0, y + 15.0), "end", "label", &name);
        for (column, (host, _)) in hosts.iter().enumerate() {
            let value = calls(row, host);
            let x = NAMES + column as f64 * wide;
            // Few calls are to be seen beside many.
            let depth = match value {
                0 => 0.04,
                value => 0.2 + 0.8 * (1.0 + value as f64).ln() / (1.0 + most as f64).ln(),
            };
            let title = escape(&format!("{name} on {host}: {} calls", grouped(value)));
            let _infallible = write!(
                out,
                r#"<rect class="v1" fill-opacity="{depth:.2}" x="{x:.1}" y="{y:.1}" width="{:.1}" height="{:.1}"><title>{title}</title></rect>"#,
                wide - 2.0,
                step - 2.0,
            );
        }
    }
    for (column, (host, _)) in hosts.iter().enumerate() {
        let x = NAMES + (column as f64 + 0.6) * wide;
        let y = names - 6.0;
        let host = escape(&end(host, 18));
        let _infallible = write!(
            out,
            r#"<text class="note" transform="translate({x:.1} {y:.1}) rotate(-50)">{host}</text>"#
        );
    }
    out + "</svg>"
}

/// Text in HTML and SVG.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for it in super::plain(text).chars() {
        match it {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            _ => escaped.push(it),
        }
    }
    escaped
}

fn open(height: f64, title: &str) -> String {
    format!(
        r#"<svg viewBox="0 0 {WIDTH} {height:.0}" role="img" aria-label="{title}"><title>{title}</title>"#
    )
}

fn bar(out: &mut String, class: &str, (x, y, wide, tall): (f64, f64, f64, f64), title: &str) {
    if wide <= 0.0 || tall <= 0.0 {
        return;
    }
    let _infallible = write!(
        out,
        r#"<rect class="{class}" x="{x:.1}" y="{y:.1}" width="{wide:.1}" height="{tall:.1}"><title>{}</title></rect>"#,
        escape(title)
    );
}

fn text(out: &mut String, (x, y): (f64, f64), anchor: &str, class: &str, text: &str) {
    let _infallible = write!(
        out,
        r#"<text class="{class}" x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#,
        escape(text)
    );
}

/// What a caller is called where there is little room: the end of its path says most.
fn caller_name(row: &Row) -> String {
    let what = row
        .identity
        .script
        .as_ref()
        .unwrap_or(&row.identity.program);
    let name = what.rsplit('/').next().unwrap_or(what);
    let place = row.identity.place();
    match place.is_empty() {
        true => end(name, 44),
        false => format!("{} · {}", end(name, 20), end(&place, 22)),
    }
}

/// The end of a name, which says most.
fn end(text: &str, most: usize) -> String {
    let surplus = text.chars().count().saturating_sub(most);
    match surplus {
        0 => text.to_owned(),
        _ => format!("…{}", text.chars().skip(surplus).collect::<String>()),
    }
}

fn share(value: u64, most: u64) -> f64 {
    match value {
        0 => 0.0,
        // Never too small to be seen.
        value => (value as f64 / most as f64).max(0.012),
    }
}

/// About six periods, evenly spread.
fn labelled(periods: &[Period]) -> impl Iterator<Item = (usize, &Period)> {
    let every = periods.len().div_ceil(6).max(1);
    let half = every / 2;
    periods
        .iter()
        .enumerate()
        .filter(move |(at, _)| at % every == half)
}
