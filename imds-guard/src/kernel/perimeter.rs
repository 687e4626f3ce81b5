//! The program on every uplink: attached to those that are there, and to later ones.

use std::collections::BTreeSet;

use anyhow::Context as _;
use aya::{
    programs::{
        ProgramError, SchedClassifier, TcAttachType,
        links::FdLink,
        tc::{
            NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact,
            qdisc_detach_program,
        },
    },
    util::KernelVersion,
};

use super::pins::Pins;
use crate::net::Link;

/// Name of the program, in the object and in the kernel.
pub const PROGRAM: &str = "imds_perimeter";

/// Links of this layer are pinned as `link-perimeter-INDEX`.
pub const PIN: &str = "perimeter-";

/// Where our filter stands among those of an interface, before Linux 6.6. A fixed place is what the
/// next daemon replaces.
const PRIORITY: u16 = 0xa9fe;

/// The interfaces that the program is attached to.
#[derive(Default)]
pub struct Perimeter {
    attached: BTreeSet<u32>,
}

impl Perimeter {
    /// Attaches the program to uplinks that it is not attached to yet, and forgets those that are
    /// gone. An interface that refuses is logged, and tried again with the next change.
    pub fn follow(&mut self, program: &mut SchedClassifier, uplinks: &[Link], pins: &Pins) {
        self.attached
            .retain(|index| uplinks.iter().any(|link| link.index == *index));
        for link in uplinks {
            if self.attached.contains(&link.index) {
                continue;
            }
            match attach(program, link, pins) {
                Ok(()) => {
                    log::info!("guarding uplink {}", link.name);
                    self.attached.insert(link.index);
                }
                Err(error) => log::error!("uplink {} is not guarded: {error:#}", link.name),
            }
        }
        // Links of interfaces that are gone hold nothing, but would be taken for those of later
        // interfaces of the same number.
        for name in pins.links() {
            if let Some(index) = name.strip_prefix(PIN)
                && !index
                    .parse()
                    .is_ok_and(|index| self.attached.contains(&index))
                && let Err(error) = pins.remove(&name)
            {
                log::warn!("the pin of an uplink that is gone stays: {error}");
            }
        }
    }

    /// How many uplinks are guarded.
    #[must_use]
    pub fn len(&self) -> usize {
        self.attached.len()
    }
}

fn attach(program: &mut SchedClassifier, link: &Link, pins: &Pins) -> anyhow::Result<()> {
    if has_tcx() {
        let id = program.attach(&link.name, TcAttachType::Egress)?;
        let attached: FdLink = program.take_link(id)?.try_into()?;
        pins.keep(&format!("{PIN}{}", link.index), attached)
    } else {
        attach_filter(program, link)
    }
}

/// Before Linux 6.6: a filter of the clsact qdisc, which outlives the daemon without a pin.
fn attach_filter(program: &mut SchedClassifier, link: &Link) -> anyhow::Result<()> {
    // It may be there already; what else is wrong shows in the next step.
    let _present = qdisc_add_clsact(&link.name);
    let handle = TcHandle::from(1);
    let there =
        SchedClassifierLink::attached(&link.name, TcAttachType::Egress, PRIORITY, handle, None)
            .context("no such interface")?;
    // Replaces the filter of an earlier daemon in one step; without one, makes it.
    let id = match program.attach_to_link(there) {
        Ok(id) => id,
        Err(ProgramError::TcError(_)) => {
            let options = NlOptions {
                priority: PRIORITY,
                handle,
                classid: None,
            };
            program.attach_with_options(
                &link.name,
                TcAttachType::Egress,
                TcAttachOptions::Netlink(options),
            )?
        }
        Err(error) => Err(error)?,
    };
    // Dropping the link would remove the filter.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

/// Removes filters from all interfaces. Returns the names of those that had one.
pub fn remove_filters(links: &[Link]) -> Vec<String> {
    if has_tcx() {
        return Vec::new();
    }
    links
        .iter()
        .filter(|link| qdisc_detach_program(&link.name, TcAttachType::Egress, PROGRAM).is_ok())
        .map(|link| link.name.clone())
        .collect()
}

/// As aya decides when it attaches.
fn has_tcx() -> bool {
    KernelVersion::current().is_ok_and(|kernel| kernel >= KernelVersion::new(6, 6, 0))
}
