//! `imds-guard ready`.

use std::process::ExitCode;

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::report::LogArguments;
use crate::{
    failure::Failure,
    forensics::{
        HostCoverage, Summary,
        render::{Report, Row, plain},
    },
    record::to_json_pretty,
};

/// For `--help`.
pub const ABOUT: &str = "\
Says whether IMDSv1 can be switched off: only if the logs cover the time without a gap on every host, and \
nobody needed it. A call that the guard has refused was not needed: it would be refused by AWS just the same.

Exit code 0 and the next steps if so; 1 and what stands against it if not.";

/// What is looked at unless something else is said.
const DAYS: i64 = 14;
/// Gaps and callers that are shown.
const MOST: usize = 20;

/// Arguments of `imds-guard ready`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    logs: LogArguments,

    /// Hosts come and go: the time before the first and after the last event of a host is no gap
    #[arg(long)]
    elastic: bool,

    /// Print JSON, for machines
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Readiness {
    ready: bool,
    /// The time that was looked at (RFC 3339, UTC).
    from: String,
    to: String,
    hosts: usize,
    events: u64,
    /// Lines that are no events.
    skipped: u64,
    /// IMDSv1 calls that were answered.
    v1_needed: u64,
    /// IMDSv1 calls that were refused.
    v1_denied: u64,
    /// IMDSv1 calls that the guard carried over: these work without IMDSv1, but not without the guard.
    v1_upgraded: u64,
    /// Who needed IMDSv1.
    callers: Vec<Row>,
    /// Hosts that were not watched all the time.
    gaps: Vec<HostCoverage>,
    /// What to do next.
    next_steps: Vec<Step>,
}

#[derive(Clone, Copy, Serialize)]
struct Step {
    what: &'static str,
    /// To be run, or put into a file.
    text: &'static str,
}

/// Prints whether IMDSv1 can be switched off.
pub fn main(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let to = Timestamp::now();
    let window = jiff::SignedDuration::from_hours(24 * DAYS);
    let from = arguments
        .logs
        .since
        .map_or_else(|| to.checked_sub(window), Ok);
    let from = from.map_err(anyhow::Error::from)?;
    let summary = arguments.logs.read_since(Some(from))?;
    let readiness = judge(&summary, (from, to), arguments.elastic);
    if arguments.json {
        let json = to_json_pretty(&readiness).map_err(anyhow::Error::from)?;
        println!("{json}");
    } else {
        print(&readiness);
    }
    Ok(ExitCode::from(u8::from(!readiness.ready)))
}

fn judge(summary: &Summary, (from, to): (Timestamp, Timestamp), elastic: bool) -> Readiness {
    let report = Report::of(summary);
    let mut gaps = summary.coverage.judge(from, to, elastic);
    gaps.retain(|host| !host.gaps.is_empty());
    let mut callers = report.v1_callers;
    callers.retain(|row| row.calls.needed_v1() > 0);
    let needed = summary.calls.needed_v1();
    // Logs in which no host was heard of prove nothing.
    let ready = needed == 0 && gaps.is_empty() && report.hosts > 0 && summary.skipped == 0;
    Readiness {
        ready,
        from: format!("{from:.0}"),
        to: format!("{to:.0}"),
        hosts: report.hosts,
        events: summary.events,
        skipped: summary.skipped,
        v1_needed: needed,
        v1_denied: summary.calls.v1_denied,
        v1_upgraded: summary.calls.v1_upgraded,
        callers,
        gaps,
        next_steps: if ready { STEPS.to_vec() } else { Vec::new() },
    }
}

fn print(readiness: &Readiness) {
    println!(
        "{}: {} to {}, {} hosts, {} events",
        if readiness.ready {
            "ready"
        } else {
            "not ready"
        },
        readiness.from,
        readiness.to,
        readiness.hosts,
        readiness.events
    );
    for (calls, what) in [
        (readiness.v1_denied, "refused, and not needed"),
        (
            readiness.v1_upgraded,
            "carried over by the guard: keep it, and its rules",
        ),
    ] {
        if calls > 0 {
            println!("  {calls} calls without a session token were {what}");
        }
    }
    if readiness.hosts == 0 {
        println!("  no host has written events in this time");
    }
    if readiness.skipped > 0 {
        println!(
            "  {} lines are no events: what they said is not known",
            readiness.skipped
        );
    }
    if readiness.v1_needed > 0 {
        println!(
            "  {} calls without a session token were answered, of {} callers:",
            readiness.v1_needed,
            readiness.callers.len()
        );
    }
    for row in readiness.callers.iter().take(MOST) {
        let (what, place) = (row.identity.what(), row.identity.place());
        let calls = row.calls.needed_v1();
        println!("    {calls:>8}  {}  {}", plain(&what), plain(&place));
        println!("              {}", plain(&row.advice.text));
    }
    for host in readiness.gaps.iter().take(MOST) {
        println!("  {} was not watched all the time:", plain(&host.host));
        for gap in host.gaps.iter().take(3) {
            println!("    {} to {}: {}", gap.from, gap.to, gap.why);
        }
        if host.gaps.len() > 3 {
            println!("    and {} more", host.gaps.len() - 3);
        }
    }
    if readiness.gaps.len() > MOST {
        println!("  and {} more hosts", readiness.gaps.len() - MOST);
    }
    for step in &readiness.next_steps {
        println!("\n{}:\n", step.what);
        for line in step.text.lines() {
            println!("    {line}");
        }
    }
}

/// From the EC2 User Guide: "Modify instance metadata options", "Set IMDSv2 as the default for the
/// account", "Configure the AMI", and "Example policies for working with instance metadata".
const STEPS: [Step; 5] = [
    Step {
        what: "Instances that are running",
        text: "aws ec2 modify-instance-metadata-options --instance-id INSTANCE \\\n  \
               --http-tokens required --http-endpoint enabled",
    },
    Step {
        what: "Instances to come, in this account and region",
        text: "aws ec2 modify-instance-metadata-defaults --http-tokens required",
    },
    Step {
        what: "Images",
        text: "aws ec2 register-image … --imds-support v2.0\n\
               aws ec2 modify-image-attribute --image-id AMI --imds-support v2.0",
    },
    Step {
        what: "Terraform",
        text: "metadata_options {\n  http_endpoint = \"enabled\"\n  http_tokens   = \"required\"\n}\n\
               resource \"aws_ec2_instance_metadata_defaults\" \"this\" {\n  http_tokens = \"required\"\n}",
    },
    Step {
        what: "A service control policy, so that it stays so (and nothing uses credentials from IMDSv1)",
        text: r#"{
  "Version": "2012-10-17",
  "Statement": [
    {
      "Sid": "RequireImdsV2AtLaunch",
      "Effect": "Deny",
      "Action": "ec2:RunInstances",
      "Resource": "arn:aws:ec2:*:*:instance/*",
      "Condition": {"StringNotEquals": {"ec2:MetadataHttpTokens": "required"}}
    },
    {
      "Sid": "OnlyOneRoleChangesIt",
      "Effect": "Deny",
      "Action": "ec2:ModifyInstanceMetadataOptions",
      "Resource": "*",
      "Condition": {"StringNotLike": {"aws:PrincipalARN": "arn:aws:iam::*:role/ec2-imds-admins"}}
    },
    {
      "Sid": "NoCredentialsFromImdsV1",
      "Effect": "Deny",
      "Action": "*",
      "Resource": "*",
      "Condition": {"NumericLessThan": {"ec2:RoleDelivery": "2.0"}}
    }
  ]
}"#,
    },
];
