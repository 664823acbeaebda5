//! Installed model bundles in the state directory: which one is to run, and which one before it.
//!
//! ```text
//! state.dir/models/NAME-VERSION-HASH/   a bundle, with nothing but the files that its manifest names
//!                 /current  → NAME-VERSION-HASH     is to run; without it, the configured bundle is
//!                 /previous → NAME-VERSION-HASH     ran before it
//!                 /staging/                         a copy that is not complete or not checked yet
//!                 /lock                             one change at a time
//! ```
//!
//! A bundle is written to the disk completely before a link names it, and a link changes by a rename: at every moment, a power cut included,
//! `current` names a whole bundle. What no link names is taken away, now or at the next change. Whether a bundle is any good is not decided
//! here: whoever loads one checks it.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Error, ErrorKind, Read as _, Result};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat};

use super::{Lock, free_bytes, lock};
use crate::manifest::{
    MANIFEST, MAX_GOLDEN, MAX_MODEL, MAX_TEXT, MODEL_CARD, Manifest, SIGNATURE, check_file,
};

const FOLDER: &str = "models";
const CURRENT: &str = "current";
const PREVIOUS: &str = "previous";
const STAGING: &str = "staging";

/// The folder of installed bundles; it need not be there.
#[derive(Debug, Clone)]
pub struct Models(PathBuf);

impl Models {
    /// The one in a state directory.
    pub fn of(state_dir: &Path) -> Self {
        Self(state_dir.join(FOLDER))
    }

    /// What `current` holds, unchecked: another value means another bundle.
    pub fn link(&self) -> Option<PathBuf> {
        std::fs::read_link(self.0.join(CURRENT)).ok()
    }

    /// Name of the installed bundle that is to run, if there is one.
    pub fn current(&self) -> Result<Option<String>> {
        self.read(CURRENT)
    }

    /// Name of the installed bundle that ran before, if there is one.
    pub fn previous(&self) -> Result<Option<String>> {
        let previous = self.read(PREVIOUS)?;
        // Both are the same after a power cut between the two renames of an install.
        Ok(previous.filter(|name| !self.current().is_ok_and(|c| c.as_ref() == Some(name))))
    }

    /// Where the bundle `name` lies.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn read(&self, link: &str) -> Result<Option<String>> {
        let target = match std::fs::read_link(self.0.join(link)) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            target => target?,
        };
        let mut parts = target.components();
        match (parts.next(), parts.next(), target.to_str()) {
            (Some(Component::Normal(_)), None, Some(name)) => Ok(Some(name.to_owned())),
            _ => Err(Error::other("does not name a folder beside it")),
        }
    }

    /// Begins a change: makes the folder (mode 0700), keeps others from changing it, takes away what an earlier change left behind.
    pub fn change(&self) -> Result<Change> {
        let lock = lock(&self.0).map_err(|error| match error {
            super::StoreError::Unwritable(why) => Error::other(format!(
                "{why}; run as root or as the user of the daemon, with room on the disk"
            )),
            _ => Error::other("another change is on its way; wait until it is done"),
        })?;
        let change = Change {
            models: self.clone(),
            _lock: lock,
        };
        change.tidy()?;
        Ok(change)
    }
}

/// A change of what is installed; nobody else changes it meanwhile.
#[derive(Debug)]
pub struct Change {
    models: Models,
    _lock: Lock,
}

impl Change {
    /// Copies `source` into the staging folder and onto the disk; returns that folder. `leave_free` bytes of the file system stay free.
    pub fn stage(&self, source: &mut Source, leave_free: u64) -> Result<PathBuf> {
        let size: u64 = source.files.values().map(|(_, size)| size).sum();
        let free = free_bytes(&self.models.0)?;
        if size.saturating_add(leave_free) > free {
            let line = format!(
                "the bundle takes {size} bytes, {free} are free and {leave_free} are to stay free (state.min_free_bytes)"
            );
            return Err(Error::new(ErrorKind::StorageFull, line));
        }
        let staging = self.models.path(STAGING);
        let mut folders = vec![staging.clone()];
        for (name, (file, size)) in &mut source.files {
            let to = staging.join(name);
            let folder = to.parent().expect("below the staging folder");
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder)?;
            folders.extend(
                folder
                    .ancestors()
                    .take_while(|f| *f != staging)
                    .map(PathBuf::from),
            );
            let mut copy = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&to)?;
            // It may grow while it is read; then its hash is wrong, and the disk not full.
            std::io::copy(&mut file.take(*size), &mut copy)?;
            copy.sync_all()?;
        }
        folders.sort();
        folders.dedup();
        folders.iter().try_for_each(|folder| sync_folder(folder))?;
        Ok(staging)
    }

    /// Makes the staged bundle the one to run, under `name` or a name that begins with it and a dot; `previous` is the one before it.
    pub fn install(&self, name: &str, previous: Option<&str>) -> Result<String> {
        let numbered = (2..).map(|n| format!("{name}.{n}"));
        let name = std::iter::once(name.to_owned())
            .chain(numbered)
            .find(|name| self.models.path(name).symlink_metadata().is_err())
            .expect("numbers do not end");
        std::fs::rename(self.models.path(STAGING), self.models.path(&name))?;
        sync_folder(&self.models.0)?;
        self.switch(Some(&name), previous)?;
        Ok(name)
    }

    /// Sets both links; what neither names is taken away with the end of this change.
    pub fn switch(&self, current: Option<&str>, previous: Option<&str>) -> Result<()> {
        let former = self.models.read(PREVIOUS);
        // One that is kept is named by a link throughout.
        if previous.is_some() {
            self.set(PREVIOUS, previous)?;
        }
        self.set(CURRENT, current)?;
        if previous.is_none() && !matches!(former, Ok(None)) {
            self.set(PREVIOUS, None)?;
        }
        Ok(())
    }

    fn set(&self, link: &str, target: Option<&str>) -> Result<()> {
        let path = self.models.path(link);
        match target {
            Some(target) => {
                let new = self.models.path(&format!("{link}.new"));
                let _ = std::fs::remove_file(&new);
                std::os::unix::fs::symlink(target, &new)?;
                std::fs::rename(&new, &path)?;
            }
            None => match std::fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            },
        }
        sync_folder(&self.models.0)
    }

    /// Removes everything but the links, what they name and the lock.
    fn tidy(&self) -> Result<()> {
        let mut kept = vec![super::state_dir::LOCK.to_owned()];
        kept.extend([CURRENT, PREVIOUS].map(str::to_owned));
        for link in [CURRENT, PREVIOUS] {
            match self.models.read(link) {
                Ok(name) => kept.extend(name),
                // What is no link names nothing; what cannot be read may.
                Err(error) if error.raw_os_error().is_none() => {}
                Err(error) if error.kind() == ErrorKind::InvalidInput => {}
                Err(error) => return Err(error),
            }
        }
        for entry in std::fs::read_dir(&self.models.0)? {
            let entry = entry?;
            if kept
                .iter()
                .any(|name| entry.file_name().as_os_str() == name.as_str())
            {
                continue;
            }
            if entry.file_type()?.is_dir() {
                std::fs::remove_dir_all(entry.path())?;
            } else {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        // What is left behind goes at the next change.
        let _ = self.tidy();
    }
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)?.sync_all()
}

/// The files of a bundle, opened before anything is copied: what they name cannot be changed any more, and whoever opened them may read them
/// for somebody who may not.
#[derive(Debug)]
pub struct Source {
    /// Path inside the bundle: the file and its size in bytes.
    files: BTreeMap<PathBuf, (File, u64)>,
}

impl Source {
    /// Opens the bundle in `folder`: the manifest and what it names, the signature and the model card where they are there; every problem is
    /// one line. No link is followed, and only regular files within the limits of [`manifest`](crate::manifest) are taken.
    pub fn open(folder: &Path) -> std::result::Result<Self, Vec<String>> {
        let fail = |name: &Path, error: &Error| {
            format!(
                "{}: {error}; install needs a folder with the files of a bundle, not links",
                folder.join(name).display()
            )
        };
        let root = openat(CWD, folder, FOLDER_FLAGS & !OFlags::NOFOLLOW, Mode::empty())
            .map_err(|e| vec![fail(Path::new(""), &e.into())])?;
        let root = File::from(root);
        let open = |name: &Path, limit| -> Result<(File, u64)> {
            let file = open_inside(&root, name)?;
            let size = check_file(&file, limit)?;
            Ok((file, size))
        };
        let mut files = BTreeMap::new();
        let mut problems = Vec::new();
        let mut add = |name: &str, limit, needed: bool| match open(Path::new(name), limit) {
            Ok(file) => _ = files.insert(PathBuf::from(name), file),
            Err(error) if error.kind() == ErrorKind::NotFound && !needed => {}
            Err(error) => problems.push(fail(Path::new(name), &error)),
        };
        add(SIGNATURE, MAX_TEXT, false);
        add(MODEL_CARD, MAX_TEXT, false);
        let manifest = open(Path::new(MANIFEST), MAX_TEXT).and_then(|(mut file, size)| {
            let mut text = String::new();
            (&mut file).take(size).read_to_string(&mut text)?;
            std::io::Seek::rewind(&mut file)?;
            Ok(((file, size), text))
        });
        match manifest {
            Err(error) => problems.push(fail(Path::new(MANIFEST), &error)),
            Ok((file, text)) => {
                match Manifest::parse(&text) {
                    Err(lines) => problems.extend(lines),
                    Ok(manifest) => {
                        add(&manifest.file, MAX_MODEL, true);
                        for image in &manifest.golden.image {
                            add(&image.file, MAX_GOLDEN, true);
                        }
                    }
                }
                files.insert(PathBuf::from(MANIFEST), file);
            }
        }
        if problems.is_empty() {
            Ok(Self { files })
        } else {
            Err(problems)
        }
    }
}

const FOLDER_FLAGS: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Opens the file `name` below `root`; a link on the way is an error.
fn open_inside(root: &File, name: &Path) -> Result<File> {
    let mut parts: Vec<_> = name.components().collect();
    let Some(Component::Normal(last)) = parts.pop() else {
        return Err(Error::other("no file name"));
    };
    let mut folder = root.try_clone()?;
    for part in parts {
        folder = File::from(openat(
            &folder,
            part.as_os_str(),
            FOLDER_FLAGS,
            Mode::empty(),
        )?);
    }
    // A pipe would keep the opener waiting for ever.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(File::from(openat(&folder, last, flags, Mode::empty())?))
}
