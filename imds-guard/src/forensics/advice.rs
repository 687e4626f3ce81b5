//! What to do about a caller, from what it says it is.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What to do about a caller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Advice {
    /// The SDK or tool that was recognised.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tool: Option<String>,
    /// The oldest version of it that speaks IMDSv2.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub needs: Option<String>,
    /// What to do, in words.
    pub text: String,
}

/// A tool: its name, how its user agent begins, and the first version with IMDSv2.
struct Tool {
    name: &'static str,
    agent: &'static str,
    since: &'static [u32],
}

/// From the EC2 User Guide, "Use a supported AWS SDK" (minimum versions for IMDSv2). The more particular
/// come first.
const TOOLS: &[Tool] = &[
    tool("AWS CLI", "aws-cli/", &[1, 16, 289]),
    tool("boto3", "boto3/", &[1, 12, 6]),
    tool("botocore", "botocore/", &[1, 13, 25]),
    tool("AWS SDK for Go v2", "aws-sdk-go-v2/", &[0, 19, 0]),
    tool("AWS SDK for Go", "aws-sdk-go/", &[1, 25, 38]),
    tool("AWS SDK for Java", "aws-sdk-java/1.", &[1, 11, 678]),
    tool("AWS SDK for Java 2.x", "aws-sdk-java/2.", &[2, 10, 21]),
    tool("AWS SDK for Kotlin", "aws-sdk-kotlin/", &[1, 1, 4]),
    tool("AWS SDK for JavaScript", "aws-sdk-nodejs/", &[2, 722, 0]),
    tool("AWS SDK for JavaScript v3", "aws-sdk-js/3.", &[3, 0, 0]),
    tool("AWS SDK for JavaScript", "aws-sdk-js/", &[2, 722, 0]),
    tool("AWS SDK for PHP", "aws-sdk-php/", &[3, 147, 7]),
    tool("AWS SDK for Ruby", "aws-sdk-ruby3/", &[3, 79, 0]),
    tool("AWS SDK for .NET", "aws-sdk-dotnet", &[3, 3, 634, 1]),
    tool("AWS SDK for C++", "aws-sdk-cpp/", &[1, 7, 229]),
    tool("AWS Tools for PowerShell", "awspowershell", &[4, 0, 1, 0]),
];

/// Clients that do what a script tells them.
const BY_HAND: &[(&str, &str)] = &[
    ("curl", "curl/"),
    ("wget", "wget"),
    ("wget", "busybox"),
    ("python-requests", "python-requests/"),
    ("urllib", "python-urllib/"),
    ("Go's net/http", "go-http-client/"),
    ("Java's HttpURLConnection", "java/"),
    ("libwww-perl", "libwww-perl/"),
    ("Ruby's net/http", "ruby"),
    ("node-fetch", "node-fetch"),
    ("axios", "axios/"),
];

const ASK_FOR_A_TOKEN: &str = "ask for a session token (PUT /latest/api/token with \
X-aws-ec2-metadata-token-ttl-seconds) and send it as X-aws-ec2-metadata-token";

/// Advice from user agents, the most frequent first. `fallback`: it would have spoken IMDSv2, but its
/// token request was refused.
#[must_use]
pub fn advise<'a>(agents: impl IntoIterator<Item = &'a str>, fallback: bool) -> Advice {
    if fallback {
        return Advice {
            tool: None,
            needs: None,
            text: "it asks for a session token first and is refused: the reason is in the event of that \
                   request (hop_limit: let this one container reach further with a rule; forwarded: no \
                   proxy in between; token_ttl: send a TTL of 1 to 21600)"
                .into(),
        };
    }
    let mut by_hand = None;
    for agent in agents {
        let lower = agent.to_ascii_lowercase();
        if let Some((tool, version)) = recognised(&lower) {
            return of_tool(tool, &version);
        }
        let known = BY_HAND.iter().find(|(_, begin)| lower.starts_with(begin));
        by_hand = by_hand.or(known.map(|(name, _)| *name));
    }
    match by_hand {
        Some(name) => Advice {
            tool: Some(name.into()),
            needs: None,
            text: format!("a script or program of your own with {name}: {ASK_FOR_A_TOKEN}"),
        },
        None => Advice {
            tool: None,
            needs: None,
            text: format!("not a known SDK: update it, or have it {ASK_FOR_A_TOKEN}"),
        },
    }
}

const fn tool(name: &'static str, agent: &'static str, since: &'static [u32]) -> Tool {
    Tool { name, agent, since }
}

/// The tool that a user agent names in one of its words, and its version.
fn recognised(agent: &str) -> Option<(&'static Tool, Vec<u32>)> {
    TOOLS.iter().find_map(|tool| {
        let word = agent
            .split([' ', ';', '(', ',', '['])
            .find(|word| word.starts_with(tool.agent))?;
        let version = word.split('/').nth(1).unwrap_or_default();
        let numbers: Vec<u32> = version
            .split(['.', '-', '+'])
            .map_while(|number| number.parse().ok())
            .collect();
        (!numbers.is_empty()).then_some((tool, numbers))
    })
}

fn of_tool(tool: &Tool, version: &[u32]) -> Advice {
    let dotted = |numbers: &[u32]| {
        let numbers: Vec<_> = numbers.iter().map(u32::to_string).collect();
        numbers.join(".")
    };
    let (found, needed) = (dotted(version), dotted(tool.since));
    let text = if version < tool.since {
        format!(
            "{} {found} does not speak IMDSv2: update it to {needed} or newer",
            tool.name
        )
    } else {
        format!(
            "{} {found} speaks IMDSv2, and falls back to IMDSv1 where it gets no token: look for \
             AWS_EC2_METADATA_V1_DISABLED, its own configuration and the hop limit",
            tool.name
        )
    };
    Advice {
        tool: Some(format!("{} {found}", tool.name)),
        needs: (version < tool.since).then_some(needed),
        text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tools_are_known_by_what_they_say_they_are() {
        let table = [
            (
                "aws-cli/1.16.1 Python/2.7.5 Linux/4.14 botocore/1.11.1",
                Some("1.16.289"),
            ),
            ("aws-cli/2.15.0 Python/3.11", None),
            ("Boto3/1.9.0 Python/3.6 Botocore/1.12.0", Some("1.12.6")),
            ("Botocore/1.12.253", Some("1.13.25")),
            ("aws-sdk-go/1.25.30 (go1.13; linux; amd64)", Some("1.25.38")),
            ("aws-sdk-go-v2/1.30.0 os/linux", None),
            ("aws-sdk-java/1.11.600 Linux/5.4 OpenJDK", Some("1.11.678")),
            ("aws-sdk-java/2.10.1 Linux", Some("2.10.21")),
            ("aws-sdk-nodejs/2.500.0 linux", Some("2.722.0")),
            ("aws-sdk-js/3.400.0", None),
            ("aws-sdk-dotnet-45/3.3.100.0", Some("3.3.634.1")),
            ("aws-sdk-php/3.100.0", Some("3.147.7")),
        ];
        for (agent, needs) in table {
            let advice = advise([agent], false);
            assert_eq!(advice.needs.as_deref(), needs, "{agent}");
            assert!(advice.tool.is_some(), "{agent}");
        }
        assert_eq!(advise(["curl/8.5.0"], false).tool.as_deref(), Some("curl"));
        assert_eq!(advise(["x"], false).tool, None);
        assert!(advise(["curl/8"], true).text.contains("hop_limit"));
        assert_eq!(
            advise(["curl/8", "Boto3/1.9.0"], false).needs.as_deref(),
            Some("1.12.6"),
            "an SDK says more than a tool"
        );
    }
}
