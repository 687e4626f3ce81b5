//! Where each key comes from: a default, a file, the environment or the command line, the later ones
//! before the earlier.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use clap::{ArgMatches, Args as _, Command, parser::ValueSource};
use serde_json::{Map, Value};

use super::{CONFIG_FILE, Keys, Place, Settings, files::Source};
use crate::failure::Failure;

/// What the command line and the environment say, which does not change while the guard runs, and which
/// files to read.
#[derive(Clone, Debug)]
pub struct Layers {
    /// The configuration file.
    pub file: PathBuf,
    /// Whether it was named, and so has to be there.
    required: bool,
    given: Keys,
    /// Which of these are in the environment.
    environment: Vec<String>,
}

/// All layers in one.
#[derive(Clone, Debug)]
pub struct Configuration {
    /// The keys that are given.
    pub keys: Keys,
    /// Where from.
    pub origins: BTreeMap<String, Origin>,
    /// Where each of the rules comes from.
    pub rule_origins: Vec<Origin>,
    /// The files that were read.
    pub sources: Vec<PathBuf>,
}

/// Where a key comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A file, and where in it.
    File(PathBuf, Place),
    /// A variable of the environment.
    Environment(String),
    /// The command line.
    CommandLine,
}

impl Layers {
    /// From the arguments of a command, of which some are [`Keys`].
    #[must_use]
    pub fn new(file: Option<&Path>, given: Keys, matches: &ArgMatches) -> Self {
        let environment = Keys::augment_args(Command::new(""));
        let environment = environment
            .get_arguments()
            .map(|it| it.get_id().to_string());
        let is_from = |id: &String| {
            let source = matches
                .try_contains_id(id)
                .ok()
                .and_then(|_| matches.value_source(id));
            source == Some(ValueSource::EnvVariable)
        };
        Self {
            required: file.is_some(),
            file: file.unwrap_or(Path::new(CONFIG_FILE)).to_owned(),
            given,
            environment: environment.filter(is_from).collect(),
        }
    }

    /// Only a file.
    #[must_use]
    pub fn of_file(file: Option<&Path>) -> Self {
        Self {
            required: file.is_some(),
            file: file.unwrap_or(Path::new(CONFIG_FILE)).to_owned(),
            given: Keys::default(),
            environment: Vec::new(),
        }
    }

    /// Reads the files, and puts everything together.
    ///
    /// # Errors
    /// As [`files::read`].
    pub fn read(&self) -> Result<Configuration, Failure> {
        self.read_files(self.required)
    }

    /// Reads them once more. A file that was there and has gone is half a change, as of a deployment that
    /// removes it before it writes the new one: without its rules the guard would let everything pass. Files
    /// of conf.d are made to be removed.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_again(&self, before: &Configuration) -> Result<Configuration, Failure> {
        self.read_files(self.required || before.sources.contains(&self.file))
    }

    fn read_files(&self, required: bool) -> Result<Configuration, Failure> {
        let mut keys = Map::new();
        let mut origins = BTreeMap::new();
        let (mut rules, mut rule_origins, mut files) = (Vec::new(), Vec::new(), Vec::new());
        for source in super::files::read(&self.file, required)? {
            let Source {
                path,
                keys: mut read,
                places,
            } = source;
            let from = |place| Origin::File(path.clone(), place);
            rules.append(&mut read.rules);
            rule_origins.extend(places.rules.into_iter().map(from));
            for (key, value) in object(read)? {
                if let Some(place) = places.keys.get(&key) {
                    origins.insert(key.clone(), from(*place));
                }
                keys.insert(key, value);
            }
            files.push(path);
        }
        for (key, value) in object(self.given.clone())? {
            let origin = match self.environment.contains(&key) {
                true => Origin::Environment(format!("IMDS_GUARD_{}", key.to_uppercase())),
                false => Origin::CommandLine,
            };
            origins.insert(key.clone(), origin);
            keys.insert(key, value);
        }
        let keys: Keys =
            serde_json::from_value(Value::Object(keys)).map_err(anyhow::Error::from)?;
        Ok(Configuration {
            keys: Keys { rules, ..keys },
            origins,
            rule_origins,
            sources: files,
        })
    }
}

impl Configuration {
    /// The files that it was read from.
    #[must_use]
    pub fn files(&self) -> Vec<String> {
        self.sources
            .iter()
            .map(|path| path.display().to_string())
            .collect()
    }

    /// What it means.
    ///
    /// # Errors
    /// As [`Keys::settings`].
    pub fn settings(&self) -> Result<Settings, Failure> {
        self.keys
            .settings()
            .map_err(|wrong| wrong.at(&self.origins))
    }

    /// The effective values as TOML, each with where it comes from.
    ///
    /// # Errors
    /// None that is known.
    pub fn show(&self) -> Result<String, Failure> {
        let mut text = String::new();
        let effective = self.keys.or_defaults();
        for (key, value) in object(effective)? {
            let value = toml::Value::try_from(value).map_err(anyhow::Error::from)?;
            let origin = match self.origins.get(&key) {
                Some(origin) => origin.to_string(),
                None => "default".into(),
            };
            text += &format!("{:<60} # {origin}\n", format!("{key} = {value}"));
        }
        for (rule, origin) in self.keys.rules.iter().zip(&self.rule_origins) {
            let rule = Keys {
                rules: vec![rule.clone()],
                ..Keys::default()
            };
            let rule = toml::to_string(&rule).map_err(anyhow::Error::from)?;
            text += &format!("\n# {origin}\n{rule}");
        }
        Ok(text)
    }

    /// The keys that have another value than in `other`, of those that can only be changed by a restart.
    ///
    /// # Errors
    /// None that is known.
    pub fn needs_restart(&self, other: &Self) -> Result<Vec<String>, Failure> {
        let (new, old) = (
            object(self.keys.or_defaults())?,
            object(other.keys.or_defaults())?,
        );
        let keys = Keys::augment_args(Command::new(""));
        let keys = keys.get_arguments().map(|it| it.get_id().to_string());
        Ok(keys
            .filter(|key| !LIVE.contains(&key.as_str()) && new.get(key) != old.get(key))
            .collect())
    }
}

impl Keys {
    /// Keeps the values of others for some keys.
    ///
    /// # Errors
    /// None that is known.
    pub fn keep(&mut self, others: &Self, kept: &[String]) -> Result<(), Failure> {
        if kept.is_empty() {
            return Ok(());
        }
        let (mut keys, others) = (object(self.clone())?, object(others.clone())?);
        for key in kept {
            match others.get(key) {
                Some(value) => keys.insert(key.clone(), value.clone()),
                None => keys.remove(key),
            };
        }
        let keys: Self =
            serde_json::from_value(Value::Object(keys)).map_err(anyhow::Error::from)?;
        let rules = std::mem::take(&mut self.rules);
        *self = Self { rules, ..keys };
        Ok(())
    }
}

/// Keys that take effect at once.
const LIVE: [&str; 8] = [
    "mode",
    "hop_limit",
    "hop_limit_action",
    "token_binding",
    "mark_answers",
    "backstop",
    "on_failure",
    "on_stop",
];

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path, place) => write!(f, "{}:{place}", path.display()),
            Self::Environment(variable) => f.write_str(variable),
            Self::CommandLine => f.write_str("command line"),
        }
    }
}

/// The keys that are given, without rules.
fn object(keys: Keys) -> Result<Map<String, Value>, Failure> {
    let keys = Keys {
        rules: Vec::new(),
        ..keys
    };
    match serde_json::to_value(keys).map_err(anyhow::Error::from)? {
        Value::Object(keys) => Ok(keys),
        _ => Ok(Map::new()),
    }
}
