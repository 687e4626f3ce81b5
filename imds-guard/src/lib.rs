//! imds-guard: a transparent enforcement proxy for the EC2 instance metadata service (IMDS).
//!
//! A request goes one way, and the modules follow it: [`kernel`] redirects the connection, [`proxy`]
//! accepts it, [`identify`] names the caller, [`policy`] decides, [`proxy`] forwards or refuses,
//! [`record`] writes what happened; [`tokens`] are valid only where
//! they were issued. [`service`] puts them together, as [`config`] says and [`control`] changes. See `docs/ARCHITECTURE.md`.

pub mod cli;
pub mod config;
pub mod control;
pub mod failure;
pub mod forensics;
pub mod identify;
pub mod kernel;
pub mod lab;
pub mod net;
pub mod policy;
pub mod proxy;
pub mod record;
pub mod service;
pub mod tokens;
