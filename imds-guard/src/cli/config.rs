//! `imds-guard config`.

use std::{path::PathBuf, process::ExitCode};

use clap::{ArgMatches, Args, Subcommand};

use crate::{
    config::{Keys, Layers, example, schema},
    failure::Failure,
};

/// Arguments of `imds-guard config`.
#[derive(Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Say whether the configuration is valid, and where it is not
    Check(Layered),
    /// Show every value that is in force, and where it comes from
    Show(Layered),
    /// Print the JSON Schema of configuration files
    Schema,
    /// Print a configuration file with every key
    Example,
}

/// As for `imds-guard run`.
#[derive(Args)]
struct Layered {
    /// Configuration file; those in conf.d beside it are read, too
    /// [default: /etc/imds-guard/config.toml]
    #[arg(long, env = "IMDS_GUARD_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(flatten)]
    keys: Keys,
}

/// Checks, shows or describes.
pub fn main(arguments: &Arguments, matches: &ArgMatches) -> Result<ExitCode, Failure> {
    let read = |layered: &Layered| {
        Layers::new(layered.config.as_deref(), layered.keys.clone(), matches).read()
    };
    match &arguments.command {
        Command::Check(layered) => {
            let configuration = read(layered)?;
            let settings = configuration.settings()?;
            let rules = settings.policy.rules.list();
            let files = configuration.files();
            match files.is_empty() {
                true => println!("there is no configuration file: the defaults hold"),
                false => println!("{}: valid", files.join(", ")),
            }
            println!("{} mode, {} rules", settings.policy.mode, rules.len());
            if let Some(warning) = settings.workloads.warning(&settings.policy.rules) {
                println!("{warning}");
            }
            let now = jiff::Timestamp::now();
            for rule in rules.iter().filter(|rule| !rule.holds(now)) {
                println!("rule \"{}\" has expired", rule.name);
            }
        }
        Command::Show(layered) => {
            let configuration = read(layered)?;
            configuration.settings()?;
            print!("{}", configuration.show()?);
        }
        Command::Schema => {
            let schema = serde_json::to_string_pretty(&schema()).map_err(anyhow::Error::from)?;
            println!("{schema}");
        }
        Command::Example => print!("{}", example()?),
    }
    Ok(ExitCode::SUCCESS)
}
