//! Takes connections, finds out who made each, and serves its requests until it ends.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use imds_guard_common::flow::{Family, Origin};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinHandle,
};

use super::{Proxy, pipeline::Connection, syn};
use crate::{
    kernel::flow_key,
    policy::{caller::Netns, hops},
    record::{ConnectionRefusal, Kind, RefusedConnection},
};

/// How long to wait when the process is out of file descriptors, before accepting again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Accepts connections for a proxy, as many at once as its limits allow.
pub struct Acceptor {
    proxy: Arc<Proxy>,
    places: Arc<Semaphore>,
    stop: watch::Sender<bool>,
    loops: Vec<JoinHandle<()>>,
}

impl Acceptor {
    /// Nothing is accepted before [`Acceptor::serve`].
    #[must_use]
    pub fn new(proxy: Proxy) -> Self {
        let places = Arc::new(Semaphore::new(proxy.limits.connections));
        Self {
            proxy: Arc::new(proxy),
            places,
            stop: watch::Sender::new(false),
            loops: Vec::new(),
        }
    }

    /// Accepts from a listener in the background, until [`Acceptor::drain`].
    ///
    /// # Errors
    /// The listener cannot be watched.
    pub fn serve(&mut self, listener: std::net::TcpListener) -> io::Result<()> {
        let listener = TcpListener::from_std(listener)?;
        let (proxy, places) = (Arc::clone(&self.proxy), Arc::clone(&self.places));
        let stop = self.stop.subscribe();
        self.loops.push(tokio::spawn(async move {
            accept_all(&listener, &proxy, &places, &stop).await;
        }));
        Ok(())
    }

    /// Takes what has been waiting, stops accepting, lets requests in flight finish, and waits for
    /// them, within the limit for draining. Returns how many connections were cut off.
    pub async fn drain(self) -> usize {
        self.stop.send_replace(true);
        let all = self.proxy.limits.connections;
        let everyone_left = async {
            for accepting in self.loops {
                if let Err(error) = accepting.await {
                    log::error!("a listener ended early: {error}");
                }
            }
            let all = u32::try_from(all).unwrap_or(u32::MAX);
            self.places.acquire_many(all).await.map(|_| ())
        };
        match tokio::time::timeout(self.proxy.limits.drain, everyone_left).await {
            Ok(_) => 0,
            Err(_elapsed) => all - self.places.available_permits(),
        }
    }
}

async fn accept_all(
    listener: &TcpListener,
    proxy: &Arc<Proxy>,
    places: &Arc<Semaphore>,
    stop: &watch::Receiver<bool>,
) {
    let mut stopping = stop.clone();
    loop {
        let accepted = tokio::select! {
            // What waits comes first, also when it is time to stop.
            biased;
            accepted = listener.accept() => accepted,
            () = told_to(&mut stopping) => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                // Without a place it waits here, and others in the backlog instead of in memory.
                let Ok(place) = Arc::clone(places).acquire_owned().await else {
                    return;
                };
                tokio::spawn(serve(Arc::clone(proxy), stream, peer, place, stop.clone()));
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
    stream: TcpStream,
    peer: SocketAddr,
    _place: OwnedSemaphorePermit,
    mut stop: watch::Receiver<bool>,
) {
    let accepted = Instant::now();
    let Some((origin, family)) = origin(&proxy, &stream, peer) else {
        proxy
            .recorder
            .record(Kind::ConnectionRefused(RefusedConnection {
                reason: ConnectionRefusal::NotRedirected,
                peer: peer.to_string(),
            }));
        return;
    };
    let ttl = syn::ttl(&stream);
    let caller = proxy.resolver.resolve(&origin).await;
    let hops = hops(caller.netns == Netns::Host, ttl);
    let connection = Connection::new(caller, family, hops, accepted.elapsed());

    let answer =
        service_fn(async |request| Ok::<_, Infallible>(proxy.answer(&connection, request).await));
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
        () = told_to(&mut stop) => {
            http.as_mut().graceful_shutdown();
            http.await
        }
    };
    if let Err(error) = served {
        log::debug!("the connection of pid {} ended: {error}", origin.pid);
    }
}

/// Returns when it is time to stop.
async fn told_to(stop: &mut watch::Receiver<bool>) {
    // The sender is gone only when everything ends.
    let _sender_gone = stop.wait_for(|stop| *stop).await.is_err();
}

/// Who made the connection, as the kernel published it.
fn origin(proxy: &Proxy, stream: &TcpStream, peer: SocketAddr) -> Option<(Origin, Family)> {
    let listener = stream.local_addr().ok()?;
    match proxy.flows.take(&flow_key(peer, listener)) {
        Ok(origin) => origin.and_then(|origin| Some((origin, origin.family()?))),
        Err(error) => {
            log::error!("the callers cannot be read from the kernel: {error}");
            None
        }
    }
}
