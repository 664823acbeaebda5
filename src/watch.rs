//! The eyes: file events as hints, walks of the folder as the truth, and the state of the folder itself.
//!
//! ```text
//! away ──folder there──▶ present(events | polling) ──gone, or another directory in its place──▶ away
//! ```
//!
//! A lost event costs time until the next walk, never a file. Events come through a bounded channel; when it is full, or
//! the kernel's own queue was, the hint becomes "walk everything".

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use globset::{Glob, GlobSet, GlobSetBuilder};
use notify::event::{AccessKind, AccessMode, CreateKind, EventKind, ModifyKind, RenameMode};
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::config::{Watch, WatchMode};
use crate::health::{Condition, Health};
use crate::progress::{look, stir};
use crate::scan::{ScanFile, Stamp};

/// Hints that may wait before they become "walk everything".
const HINTS: usize = 1024;

/// How long the folder may take to answer.
const FOLDER_PATIENCE: Duration = Duration::from_secs(10);

/// Files handed on at a time by a walk.
pub const CHUNK: usize = 256;

/// Something to look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hint {
    /// A file was closed after writing, or renamed into place: it is complete.
    Complete(PathBuf),
    /// A file changed; whether it is complete is not known.
    Changed(PathBuf),
    /// A sub-folder appeared: files may have come into it before it was watched.
    Folder(PathBuf),
    /// The folder is there (again); walk everything, and go on walking at the pace of this mode.
    Present {
        /// Whether file events cannot be relied on.
        polling: bool,
    },
    /// Events were lost, or known files are to be looked at again: walk everything.
    Overflow,
}

/// Which names are left alone: hidden and temporary files, by the patterns of `watch.ignore`.
#[derive(Debug, Clone)]
pub struct NameFilter {
    ignore: GlobSet,
}

impl NameFilter {
    /// A filter by glob patterns on single names. Patterns that do not parse are left out; the configuration was checked for them.
    pub fn new(patterns: &[String]) -> Self {
        let mut set = GlobSetBuilder::new();
        for glob in patterns.iter().filter_map(|p| Glob::new(p).ok()) {
            set.add(glob);
        }
        Self {
            ignore: set.build().unwrap_or_default(),
        }
    }

    /// Whether every name of `relative`, a path below the export folder, may be looked at.
    pub fn accepts(&self, relative: &Path) -> bool {
        relative.components().next().is_some()
            && relative
                .iter()
                .all(|name| !self.ignore.is_match(Path::new(name)))
    }
}

/// Follows the folder until `stop`, sending hints. Ends early only if nobody listens any more.
pub async fn follow(
    config: Watch,
    hints: mpsc::Sender<Hint>,
    health: Health,
    stop: CancellationToken,
) {
    let mut folder = Folder {
        path: config.folder.clone(),
        asking: None,
        mounted: false,
    };
    // Set once the system has run out of watches: polling until the folder goes away.
    let mut out_of_watches = false;
    let mut said = None;
    loop {
        let (identity, source, polling) = tokio::select! {
            () = stop.cancelled() => return,
            present = wait_for_folder(&mut folder, &config, &hints, &health, out_of_watches) => present,
        };
        if said.replace((identity, polling)) != Some((identity, polling)) {
            tracing::info!(
                mode = if polling { "polling" } else { "events" },
                "watching the export folder"
            );
        }
        if hints.send(Hint::Present { polling }).await.is_err() {
            return;
        }
        let again = Instant::now() + Duration::from_secs(config.rescan_s);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = look() => {}
            }
            let now = tokio::select! {
                () = stop.cancelled() => return,
                now = folder.identity() => now,
            };
            if now != Ok(identity) {
                out_of_watches = false;
                break;
            }
            let Some(source) = &source else {
                // What kept the events away may be mended by now.
                if health.holds(Condition::EventsUnavailable) && Instant::now() > again {
                    out_of_watches = false;
                    break;
                }
                continue;
            };
            let signs = source.signs.swap(0, Ordering::Relaxed);
            if signs & (GONE | NOT_WATCHED) != 0 {
                break;
            }
            if signs & NO_WATCHES != 0 {
                out_of_watches = true;
                break;
            }
            if signs & LOST != 0 {
                tracing::warn!("file events were lost; walking the whole folder");
                if hints.send(Hint::Overflow).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Device, inode and mount: another triple under the same name is another folder (an unmounted or replaced share). And whether it is a mount point.
type Identity = (u64, u64, u64, bool);

/// The folder, asked who it is without waiting for ever: a share that hangs keeps the one thread that asks, not more and more.
struct Folder {
    path: PathBuf,
    asking: Option<JoinHandle<Result<Identity, String>>>,
    /// Whether it has been a mount point. What lies there without the mount is not the scanner's export then.
    mounted: bool,
}

impl Folder {
    async fn identity(&mut self) -> Result<Identity, String> {
        let path = self.path.clone();
        let asking = self
            .asking
            .get_or_insert_with(|| tokio::task::spawn_blocking(move || identity_of(&path)));
        let Ok(answer) = tokio::time::timeout(FOLDER_PATIENCE, asking).await else {
            return Err("it does not answer".into());
        };
        self.asking = None;
        let identity = answer.unwrap_or_else(|e| Err(e.to_string()))?;
        if self.mounted && !identity.3 {
            return Err("nothing is mounted there any more".into());
        }
        self.mounted = identity.3;
        Ok(identity)
    }
}

fn identity_of(path: &Path) -> Result<Identity, String> {
    // The system's own words, without the path.
    let text = |e: std::io::Error| e.to_string();
    // With the dot, it has to be allowed to look at what is in it.
    let metadata = std::fs::metadata(path.join(".")).map_err(text)?;
    rustix::fs::access(path, rustix::fs::Access::READ_OK).map_err(|e| text(e.into()))?;
    // Whether there are descriptors left. Opened to be read, it would be a file event.
    let place = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open(path, place, rustix::fs::Mode::empty()).map_err(|e| text(e.into()))?;
    let flags = rustix::fs::StatxFlags::MNT_ID;
    let mount = rustix::fs::statx(rustix::fs::CWD, path, rustix::fs::AtFlags::empty(), flags);
    // Before Linux 5.8 there is neither.
    let (mount, mounted) = mount.map_or((0, false), |stat| {
        let root = rustix::fs::StatxAttributes::MOUNT_ROOT;
        (stat.stx_mnt_id, stat.stx_attributes.contains(root))
    });
    Ok((metadata.dev(), metadata.ino(), mount, mounted))
}

async fn wait_for_folder(
    folder: &mut Folder,
    config: &Watch,
    hints: &mpsc::Sender<Hint>,
    health: &Health,
    out_of_watches: bool,
) -> (Identity, Option<EventSource>, bool) {
    loop {
        match folder.identity().await {
            Ok(identity) => {
                health.clear(Condition::FolderAway);
                if out_of_watches {
                    health.raise(Condition::EventsUnavailable, NO_EVENTS);
                    return (identity, None, true);
                }
                let (config, hints, health) = (config.clone(), hints.clone(), health.clone());
                let (source, polling) =
                    tokio::task::spawn_blocking(move || open_events(&config, hints, &health))
                        .await
                        .unwrap_or((None, true));
                return (identity, source, polling);
            }
            Err(error) => health.raise(
                Condition::FolderAway,
                format!(
                    "the export folder cannot be read ({error}); mount it, or correct watch.folder"
                ),
            ),
        }
        // Not seldom: the scanner may wait for it too.
        stir();
        look().await;
    }
}

/// Events were lost: walk.
const LOST: u8 = 1;
/// The folder itself was removed or renamed, and its watch with it.
const GONE: u8 = 2;
/// A new sub-folder could not be watched: the system is out of watches.
const NO_WATCHES: u8 = 4;
/// A new sub-folder could not be watched: it may not be read.
const NOT_WATCHED: u8 = 8;

const NO_EVENTS: &str =
    "the system is out of file watches; polling instead, raise fs.inotify.max_user_watches";

struct EventSource {
    _watcher: RecommendedWatcher,
    /// What the callback has noticed since the last look: [`LOST`], [`GONE`], [`NO_WATCHES`], [`NOT_WATCHED`].
    signs: Arc<AtomicU8>,
}

/// Decides between events and polling; the second value says whether to poll.
fn open_events(
    config: &Watch,
    hints: mpsc::Sender<Hint>,
    health: &Health,
) -> (Option<EventSource>, bool) {
    let network = network_file_system(&config.folder);
    let use_events = match config.mode {
        WatchMode::Poll => false,
        WatchMode::Events => true,
        WatchMode::Auto => network.is_none(),
    };
    if !use_events {
        if let Some(name) = network {
            tracing::info!(
                file_system = name,
                "file events do not come from other machines on this file system; polling"
            );
        }
        health.clear(Condition::EventsUnavailable);
        return (None, true);
    }
    match watch_events(config, hints) {
        Ok(source) => {
            health.clear(Condition::EventsUnavailable);
            (Some(source), false)
        }
        Err(error) => {
            // The kind only: the error's own text names folders.
            let message = match error.kind {
                notify::ErrorKind::MaxFilesWatch => NO_EVENTS.to_owned(),
                notify::ErrorKind::Io(error) => {
                    format!(
                        "a folder cannot be watched ({}); polling instead, check its permissions",
                        error.kind()
                    )
                }
                _ => "file events cannot be had; polling instead".to_owned(),
            };
            health.raise(Condition::EventsUnavailable, message);
            (None, true)
        }
    }
}

fn watch_events(config: &Watch, hints: mpsc::Sender<Hint>) -> notify::Result<EventSource> {
    let signs = Arc::new(AtomicU8::new(0));
    let noticed = signs.clone();
    // notify reports canonical paths only if it is given one.
    let root = config.folder.canonicalize().map_err(notify::Error::io)?;
    let filter = NameFilter::new(&config.ignore);
    let (base, recursive) = (root.clone(), config.recursive);
    let callback = move |event: notify::Result<notify::Event>| {
        let notice = |sign: u8| _ = noticed.fetch_or(sign, Ordering::Relaxed);
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                let limit = matches!(error.kind, notify::ErrorKind::MaxFilesWatch);
                notice(if limit { NO_WATCHES } else { LOST });
                return;
            }
        };
        if event.need_rescan() {
            notice(LOST);
        }
        let leaves = matches!(
            event.kind,
            EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(RenameMode::From))
        );
        if leaves && event.paths.first() == Some(&base) {
            notice(GONE);
        }
        for hint in hints_of(&event) {
            let (Hint::Complete(path) | Hint::Changed(path) | Hint::Folder(path)) = &hint else {
                continue;
            };
            let Ok(relative) = path.strip_prefix(&base) else {
                continue;
            };
            if !filter.accepts(relative) {
                continue;
            }
            // notify says nothing of that.
            if recursive && matches!(hint, Hint::Folder(_)) && denied(path) {
                notice(NOT_WATCHED);
            }
            let relative = relative.to_owned();
            let hint = match hint {
                Hint::Complete(_) => Hint::Complete(relative),
                Hint::Folder(_) => Hint::Folder(relative),
                _ => Hint::Changed(relative),
            };
            if hints.try_send(hint).is_err() {
                notice(LOST);
            }
        }
    };
    // Links to folders are not followed: what lies behind them is not the scanner's export.
    let options = notify::Config::default().with_follow_symlinks(false);
    let mut watcher = RecommendedWatcher::new(callback, options)?;
    let mode = if config.recursive {
        RecursiveMode::Recursive
    } else {
        RecursiveMode::NonRecursive
    };
    watcher.watch(&root, mode)?;
    Ok(EventSource {
        _watcher: watcher,
        signs,
    })
}

fn hints_of(event: &notify::Event) -> Vec<Hint> {
    let wrap: fn(PathBuf) -> Hint = match event.kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => Hint::Complete,
        EventKind::Modify(ModifyKind::Name(RenameMode::To)) => {
            // A renamed folder arrives with everything in it.
            return event.paths.last().map_or_else(Vec::new, |to| {
                vec![if is_folder(to) {
                    Hint::Folder(to.clone())
                } else {
                    Hint::Complete(to.clone())
                }]
            });
        }
        // Said again of what the event above has told, and of a name that is gone.
        EventKind::Modify(ModifyKind::Name(RenameMode::Both | RenameMode::From)) => {
            return Vec::new();
        }
        EventKind::Create(CreateKind::Folder) => Hint::Folder,
        // It may be allowed to look into it by now.
        EventKind::Modify(ModifyKind::Metadata(_)) if event.paths.iter().all(|p| is_folder(p)) => {
            Hint::Folder
        }
        EventKind::Create(_) | EventKind::Modify(_) => Hint::Changed,
        _ => return Vec::new(),
    };
    event.paths.iter().cloned().map(wrap).collect()
}

fn denied(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_err_and(|e| e.kind() == ErrorKind::PermissionDenied)
}

fn is_folder(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|m| m.is_dir())
}

/// The name of the network (or FUSE) file system that `path` lies on, from its magic number (Linux `statfs(2)`, `linux/magic.h`).
fn network_file_system(path: &Path) -> Option<&'static str> {
    let magic = rustix::fs::statfs(path).ok()?.f_type as u64 & 0xffff_ffff;
    match magic {
        0x6969 => Some("nfs"),
        0xff53_4d42 => Some("cifs"),
        0xfe53_4d42 => Some("smb2"),
        0x517b => Some("smb"),
        0x6573_5546 => Some("fuse"),
        0x0102_1997 => Some("9p"),
        0x00c3_6400 => Some("ceph"),
        0x5346_414f => Some("afs"),
        0x7375_7245 => Some("coda"),
        _ => None,
    }
}

/// Walks `below` (a path below `root`, or empty for all of it) and calls `chunk` with the files found, at most [`CHUNK`] at a
/// time and in name order within a folder, until `chunk` returns `false`. Symbolic links, FIFOs and devices are reported as the files they
/// stand for; whether they may be read is decided where they are read. Folders are not followed through links. `true` if every sub-folder could be read.
pub fn walk(
    root: &Path,
    below: &Path,
    config: &Watch,
    chunk: &mut dyn FnMut(Vec<ScanFile>) -> bool,
) -> std::io::Result<bool> {
    let filter = NameFilter::new(&config.ignore);
    let mut folders = VecDeque::from([below.to_owned()]);
    let mut found = Vec::with_capacity(CHUNK);
    let mut first = true;
    let mut complete = true;
    while let Some(folder) = folders.pop_front() {
        let entries = match std::fs::read_dir(root.join(&folder)) {
            Ok(entries) => entries,
            Err(error) if first => return Err(error),
            // A sub-folder that has gone or cannot be read: the next walk tries again.
            Err(_) => {
                complete = false;
                continue;
            }
        };
        first = false;
        let mut names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
        names.sort();
        for name in names {
            let relative = folder.join(name);
            if !filter.accepts(&relative) {
                continue;
            }
            let metadata = match std::fs::symlink_metadata(root.join(&relative)) {
                Ok(metadata) => metadata,
                Err(error) => {
                    complete &= error.kind() == ErrorKind::NotFound;
                    continue;
                }
            };
            if metadata.is_dir() {
                if config.recursive && relative.components().count() <= config.max_depth {
                    folders.push_back(relative);
                }
                continue;
            }
            let stamp = if metadata.is_symlink() {
                // The target's stamp, so that a change behind the link is seen.
                Stamp::of(&std::fs::metadata(root.join(&relative)).unwrap_or(metadata))
            } else {
                Stamp::of(&metadata)
            };
            found.push(ScanFile {
                path: relative,
                stamp,
            });
            if found.len() == CHUNK
                && !chunk(std::mem::replace(&mut found, Vec::with_capacity(CHUNK)))
            {
                return Ok(false);
            }
        }
    }
    if !found.is_empty() {
        chunk(found);
    }
    Ok(complete)
}

/// A bounded channel for hints.
pub fn channel() -> (mpsc::Sender<Hint>, mpsc::Receiver<Hint>) {
    mpsc::channel(HINTS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_and_temporary_names_are_left_alone() {
        let filter = NameFilter::new(&crate::config::Config::defaults().watch.ignore);
        for (path, accepted) in [
            ("a.png", true),
            ("MR.1.2.840", true),
            ("series 1/IM0001", true),
            (".a.png", false),
            ("a.png.part", false),
            ("a.tmp", false),
            (".hidden/a.png", false),
            ("up.partial/a.png", false),
            ("", false),
        ] {
            assert_eq!(filter.accepts(Path::new(path)), accepted, "{path}");
        }
    }

    #[test]
    fn a_walk_finds_files_in_order_within_its_depth() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        std::fs::create_dir_all(root.join("b/c/d")).unwrap();
        for name in ["z.png", "a.png", "b/1", "b/c/2", "b/c/d/3", ".h", "x.tmp"] {
            std::fs::write(root.join(name), b"x").unwrap();
        }
        let mut config = crate::config::Config::defaults().watch;
        let names = |config: &Watch| {
            let mut names = Vec::new();
            walk(root, Path::new(""), config, &mut |chunk| {
                names.extend(chunk.into_iter().map(|f| f.path.display().to_string()));
                true
            })
            .unwrap();
            names
        };
        assert_eq!(
            names(&config),
            ["a.png", "z.png", "b/1", "b/c/2", "b/c/d/3"]
        );
        config.max_depth = 2;
        assert_eq!(names(&config), ["a.png", "z.png", "b/1", "b/c/2"]);
        config.recursive = false;
        assert_eq!(names(&config), ["a.png", "z.png"]);
    }
}
