//! User names, from the host's own files.
//!
//! Not through the C library: its modules may ask a directory service over the network, which must
//! not happen while a client waits for its credentials.

use std::{
    collections::HashMap,
    fs,
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

/// The users of a passwd file, read again when it changes.
pub struct Users {
    passwd: PathBuf,
    cache: Mutex<Option<(SystemTime, HashMap<u32, String>)>>,
}

impl Users {
    /// Users of a file in the form of passwd(5); nothing is read yet.
    #[must_use]
    pub fn of(passwd: impl Into<PathBuf>) -> Self {
        Self {
            passwd: passwd.into(),
            cache: Mutex::new(None),
        }
    }

    /// The name of a user, if the file has it.
    pub fn name(&self, uid: u32) -> Option<String> {
        let modified = fs::metadata(&self.passwd)
            .and_then(|meta| meta.modified())
            .ok()?;
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let users = match &mut *cache {
            Some((read, users)) if *read == modified => users,
            stale => {
                let text = String::from_utf8_lossy(&fs::read(&self.passwd).ok()?).into_owned();
                &mut stale.insert((modified, parse(&text))).1
            }
        };
        users.get(&uid).cloned()
    }
}

fn parse(passwd: &str) -> HashMap<u32, String> {
    let mut users = HashMap::new();
    for line in passwd.lines() {
        let mut fields = line.split(':');
        if let (Some(name), Some(uid)) = (fields.next(), fields.nth(1))
            && let Ok(uid) = uid.parse()
        {
            // The first of several names for one uid is the one that ls and ps show.
            users.entry(uid).or_insert_with(|| name.to_owned());
        }
    }
    users
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn the_first_name_counts_and_bad_lines_do_not() {
        let users =
            parse("root:x:0:0::/root:/bin/sh\ntoor:x:0:0::/:/\n#\nx:y\na:x:7:7::/:/\nb:x:-1:");
        assert_eq!(users.len(), 2);
        assert_eq!(users[&0], "root");
        assert_eq!(users[&7], "a");
    }
}
