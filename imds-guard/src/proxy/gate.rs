//! What a client sends, let through head by head: the HTTP library reads only heads that were found
//! unambiguous ([`head`]).

use std::{
    io,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
};

use hyper::rt::{Read, ReadBufCursor, Write};
use tokio::net::TcpStream;

use crate::{
    config::Limits,
    policy::{
        Malformed,
        head::{self, Body},
    },
};

/// Bytes that are read at once.
const CHUNK: usize = 4096;

/// A head that was not let through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// What is wrong with it.
    pub malformed: Malformed,
    /// Its first line, as far as it came.
    pub line: Vec<u8>,
}

/// A client's connection, as the HTTP library sees it.
pub struct Gate {
    stream: Arc<TcpStream>,
    limits: Limits,
    /// What was read and not yet let through.
    waiting: Vec<u8>,
    /// How much of that is known not to end a head.
    seen: usize,
    open: Open,
    refused: Arc<OnceLock<Refused>>,
}

/// How much may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Open {
    /// So many bytes: the rest of a head, and its body.
    For(u64),
    /// Everything: chunks, after which nothing is served on this connection.
    ForGood,
}

impl Gate {
    /// A gate for a connection. What it does not let through is left in `refused`.
    pub fn new(stream: Arc<TcpStream>, limits: Limits, refused: Arc<OnceLock<Refused>>) -> Self {
        Self {
            stream,
            limits,
            waiting: Vec::new(),
            seen: 0,
            open: Open::For(0),
            refused,
        }
    }

    /// Reads until a whole head is there and found to be good. `false` if the client is done.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        loop {
            match self.judge() {
                Ok(Some(open)) => {
                    (self.open, self.seen) = (open, 0);
                    return Poll::Ready(Ok(true));
                }
                Ok(None) => self.seen = self.waiting.len(),
                Err(malformed) => {
                    let mut lines = self.waiting.split(|byte| matches!(byte, b'\r' | b'\n'));
                    let line = lines.next().unwrap_or_default().to_vec();
                    let _first = self.refused.set(Refused { malformed, line });
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, malformed)));
                }
            }
            if ready!(self.poll_more(cx))? == 0 {
                return Poll::Ready(Ok(false));
            }
        }
    }

    fn judge(&self) -> Result<Option<Open>, Malformed> {
        let Some(end) = head::end(&self.waiting, self.seen)? else {
            return match self.waiting.len() < self.limits.head_bytes {
                true => Ok(None),
                false => Err(Malformed::Oversized),
            };
        };
        let head = &self.waiting[..end];
        if end > self.limits.head_bytes
            || head.iter().filter(|byte| **byte == b'\n').count() > self.limits.headers + 2
        {
            return Err(Malformed::Oversized);
        }
        Ok(Some(match head::check(head)? {
            Body::Length(body) => Open::For(body.saturating_add(end as u64)),
            Body::Chunked => Open::ForGood,
        }))
    }

    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            self.waiting.reserve(CHUNK);
            match self.stream.try_read_buf(&mut self.waiting) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read),
            }
        }
    }
}

impl Read for Gate {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let gate = &mut *self;
        if gate.open == Open::For(0) {
            if !ready!(gate.poll_head(cx))? {
                return Poll::Ready(Ok(()));
            }
        } else if gate.waiting.is_empty() && ready!(gate.poll_more(cx))? == 0 {
            return Poll::Ready(Ok(()));
        }
        let mut bytes = gate.waiting.len().min(buffer.remaining());
        if let Open::For(left) = &mut gate.open {
            bytes = bytes.min(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= bytes as u64;
        }
        buffer.put_slice(&gate.waiting[..bytes]);
        gate.waiting.drain(..bytes);
        Poll::Ready(Ok(()))
    }
}

impl Write for Gate {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream.poll_write_ready(cx))?;
            match self.stream.try_write_vectored(slices) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Not yet: whoever sent something else than HTTP is still to be told.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
