//! JSON that can be shown in a terminal, whatever callers have put into it.
//!
//! JSON itself escapes only what is below a space. A terminal also takes U+009B as the begin of a
//! command, and others turn text around or begin new lines.

use serde::Serialize;

/// A value as JSON in one line.
///
/// # Errors
/// It has no JSON.
pub fn to_json(value: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string(value).map(escaped)
}

/// A value as JSON for people.
///
/// # Errors
/// It has no JSON.
pub fn to_json_pretty(value: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string_pretty(value).map(escaped)
}

/// The same JSON without characters that a terminal obeys. They can only be within its strings.
#[must_use]
pub fn escaped(json: String) -> String {
    // Most has nothing of the kind.
    if json.bytes().all(|byte| byte < 0x7f) {
        return json;
    }
    let mut plain = String::with_capacity(json.len());
    for one in json.chars() {
        if obeyed(one) {
            plain.push_str(&format!("\\u{:04x}", u32::from(one)));
        } else {
            plain.push(one);
        }
    }
    plain
}

/// Whether a terminal may obey a character in place of showing it, or a reader not see it: control characters
/// beyond ASCII's, those that change the direction of text or have no width, and line separators.
#[must_use]
pub const fn obeyed(one: char) -> bool {
    matches!(
        one,
        '\u{7f}'..='\u{9f}'
            | '\u{61c}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{2069}'
            | '\u{feff}'
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_character_is_read_again_and_none_is_obeyed() {
        let all: String = ('\0'..=char::MAX).collect();
        let json = to_json(&[&all]).unwrap();
        assert!(!json.chars().any(|it| it.is_control() || obeyed(it)));
        let again: Vec<String> = serde_json::from_str(&json).unwrap();
        assert_eq!(again, [all]);
        assert!(json.contains("\\u009b") && json.contains("\\u202e") && json.contains('é'));
        let key = to_json_pretty(&serde_json::json!({"a\u{9b}": 1})).unwrap();
        assert_eq!(key, "{\n  \"a\\u009b\": 1\n}");
    }
}
