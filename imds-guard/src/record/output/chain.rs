//! Each line carries the hash of the one before, so that whoever alters, removes or moves one must
//! rewrite all that follow.
//!
//! It does not show that lines are missing at the end, nor a chain that was made anew: compare the last
//! hash with one that was sent elsewhere.

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::record::event::Chain;

/// What the first line carries.
const FIRST: [u8; 32] = [0; 32];

/// Chains lines.
pub struct Chained {
    written: Links,
    next: Links,
}

/// Where a chain has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Links {
    seq: u64,
    hash: [u8; 32],
}

/// A line that does not follow from the one before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Broken {
    /// It carries no place in a chain, or is no event at all.
    Unchained,
    /// Lines were taken out before it.
    Missing {
        /// The numbers of the first and the last one.
        from: u64,
        /// See `from`.
        to: u64,
    },
    /// It has a number that was there before: it was moved, or doubled.
    Reordered {
        /// Its number.
        seq: u64,
        /// The number that should be here.
        expected: u64,
    },
    /// It is the first of the chain, and not tied to the lines before the chain: these have lost their
    /// places in it, or were altered.
    Beginning,
    /// The line before it is not the one that was written.
    AlteredBefore {
        /// The number of the altered line.
        seq: u64,
    },
}

/// Lines that follow from each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    first: Option<u64>,
    last: Option<Links>,
    /// Hash of the last line before the chain, which is tied to it.
    before: Option<[u8; 32]>,
}

#[derive(Deserialize)]
struct Chainable {
    chain: Chain,
}

impl Chained {
    /// Goes on after a line; `None` begins a chain. A line without a place in a chain begins one, too,
    /// that is tied to it.
    pub fn after(line: Option<&[u8]>) -> Self {
        let written = match line {
            None => Links {
                seq: 0,
                hash: FIRST,
            },
            Some(line) => {
                let seq = place(line).map_or(0, |chain| chain.seq + 1);
                Links {
                    seq,
                    hash: Sha256::digest(line).into(),
                }
            }
        };
        Self {
            written,
            next: written,
        }
    }

    /// Appends a line of JSON, with its place in the chain.
    pub fn link(&mut self, line: &[u8], out: &mut Vec<u8>) {
        let begin = out.len();
        let object = line.trim_ascii_end();
        out.extend_from_slice(object.strip_suffix(b"}").unwrap_or(object));
        let Links { seq, hash } = self.next;
        let prev = hex(&hash);
        out.extend_from_slice(
            format!(",\"chain\":{{\"seq\":{seq},\"prev\":\"{prev}\"}}}}").as_bytes(),
        );
        self.next = Links {
            seq: seq + 1,
            hash: Sha256::digest(&out[begin..]).into(),
        };
        out.push(b'\n');
    }

    /// What was linked is written.
    pub fn commit(&mut self) {
        self.written = self.next;
    }

    /// What was linked since is lost.
    pub fn roll_back(&mut self) {
        self.next = self.written;
    }
}

impl Verified {
    /// Takes the next line, without its line end.
    ///
    /// # Errors
    /// It does not follow from the one before.
    pub fn add(&mut self, line: &[u8]) -> Result<(), Broken> {
        let Some(chain) = place(line) else {
            self.before = Some(Sha256::digest(line).into());
            return Err(Broken::Unchained);
        };
        if let Some(last) = &self.last {
            let (seq, expected) = (chain.seq, last.seq);
            if seq > expected {
                return Err(Broken::Missing {
                    from: expected,
                    to: seq - 1,
                });
            }
            if seq < expected {
                return Err(Broken::Reordered { seq, expected });
            }
            if chain.prev != hex(&last.hash) {
                return Err(Broken::AlteredBefore {
                    seq: expected.saturating_sub(1),
                });
            }
        } else if let Some(before) = &self.before
            && (chain.seq > 0 || chain.prev != hex(before))
        {
            return Err(Broken::Beginning);
        }
        self.first.get_or_insert(chain.seq);
        self.last = Some(Links {
            seq: chain.seq + 1,
            hash: Sha256::digest(line).into(),
        });
        Ok(())
    }

    /// The number of the first line; 0 if no older one was rotated away.
    #[must_use]
    pub fn first(&self) -> Option<u64> {
        self.first
    }

    /// The number of the last line, and its hash.
    #[must_use]
    pub fn last(&self) -> Option<(u64, String)> {
        let last = self.last?;
        Some((last.seq - 1, hex(&last.hash)))
    }
}

fn place(line: &[u8]) -> Option<Chain> {
    let parsed: Chainable = serde_json::from_slice(line).ok()?;
    Some(parsed.chain)
}

fn hex(hash: &[u8; 32]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(lines: usize) -> Vec<Vec<u8>> {
        let mut chain = Chained::after(None);
        let mut out = Vec::new();
        for number in 0..lines {
            chain.link(format!("{{\"n\":{number}}}\n").as_bytes(), &mut out);
        }
        out.trim_ascii_end()
            .split(|byte| *byte == b'\n')
            .map(<[u8]>::to_vec)
            .collect()
    }

    fn verify(lines: &[Vec<u8>]) -> Result<Verified, (usize, Broken)> {
        let mut verified = Verified::default();
        for (at, line) in lines.iter().enumerate() {
            verified.add(line).map_err(|broken| (at, broken))?;
        }
        Ok(verified)
    }

    #[test]
    fn whatever_is_done_to_a_line_shows_at_the_next() {
        let whole = chain(6);
        assert_eq!(verify(&whole).unwrap().first(), Some(0));
        assert_eq!(verify(&whole).unwrap().last().unwrap().0, 5);
        assert_eq!(
            verify(&whole[2..]).unwrap().first(),
            Some(2),
            "rotated away"
        );

        let mut altered = whole.clone();
        let place = altered[2].iter().position(|byte| *byte == b'2').unwrap();
        altered[2][place] = b'7';
        assert_eq!(verify(&altered), Err((3, Broken::AlteredBefore { seq: 2 })));
        let mut missing = whole.clone();
        missing.drain(2..4);
        assert_eq!(
            verify(&missing),
            Err((2, Broken::Missing { from: 2, to: 3 }))
        );
        let mut swapped = whole.clone();
        swapped.swap(2, 3);
        assert_eq!(
            verify(&swapped),
            Err((2, Broken::Missing { from: 2, to: 2 }))
        );
        let mut doubled = whole.clone();
        doubled.insert(3, whole[1].clone());
        assert_eq!(
            verify(&doubled),
            Err((
                3,
                Broken::Reordered {
                    seq: 1,
                    expected: 3
                }
            ))
        );
        let mut foreign = whole.clone();
        foreign.insert(1, b"{\"n\":9}".to_vec());
        assert_eq!(verify(&foreign), Err((1, Broken::Unchained)));
    }

    #[test]
    fn lines_cannot_be_taken_out_of_a_chain_at_its_beginning() {
        let unchained: &[u8] = b"{\"n\":-1}";
        let mut chain = Chained::after(Some(unchained));
        let mut out = Vec::new();
        for number in 0..3 {
            chain.link(format!("{{\"n\":{number}}}\n").as_bytes(), &mut out);
        }
        let lines: Vec<_> = out.trim_ascii_end().split(|it| *it == b'\n').collect();
        let verify = |before: &[u8], lines: &[&[u8]]| {
            let mut verified = Verified::default();
            assert_eq!(verified.add(before), Err(Broken::Unchained));
            lines.iter().try_for_each(|line| verified.add(line))
        };
        assert_eq!(verify(unchained, &lines), Ok(()));
        assert_eq!(verify(b"{\"n\":-2}", &lines), Err(Broken::Beginning));
        assert_eq!(
            verify(b"{\"n\":0}", &lines[1..]),
            Err(Broken::Beginning),
            "the first was altered, and has lost its place"
        );
    }

    #[test]
    fn a_chain_goes_on_after_what_was_written_and_leaves_out_what_was_not() {
        let mut chain = Chained::after(None);
        let mut out = Vec::new();
        chain.link(b"{\"n\":0}\n", &mut out);
        chain.commit();
        chain.link(b"{\"n\":1}\n", &mut Vec::new());
        chain.roll_back();
        let last = out.trim_ascii_end().to_vec();
        let mut again = Chained::after(Some(&last));
        assert_eq!(again.next, chain.next);
        again.link(b"{\"n\":2}\n", &mut out);
        let lines: Vec<_> = out.trim_ascii_end().split(|it| *it == b'\n').collect();
        let mut verified = Verified::default();
        for line in lines {
            verified.add(line).unwrap();
        }
    }
}
