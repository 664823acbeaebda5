//! Takes images from the page into the export folder: the one thing that ScanSentry writes there.
//!
//! ```text
//! parts ──▶ .scansentry-upload-RANDOM.part (ignored by the watcher) ──whole and synced──▶ upload-RANDOM.EXT ──▶ the normal way
//! ```
//!
//! The name that the file had never gets here. With `watch.recursive` the files go into a sub-folder of their own, so that they are a study
//! of their own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::fs::File;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::{Semaphore, mpsc};

use super::page::read;
use crate::config::Config;
use crate::history::ApplianceKey;
use crate::http::{Part, Refusal};
use crate::scan::{PseudonymKey, hex};
use crate::store::{HistoryReader, Store, free_bytes};

/// Sub-folder for uploaded files.
const FOLDER: &str = "uploads";
/// Begin and end of a temporary name; one of the default `watch.ignore` patterns must match.
const TEMPORARY: (&str, &str) = (".scansentry-upload-", ".part");
/// Begin of a final name.
const FINAL: &str = "upload-";
/// Extensions that are kept. The content decides in any case.
const EXTENSIONS: [&str; 8] = ["png", "jpg", "jpeg", "bmp", "tif", "tiff", "dcm", "dicom"];
/// Files on their way at the same time.
const AT_ONCE: usize = 4;
/// How long a file waits for its turn to look at the export folder.
const LOOK_PATIENCE: Duration = Duration::from_secs(10);

/// Where uploaded files go.
pub struct Inbox {
    folder: PathBuf,
    key: PseudonymKey,
    store: Store,
    /// Whose folder it is.
    pub(super) appliance: ApplianceKey,
    /// Largest file, bytes.
    pub(super) file_bytes: u64,
    min_free_bytes: u64,
    files: usize,
    room: Semaphore,
    /// Held while the export folder is looked at: a share that hangs holds one thread, not all of them.
    looking: Arc<Semaphore>,
}

impl Inbox {
    /// Into `watch.folder` of `config`; what an earlier run left unfinished is removed in a thread, before anything is taken. Needs a runtime.
    pub fn open(config: &Config, key: PseudonymKey, store: Store) -> Self {
        let folder = if config.watch.recursive {
            config.watch.folder.join(FOLDER)
        } else {
            config.watch.folder.clone()
        };
        let looking = Arc::new(Semaphore::new(1));
        let (cleaned, place) = (folder.clone(), looking.clone().try_acquire_owned());
        tokio::task::spawn_blocking(move || {
            let _place = place;
            clean(&cleaned);
        });
        Self {
            folder,
            key,
            store,
            appliance: ApplianceKey {
                site: config.device.site.clone(),
                device: config.device.id.clone(),
            },
            file_bytes: config.limits.file_bytes,
            min_free_bytes: config.state.min_free_bytes,
            files: config.dashboard.upload_files,
            room: Semaphore::new(AT_ONCE),
            looking,
        }
    }

    /// Takes one file; answers with its id and whether its result is known already.
    pub(super) async fn take(
        self: Arc<Self>,
        extension: Option<String>,
        parts: mpsc::Receiver<Part>,
        reader: HistoryReader,
    ) -> Result<String, Refusal> {
        let Ok(_place) = self.room.try_acquire() else {
            return Err(Refusal::Busy(
                "upload: too many files at once; try again".into(),
            ));
        };
        let me = self.clone();
        let looking = tokio::time::timeout(LOOK_PATIENCE, self.looking.clone().acquire_owned())
            .await
            .map_err(|_| broken("the export folder does not answer"))?;
        let look = move || {
            let _looking = looking;
            me.look_around()
        };
        tokio::task::spawn_blocking(look)
            .await
            .map_err(|_| broken("the export folder cannot be looked at"))??;
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|_| broken("no random numbers"))?;
        let random = hex(&random);
        let temporary = Temporary(
            self.folder
                .join(format!("{}{random}{}", TEMPORARY.0, TEMPORARY.1)),
        );
        let digest = self.receive(&temporary.0, parts).await?;
        let scan_id = self.key.scan_id(&digest);
        let appliance = self.appliance.clone();
        let shown = read(reader, move |reader| Ok(reader.scan(&appliance, scan_id)?)).await?;
        let recorded = self
            .store
            .call(move |ledger| ledger.lookup(scan_id))
            .await?
            .is_some_and(|(_, outcome)| outcome.is_some());
        let known = recorded || !shown.is_empty();
        if !known {
            let extension = extension.map(|e| e.to_ascii_lowercase());
            let extension = extension.filter(|e| EXTENSIONS.contains(&e.as_str()));
            let dotted = extension.map_or_else(String::new, |e| format!(".{e}"));
            let target = self.folder.join(format!("{FINAL}{random}{dotted}"));
            tokio::fs::rename(&temporary.0, &target)
                .await
                .map_err(|e| unwritable(&e))?;
        }
        let (site, device) = (&self.appliance.site, &self.appliance.device);
        let answer = json!({ "scan_id": scan_id, "site": site, "device": device, "known": known, "shown": !shown.is_empty() });
        Ok(answer.to_string())
    }

    /// Whether there is room; makes the sub-folder, but never the export folder itself, which may be a share that is away.
    fn look_around(&self) -> Result<(), Refusal> {
        if self.folder.ends_with(FOLDER) {
            match std::fs::create_dir(&self.folder) {
                Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(unwritable(&e));
                }
                _ => {}
            }
        }
        let entries = std::fs::read_dir(&self.folder).map_err(|e| unwritable(&e))?;
        let uploaded = entries
            .flatten()
            .filter(|e| e.file_name().to_string_lossy().starts_with(FINAL));
        if uploaded.take(self.files).count() >= self.files {
            return Err(Refusal::Full(format!(
                "upload: {} uploaded files lie in the export folder; remove some or raise dashboard.upload_files",
                self.files
            )));
        }
        let free = free_bytes(&self.folder).map_err(|e| unwritable(&e))?;
        if free < self.min_free_bytes + self.file_bytes {
            return Err(Refusal::Full(
                "upload: the export folder's disk is nearly full; free some space".into(),
            ));
        }
        Ok(())
    }

    async fn receive(
        &self,
        path: &Path,
        mut parts: mpsc::Receiver<Part>,
    ) -> Result<[u8; 32], Refusal> {
        let mut file = File::create_new(path).await.map_err(|e| unwritable(&e))?;
        let mut hash = Sha256::new();
        let mut empty = true;
        loop {
            match parts.recv().await {
                Some(Part::Bytes(bytes)) => {
                    empty &= bytes.is_empty();
                    hash.update(&bytes);
                    file.write_all(&bytes).await.map_err(|e| unwritable(&e))?;
                }
                Some(Part::End) if empty => {
                    return Err(Refusal::Bad("file: is empty; choose another".into()));
                }
                Some(Part::End) => break,
                None => {
                    return Err(Refusal::Bad(
                        "file: did not arrive whole; send it again".into(),
                    ));
                }
            }
        }
        file.sync_all().await.map_err(|e| unwritable(&e))?;
        Ok(hash.finalize().into())
    }
}

/// Removes what an earlier run left unfinished.
fn clean(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(TEMPORARY.0) && name.ends_with(TEMPORARY.1) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// A file that is gone unless it was renamed.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Whether the watcher would leave an unfinished upload alone; the error is one line `key: value; hint`.
pub fn check(config: &Config) -> Result<(), String> {
    let example = format!("{}0{}", TEMPORARY.0, TEMPORARY.1);
    let ignored = config.watch.ignore.iter().any(|pattern| {
        globset::Glob::new(pattern).is_ok_and(|glob| glob.compile_matcher().is_match(&example))
    });
    if ignored {
        Ok(())
    } else {
        Err("dashboard.upload: an unfinished upload would be taken for an image; add \".*\" or \"*.part\" to watch.ignore".into())
    }
}

fn broken(what: &str) -> Refusal {
    Refusal::Away(format!("upload: {what}; try again"))
}

/// The kind only: the error's own text may name the folder.
fn unwritable(error: &std::io::Error) -> Refusal {
    Refusal::Away(format!(
        "upload: the export folder cannot be written ({}); check its rights (systemd: ReadWritePaths) and that it is there",
        error.kind()
    ))
}
