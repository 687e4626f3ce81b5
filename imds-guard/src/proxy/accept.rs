//! Takes connections, finds out who made each, and serves its requests until it ends.

use std::{
    convert::Infallible,
    io,
    mem::MaybeUninit,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::FutureExt as _;
use hyper::{
    header::{CONNECTION, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use imds_guard_common::flow::{Family, Origin, SynKey};
use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinHandle,
};

use super::{Proxy, pipeline::Connection, places::Places, syn};
use crate::{
    identify::lossy,
    policy::{caller::Netns, hops},
    record::{ConnectionRefusal, Kind, RefusedConnection},
};

/// How long to wait when the process is out of file descriptors, before accepting again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Accepts connections for a proxy, as many at once as its limits allow.
pub struct Acceptor {
    proxy: Arc<Proxy>,
    room: Arc<Semaphore>,
    places: Arc<Places>,
    stop: watch::Sender<Option<Backlog>>,
    loops: Vec<JoinHandle<()>>,
}

/// What becomes of connections that wait to be accepted when the guard stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backlog {
    /// They are served: the listeners close afterwards.
    Serve,
    /// They are left to the next daemon, which has the same listeners.
    Leave,
}

impl Acceptor {
    /// Nothing is accepted before [`Acceptor::serve`].
    #[must_use]
    pub fn new(proxy: Proxy) -> Self {
        let room = Arc::new(Semaphore::new(proxy.limits.connections));
        let places = Places::new(proxy.limits, proxy.resolver.netns_cookie());
        Self {
            proxy: Arc::new(proxy),
            room,
            places,
            stop: watch::Sender::new(None),
            loops: Vec::new(),
        }
    }

    /// Accepts from a listener in the background, until [`Acceptor::drain`].
    ///
    /// # Errors
    /// The listener cannot be watched.
    pub fn serve(&mut self, listener: std::net::TcpListener) -> io::Result<()> {
        let listener = TcpListener::from_std(listener)?;
        let (room, stop) = (Arc::clone(&self.room), self.stop.subscribe());
        let (proxy, places) = (Arc::clone(&self.proxy), Arc::clone(&self.places));
        self.loops.push(tokio::spawn(async move {
            accept_all(&listener, &room, stop.clone(), |stream, peer, _room| {
                let (proxy, places) = (Arc::clone(&proxy), Arc::clone(&places));
                tokio::spawn(serve(proxy, places, stream, peer, _room, stop.clone()));
            })
            .await;
        }));
        Ok(())
    }

    /// Stops accepting, lets requests in flight finish, and waits for them, within the limit for
    /// draining. Returns how many connections were cut off.
    pub async fn drain(self, backlog: Backlog) -> usize {
        self.stop.send_replace(Some(backlog));
        let all = self.proxy.limits.connections;
        let everyone_left = async {
            for accepting in self.loops {
                if let Err(error) = accepting.await {
                    log::error!("a listener ended early: {error}");
                }
            }
            let all = u32::try_from(all).unwrap_or(u32::MAX);
            self.room.acquire_many(all).await.map(|_| ())
        };
        match tokio::time::timeout(self.proxy.limits.drain, everyone_left).await {
            Ok(_) => 0,
            Err(_elapsed) => all - self.room.available_permits(),
        }
    }
}

async fn accept_all(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
    mut stop: watch::Receiver<Option<Backlog>>,
    mut serve: impl FnMut(TcpStream, SocketAddr, OwnedSemaphorePermit),
) {
    loop {
        let stopping = *stop.borrow();
        let accepted = match stopping {
            None => tokio::select! {
                accepted = listener.accept() => accepted,
                _ = told_to(&mut stop) => continue,
            },
            Some(Backlog::Leave) => return,
            Some(Backlog::Serve) => match listener.accept().now_or_never() {
                Some(accepted) => accepted,
                None => return,
            },
        };
        match accepted {
            Ok((stream, peer)) => {
                // Without room it waits here, and others in the backlog instead of in memory.
                let Ok(room) = Arc::clone(room).acquire_owned().await else {
                    return;
                };
                serve(stream, peer, room);
            }
            Err(error) => {
                log::warn!("a connection cannot be accepted: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(
    proxy: Arc<Proxy>,
    places: Arc<Places>,
    stream: TcpStream,
    peer: SocketAddr,
    _room: OwnedSemaphorePermit,
    mut stop: watch::Receiver<Option<Backlog>>,
) {
    let accepted = Instant::now();
    let refuse = |reason, origin: Option<&Origin>| {
        let refused = RefusedConnection {
            reason,
            peer: peer.to_string(),
            pid: origin.map(|origin| origin.pid),
            uid: origin.map(|origin| origin.uid),
            comm: origin.map(|origin| lossy(&origin.comm)),
        };
        proxy.recorder.record(Kind::ConnectionRefused(refused));
    };
    let Some(syn) = syn::take(&stream) else {
        return refuse(ConnectionRefusal::NoSyn, None);
    };
    let Some((origin, family)) = origin(&proxy, &syn.key) else {
        return refuse(ConnectionRefusal::NotRedirected, None);
    };
    let Some(_place) = places.take(&origin) else {
        return refuse(ConnectionRefusal::TooMany, Some(&origin));
    };
    if has_left(&stream) {
        return;
    }
    let caller = proxy.resolver.resolve(&origin).await;
    let hops = hops(caller.netns == Netns::Host, Some(syn.ttl));
    let connection = Connection::new(caller, family, hops, accepted.elapsed());

    let leaving = stop.clone();
    let answer = service_fn(async |request| {
        let mut answer = proxy.answer(&connection, request).await;
        if leaving.borrow().is_some() {
            let close = HeaderValue::from_static("close");
            answer.headers_mut().insert(CONNECTION, close);
        }
        Ok::<_, Infallible>(answer)
    });
    let http = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(proxy.limits.head_timeout)
        .max_buf_size(proxy.limits.head_bytes)
        .max_headers(proxy.limits.headers)
        // A client may close its side once it has asked, as `nc` does.
        .half_close(true)
        .title_case_headers(true)
        .serve_connection(TokioIo::new(stream), answer);
    tokio::pin!(http);
    let served = tokio::select! {
        served = http.as_mut() => served,
        backlog = told_to(&mut stop) => {
            // Whoever is to notice nothing gets the answer to a request that may be on its way, and
            // is told then to connect anew.
            if backlog == Backlog::Serve {
                http.as_mut().graceful_shutdown();
            }
            http.await
        }
    };
    if let Err(error) = served {
        log::debug!("the connection of pid {} ended: {error}", origin.pid);
    }
}

/// Whether the client has closed its side without having asked anything: not worth finding out who it
/// was, which is most of the work.
fn has_left(stream: &TcpStream) -> bool {
    let mut byte = [MaybeUninit::uninit()];
    match SockRef::from(stream).peek(&mut byte) {
        Ok(bytes) => bytes == 0,
        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
    }
}

/// Returns when it is time to stop.
async fn told_to(stop: &mut watch::Receiver<Option<Backlog>>) -> Backlog {
    let told = stop.wait_for(Option::is_some).await;
    // The sender is gone only when everything ends.
    told.ok()
        .and_then(|backlog| *backlog)
        .unwrap_or(Backlog::Serve)
}

/// Who made the connection, as the kernel published it.
fn origin(proxy: &Proxy, key: &SynKey) -> Option<(Origin, Family)> {
    match proxy.flows.take(key) {
        Ok(origin) => origin.and_then(|origin| Some((origin, origin.family()?))),
        Err(error) => {
            log::error!("the callers cannot be read from the kernel: {error}");
            None
        }
    }
}
