//! `imds-guard detach`.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Args;

use crate::{
    config::{LISTENER_PORT, LISTENER_V4, LISTENER_V6, Pair},
    failure::Failure,
    kernel::{Control, PINS, Pins, remove_filters},
    net::{self, Addresses},
};

/// For `--help`.
pub const ABOUT: &str = "\
Removes what a guard has left on this host: kernel programs, maps, pins, and the listener's addresses. \
Connections go straight to the metadata service afterwards.

A guard that is running must be stopped first.";

/// Arguments of `imds-guard detach`.
#[derive(Args)]
pub struct Arguments {
    /// Where the kernel programs and maps are pinned
    #[arg(long, value_name = "PATH", default_value = PINS)]
    pins: PathBuf,

    /// The guard's own address, if it was not the default
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Vec<SocketAddr>,

    /// Network interface that carries the guard's addresses
    #[arg(long, value_name = "NAME", default_value = "lo")]
    link: String,
}

/// Removes everything, and says what.
pub fn main(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let listeners =
        Pair::new(LISTENER_V4, LISTENER_V6, LISTENER_PORT).with(&arguments.listen, "--listen")?;
    let pins = Pins::open(&arguments.pins)?;
    let control = Control::open(&pins).map(|control| control.get());
    let Some(_charge) = pins.take_charge()? else {
        return Err(Failure::Running {
            pid: control.map_or(0, |control| control.owner),
        });
    };
    let mut removed: Vec<String> = pins
        .links()
        .into_iter()
        .map(|name| format!("program {name}"))
        .collect();
    pins.remove_all().context("pins cannot be removed")?;
    let filters = remove_filters(&net::list_now()?);
    removed.extend(filters.into_iter().map(|link| format!("filter on {link}")));
    let bits = control.map_or(0, |control| control.addresses);
    let (addresses, left) = Addresses::left_behind(&arguments.link, listeners, bits);
    drop(addresses);
    removed.extend(left.into_iter().map(|address| format!("address {address}")));
    if removed.is_empty() {
        println!("nothing to remove: imds-guard is not active on this host");
    }
    for what in removed {
        println!("removed {what}");
    }
    Ok(ExitCode::SUCCESS)
}
