//! `imds-guard explain`.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::{
    config::{Layers, RUN_DIR},
    control::{self, Client, Question, Request},
    failure::Failure,
    identify::{CommandLines, Resolver, workload::Workloads},
    kernel::probe,
    policy::{Caller, Explanation, Fit},
    record::to_json_pretty,
};

/// For `--help`.
pub const ABOUT: &str = "\
Shows how a request would be judged: which rule decides, why each earlier one does not match, and what \
would happen. The request comes from a process that is there (--pid) or from one that is made up, of \
which everything is as given and nothing else.

The guard that is running answers. With --config, or where none is running, the configuration is read \
here.";

/// Arguments of `imds-guard explain`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    question: Question,

    /// Print JSON, for machines
    #[arg(long)]
    json: bool,

    /// Ask this configuration, and not the guard that is running
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Directory of the control socket
    #[arg(long, value_name = "PATH", default_value = RUN_DIR, env = "IMDS_GUARD_RUN_DIR")]
    run_dir: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Answer {
    caller: Caller,
    explanation: Explanation,
}

/// Explains.
pub fn main(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let running = match &arguments.config {
        Some(_) => None,
        None => Client::connect(&arguments.run_dir)?,
    };
    let answer = match running {
        Some(mut guard) => guard.ask(Request::Explain(Box::new(arguments.question.clone())))?,
        None => here(arguments)?,
    };
    if arguments.json {
        let json = to_json_pretty(&answer).map_err(anyhow::Error::from)?;
        println!("{json}");
    } else {
        print(&answer);
    }
    Ok(ExitCode::SUCCESS)
}

fn here(arguments: &Arguments) -> Result<Answer, Failure> {
    let settings = Layers::of_file(arguments.config.as_deref())
        .read()?
        .settings()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.context("no thread can be started")?;
    let explained = runtime.block_on(async {
        let resolver = Resolver::new(
            "/proc",
            ("/etc/passwd", "/etc/group"),
            probe::cgroup2_mount().unwrap_or_default(),
            Workloads::new(settings.workloads.clone()),
            None,
            CommandLines::Off,
        );
        control::explain(&settings.policy, &resolver, &arguments.question).await
    });
    let (caller, explanation) = explained.map_err(Failure::Refused)?;
    Ok(Answer {
        caller,
        explanation,
    })
}

fn print(answer: &Answer) {
    let Answer {
        caller,
        explanation,
    } = answer;
    let exe = caller.exe.as_deref().unwrap_or("(no program)");
    let verified = if caller.exe_verified {
        ""
    } else {
        ", not a file of the host by that name"
    };
    println!("caller   {}{verified}", exe.escape_default());
    println!("         uid {}, pid {}", caller.uid, caller.pid);
    for rule in &explanation.rules {
        let why = match rule.matches {
            Fit::Yes if rule.expired => "would match, but has expired".into(),
            Fit::Yes => "matches".into(),
            Fit::No => format!("does not match: {}", rule.mismatches.join(", ")),
            Fit::Unknown => format!("not known: {}", rule.unknown.join(", ")),
        };
        println!("rule     \"{}\": {why}", rule.name);
    }
    match &explanation.rule {
        Some(rule) => println!("decides  rule \"{rule}\""),
        None => println!("decides  {} mode", explanation.mode),
    }
    let verdict = format!("{:?}", explanation.verdict).to_lowercase();
    let status = explanation
        .status
        .map_or(String::new(), |status| format!(", answered with {status}"));
    println!("verdict  {verdict} ({}{status})", explanation.reason);
    println!(
        "besides  hop limit {}, tokens bound to: {:?}",
        explanation.hop_limit, explanation.token_binding
    );
}
