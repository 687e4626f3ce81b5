//! Session tokens that are valid only where they were issued.
//!
//! The service takes a token from anybody on the instance. So the guard hands out its own: the
//! service's token, with where and until when it may be used, sealed (XChaCha20-Poly1305). The guard
//! opens it when it comes back; no table of tokens is kept, and nobody learns the service's token, to
//! use it on another way.

mod keys;

use std::{
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chacha20poly1305::{
    XChaCha20Poly1305, XNonce,
    aead::{Aead as _, Generate as _, KeyInit as _, Payload},
};
use nix::time::{ClockId, clock_gettime};
use sha2::{Digest as _, Sha256};

use crate::policy::{MAX_TTL, SessionToken};
use keys::Keys;

/// What sealed tokens begin with; the service's do not, as it has no full stop in them.
const PREFIX: &str = "IG1.";
/// What is sealed here cannot be taken for something else that is sealed with the same key one day.
const PURPOSE: &[u8] = b"imds-guard session token";
/// Longest token of the service that is sealed; its own have 56 bytes.
const MAX_TOKEN: usize = 1024;

const NONCE: usize = 24;
const EXPIRY: usize = 8;
const SCOPE: usize = 16;

/// Seals tokens and opens them again.
pub struct Tokens {
    keys: Mutex<Keys>,
    /// Until when there may be tokens that were issued before they were sealed.
    plain_until: AtomicU64,
}

impl Tokens {
    /// With the keys that an earlier guard left in this directory, or with new ones, which are left
    /// there. Where that cannot be done, tokens are valid until the guard ends, and it says so.
    #[must_use]
    pub fn new(directory: &Path) -> Self {
        let now = now();
        let keys = Keys::load(directory, now);
        Self {
            keys: Mutex::new(keys),
            plain_until: (now + u64::from(MAX_TTL)).into(),
        }
    }

    /// From now on tokens are valid elsewhere than before: those that were handed out as they are stay
    /// good for as long as any token lives.
    pub fn rebind(&self) {
        let until = now() + u64::from(MAX_TTL);
        self.plain_until.store(until, Relaxed);
    }

    /// Seals a token of the service for a scope. `None` if it is no token, or nothing random is to be had.
    #[must_use]
    pub fn seal(&self, token: &[u8], lives: Duration, scope: &str) -> Option<String> {
        self.seal_at(now(), token, lives, scope)
    }

    /// What a token is that was presented in a scope; in no scope, a token of any is good. And the
    /// service's token, if that is another one.
    #[must_use]
    pub fn open(&self, presented: &[u8], scope: Option<&str>) -> (SessionToken, Option<Vec<u8>>) {
        self.open_at(now(), presented, scope)
    }

    fn seal_at(&self, now: u64, token: &[u8], lives: Duration, scope: &str) -> Option<String> {
        if token.is_empty() || token.len() > MAX_TOKEN || !token.iter().all(u8::is_ascii_graphic) {
            return None;
        }
        let mut inside = Vec::with_capacity(EXPIRY + SCOPE + token.len());
        inside.extend((now + lives.as_secs()).to_be_bytes());
        inside.extend(digest(scope));
        inside.extend(token);
        let nonce = XNonce::try_generate().ok()?;
        let key = self.keys(now).newest();
        let sealed = XChaCha20Poly1305::new(&key).encrypt(&nonce, payload(&inside));
        let mut bytes = nonce.to_vec();
        bytes.extend(sealed.ok()?);
        let mut text = PREFIX.to_owned();
        URL_SAFE_NO_PAD.encode_string(bytes, &mut text);
        Some(text)
    }

    fn open_at(
        &self,
        now: u64,
        presented: &[u8],
        scope: Option<&str>,
    ) -> (SessionToken, Option<Vec<u8>>) {
        let Some(sealed) = presented.strip_prefix(PREFIX.as_bytes()) else {
            let stray = scope.is_some() && now >= self.plain_until.load(Relaxed);
            let plain = if stray {
                SessionToken::Stray
            } else {
                SessionToken::Plain
            };
            return (plain, None);
        };
        let Some(inside) = self.unseal(now, sealed) else {
            return (SessionToken::Invalid, None);
        };
        let Some((expiry, rest)) = inside.split_first_chunk::<EXPIRY>() else {
            return (SessionToken::Invalid, None);
        };
        let Some((issued, token)) = rest.split_first_chunk::<SCOPE>() else {
            return (SessionToken::Invalid, None);
        };
        if now >= u64::from_be_bytes(*expiry) {
            return (SessionToken::Invalid, None);
        }
        let found = if scope.is_none_or(|scope| digest(scope) == *issued) {
            SessionToken::Bound
        } else {
            SessionToken::Foreign
        };
        (found, Some(token.to_vec()))
    }

    fn unseal(&self, now: u64, sealed: &[u8]) -> Option<Vec<u8>> {
        if sealed.len() > 2 * MAX_TOKEN {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(sealed).ok()?;
        let (nonce, sealed) = bytes.split_first_chunk::<NONCE>()?;
        let nonce = XNonce::from(*nonce);
        let keys = self.keys(now).all();
        keys.into_iter().find_map(|key| {
            let cipher = XChaCha20Poly1305::new(&key);
            cipher.decrypt(&nonce, payload(sealed)).ok()
        })
    }

    fn keys(&self, now: u64) -> std::sync::MutexGuard<'_, Keys> {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        keys.rotate(now);
        keys
    }
}

fn payload(bytes: &[u8]) -> Payload<'_, '_> {
    Payload {
        msg: bytes,
        aad: PURPOSE,
    }
}

fn digest(scope: &str) -> [u8; SCOPE] {
    let mut digest = [0; SCOPE];
    digest.copy_from_slice(&Sha256::digest(scope)[..SCOPE]);
    digest
}

/// Seconds since the machine has started, which nobody sets.
fn now() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| time.tv_sec());
    u64::try_from(now).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &[u8] = b"AQAEAKEY0123456789abcdefghijklmnopqrstuvwxyz-_01234567==";
    const HOUR: Duration = Duration::from_secs(3600);

    fn tokens() -> Tokens {
        Tokens::new(Path::new("/proc/imds-guard"))
    }

    #[test]
    fn a_sealed_token_is_good_where_it_was_issued() {
        let tokens = tokens();
        let sealed = tokens.seal_at(100, TOKEN, HOUR, "here").unwrap();
        assert!(sealed.bytes().all(|byte| byte.is_ascii_graphic()));
        assert!(sealed.len() < 256, "{}", sealed.len());
        let open = |now, scope| tokens.open_at(now, sealed.as_bytes(), scope);
        let (good, inside) = (SessionToken::Bound, Some(TOKEN.to_vec()));
        assert_eq!(open(100, Some("here")), (good, inside.clone()));
        assert_eq!(open(3699, None), (good, inside.clone()));
        assert_eq!(open(100, Some("there")), (SessionToken::Foreign, inside));
        assert_eq!(open(3700, Some("here")), (SessionToken::Invalid, None));
        let again = tokens.seal_at(100, TOKEN, HOUR, "here").unwrap();
        assert_ne!(
            sealed, again,
            "nobody can tell which service's token is inside"
        );
    }

    #[test]
    fn nobody_else_can_make_or_alter_one() {
        let tokens = tokens();
        let sealed = tokens.seal_at(0, TOKEN, HOUR, "here").unwrap();
        for at in PREFIX.len()..sealed.len() {
            let mut altered = sealed.clone().into_bytes();
            altered[at] = if altered[at] == b'x' { b'y' } else { b'x' };
            let found = tokens.open_at(0, &altered, Some("here"));
            assert_eq!(found, (SessionToken::Invalid, None), "at {at}");
        }
        for garbage in [
            "IG1.",
            "IG1.AAAA",
            &sealed[..sealed.len() - 1],
            &"IG1.A".repeat(2000),
        ] {
            let found = tokens.open_at(0, garbage.as_bytes(), Some("here"));
            assert_eq!(found, (SessionToken::Invalid, None), "{garbage}");
        }
        let others = Tokens::new(Path::new("/proc/imds-guard"));
        let found = others.open_at(0, sealed.as_bytes(), Some("here"));
        assert_eq!(found, (SessionToken::Invalid, None), "another guard's");
        for no_token in [&b""[..], b"two words", &[b'x'; MAX_TOKEN + 1], b"\r\n"] {
            assert_eq!(tokens.seal_at(0, no_token, HOUR, "here"), None);
        }
    }

    #[test]
    fn tokens_from_before_are_good_for_as_long_as_they_can_live() {
        let tokens = tokens();
        let plain_until = tokens.plain_until.load(Relaxed);
        let open = |now, scope| tokens.open_at(now, TOKEN, scope).0;
        assert_eq!(open(plain_until - 1, Some("here")), SessionToken::Plain);
        assert_eq!(open(plain_until, Some("here")), SessionToken::Stray);
        assert_eq!(open(plain_until, None), SessionToken::Plain);
    }

    #[test]
    fn keys_are_changed_and_the_last_one_is_remembered() {
        let tokens = tokens();
        let begin = now();
        let life = Duration::from_secs(MAX_TTL.into());
        let late = begin + keys::ROTATION - 1;
        let sealed = tokens.seal_at(late, TOKEN, life, "here").unwrap();
        let open = |now| tokens.open_at(now, sealed.as_bytes(), None).0;
        assert_eq!(open(late + u64::from(MAX_TTL) - 1), SessionToken::Bound);
        let first = tokens.keys(late).newest();
        assert_ne!(tokens.keys(late + 2 * keys::ROTATION).newest(), first);
        assert_ne!(tokens.keys(late + 4 * keys::ROTATION).all()[1], first);
    }
}
