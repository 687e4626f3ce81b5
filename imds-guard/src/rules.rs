//! The file of rules.

use std::{fs, path::Path};

use serde::Deserialize;

use crate::{failure::Failure, policy::Rule};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    rule: Vec<Rule>,
}

/// Reads a file of rules, `[[rule]]` tables in TOML.
///
/// # Errors
/// [`Failure::Settings`], with line and column where something in it is wrong.
pub fn read(file: &Path) -> Result<Vec<Rule>, Failure> {
    let text = fs::read_to_string(file)
        .map_err(|error| Failure::Settings(format!("--rules {}: {error}", file.display())))?;
    parse(&text).map_err(|what| Failure::Settings(format!("--rules {}: {what}", file.display())))
}

fn parse(text: &str) -> Result<Vec<Rule>, String> {
    let document: Document = toml::from_str(text).map_err(|error| error.to_string())?;
    for (number, rule) in document.rule.iter().enumerate() {
        if !rule.selects() {
            return Err(format!(
                "rule \"{}\" applies to everybody: give it uid, cgroup, container_id or pod_uid",
                rule.name
            ));
        }
        if document.rule[..number]
            .iter()
            .any(|it| it.name == rule.name)
        {
            return Err(format!("two rules are called \"{}\"", rule.name));
        }
    }
    Ok(document.rule)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_line_is_named() {
        let table = [
            ("", Ok(0)),
            ("[[rule]]\nname = 'a'\nuid = 7\naction = 'upgrade'", Ok(1)),
            (
                "[[rule]]\nname = 'a'\nuid = 7\nhop_limit = 65",
                Err("line 4, column 13"),
            ),
            ("[[rule]]\nname = 'a'\nuid = 'x'", Err("line 3, column 7")),
            (
                "[[rule]]\nname = 'a'\nuser = 7",
                Err("unknown field `user`"),
            ),
            ("[[rule]]\nuid = 7", Err("missing field `name`")),
            (
                "[[rule]]\nname = 'a'\nuid = 7\naction = 'deny'",
                Err("line 4, column 10"),
            ),
            ("[[rule]]\nname = 'a'", Err("applies to everybody")),
            (
                "[[rule]]\nname = 'a'\nuid = 7\n[[rule]]\nname = 'a'\nuid = 8",
                Err("two rules are called"),
            ),
            ("[rule", Err("line 1")),
        ];
        for (text, expected) in table {
            match (parse(text), expected) {
                (Ok(rules), Ok(count)) => assert_eq!(rules.len(), count, "{text}"),
                (Err(error), Err(part)) => assert!(error.contains(part), "{text}: {error}"),
                (got, _) => panic!("{text}: {got:?}"),
            }
        }
    }
}
