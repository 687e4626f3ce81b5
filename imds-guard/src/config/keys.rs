//! Every key of the configuration: in files, in the environment and on the command line.

use std::{
    net::SocketAddr,
    num::NonZeroU32,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clap::{Args, value_parser};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

use super::{
    IMDS_PORT, IMDS_V4, IMDS_V6, LISTENER_PORT, LISTENER_V4, LISTENER_V6, Limits, MetricsAt,
    OnFailure, OnStop, OutputSettings, Pair, RUN_DIR, Settings, Uplinks, Upstreams, Wrong,
};
use crate::{
    identify::{CommandLines, workload},
    kernel::PINS,
    policy::{Binding, HopLimitAction, Mode, Policy, Rule, Rules, pattern::Glob},
    record::output::{Collector, JOURNALD, Rotation, Sync},
};

/// Most connections that can be served at once.
const MAX_CONNECTIONS: u16 = 4000;

/// What can be configured. What is not given has a default that is right on EC2.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(title = "imds-guard configuration")]
pub struct Keys {
    /// audit: forward everything and record it; enforce: refuse requests without a session token. Rules
    /// come first
    /// [default: audit]
    #[arg(long, env = "IMDS_GUARD_MODE", value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,

    /// Network hops that a session token may travel, as the instance's HttpPutResponseHopLimit: 1
    /// for the host alone, 2 for containers with their own network, too. Refused in enforce mode,
    /// marked in audit mode
    /// [default: 1]
    #[arg(long, env = "IMDS_GUARD_HOP_LIMIT", value_name = "1-64", value_parser = value_parser!(u8).range(1..=64))]
    #[serde(
        skip_serializing_if = "Option::is_none",
        deserialize_with = "hop_limit"
    )]
    #[schemars(range(min = 1, max = 64))]
    pub hop_limit: Option<u8>,

    /// What becomes of requests for a session token from further away, in enforce mode: reject answers them
    /// with 403 at once; drop never answers them, as on EC2, where clients wait until they give up
    /// [default: reject]
    #[arg(long, env = "IMDS_GUARD_HOP_LIMIT_ACTION", value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hop_limit_action: Option<HopLimitAction>,

    /// Where a session token is valid: everywhere (off), or in the network namespace (netns), container or
    /// cgroup that it was fetched in. Elsewhere it is refused with 401, so that clients fetch one of their own
    /// [default: container in enforce mode, off in audit mode]
    #[arg(long, env = "IMDS_GUARD_TOKEN_BINDING", value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_binding: Option<Binding>,

    /// Say in a header, X-Imds-Guard, why the guard has answered in place of the service
    /// [default: false]
    #[arg(long, env = "IMDS_GUARD_MARK_ANSWERS", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mark_answers: Option<bool>,

    /// Cgroup v2 directory whose processes are watched
    /// [default: the root, every process]
    #[arg(long, env = "IMDS_GUARD_CGROUP", value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<PathBuf>,

    /// The guard's own address, one for each family, both with the same port
    /// [default: 169.254.171.254:254 and [fd00:ec2::a9fe:abfe]:254]
    #[arg(
        long,
        env = "IMDS_GUARD_LISTEN",
        value_name = "ADDRESS:PORT",
        value_delimiter = ','
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<String>>")]
    pub listen: Option<Vec<SocketAddr>>,

    /// Network interface that carries the guard's addresses
    /// [default: lo]
    #[arg(long, env = "IMDS_GUARD_LINK", value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,

    /// Guard the uplinks against packets of virtual machines, packet sockets and the like
    /// [default: true]
    #[arg(long, env = "IMDS_GUARD_PERIMETER", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perimeter: Option<bool>,

    /// Network interface through which the host is connected; may be repeated
    /// [default: every network card of the machine, also those that come later]
    #[arg(
        long,
        env = "IMDS_GUARD_UPLINK",
        value_name = "NAME",
        value_delimiter = ','
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uplink: Option<Vec<String>>,

    /// Judge packets that processes send to the metadata service past the redirect
    /// [default: true]
    #[arg(long, env = "IMDS_GUARD_BACKSTOP", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backstop: Option<bool>,

    /// What becomes of connections when the guard has been killed, or was stopped and its kernel programs
    /// stay: within a second they are refused, or go straight to the metadata service
    /// [default: closed in enforce mode, open in audit mode]
    #[arg(long, env = "IMDS_GUARD_ON_FAILURE", value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_failure: Option<OnFailure>,

    /// What becomes of the kernel programs on SIGTERM: they are kept for the next start, or go
    /// [default: keep in enforce mode, detach in audit mode]
    #[arg(long, env = "IMDS_GUARD_ON_STOP", value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_stop: Option<OnStop>,

    /// Where the kernel programs and maps are pinned
    /// [default: /sys/fs/bpf/imds-guard]
    #[arg(long, env = "IMDS_GUARD_PINS", value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pins: Option<PathBuf>,

    /// Where the keys of session tokens and the control socket are, until the machine is switched off
    /// [default: /run/imds-guard]
    #[arg(long, env = "IMDS_GUARD_RUN_DIR", value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_dir: Option<PathBuf>,

    /// Metadata address that clients ask for, one for each family
    /// [default: 169.254.169.254:80 and [fd00:ec2::254]:80]
    #[arg(
        long,
        env = "IMDS_GUARD_ENDPOINT",
        value_name = "ADDRESS:PORT",
        value_delimiter = ','
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<String>>")]
    pub endpoint: Option<Vec<SocketAddr>>,

    /// Where requests are forwarded to, one for each family
    /// [default: the endpoints]
    #[arg(
        long,
        env = "IMDS_GUARD_UPSTREAM",
        value_name = "ADDRESS:PORT",
        value_delimiter = ','
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<String>>")]
    pub upstream: Option<Vec<SocketAddr>>,

    /// Event log, rotated by size and age; `-` is standard output
    /// [default: -, unless ocsf or emf is]
    #[arg(long, env = "IMDS_GUARD_EVENTS", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub events: Option<PathBuf>,

    /// MiB in one file, before a new one is begun and the old one compressed
    /// [default: 64]
    #[arg(long, env = "IMDS_GUARD_EVENTS_FILE_MIB", value_name = "MIB")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub events_file_mib: Option<NonZeroU32>,

    /// Hours in one file
    /// [default: 24]
    #[arg(long, env = "IMDS_GUARD_EVENTS_FILE_HOURS", value_name = "HOURS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub events_file_hours: Option<NonZeroU32>,

    /// MiB in all files of a log; the oldest is removed
    /// [default: 1024]
    #[arg(long, env = "IMDS_GUARD_EVENTS_TOTAL_MIB", value_name = "MIB")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub events_total_mib: Option<NonZeroU32>,

    /// When events are brought to the disk itself: never (when the kernel sees fit), once a second, or with
    /// every batch
    /// [default: second]
    #[arg(long, env = "IMDS_GUARD_EVENTS_SYNC", value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub events_sync: Option<Sync>,

    /// Fold calls of one process that are alike within so many seconds into one line; 0 is not at all
    /// [default: 0]
    #[arg(long, env = "IMDS_GUARD_EVENTS_FOLD_SECONDS", value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub events_fold_seconds: Option<u32>,

    /// Let each line of the event log carry the hash of the one before: `imds-guard events verify`
    /// [default: false]
    #[arg(long, env = "IMDS_GUARD_EVENTS_CHAIN", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub events_chain: Option<bool>,

    /// Also write requests in the Open Cybersecurity Schema Framework's form to this file, or `-`
    /// [default: none]
    #[arg(long, env = "IMDS_GUARD_OCSF", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ocsf: Option<PathBuf>,

    /// Also write requests without a session token in CloudWatch's embedded metric format to this file, or `-`
    /// [default: none]
    #[arg(long, env = "IMDS_GUARD_EMF", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub emf: Option<PathBuf>,

    /// Also send events to journald, which listens on this socket
    /// [default: none; without a value /run/systemd/journal/socket]
    #[arg(long, env = "IMDS_GUARD_JOURNALD", value_name = "SOCKET", num_args = 0..=1, require_equals = true, default_missing_value = JOURNALD)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub journald: Option<PathBuf>,

    /// Also send events to this collector of OpenTelemetry logs, as http://127.0.0.1:4318
    /// [default: none]
    #[arg(long, env = "IMDS_GUARD_OTLP", value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otlp: Option<String>,

    /// Serve metrics for Prometheus on this loopback address and port, or Unix socket
    /// [default: none]
    #[arg(long, env = "IMDS_GUARD_METRICS", value_name = "ADDRESS:PORT|PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<MetricsAt>,

    /// How much of the callers' command lines is recorded: redacted, full or off
    /// [default: redacted]
    #[arg(long, env = "IMDS_GUARD_COMMAND_LINES", value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command_lines: Option<CommandLines>,

    /// Client connections served at once; more wait
    /// [default: 1024]
    #[arg(long, env = "IMDS_GUARD_MAX_CONNECTIONS", value_name = "1-4000", value_parser = value_parser!(u16).range(1..=i64::from(MAX_CONNECTIONS)))]
    #[serde(
        skip_serializing_if = "Option::is_none",
        deserialize_with = "max_connections"
    )]
    #[schemars(range(min = 1, max = 4000))]
    pub max_connections: Option<u16>,

    /// Messages of the kernel programs: off, error, warn, info, debug or trace
    /// [default: off]
    #[arg(long, env = "IMDS_GUARD_KERNEL_LOG", value_enum, value_name = "LEVEL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel_log: Option<KernelLog>,

    /// Socket of docker, which is asked for the names and images of its containers
    /// [default: /run/docker.sock]
    #[arg(long, env = "IMDS_GUARD_DOCKER_SOCKET", value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub docker_socket: Option<PathBuf>,

    /// Where containerd keeps the state of its containers
    /// [default: /run/containerd]
    #[arg(long, env = "IMDS_GUARD_CONTAINERD_STATE", value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub containerd_state: Option<PathBuf>,

    /// Where CRI-O and podman keep the state of their containers
    /// [default: /run/containers/storage]
    #[arg(long, env = "IMDS_GUARD_CONTAINERS_STORAGE", value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub containers_storage: Option<PathBuf>,

    /// Name of the Kubernetes node that this host is: its pods are asked for
    /// [default: none, and Kubernetes is not asked]
    #[arg(long, env = "IMDS_GUARD_KUBERNETES_NODE", value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubernetes_node: Option<String>,

    /// How the Kubernetes API server is reached
    /// [default: as from within a pod]
    #[arg(long, env = "IMDS_GUARD_KUBECONFIG", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubeconfig: Option<PathBuf>,

    /// Rules, in their order: the first one that matches counts
    #[arg(skip)]
    #[serde(
        rename = "rule",
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "rules"
    )]
    pub rules: Vec<Rule>,
}

/// Least severe message of the kernel programs that is logged.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum KernelLog {
    /// None.
    #[default]
    Off,
    /// Errors.
    Error,
    /// Warnings.
    Warn,
    /// Information.
    Info,
    /// Each decision.
    Debug,
    /// Everything.
    Trace,
}

impl From<KernelLog> for log::LevelFilter {
    fn from(level: KernelLog) -> Self {
        match level {
            KernelLog::Off => Self::Off,
            KernelLog::Error => Self::Error,
            KernelLog::Warn => Self::Warn,
            KernelLog::Info => Self::Info,
            KernelLog::Debug => Self::Debug,
            KernelLog::Trace => Self::Trace,
        }
    }
}

impl Keys {
    /// What they mean, with the defaults for what is not given.
    ///
    /// # Errors
    /// Keys that contradict each other.
    pub fn settings(&self) -> Result<Settings, Wrong> {
        let endpoints = Pair::new(IMDS_V4, IMDS_V6, IMDS_PORT)
            .with(self.endpoint.as_deref().unwrap_or_default(), "endpoint")?;
        let listeners = Pair::new(LISTENER_V4, LISTENER_V6, LISTENER_PORT)
            .with(self.listen.as_deref().unwrap_or_default(), "listen")?;
        let mode = self.mode.unwrap_or_default();
        let path = |given: &Option<PathBuf>, default: &str| {
            given.clone().unwrap_or_else(|| default.into())
        };
        let uplinks = self.uplink.clone().unwrap_or_default();
        let sources = workload::Sources::default();
        let settings = Settings {
            policy: Policy {
                mode,
                hop_limit: self.hop_limit.unwrap_or(1),
                hop_limit_action: self.hop_limit_action.unwrap_or_default(),
                token_binding: self.token_binding,
                rules: Arc::new(Rules::new(self.rules.iter().map(with_real_paths).collect())),
            },
            cgroup: self.cgroup.clone(),
            endpoints,
            listeners,
            link: self.link.clone().unwrap_or_else(|| "lo".into()),
            uplinks: match (self.perimeter.unwrap_or(true), uplinks.is_empty()) {
                (false, _) => Uplinks::None,
                (true, true) => Uplinks::Physical,
                (true, false) => Uplinks::Named(uplinks),
            },
            backstop: self.backstop.unwrap_or(true),
            on_failure: self.on_failure,
            on_stop: self.on_stop,
            pins: path(&self.pins, PINS),
            replace: false,
            upstreams: Upstreams::resolve(endpoints, self.upstream.as_deref().unwrap_or_default())?,
            outputs: self.outputs()?,
            metrics: self.metrics.clone(),
            run_dir: path(&self.run_dir, RUN_DIR),
            marks_answers: self.mark_answers.unwrap_or_default(),
            command_lines: self.command_lines.unwrap_or_default(),
            kernel_log: self.kernel_log.unwrap_or_default().into(),
            limits: Limits::for_connections(self.max_connections.unwrap_or(1024).into()),
            workloads: workload::Sources {
                docker_socket: self.docker_socket.clone().or(sources.docker_socket),
                containerd_state: self
                    .containerd_state
                    .clone()
                    .unwrap_or(sources.containerd_state),
                containers_storage: self
                    .containers_storage
                    .clone()
                    .unwrap_or(sources.containers_storage),
                kubernetes: self
                    .kubernetes_node
                    .clone()
                    .map(|node| workload::Kubernetes {
                        node,
                        kubeconfig: self.kubeconfig.clone(),
                    }),
            },
        };
        settings.validate()?;
        Ok(settings)
    }

    fn outputs(&self) -> Result<OutputSettings, Wrong> {
        let default = OutputSettings::default();
        let mib = |given: Option<NonZeroU32>, default| {
            given.map_or(default, |mib| u64::from(mib.get()) * 1024 * 1024)
        };
        let hours = |hours: NonZeroU32| Duration::from_secs(u64::from(hours.get()) * 3600);
        let collector = self.otlp.as_deref().map(Collector::at).transpose();
        let collector = collector.map_err(|why| Wrong::new(["otlp"], format!("otlp: {why}")))?;
        let fold = self.events_fold_seconds.filter(|seconds| *seconds > 0);
        let rotation = default.rotation;
        let outputs = OutputSettings {
            events: self.events.clone(),
            ocsf: self.ocsf.clone(),
            emf: self.emf.clone(),
            journald: self.journald.clone(),
            otlp: collector,
            fold: fold.map(|seconds| Duration::from_secs(seconds.into())),
            chain: self.events_chain.unwrap_or_default(),
            rotation: Rotation {
                size: mib(self.events_file_mib, rotation.size),
                age: self.events_file_hours.map_or(rotation.age, hours),
                total: mib(self.events_total_mib, rotation.total),
                sync: self.events_sync.unwrap_or_default(),
            },
        };
        outputs.validate()?;
        Ok(outputs)
    }

    /// These, and the defaults of those that have one value for all hosts and modes.
    #[must_use]
    pub fn or_defaults(&self) -> Self {
        let text = |path: &str| Some(PathBuf::from(path));
        let sources = workload::Sources::default();
        let pair = |v4, v6, port| Some(Pair::new(v4, v6, port).both().to_vec());
        let given = self.clone();
        let mode = given.mode.unwrap_or_default();
        Self {
            mode: Some(mode),
            hop_limit: given.hop_limit.or(Some(1)),
            hop_limit_action: given.hop_limit_action.or_else(|| Some(Default::default())),
            token_binding: given.token_binding.or(Some(Binding::of(mode))),
            mark_answers: given.mark_answers.or(Some(false)),
            listen: given
                .listen
                .or_else(|| pair(LISTENER_V4, LISTENER_V6, LISTENER_PORT)),
            link: given.link.or_else(|| Some("lo".into())),
            perimeter: given.perimeter.or(Some(true)),
            uplink: given.uplink.or_else(|| Some(Vec::new())),
            backstop: given.backstop.or(Some(true)),
            on_failure: given.on_failure.or(Some(OnFailure::of(mode))),
            on_stop: given.on_stop.or(Some(OnStop::of(mode))),
            pins: given.pins.or_else(|| text(PINS)),
            run_dir: given.run_dir.or_else(|| text(RUN_DIR)),
            endpoint: given.endpoint.or_else(|| pair(IMDS_V4, IMDS_V6, IMDS_PORT)),
            command_lines: given.command_lines.or_else(|| Some(Default::default())),
            events_file_mib: given.events_file_mib.or(NonZeroU32::new(64)),
            events_file_hours: given.events_file_hours.or(NonZeroU32::new(24)),
            events_total_mib: given.events_total_mib.or(NonZeroU32::new(1024)),
            events_sync: given.events_sync.or_else(|| Some(Default::default())),
            events_fold_seconds: given.events_fold_seconds.or(Some(0)),
            events_chain: given.events_chain.or(Some(false)),
            max_connections: given.max_connections.or(Some(1024)),
            kernel_log: given.kernel_log.or_else(|| Some(Default::default())),
            docker_socket: given.docker_socket.or(sources.docker_socket),
            containerd_state: given.containerd_state.or(Some(sources.containerd_state)),
            containers_storage: given
                .containers_storage
                .or(Some(sources.containers_storage)),
            ..given
        }
    }
}

/// A program may be named by a link to it, such as `/usr/bin/python3`; what runs is the file.
fn with_real_paths(rule: &Rule) -> Rule {
    let mut rule = rule.clone();
    let real = |glob: &Glob| {
        let written = Path::new(glob.as_literal()?);
        let real = written.canonicalize().ok()?;
        (real != written).then(|| Glob::literal(&real.to_string_lossy()))
    };
    for globs in [&mut rule.exe, &mut rule.ancestor_exe]
        .into_iter()
        .flatten()
    {
        globs.add_each(real);
    }
    rule
}

fn hop_limit<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u8>, D::Error> {
    Ok(Some(
        crate::policy::HopLimit::deserialize(deserializer)?.get(),
    ))
}

fn max_connections<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u16>, D::Error> {
    match u16::deserialize(deserializer)? {
        number @ 1..=MAX_CONNECTIONS => Ok(Some(number)),
        _ => Err(D::Error::custom(
            "max_connections is a number from 1 to 4000",
        )),
    }
}

/// Rules that are valid, each by itself: an error has the place of the rule.
fn rules<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Rule>, D::Error> {
    struct Valid(Rule);
    impl<'de> Deserialize<'de> for Valid {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            let rule = Rule::deserialize(deserializer)?;
            match rule.validate() {
                Ok(()) => Ok(Self(rule)),
                Err(error) => Err(D::Error::custom(format!("rule \"{}\": {error}", rule.name))),
            }
        }
    }
    let rules = Vec::<Valid>::deserialize(deserializer)?;
    Ok(rules.into_iter().map(|Valid(rule)| rule).collect())
}
