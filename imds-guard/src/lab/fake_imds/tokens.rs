//! Session tokens that carry their own expiry, so that millions of them cost no memory.

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read};
use std::time::{Duration, Instant};

/// How every token begins.
pub const TOKEN_PREFIX: &str = "AQAE";

/// The bytes that are spelled [`TOKEN_PREFIX`] in Base64.
const MARK: [u8; 3] = [1, 0, 4];

/// A token before it is spelled: mark, expiry, random bytes, seal.
type Bytes = [u8; 40];
const EXPIRY: usize = MARK.len();
const RANDOM: usize = EXPIRY + 8;
const SEAL: usize = RANDOM + 21;

/// Makes tokens and tells which are valid.
#[derive(Debug)]
pub(super) struct Tokens {
    /// Seals tokens; a new key makes all older ones invalid.
    key: RandomState,
    /// Expiries count from here, on the clock that nobody can set.
    start: Instant,
    random: File,
}

impl Tokens {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            key: RandomState::new(),
            start: Instant::now(),
            random: File::open("/dev/urandom")?,
        })
    }

    pub(super) fn issue(&self, ttl: Duration) -> io::Result<String> {
        let expiry = (self.start.elapsed() + ttl).as_millis() as u64;
        let mut bytes: Bytes = [0; _];
        bytes[..EXPIRY].copy_from_slice(&MARK);
        bytes[EXPIRY..RANDOM].copy_from_slice(&expiry.to_be_bytes());
        (&self.random).read_exact(&mut bytes[RANDOM..SEAL])?;
        let seal = self.seal(&bytes);
        bytes[SEAL..].copy_from_slice(&seal);
        Ok(spell(&bytes))
    }

    /// How long the token is still valid; `None` when it is not.
    pub(super) fn remaining(&self, token: &str) -> Option<Duration> {
        let bytes = read(token)?;
        if bytes[..EXPIRY] != MARK || bytes[SEAL..] != self.seal(&bytes) {
            return None;
        }
        let expiry = u64::from_be_bytes(bytes[EXPIRY..RANDOM].try_into().ok()?);
        Duration::from_millis(expiry)
            .checked_sub(self.start.elapsed())
            .filter(|left| !left.is_zero())
    }

    pub(super) fn expire_all(&mut self) {
        self.key = RandomState::new();
    }

    fn seal(&self, bytes: &Bytes) -> [u8; 8] {
        self.key.hash_one(&bytes[..SEAL]).to_be_bytes()
    }
}

/// Base64 for URLs, as the real service uses it.
const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

fn spell(bytes: &Bytes) -> String {
    let mut text = String::with_capacity(56);
    for group in bytes.chunks(3) {
        let mut word = [0; 4];
        word[1..=group.len()].copy_from_slice(group);
        let word = u32::from_be_bytes(word);
        for digit in 0..4 {
            let letter = ALPHABET[(word >> (18 - 6 * digit)) as usize & 63];
            text.push(if digit > group.len() {
                '='
            } else {
                letter.into()
            });
        }
    }
    text
}

fn read(token: &str) -> Option<Bytes> {
    let digits = token.strip_suffix("==").filter(|it| it.len() == 54)?;
    let mut bytes: Bytes = [0; _];
    for (group, letters) in bytes.chunks_mut(3).zip(digits.as_bytes().chunks(4)) {
        let mut word = 0;
        for (digit, letter) in letters.iter().enumerate() {
            let value = ALPHABET.iter().position(|it| it == letter)? as u32;
            word |= value << (18 - 6 * digit);
        }
        group.copy_from_slice(&word.to_be_bytes()[1..=group.len()]);
    }
    // The last letter has bits to spare: only one of its spellings is the token.
    (spell(&bytes) == token).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn tokens_look_like_the_real_ones() {
        let tokens = Tokens::new().unwrap();
        let token = tokens.issue(MINUTE).unwrap();
        assert_eq!(token.len(), 56);
        assert!(token.starts_with(TOKEN_PREFIX) && token.ends_with("=="));
        assert_ne!(token, tokens.issue(MINUTE).unwrap());
    }

    #[test]
    fn a_token_is_valid_for_its_time() {
        let mut tokens = Tokens::new().unwrap();
        let token = tokens.issue(MINUTE).unwrap();
        let later = tokens.issue(MINUTE).unwrap();
        let left = tokens.remaining(&token).unwrap();
        assert!(left <= MINUTE && left > MINUTE - Duration::from_secs(10));
        assert!(tokens.remaining(&later).is_some());
        let past = tokens.issue(Duration::ZERO).unwrap();
        assert_eq!(tokens.remaining(&past), None);
        tokens.expire_all();
        assert_eq!(tokens.remaining(&token), None);
    }

    #[test]
    fn an_altered_token_is_invalid() {
        let tokens = Tokens::new().unwrap();
        let token = tokens.issue(MINUTE).unwrap();
        for place in 0..token.len() {
            let mut altered = token.clone().into_bytes();
            altered[place] = if altered[place] == b'x' { b'y' } else { b'x' };
            let altered = String::from_utf8(altered).unwrap();
            assert_eq!(tokens.remaining(&altered), None, "{altered}");
        }
        for garbage in ["", "==", "é", &token[1..], &format!("{token} ")] {
            assert_eq!(tokens.remaining(garbage), None, "{garbage}");
        }
    }
}
