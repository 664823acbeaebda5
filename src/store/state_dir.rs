//! The state directory: private to the daemon, one daemon at a time, and home of the pseudonym key.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::StoreError;
use crate::scan::{KEY_BYTES, PseudonymKey};

const KEY: &str = "pseudonym.key";
pub(super) const LOCK: &str = "lock";

/// The locked state directory. The lock is let go when this is dropped, or by the kernel when the process dies.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    key: PseudonymKey,
    _lock: Lock,
}

impl StateDir {
    /// Opens `path`, making it (mode 0700) and its key (mode 0600) at first start, and locks it.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let lock = lock(path)?;
        let key = read_or_make_key(path)?;
        Ok(Self {
            path: path.to_owned(),
            key,
            _lock: lock,
        })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The appliance's key.
    pub fn key(&self) -> &PseudonymKey {
        &self.key
    }
}

/// Held while it lives; let go by the kernel when the process dies.
#[derive(Debug)]
pub(super) struct Lock(#[allow(dead_code, reason = "what holds the lock")] File);

/// Makes `path` (mode 0700) if it is not there, and takes it for this process alone.
pub(super) fn lock(path: &Path) -> Result<Lock, StoreError> {
    let unwritable = |e: std::io::Error| StoreError::Unwritable(e.to_string());
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(unwritable)?;
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path.join(LOCK))
        .map_err(unwritable)?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(
        |_| {
            StoreError::Other(
                "another scansentry uses this state directory; stop it or set state.dir or dashboard.dir".into(),
            )
        },
    )?;
    Ok(Lock(lock))
}

/// The key in `dir`; made with the system's generator, and on the disk before it is used, if there is none.
fn read_or_make_key(dir: &Path) -> Result<PseudonymKey, StoreError> {
    let path = dir.join(KEY);
    let unwritable = |e: std::io::Error| StoreError::Unwritable(e.to_string());
    let mut bytes = [0; KEY_BYTES];
    match File::open(&path) {
        Ok(mut file) => {
            file.read_exact(&mut bytes).map_err(|_| {
                StoreError::Other(format!(
                    "{KEY} is shorter than {KEY_BYTES} bytes; restore it from a backup or remove it"
                ))
            })?;
            return Ok(PseudonymKey::new(bytes));
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(unwritable(error)),
    }
    getrandom::fill(&mut bytes)
        .map_err(|e| StoreError::Other(format!("no random numbers for the key ({e})")))?;
    let temporary = dir.join(format!("{KEY}.new"));
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(unwritable)?;
    file.write_all(&bytes)
        .and_then(|()| file.sync_all())
        .map_err(unwritable)?;
    std::fs::rename(&temporary, &path).map_err(unwritable)?;
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(unwritable)?;
    Ok(PseudonymKey::new(bytes))
}

/// Bytes free for this user on the file system of `path`.
pub fn free_bytes(path: &Path) -> std::io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
