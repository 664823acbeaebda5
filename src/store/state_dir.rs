//! The state directory: private to the daemon, one daemon at a time, and home of the pseudonym key.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Flock, FlockOffsetType, FlockType, Signal};

use super::{DAMAGED, DATABASE, StoreError};
use crate::scan::{KEY_BYTES, PseudonymKey};

const KEY: &str = "pseudonym.key";
pub(super) const LOCK: &str = "lock";

/// Permissions of group and others.
const OTHERS: u32 = 0o077;

/// The locked state directory. The lock is let go when this is dropped, or by the kernel when the process dies.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    key: PseudonymKey,
    _lock: Lock,
}

impl StateDir {
    /// Opens `path`, making it (mode 0700) and its key (mode 0600) at first start, and locks it. What other users could open of ours in it is
    /// closed to them, with a warning.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let lock = lock(path)?;
        // A query can see this lock and disturbs nobody (`in_use`), unlike the one above. It goes with any descriptor of the file that this
        // process closes, and no other is ever opened.
        let _ = rustix::fs::fcntl_lock(
            &lock.0,
            rustix::fs::FlockOperation::NonBlockingLockExclusive,
        );
        make_private(path);
        let key = read_or_make_key(path)?;
        Ok(Self {
            path: path.to_owned(),
            key,
            _lock: lock,
        })
    }

    /// Whether a daemon has `path` open now.
    pub fn in_use(path: &Path) -> std::io::Result<bool> {
        Ok(Self::lock_of(path)?.is_some())
    }

    /// Tells the daemon that has `path` open, if there is one and this process may, to look soon at what lies there now. The signal does nothing to a
    /// process that does not wait for it.
    pub fn nudge(path: &Path) {
        // The number of a process in another container is none here.
        if let Ok(Some(Flock { pid: Some(pid), .. })) = Self::lock_of(path) {
            let _ = rustix::process::kill_process(pid, Signal::URG);
        }
    }

    /// The lock of the daemon that has `path` open.
    fn lock_of(path: &Path) -> std::io::Result<Option<Flock>> {
        let file = File::open(path.join(LOCK))?;
        let whole = Flock {
            start: 0,
            length: 0,
            pid: None,
            typ: FlockType::WriteLock,
            offset_type: FlockOffsetType::Set,
        };
        Ok(rustix::process::fcntl_getlk(&file, &whole)?)
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

/// Takes the permissions of group and others from what is ours below `dir`: an earlier umask, a copy or a backup may have left them. `dir`
/// itself is not changed: it may be somebody else's, by mistake.
pub(super) fn make_private(dir: &Path) {
    let open_to_others = |path: &Path| {
        let metadata = path.symlink_metadata().ok()?;
        (!metadata.is_symlink() && metadata.mode() & OTHERS != 0).then_some(())
    };
    if open_to_others(dir).is_some() {
        tracing::warn!(
            "{}: other users may look into it; close it to them with chmod 700",
            dir.display()
        );
    }
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let ours = entries.filter(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name == LOCK
            || name == DAMAGED
            || [
                DATABASE,
                super::history::DATABASE,
                KEY,
                "models",
                "dashboard",
            ]
            .iter()
            .any(|ours| name.starts_with(ours))
    });
    let mut waiting: Vec<_> = ours.map(|entry| entry.path()).collect();
    let mut closed = 0;
    while let Some(path) = waiting.pop() {
        if open_to_others(&path).is_some() {
            match close_to_others(&path) {
                Ok(()) => closed += 1,
                Err(error) => tracing::warn!(
                    "{}: a file in it is open to other users and cannot be closed to them ({error}); check its owner",
                    dir.display()
                ),
            }
        }
        if path.symlink_metadata().is_ok_and(|m| m.is_dir()) {
            let below = std::fs::read_dir(&path).into_iter().flatten().flatten();
            waiting.extend(below.map(|entry| entry.path()));
        }
    }
    if closed > 0 {
        tracing::warn!(
            closed,
            "{}: files in it were open to other users; they are closed now, but may have been read",
            dir.display()
        );
    }
}

fn close_to_others(path: &Path) -> rustix::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    let mode = rustix::fs::fstat(&file)?.st_mode & 0o7700;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))
}

/// The key in `dir`; made with the system's generator, and on the disk before it is used, if there is none. What is not a file of its own with
/// exactly [`KEY_BYTES`] is refused.
fn read_or_make_key(dir: &Path) -> Result<PseudonymKey, StoreError> {
    let path = dir.join(KEY);
    let unwritable = |e: std::io::Error| StoreError::Unwritable(e.to_string());
    let refused = |what: &str| {
        let hint = "restore it from a backup, or remove it and all ids become others";
        Err(StoreError::Other(format!("{KEY} {what}; {hint}")))
    };
    let mut bytes = [0; KEY_BYTES];
    match path.symlink_metadata() {
        Ok(metadata) if !metadata.is_file() => return refused("is a link or no file"),
        Ok(metadata) if metadata.len() != KEY_BYTES as u64 => {
            return refused(&format!("does not hold {KEY_BYTES} bytes"));
        }
        Ok(_) => {
            File::open(&path)
                .and_then(|mut file| file.read_exact(&mut bytes))
                .map_err(unwritable)?;
            return Ok(PseudonymKey::new(bytes));
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
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
