//! imds-guard as a whole. One binary, so that it links once; each module is one subject.

#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

mod attribution;
mod bounds;
mod bypass;
mod caller;
mod clients;
mod command_line;
mod configuration;
mod containers;
mod demo;
mod distance;
mod doctor;
mod events;
mod faults;
mod forensics;
mod holes;
mod http;
mod lab;
mod lifecycle;
mod live;
mod load;
mod logs;
mod outputs;
mod redirect;
mod rules;
mod selectors;
mod story;
mod strict;
mod tokens;
mod upgrade;
mod workloads;

/// imds-guard's command line.
const GUARD: &str = env!("CARGO_BIN_EXE_guard-under-test");

/// Every form of the metadata address.
const ADDRESSES: [&str; 3] = [
    "169.254.169.254",
    "[fd00:ec2::254]",
    "[::ffff:169.254.169.254]",
];

const INSTANCE_ID_PATH: &str = "/latest/meta-data/instance-id";
