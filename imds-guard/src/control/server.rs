//! The side of the guard.

use std::{
    fs::{self, Permissions},
    io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, atomic::Ordering::Relaxed},
    time::Duration,
};

use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Semaphore, broadcast::error::RecvError, mpsc, oneshot},
};

use super::{
    Call, MAX_LINE, Order, RemovedFiles, Reply, Request, RuleStatus, SOCKET, Standing, Status,
    VERSION, What, explain,
};
use crate::{
    identify::Resolver,
    kernel::Counters,
    policy::Rule,
    proxy::InForce,
    record::{By, Recorder, Tally},
};

/// Connections at once.
const CONNECTIONS: usize = 32;
/// How long a connection may ask nothing.
const IDLE: Duration = Duration::from_secs(60);
/// How long whoever asks may take to read the answer.
const UNREAD: Duration = Duration::from_secs(10);

/// What the guard's own side of the socket knows.
pub struct Desk {
    /// What is in force.
    pub in_force: Arc<InForce>,
    /// What is configured.
    pub standing: Arc<Mutex<Standing>>,
    /// Names processes.
    pub resolver: Arc<Resolver>,
    /// What has happened.
    pub tally: Arc<Tally>,
    /// What happens.
    pub recorder: Recorder,
    /// What the kernel programs count.
    pub counters: Arc<Counters>,
    /// To the main loop.
    pub orders: mpsc::Sender<Order>,
}

/// A socket that is there until this is dropped.
pub struct Server {
    path: PathBuf,
    /// To leave alone what another daemon has put in its place.
    inode: u64,
}

impl Server {
    /// Answers in the background. The directory must be there, and nobody else's.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn start(run_dir: &Path, desk: Desk) -> io::Result<Self> {
        let path = run_dir.join(SOCKET);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        let inode = fs::symlink_metadata(&path)?.ino();
        tokio::spawn(accept(listener, Arc::new(desk)));
        Ok(Self { path, inode })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let is_mine = fs::symlink_metadata(&self.path).is_ok_and(|it| it.ino() == self.inode);
        if is_mine && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("{} stays behind: {error}", self.path.display());
        }
    }
}

async fn accept(listener: UnixListener, desk: Arc<Desk>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let desk = Arc::clone(&desk);
                tokio::spawn(async move {
                    if let Err(error) = serve(stream, &desk).await {
                        log::debug!("control: {error}");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                log::warn!("control: {error}");
                tokio::time::sleep(UNREAD).await;
            }
        }
    }
}

async fn serve(stream: UnixStream, desk: &Desk) -> io::Result<()> {
    let peer = stream.peer_cred()?;
    let pid = peer
        .pid()
        .and_then(|pid| u32::try_from(pid).ok())
        .unwrap_or(0);
    let (reader, mut writer) = stream.into_split();
    if ![0, nix::unistd::geteuid().as_raw()].contains(&peer.uid()) {
        log::warn!("control: pid {pid} of user {} is turned away", peer.uid());
        return say(&mut writer, &error("only root may ask")).await;
    }
    let by = By {
        pid,
        uid: peer.uid(),
        login: desk.resolver.login(pid),
    };
    let mut reader = BufReader::new(reader);
    while let Some(line) = line(&mut reader).await? {
        let call = match serde_json::from_slice::<Call>(&line) {
            Ok(call) if call.v == VERSION => call,
            Ok(call) => {
                let what = format!("version {} is not spoken here, but {VERSION}", call.v);
                say(&mut writer, &error(&what)).await?;
                continue;
            }
            Err(wrong) => {
                say(&mut writer, &error(&wrong.to_string())).await?;
                continue;
            }
        };
        log::debug!("control: {:?} by pid {pid}", call.request);
        if call.request == Request::Events {
            return events(desk, reader, writer).await;
        }
        let reply = match answer(call.request, desk, &by).await {
            Ok(ok) => Reply {
                v: VERSION,
                ok: Some(ok),
                error: None,
            },
            Err(what) => error(&what),
        };
        say(&mut writer, &reply).await?;
    }
    Ok(())
}

async fn answer(request: Request, desk: &Desk, by: &By) -> Result<Value, String> {
    let what = match request {
        Request::Status => return json_of(&status(desk)),
        Request::Explain(question) => {
            let force = desk.in_force.now();
            let explained = explain(&force.policy, &desk.resolver, &question).await?;
            let (caller, explanation) = explained;
            return Ok(json!({"caller": caller, "explanation": explanation}));
        }
        Request::Events => return Err("asked once more".into()),
        Request::Reload => What::Reload,
        Request::Mode { mode, for_seconds } => {
            What::Mode(mode, for_seconds.map(Duration::from_secs))
        }
        Request::Drain => What::Drain,
    };
    let (reply, outcome) = oneshot::channel();
    let by = by.clone();
    let order = Order { what, by, reply };
    let ends = |_| "the guard is about to end".to_owned();
    desk.orders.send(order).await.map_err(|_| ends(()))?;
    outcome.await.map_err(|_| ends(()))?
}

fn status(desk: &Desk) -> Status {
    let force = desk.in_force.now();
    let hits = desk.tally.rule_hits();
    let now = Timestamp::now();
    let rule = |rule: &Rule| RuleStatus {
        name: rule.name.to_string(),
        action: rule.action,
        owner: rule.owner.clone(),
        expires: rule.expires.map(|expires| expires.to_string()),
        expired: !rule.holds(now),
        hits: hits.get(&*rule.name).copied().unwrap_or_default(),
    };
    Status {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        uptime_seconds: desk.tally.uptime().as_secs(),
        mode: force.policy.mode,
        standing: desk
            .standing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone(),
        rules: force.policy.rules.list().iter().map(rule).collect(),
        callers: desk.tally.callers(),
        totals: desk.tally.totals(),
        counts: desk.counters.read(),
        events_lost: desk.recorder.lost(),
        lost_by_output: desk
            .recorder
            .losses()
            .iter()
            .map(|loss| (loss.output.to_owned(), loss.events.load(Relaxed)))
            .collect(),
        removed_by_output: desk
            .recorder
            .losses()
            .iter()
            .filter_map(|loss| {
                let (files, bytes) = loss.removed.as_ref()?.now();
                Some((loss.output.to_owned(), RemovedFiles { files, bytes }))
            })
            .collect(),
    }
}

/// Passes on events until whoever listens hangs up.
async fn events(
    desk: &Desk,
    mut reader: BufReader<OwnedReadHalf>,
    mut writer: OwnedWriteHalf,
) -> io::Result<()> {
    let mut lines = desk.recorder.listen();
    say(
        &mut writer,
        &Reply {
            v: VERSION,
            ok: Some(json!({})),
            error: None,
        },
    )
    .await?;
    let mut byte = [0];
    loop {
        let heard = tokio::select! {
            heard = lines.recv() => heard,
            // Nothing more is asked on this connection.
            _ = reader.read(&mut byte) => return Ok(()),
        };
        let missed;
        let line = match &heard {
            Ok(line) => line,
            Err(RecvError::Lagged(count)) => {
                missed = format!("{{\"missed\":{count}}}\n");
                missed.as_bytes()
            }
            Err(RecvError::Closed) => return Ok(()),
        };
        write(&mut writer, line).await?;
    }
}

/// The next line; `None` at the end.
async fn line(reader: &mut BufReader<OwnedReadHalf>) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let mut limited = reader.take(MAX_LINE as u64);
    let read = limited.read_until(b'\n', &mut line);
    tokio::time::timeout(IDLE, read).await??;
    match line.last() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(line)),
        Some(_) => Err(io::Error::other("a line without an end")),
    }
}

async fn say(writer: &mut OwnedWriteHalf, reply: &Reply) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    write(writer, &line).await
}

async fn write(writer: &mut OwnedWriteHalf, bytes: &[u8]) -> io::Result<()> {
    tokio::time::timeout(UNREAD, writer.write_all(bytes)).await?
}

fn error(what: &str) -> Reply {
    Reply {
        v: VERSION,
        ok: None,
        error: Some(what.to_owned()),
    }
}

fn json_of(answer: &impl Serialize) -> Result<Value, String> {
    serde_json::to_value(answer).map_err(|error| error.to_string())
}
