//! `imds-guard top`.

mod screen;
mod seen;

use std::{
    io::{self, IsTerminal as _},
    path::PathBuf,
    process::ExitCode,
    sync::mpsc::{Receiver, TryRecvError, sync_channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::Args;
use crossterm::event::{self, Event as Input, KeyCode, KeyEventKind, KeyModifiers};
use serde::Deserialize;

use crate::{
    config::RUN_DIR,
    control::{Client, Request, Status},
    failure::Failure,
    record::Event,
};
use seen::{Order, Seen};

/// For `--help`.
pub const ABOUT: &str = "\
Shows who calls, by version and rate, and what is refused, as it happens. Needs a terminal of 80×24 or more.

Keys: v sorts by IMDSv1, r by rate, d by refusals, n by name; p pauses; q ends.";

/// Arguments of `imds-guard top`.
#[derive(Args)]
pub struct Arguments {
    /// Directory of the control socket
    #[arg(long, value_name = "PATH", default_value = RUN_DIR, env = "IMDS_GUARD_RUN_DIR")]
    run_dir: PathBuf,
}

/// How often the screen is drawn, and how often the guard is asked for its status.
const DRAW: Duration = Duration::from_millis(500);
const ASK: Duration = Duration::from_secs(2);
/// Events that may wait for the screen.
const WAITING: usize = 4096;

/// Shows the screen until a key ends it.
pub fn main(arguments: &Arguments) -> Result<ExitCode, Failure> {
    if !io::stdout().is_terminal() {
        return Err(Failure::Settings(
            "top needs a terminal: see `imds-guard events --follow` and `imds-guard status --json`"
                .into(),
        ));
    }
    let mut status = Client::required(&arguments.run_dir)?;
    let events = listen(arguments)?;
    let mut terminal = ratatui::try_init().context("the terminal cannot be used")?;
    let ended = run(&mut terminal, &mut status, &events);
    ratatui::restore();
    ended.map(|()| ExitCode::SUCCESS)
}

/// What the guard says unasked.
#[derive(Deserialize)]
#[serde(untagged)]
enum Heard {
    /// So many events came too fast for this program.
    Missed {
        missed: u64,
    },
    Event(Box<Event>),
}

fn listen(arguments: &Arguments) -> Result<Receiver<Heard>, Failure> {
    let mut client = Client::required(&arguments.run_dir)?;
    let _empty: serde_json::Value = client.ask(Request::Events)?;
    let (sender, events) = sync_channel(WAITING);
    thread::spawn(move || {
        while let Ok(Some(line)) = client.line() {
            let Ok(heard) = serde_json::from_str(&line) else {
                continue;
            };
            if sender.send(heard).is_err() {
                return;
            }
        }
    });
    Ok(events)
}

fn run(
    terminal: &mut ratatui::DefaultTerminal,
    client: &mut Client,
    events: &Receiver<Heard>,
) -> Result<(), Failure> {
    let mut seen = Seen::new(Instant::now());
    let mut status: Status = client.ask(Request::Status)?;
    let mut asked = Instant::now();
    let mut is_paused = false;
    loop {
        // What comes during a pause waits, or is told of as missed.
        if !is_paused {
            take(events, &mut seen)?;
            if asked.elapsed() > ASK {
                (status, asked) = (client.ask(Request::Status)?, Instant::now());
            }
        }
        seen.age(Instant::now());
        terminal
            .draw(|frame| screen::draw(frame, &seen, &status, is_paused))
            .context("the terminal cannot be written")?;
        if !event::poll(DRAW).context("the terminal cannot be read")? {
            continue;
        }
        let Input::Key(key) = event::read().context("the terminal cannot be read")? else {
            continue;
        };
        let ends = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            _ if key.kind != KeyEventKind::Press => {}
            KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
            _ if ends => return Ok(()),
            KeyCode::Char('p' | ' ') => is_paused = !is_paused,
            KeyCode::Char('v') => seen.order = Order::V1,
            KeyCode::Char('r') => seen.order = Order::Rate,
            KeyCode::Char('d') => seen.order = Order::Denied,
            KeyCode::Char('n') => seen.order = Order::Name,
            _ => {}
        }
    }
}

/// Takes all that waits into account.
fn take(events: &Receiver<Heard>, seen: &mut Seen) -> Result<(), Failure> {
    loop {
        match events.try_recv() {
            Ok(Heard::Event(event)) => seen.add(&event, Instant::now()),
            Ok(Heard::Missed { missed }) => seen.missed += missed,
            Err(TryRecvError::Empty) => return Ok(()),
            Err(TryRecvError::Disconnected) => {
                return Err(Failure::Settings("the guard has ended".into()));
            }
        }
    }
}
