//! What is in force while the guard runs: read again, switched, and returned in time.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use imds_guard_common::control;
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use tokio::time::Instant;

use crate::{
    config::{Configuration, Layers, OnFailure, Settings},
    control::{Changed, Standing},
    failure::Failure,
    kernel::Control,
    policy::{Mode, Policy},
    proxy::{Force, InForce},
    record::{By, Change, Kind, PolicyChange, Recorder, RuleExpired},
    tokens::Tokens,
};

/// How long before a rule expires it is said.
const NOTICE: SignedDuration = SignedDuration::from_hours(7 * 24);
/// How often rules are looked through for those that expire: the clock may be set meanwhile.
const LOOK: Duration = Duration::from_secs(30);

/// Configuration, and what is in force of it.
pub struct Steering {
    layers: Layers,
    configuration: Configuration,
    settings: Settings,
    /// The mode that was switched to, and until when.
    switched: Option<(Mode, Option<Until>)>,
    in_force: Arc<InForce>,
    standing: Arc<Mutex<Standing>>,
    tokens: Arc<Tokens>,
    recorder: Recorder,
    /// Rules of which it was said that they expire soon (`false`), or have (`true`).
    noticed: HashMap<Arc<str>, bool>,
}

#[derive(Clone, Copy)]
struct Until {
    /// By a clock that nobody sets.
    at: Instant,
    /// By the clock on the wall.
    shown: Timestamp,
}

impl Steering {
    /// At the start.
    pub fn new(
        layers: Layers,
        configuration: Configuration,
        settings: Settings,
        tokens: Arc<Tokens>,
        recorder: Recorder,
    ) -> Self {
        let force = Force {
            policy: settings.policy.clone(),
            marks_answers: settings.marks_answers,
        };
        let steering = Self {
            in_force: Arc::new(InForce::new(force)),
            standing: Arc::default(),
            layers,
            configuration,
            settings,
            switched: None,
            tokens,
            recorder,
            noticed: HashMap::new(),
        };
        steering.stand(None, Vec::new());
        steering.warn();
        steering
    }

    /// What is in force.
    pub fn in_force(&self) -> Arc<InForce> {
        Arc::clone(&self.in_force)
    }

    /// What the configuration says besides.
    pub fn standing(&self) -> Arc<Mutex<Standing>> {
        Arc::clone(&self.standing)
    }

    /// Where the configuration is read from.
    pub fn layers(&self) -> &Layers {
        &self.layers
    }

    /// As configured, with the mode that is in force.
    pub fn settings(&self) -> Settings {
        let mut settings = self.settings.clone();
        settings.policy.mode = self.mode();
        settings
    }

    /// What the kernel programs are told.
    pub fn control(&self, addresses: u32) -> control::Control {
        let settings = self.settings();
        let mode = match settings.policy.mode {
            Mode::Audit => control::Mode::Audit,
            Mode::Enforce => control::Mode::Enforce,
        };
        control::Control {
            mode: mode as u32,
            on_failure: control::OnFailure::from(settings.on_failure()) as u32,
            backstop: settings.backstop.into(),
            owner: std::process::id(),
            addresses,
            padding: 0,
        }
    }

    /// Reads the configuration again. What is wrong in it changes nothing.
    pub fn reload(&mut self, by: Option<By>, control: &mut Control) -> Result<Value, String> {
        let read = self.layers.read_again(&self.configuration);
        let read = read.and_then(|read| Ok((read.settings()?, read)));
        let (mut settings, read) = match read {
            Ok(read) => read,
            Err(error) => return Err(self.reject(by, &error)),
        };
        // Names of programs may be links that lead elsewhere now.
        let is_same_rules = settings.policy.rules.list() == self.settings.policy.rules.list();
        if by.is_none() && read.keys == self.configuration.keys && is_same_rules {
            // A file was touched.
            self.stand(None, self.needs_restart());
            return Ok(Value::Null);
        }
        settings.replace = self.settings.replace;
        let needs_restart = match read.needs_restart(&self.configuration) {
            Ok(keys) => keys,
            Err(error) => return Err(self.reject(by, &error)),
        };
        if !needs_restart.is_empty() {
            log::warn!(
                "these take effect only at the next start: {}",
                needs_restart.join(", ")
            );
        }
        let settings = Settings {
            policy: settings.policy,
            marks_answers: settings.marks_answers,
            backstop: settings.backstop,
            on_failure: settings.on_failure,
            on_stop: settings.on_stop,
            ..self.settings.clone()
        };
        // What needs a restart is compared with what the guard was started with, next time, too.
        let started_with = &self.configuration.keys;
        let mut keys = read.keys.clone();
        keys.keep(started_with, &needs_restart)
            .map_err(|error| error.to_string())?;
        self.configuration = Configuration { keys, ..read };
        self.settings = settings;
        self.warn();
        self.enforce(control);
        self.stand(None, needs_restart);
        log::info!("the configuration was read again: {} rules", self.rules());
        self.tell(Change::Reloaded, by, None);
        json(&self.changed())
    }

    /// Switches the mode, for some time or for good, or returns to the one that is configured.
    pub fn switch(
        &mut self,
        mode: Option<Mode>,
        lasts: Option<Duration>,
        by: Option<By>,
        control: &mut Control,
    ) -> Result<Value, String> {
        let until = match lasts {
            Some(lasts) => {
                let shown = SignedDuration::try_from(lasts).ok();
                let shown = shown.and_then(|lasts| Timestamp::now().checked_add(lasts).ok());
                let at = Instant::now().checked_add(lasts);
                let until = at.zip(shown).map(|(at, shown)| Until { at, shown });
                Some(until.ok_or("that is too long: leave the time out")?)
            }
            None => None,
        };
        self.switched = mode.map(|mode| (mode, until));
        self.enforce(control);
        self.stand(self.rejected(), self.needs_restart());
        match self.until() {
            Some(until) => log::info!("the mode is {} until {until}", self.mode()),
            None => log::info!("the mode is {}", self.mode()),
        }
        let change = if mode.is_some() {
            Change::Mode
        } else {
            Change::ModeReturned
        };
        self.tell(change, by, None);
        json(&self.changed())
    }

    /// Waits until there is something to do by itself.
    pub async fn due(&self) {
        let returns = self
            .switched
            .and_then(|(_, until)| until)
            .map(|until| until.at);
        let now = Timestamp::now();
        let rules = self.settings.policy.rules.list().iter();
        let expires = rules.filter_map(|rule| rule.expires.map(|expires| expires.at()));
        let next = expires.filter(|at| *at > now).min();
        let look = next
            .and_then(|at| Duration::try_from(at.duration_since(now)).ok())
            .map_or(LOOK, |left| left.min(LOOK));
        let look = Instant::now() + look;
        tokio::time::sleep_until(returns.map_or(look, |returns| returns.min(look))).await;
    }

    /// Does it.
    pub fn catch_up(&mut self, control: &mut Control) {
        let returns = self.switched.and_then(|(_, until)| until);
        if returns.is_some_and(|until| until.at <= Instant::now())
            && let Err(error) = self.switch(None, None, None, control)
        {
            log::error!("the mode does not return: {error}");
        }
        self.notice_expiry();
    }

    /// Says which rules expire soon, and which have.
    pub fn notice_expiry(&mut self) {
        let now = Timestamp::now();
        let rules = Arc::clone(&self.settings.policy.rules);
        self.noticed
            .retain(|name, _| rules.list().iter().any(|rule| rule.name == *name));
        for rule in rules.list() {
            let Some(expires) = rule.expires else {
                continue;
            };
            let is_over = !rule.holds(now);
            if !is_over && expires.at().duration_since(now) > NOTICE {
                self.noticed.remove(&rule.name);
                continue;
            }
            if self.noticed.insert(Arc::clone(&rule.name), is_over) == Some(is_over) {
                continue;
            }
            let owner = rule
                .owner
                .as_deref()
                .unwrap_or("nobody is named as its owner");
            if is_over {
                log::warn!("rule \"{}\" has expired ({expires}; {owner})", rule.name);
                self.recorder.record(Kind::RuleExpired(RuleExpired {
                    rule: rule.name.to_string(),
                    owner: rule.owner.clone(),
                    expires: expires.to_string(),
                }));
            } else {
                log::warn!("rule \"{}\" expires soon ({expires}; {owner})", rule.name);
            }
        }
    }

    fn mode(&self) -> Mode {
        self.switched
            .map_or(self.settings.policy.mode, |(mode, _)| mode)
    }

    fn until(&self) -> Option<String> {
        let (_, until) = self.switched?;
        Some(format!("{:.0}", until?.shown))
    }

    fn rules(&self) -> usize {
        self.settings.policy.rules.list().len()
    }

    fn enforce(&mut self, control: &mut Control) {
        let force = Force {
            policy: Policy {
                mode: self.mode(),
                ..self.settings.policy.clone()
            },
            marks_answers: self.settings.marks_answers,
        };
        // Rules may bind otherwise, too.
        self.tokens.rebind();
        self.in_force.swap(force);
        if control.is_mine() {
            let addresses = control.get().addresses;
            if let Err(error) = control.set(self.control(addresses)) {
                log::error!("{error:#}");
            }
        }
        self.notice_expiry();
    }

    fn warn(&self) {
        if let Some(warning) = self.settings.workloads.warning(&self.settings.policy.rules) {
            log::warn!("{warning}");
        }
    }

    fn reject(&self, by: Option<By>, error: &Failure) -> String {
        let error = error.to_string();
        log::error!("the configuration is left as it was: {error}");
        self.stand(Some(error.clone()), self.needs_restart());
        self.tell(Change::Rejected, by, Some(error.clone()));
        error
    }

    fn tell(&self, change: Change, by: Option<By>, error: Option<String>) {
        self.recorder.record(Kind::Policy(PolicyChange {
            change,
            by,
            mode: self.mode(),
            until: self.until(),
            rules: self.rules(),
            error,
            needs_restart: self.needs_restart(),
        }));
    }

    fn changed(&self) -> Changed {
        Changed {
            mode: self.mode(),
            until: self.until(),
            rules: self.rules(),
            needs_restart: self.needs_restart(),
        }
    }

    fn stand(&self, rejected: Option<String>, needs_restart: Vec<String>) {
        let standing = Standing {
            configured_mode: self.settings.policy.mode,
            mode_until: self.until(),
            files: self.configuration.files(),
            rejected,
            needs_restart,
            events: self
                .settings
                .outputs
                .events_file()
                .map(|path| path.display().to_string()),
        };
        *self.standing.lock().unwrap_or_else(PoisonError::into_inner) = standing;
    }

    fn needs_restart(&self) -> Vec<String> {
        self.stood().needs_restart
    }

    fn rejected(&self) -> Option<String> {
        self.stood().rejected
    }

    fn stood(&self) -> Standing {
        self.standing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// What a guard does when it is gone, for the log.
pub fn when_gone(settings: &Settings) -> &'static str {
    match settings.on_failure() {
        OnFailure::Closed => "closed",
        OnFailure::Open => "open",
    }
}

fn json(changed: &Changed) -> Result<Value, String> {
    serde_json::to_value(changed).map_err(|error| error.to_string())
}
