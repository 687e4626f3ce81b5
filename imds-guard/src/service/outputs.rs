//! Opens what events are written to.

use std::{io, path::Path};

use anyhow::Context as _;

use crate::{
    config::OutputSettings,
    failure::Failure,
    record::{
        Host,
        output::{Fold, Format, Journald, Lines, LogFile, Otlp, Outputs},
    },
};

/// Opens all of them: what is wrong with one is found out before anything is changed on this host.
///
/// # Errors
/// One cannot be opened.
pub fn open(settings: &OutputSettings, host: &Host) -> Result<Outputs, Failure> {
    let mut outputs = Outputs::new(settings.fold.map(Fold::new));
    for (name, path) in settings.files() {
        outputs = outputs.with(name, lines(settings, name, path)?);
    }
    if let Some(socket) = &settings.journald {
        let journald = Journald::to(socket).context("journald cannot be spoken to")?;
        outputs = outputs.with("journald", journald);
    }
    if let Some(collector) = &settings.otlp {
        let otlp =
            Otlp::to(host, collector.clone()).context("OpenTelemetry logs cannot be sent")?;
        outputs = outputs.with("otlp", otlp);
    }
    Ok(outputs)
}

fn lines(settings: &OutputSettings, name: &str, path: Option<&Path>) -> Result<Lines, Failure> {
    let Some(path) = path else {
        return Ok(Lines::to(format(name), Box::new(io::stdout())));
    };
    let failure = |error| Failure::Events {
        path: path.to_owned(),
        error,
    };
    let file = LogFile::open(path, settings.rotation).map_err(failure)?;
    let format = match name {
        "events" if settings.chain => Format::chained(),
        _ => format(name),
    };
    Ok(Lines::to_file(format, file))
}

fn format(name: &str) -> Format {
    match name {
        "ocsf" => Format::Ocsf,
        "emf" => Format::emf(),
        _ => Format::Json,
    }
}
