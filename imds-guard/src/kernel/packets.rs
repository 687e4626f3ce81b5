//! Packets that the layers have seen, as the kernel programs report them.

use std::io;

use aya::maps::{MapData, RingBuf};
use imds_guard_common::packet::Packet;
use tokio::io::unix::AsyncFd;

/// The reports, in the order in which they were made.
pub struct Packets(AsyncFd<RingBuf<MapData>>);

impl Packets {
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The ring buffer cannot be watched.
    pub fn watch(ring: RingBuf<MapData>) -> io::Result<Self> {
        // SAFETY: the ring owns its descriptor and gives out the same one for as long as it lives.
        Ok(Self(unsafe { AsyncFd::register(ring) }?))
    }

    /// Waits for reports, and hands each to `see`.
    ///
    /// # Errors
    /// The ring buffer cannot be watched any more.
    pub async fn next(&mut self, mut see: impl FnMut(&Packet)) -> io::Result<()> {
        let mut ready = self.0.readable_mut().await?;
        while let Some(item) = ready.get_inner_mut().next() {
            if let Some(bytes) = item.first_chunk::<{ size_of::<Packet>() }>() {
                // SAFETY: plain integers for which every bit pattern is valid; read unaligned.
                see(&unsafe { bytes.as_ptr().cast::<Packet>().read_unaligned() });
            }
        }
        ready.clear_ready();
        Ok(())
    }
}
