//! The service's thread: it listens, accepts and speaks HTTP.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc;
use std::task::Poll;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hyper::service::service_fn;
use hyper::{Method, Request};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sched::{CloneFlags, setns};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;

use super::Shared;
use crate::lab::NetNs;

/// The TTL of everything but replies to `PUT`.
const USUAL_TTL: u8 = 64;

/// How long an address may be taken by a listener that was closed.
const HELD_BY_CHILDREN: Duration = Duration::from_secs(5);
/// Rest after a failed accept, which mostly means that file descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// The thread. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Server {
    addresses: Vec<SocketAddr>,
    /// `None` once the thread has been told to end.
    orders: Option<UnboundedSender<Order>>,
    thread: Option<JoinHandle<()>>,
}

/// Where to listen from now on, and where to report that it is so.
struct Order {
    addresses: Vec<SocketAddr>,
    done: mpsc::Sender<Result<()>>,
}

impl Server {
    /// Starts the thread; it does not listen yet.
    pub(super) fn start(ns: &NetNs, addresses: Vec<SocketAddr>, state: Shared) -> Result<Self> {
        let ns = ns.as_fd().try_clone_to_owned()?;
        let (orders, inbox) = unbounded_channel();
        let (done, entered) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("fake-imds".into())
            .spawn(move || {
                // Sending fails only when the starter has panicked; then the inbox is closed as well.
                match enter(&ns) {
                    Ok(runtime) => {
                        let _ = done.send(Ok(()));
                        runtime.block_on(run(inbox, state));
                    }
                    Err(error) => {
                        let _ = done.send(Err(error));
                    }
                }
            })?;
        entered
            .recv()
            .context("the service's thread ended early")??;
        Ok(Self {
            addresses,
            orders: Some(orders),
            thread: Some(thread),
        })
    }

    pub(super) fn listen(&self) -> Result<()> {
        self.order(self.addresses.clone())
    }

    pub(super) fn refuse(&self) -> Result<()> {
        self.order(Vec::new())
    }

    fn order(&self, addresses: Vec<SocketAddr>) -> Result<()> {
        let (done, report) = mpsc::channel();
        if let Some(orders) = &self.orders {
            // A closed channel shows below, as a report that never comes.
            let _ = orders.send(Order { addresses, done });
        }
        report.recv().context("the service's thread has ended")?
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // A panic on the thread has been printed there.
            let _ = thread.join();
        }
    }
}

/// Puts this thread into the namespace and makes its runtime.
fn enter(ns: &OwnedFd) -> io::Result<tokio::runtime::Runtime> {
    setns(ns, CloneFlags::CLONE_NEWNET)?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
}

/// Serves until the orders end.
async fn run(mut orders: UnboundedReceiver<Order>, state: Shared) {
    let mut listeners = Vec::new();
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            order = orders.recv() => {
                let Some(Order { addresses, done }) = order else { return };
                listeners.clear();
                connections.shutdown().await;
                // Whoever gave the order and did not wait does not want to know.
                let _ = done.send(listen(&addresses).await.map(|bound| listeners = bound));
            }
            accepted = accept(&listeners) => match accepted {
                Ok((stream, peer)) => {
                    state.lock().counters.connections += 1;
                    connections.spawn(serve(stream, peer, state.clone()));
                }
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            },
            // Takes finished connections out of the set.
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn listen(addresses: &[SocketAddr]) -> Result<Vec<TcpListener>> {
    let mut listeners = Vec::new();
    for address in addresses {
        let listener = bind(*address).await;
        listeners.push(listener.with_context(|| format!("cannot listen at {address}"))?);
    }
    Ok(listeners)
}

/// Takes an address. A child process that another thread is about to start holds a copy of the listener
/// that was closed here, until it executes its program; nothing tells when.
async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let begun = Instant::now();
    loop {
        match TcpListener::bind(address).await {
            Err(error)
                if error.kind() == io::ErrorKind::AddrInUse
                    && begun.elapsed() < HELD_BY_CHILDREN =>
            {
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            bound => return bound,
        }
    }
}

/// Takes the next connection from whichever listener has one; waits for ever when there is none.
async fn accept(listeners: &[TcpListener]) -> io::Result<(TcpStream, SocketAddr)> {
    poll_fn(|context| {
        listeners
            .iter()
            .map(|listener| listener.poll_accept(context))
            .find(Poll::is_ready)
            .unwrap_or(Poll::Pending)
    })
    .await
}

async fn serve(stream: TcpStream, peer: SocketAddr, state: Shared) {
    // Without a copy of the socket there is no hop limit to set: the peer waits, as it would for
    // any service that is out of file descriptors.
    let Ok(ttl) = Ttl::new(&stream) else { return };
    let settings = state.lock().settings;
    let service = service_fn(|request: Request<_>| {
        let state = &state;
        let ttl = &ttl;
        async move {
            let (response, settings) = {
                let mut state = state.lock();
                (state.serve(peer, &request), state.settings)
            };
            if !settings.delay.is_zero() {
                tokio::time::sleep(settings.delay).await;
            }
            ttl.set(match *request.method() {
                Method::PUT => settings.hop_limit,
                _ => USUAL_TTL,
            });
            Ok::<_, Infallible>(response)
        }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .title_case_headers(true)
        .keep_alive(settings.keep_alive)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if served.is_err_and(|error| error.is_parse()) {
        state.lock().counters.malformed += 1;
    }
}

/// A copy of a connection's file descriptor, to set the TTL behind hyper's back.
struct Ttl {
    socket: socket2::Socket,
    is_ipv6: bool,
}

impl Ttl {
    fn new(stream: &TcpStream) -> io::Result<Self> {
        // Replies are small and complete: nothing is gained by waiting for more.
        stream.set_nodelay(true)?;
        Ok(Self {
            socket: stream.as_fd().try_clone_to_owned()?.into(),
            is_ipv6: stream.local_addr()?.is_ipv6(),
        })
    }

    /// Sets the TTL of all packets from now on, acknowledgements included.
    fn set(&self, ttl: u8) {
        // Cannot fail for a TTL of 1 to 255 on a socket of the right family.
        let _ = if self.is_ipv6 {
            self.socket.set_unicast_hops_v6(ttl.into())
        } else {
            self.socket.set_ttl_v4(ttl.into())
        };
    }
}
