//! Types that cross the boundary between the kernel programs and the daemon.
//!
//! Every type here is plain data with a fixed layout, checked at compile time, so that both sides
//! agree without any code in between.
#![no_std]

pub mod addr;
pub mod control;
pub mod event;
pub mod flow;
pub mod packet;
