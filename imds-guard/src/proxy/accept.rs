//! Takes connections, finds out who made each, and serves its requests until it ends.

use std::{
    io,
    mem::MaybeUninit,
    net::{Shutdown, SocketAddr},
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures_util::FutureExt as _;
use hyper::{
    Request, StatusCode,
    body::Incoming,
    header::{CONNECTION, HeaderValue, TRANSFER_ENCODING},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioTimer;
use imds_guard_common::flow::{Family, Origin, SynKey};
use socket2::SockRef;
use tokio::{
    io::Interest,
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinHandle,
};

use super::{Proxy, answer, gate::Gate, places::Places, syn};
use crate::{
    identify::lossy,
    record::{ConnectionRefusal, Kind, RefusedConnection},
};

/// How long to wait when the process is out of file descriptors, before accepting again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How much of what is no HTTP is still read before the connection is closed, in bytes.
const MOST_UNREAD: usize = 64 * 1024;

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
    let refuse = |reason, origin: Option<&Origin>| {
        let refused = RefusedConnection {
            reason,
            peer: peer.to_string(),
            pid: origin.map(|origin| origin.pid),
            uid: origin.map(|origin| origin.uid),
            comm: origin.map(|origin| lossy(&origin.comm)),
        };
        proxy.tally.refused(&refused);
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
    let connection = proxy.meet(origin, family, syn.ttl).await;

    let stream = Arc::new(stream);
    let refused = Arc::new(OnceLock::new());
    let gate = Gate::new(Arc::clone(&stream), proxy.limits, Arc::clone(&refused));
    let leaving = stop.clone();
    let answer = service_fn(async |request: Request<Incoming>| {
        // The gate looks for no head after chunks.
        let is_last = request.headers().contains_key(TRANSFER_ENCODING);
        let Some(mut answer) = proxy.answer(&connection, &stream, request).await else {
            until_gone(&stream, proxy.limits.unanswered).await;
            return Err(Unanswered);
        };
        if is_last || leaving.borrow().is_some() {
            let close = HeaderValue::from_static("close");
            answer.headers_mut().insert(CONNECTION, close);
        }
        Ok(answer)
    });
    let http = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(proxy.limits.head_timeout)
        // The gate has let through what fits.
        .max_buf_size(2 * proxy.limits.head_bytes)
        .max_headers(proxy.limits.headers + 2)
        // A client may close its side once it has asked, as `nc` does.
        .half_close(true)
        .title_case_headers(true)
        .serve_connection(gate, answer);
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
    if let Some(refused) = refused.get() {
        let status = proxy.refuse(&connection, refused);
        dismiss(&stream, status, proxy.limits.unanswered).await;
    } else if let Err(error) = served {
        log::debug!("the connection of pid {} ended: {error}", origin.pid);
    }
}

/// A request is not to be answered.
#[derive(Debug, thiserror::Error)]
#[error("not answered, as the policy wants it")]
struct Unanswered;

/// Waits until a client gives up, or for so long.
async fn until_gone(stream: &TcpStream, at_most: Duration) {
    let gone = async {
        match stream.ready(Interest::READABLE).await {
            Ok(ready) if !ready.is_read_closed() => std::future::pending().await,
            Ok(_) | Err(_) => {}
        }
    };
    let _gone = tokio::time::timeout(at_most, gone).await;
}

/// Says what is wrong to whoever did not send HTTP, and listens on until it has been heard: closed with
/// something unread, the connection would be reset, and the client might see nothing of it.
async fn dismiss(stream: &TcpStream, status: StatusCode, at_most: Duration) {
    let words = answer::last_words(status);
    let said = async {
        let mut rest = &words[..];
        while !rest.is_empty() {
            stream.writable().await?;
            match stream.try_write(rest) {
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        SockRef::from(stream).shutdown(Shutdown::Write)?;
        let mut unread = [0; 4096];
        let mut heard = 0;
        while heard < MOST_UNREAD {
            stream.readable().await?;
            match stream.try_read(&mut unread) {
                Ok(0) => break,
                Ok(read) => heard += read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    };
    let _said = tokio::time::timeout(at_most, said).await;
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
