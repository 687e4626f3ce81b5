//! For spreadsheets: a row for each caller.

use super::{Report, plain};

pub fn csv(report: &Report) -> anyhow::Result<String> {
    let mut out = csv::Writer::from_writer(Vec::new());
    out.write_record([
        "program",
        "script",
        "namespace",
        "owner",
        "image",
        "unit",
        "user",
        "v1",
        "v1_denied",
        "v1_upgraded",
        "v2",
        "token",
        "first",
        "last",
        "hosts",
        "paths",
        "parents",
        "via",
        "user_agents",
        "rules",
        "advice",
    ])?;
    for row in &report.v1_callers {
        let identity = &row.identity;
        let calls = &row.calls;
        let all = |names: Vec<&str>| names.join(" ");
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let fields = [
            identity.program.clone(),
            text(&identity.script),
            text(&identity.namespace),
            text(&identity.owner),
            text(&identity.image),
            text(&identity.unit),
            text(&identity.user),
            calls.v1.to_string(),
            calls.v1_denied.to_string(),
            calls.v1_upgraded.to_string(),
            calls.v2.to_string(),
            calls.token.to_string(),
            row.first.clone(),
            row.last.clone(),
            all(row.hosts.iter().map(|it| it.name.as_str()).collect()),
            all(row.paths.iter().map(|it| it.path.as_str()).collect()),
            all(row.parents.iter().map(|it| it.name.as_str()).collect()),
            row.via.join(" "),
            all(row.user_agents.iter().map(|it| it.name.as_str()).collect()),
            row.rules.join(" "),
            row.advice.text.clone(),
        ];
        out.write_record(fields.map(|field| cell(&field)))?;
    }
    Ok(String::from_utf8(out.into_inner()?)?)
}

/// A field that a spreadsheet takes for text, whoever chose it: not for a formula.
fn cell(text: &str) -> String {
    let text = plain(text);
    match text.starts_with(['=', '+', '-', '@']) {
        true => format!("'{text}"),
        false => text,
    }
}
