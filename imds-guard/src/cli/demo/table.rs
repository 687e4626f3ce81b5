//! What the demo prints.

use crate::{
    lab::Counters,
    policy::{Imds, Mode, Verdict, caller::Netns},
    record::{Endpoint, Request},
};

/// The head of the table.
pub fn title(mode: Mode) {
    println!("imds-guard in {mode} mode, in front of a fake metadata service\n");
    println!(
        "{:<9}{:<14}{:<11}{:<7}{:<9}{:<7}PROGRAM",
        "ASKED", "OUTCOME", "FROM", "PID", "USER", "OVER"
    );
}

/// One request and who made it.
pub fn row(request: &Request) {
    let caller = &request.caller;
    let asked = match request.imds {
        Some(Imds::V1) => "v1",
        Some(Imds::V2) => "v2",
        Some(Imds::Token) => "token",
        None => "unclear",
    };
    let outcome = match request.verdict {
        Verdict::Deny => format!("refused {}", request.status),
        Verdict::Upgrade => format!("upgraded {}", request.status),
        Verdict::Audit => format!("noted {}", request.status),
        Verdict::Allow => format!("served {}", request.status),
    };
    let from = match caller.netns {
        Netns::Host => "host",
        Netns::Other => "container",
    };
    let over = match request.endpoint {
        Endpoint::Ipv4 => "IPv4",
        Endpoint::Ipv6 => "IPv6",
        Endpoint::Ipv4Mapped => "mapped",
    };
    let user = caller
        .user
        .clone()
        .unwrap_or_else(|| caller.uid.to_string());
    let program = caller
        .exe
        .as_deref()
        .map_or_else(|| printable(&caller.comm), printable);
    println!(
        "{asked:<9}{outcome:<14}{from:<11}{:<7}{:<9}{over:<7}{program}",
        caller.pid,
        printable(&user),
    );
    let arguments = caller.command_line.as_deref().unwrap_or_default();
    let arguments: Vec<String> = arguments
        .iter()
        .map(|argument| printable(argument))
        .collect();
    println!("         {}", arguments.join(" "));
    let parents: Vec<String> = caller
        .parents
        .iter()
        .take(2)
        .map(|parent| {
            format!(
                "{} ({})",
                printable(parent.exe.as_deref().unwrap_or("?")),
                parent.pid
            )
        })
        .collect();
    println!(
        "         uid {}, cgroup {}, started by {}",
        caller.uid,
        printable(caller.cgroup.as_deref().unwrap_or("?")),
        parents.join(", by ")
    );
}

/// What the metadata service saw of it.
pub fn sum(mode: Mode, reached: &Counters) {
    println!(
        "\nThe metadata service itself was asked {} times: {} token requests, {} v2, {} v1{}",
        reached.requests,
        reached.token_puts,
        reached.v2_requests,
        reached.v1_requests,
        match (mode, reached.v1_requests) {
            (Mode::Enforce, 0) => ". No v1 request got through.",
            (Mode::Audit, 1..) => ". Audit mode lets v1 through and says who it was.",
            _ => ".",
        }
    );
}

/// Names are the caller's to choose: no control characters on the terminal.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}
