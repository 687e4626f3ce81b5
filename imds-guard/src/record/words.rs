//! Events for people.

use super::{Event, Kind, label};
use crate::policy::Imds;

/// An event in one line for people. Whatever callers can choose is quoted where it is not plain.
#[must_use]
pub fn words(event: &Event) -> String {
    let time = event.time.get(..19).unwrap_or(&event.time);
    let what = match &event.kind {
        Kind::Request(request) => {
            let verdict = request.verdict.to_string();
            let rule = request
                .rule
                .as_ref()
                .map_or(String::new(), |rule| format!(" by \"{rule}\""));
            let calls = match request.calls() {
                1 => String::new(),
                calls => format!(", {calls} times"),
            };
            format!(
                "{verdict:<7} {:<5} {} {} {} {} pid {} ({}{rule}){calls}",
                request.imds.map_or("-", Imds::as_str),
                request.status,
                request.method.escape_default(),
                request.path.escape_default(),
                label(&request.caller).escape_default(),
                request.caller.pid,
                request.reason,
            )
        }
        Kind::ConnectionRefused(refused) => format!("refused a connection from {}", refused.peer),
        Kind::Packet(packet) => {
            let verdict = packet.verdict.to_string();
            format!(
                "{verdict:<7} packet ({}) from {}",
                packet.protocol, packet.source
            )
        }
        Kind::EventsLost { count } => format!("{count} events were lost"),
        Kind::Policy(change) => {
            let by = change.by.as_ref().map_or(String::new(), |by| {
                let login = by
                    .login
                    .as_ref()
                    .map_or(String::new(), |login| format!(", {login}"));
                format!(" by pid {} (uid {}{login})", by.pid, by.uid)
            });
            format!(
                "{:?}{by}: {} mode, {} rules",
                change.change, change.mode, change.rules
            )
        }
        Kind::RuleExpired(expired) => format!("rule \"{}\" has expired", expired.rule),
        Kind::Alive(_) => "still there".into(),
        Kind::Started(started) => format!("started in {} mode", started.mode),
        Kind::Stopped(_) => "stopped".into(),
    };
    format!("{time}Z {what}")
}
