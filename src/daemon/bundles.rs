//! Which model bundle runs: the installed one, else the one before it, else the configured one. Installing and going back.
//!
//! ```text
//! run, check, classify   installed (current) ──unusable──▶ previous ──unusable──▶ configured ──unusable──▶ refused, exit 78
//! a running daemon       another one only if it is usable; else what runs goes on
//! ```
//!
//! An appliance that is alone for years must not stand still because of a bad sector under its installed model: an older one runs then, and
//! log and health say so. Without an installed bundle there is nothing to fall back to, and none is looked for. A configuration that does not
//! go with the installed bundle is no reason for another one: it is refused, and waits for a person.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use crate::classifier::{Bundle, BundleError, Classifier, runtime};
use crate::config::Config;
use crate::manifest::SIGNATURE;
use crate::signature::PublicKey;
use crate::store::{Models, Source};

/// Digits of the manifest's hash in the folder's name.
const HASH_DIGITS: usize = 12;

/// Which bundle it is, by its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// Installed, and to run.
    Installed,
    /// Installed before that.
    Previous,
    /// The one that `model.bundle` names.
    Configured,
}

impl Place {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Installed => "installed",
            Self::Previous => "previous",
            Self::Configured => "configured",
        }
    }
}

/// Why a bundle does not run: every problem, one line each.
#[derive(Debug)]
pub enum Refusal {
    /// `[decision]` or `[model]` does not go with it; the bundle may be whole.
    Configuration(Vec<String>),
    /// It is damaged, not signed, or nothing for this engine.
    Bundle(Vec<String>),
}

impl Refusal {
    /// The problems.
    pub fn lines(self) -> Vec<String> {
        match self {
            Self::Configuration(lines) | Self::Bundle(lines) => lines,
        }
    }
}

impl From<BundleError> for Refusal {
    fn from(BundleError(lines): BundleError) -> Self {
        Self::Bundle(lines)
    }
}

/// A bundle that may run.
#[derive(Debug, Clone, Serialize)]
pub struct Candidate {
    /// Which.
    pub place: Place,
    /// Its folder.
    pub dir: PathBuf,
    /// The folder's name among the installed ones.
    #[serde(skip)]
    name: Option<String>,
}

impl Candidate {
    fn installed(models: &Models, place: Place, name: String) -> Self {
        Self {
            place,
            dir: models.path(&name),
            name: Some(name),
        }
    }

    fn configured(config: &Config) -> Self {
        Self {
            place: Place::Configured,
            dir: config.model.bundle.clone(),
            name: None,
        }
    }

    /// Reads it and checks hash, signature and tensors, but not the golden images.
    pub fn load(&self, config: &Config) -> Result<Classifier, Refusal> {
        load(&self.dir, config).map_err(|refusal| self.name_in(refusal))
    }

    /// [`Self::load`], and the golden images.
    pub fn verify(&self, config: &Config) -> Result<Classifier, Refusal> {
        verify(&self.dir, config).map_err(|refusal| self.name_in(refusal))
    }

    /// Says in each line about the bundle itself which one it is, where it is not the configured one.
    fn name_in(&self, refusal: Refusal) -> Refusal {
        let (Refusal::Bundle(lines), Some(name)) = (&refusal, &self.name) else {
            return refusal;
        };
        let named = |line: &String| {
            let line = line.strip_prefix("model.bundle: ").unwrap_or(line);
            format!("{} model {name}: {line}", self.place.as_str())
        };
        Refusal::Bundle(lines.iter().map(named).collect())
    }
}

/// What has to be right whatever the bundle: the engine and the key. The key, if there is one.
fn key(config: &Config) -> Result<Option<PublicKey>, Refusal> {
    runtime(config.model.engine)
        .map_err(|BundleError(lines)| lines)
        .and_then(|_| PublicKey::of(&config.model.public_key).map_err(|line| vec![line]))
        .map_err(Refusal::Configuration)
}

/// Reads the bundle in `dir` and checks hash, signature and tensors, but not the golden images.
pub fn load(dir: &Path, config: &Config) -> Result<Classifier, Refusal> {
    let bundle = Bundle::read(dir, key(config)?.as_ref())?;
    let rule = config.decision.over(&bundle.manifest.decision);
    let rule = rule.map_err(Refusal::Configuration)?;
    Ok(Classifier::new(Arc::new(bundle), rule, config)?)
}

/// Everything that can be checked of the bundle in `dir`, on this machine's engine.
pub fn verify(dir: &Path, config: &Config) -> Result<Classifier, Refusal> {
    let mut classifier = load(dir, config)?;
    classifier.verify_golden()?;
    Ok(classifier)
}

/// The bundle that runs, or would.
pub struct Found<T> {
    /// Which one it is.
    pub candidate: Candidate,
    /// What it was made into.
    pub loaded: T,
    /// Why those before it do not run; every problem is one line.
    pub refused: Vec<String>,
}

/// The first bundle that `make` can use, in the order of the module's picture; the error has every problem of all of them.
pub fn first<T>(
    config: &Config,
    make: impl Fn(&Candidate) -> Result<T, Refusal>,
) -> Result<Found<T>, Vec<String>> {
    let models = Models::of(&config.state.dir);
    let unreadable = |error: std::io::Error| {
        let dir = config.state.dir.display();
        format!(
            "state.dir: {dir}: which model is installed cannot be read ({error}); run as the user of the daemon, or install one again"
        )
    };
    let (installed, refused) = match models.current() {
        Ok(None) => return first_of(config, [Candidate::configured(config)], Vec::new(), make),
        Ok(Some(name)) => {
            let installed = Candidate::installed(&models, Place::Installed, name);
            (Some(installed), Vec::new())
        }
        Err(error) => (None, vec![unreadable(error)]),
    };
    let candidates = installed.into_iter().chain(older(config));
    first_of(config, candidates, refused, make)
}

/// The bundle to which [`rollback`] would go: the previous one if it can be used, else the configured one; `None` where none is installed.
pub fn before(config: &Config) -> Option<Result<Found<Classifier>, Vec<String>>> {
    if matches!(Models::of(&config.state.dir).current(), Ok(None)) {
        return None;
    }
    Some(first_of(config, older(config), Vec::new(), |c| {
        c.verify(config)
    }))
}

/// What is older than the installed one.
fn older(config: &Config) -> impl Iterator<Item = Candidate> {
    let models = Models::of(&config.state.dir);
    // Where it cannot be read, there is none to be used.
    let previous = models.previous().ok().flatten();
    let previous = previous.map(|name| Candidate::installed(&models, Place::Previous, name));
    previous.into_iter().chain([Candidate::configured(config)])
}

/// The first of `candidates` that `make` can use, unless the configuration is at fault that the very first one does not run.
fn first_of<T>(
    config: &Config,
    candidates: impl IntoIterator<Item = Candidate>,
    mut refused: Vec<String>,
    make: impl Fn(&Candidate) -> Result<T, Refusal>,
) -> Result<Found<T>, Vec<String>> {
    // Said once, not for every bundle.
    key(config).map_err(Refusal::lines)?;
    for candidate in candidates {
        match make(&candidate) {
            Ok(loaded) => {
                return Ok(Found {
                    candidate,
                    loaded,
                    refused,
                });
            }
            Err(Refusal::Configuration(lines)) if refused.is_empty() => return Err(lines),
            Err(refusal) => refused.extend(refusal.lines()),
        }
    }
    Err(refused)
}

/// Why nothing was changed.
#[derive(Debug)]
pub enum Unchanged {
    /// No bundle that can be used: every problem, one line each.
    Refused(Vec<String>),
    /// There is nothing to go back from.
    NotInstalled,
    /// The state directory does not allow it.
    Failed(std::io::Error),
}

impl From<std::io::Error> for Unchanged {
    fn from(error: std::io::Error) -> Self {
        Self::Failed(error)
    }
}

/// Copies `source` into the state directory, checks the copy completely and makes it the one to run; `false` where it is that already, with
/// that signature. What ran before stays as the previous one.
pub fn install(config: &Config, mut source: Source) -> Result<(Classifier, bool), Unchanged> {
    let change = Models::of(&config.state.dir).change()?;
    let staged = change.stage(&mut source, config.state.min_free_bytes)?;
    let classifier =
        verify(&staged, config).map_err(|refusal| Unchanged::Refused(refusal.lines()))?;
    let bundle = classifier.bundle();
    let name = format!(
        "{}-{}-{}",
        bundle.model_ref.name,
        bundle.model_ref.version,
        &bundle.manifest_sha256[..HASH_DIGITS]
    );
    let again = format!("{name}.");
    let same = |c: &Candidate| {
        c.name
            .as_ref()
            .is_some_and(|other| *other == name || other.starts_with(&again))
    };
    // What only does not go with the configuration is whole, and may go with the next one.
    let whole = |candidate: &Candidate| match candidate.verify(config) {
        Ok(_) | Err(Refusal::Configuration(_)) => Ok(()),
        Err(refusal) => Err(refusal),
    };
    let whole_of = |found: Result<Found<()>, _>| found.ok().map(|found| found.candidate);
    let mut running = whole_of(first(config, whole));
    if let Some(r) = running.as_ref().filter(|r| same(r)) {
        // The manifest's hash is in the name; the signature is not part of it.
        let signature = |dir: &Path| std::fs::read(dir.join(SIGNATURE)).ok();
        if r.place == Place::Installed && signature(&r.dir) == signature(&staged) {
            return Ok((classifier, false));
        }
        running = whole_of(first_of(config, older(config), Vec::new(), whole));
    }
    let previous = running.filter(|r| !same(r)).and_then(|r| r.name);
    change.install(&name, previous.as_deref())?;
    Ok((classifier, true))
}

/// Goes back to the bundle before the installed one, see [`before`].
pub fn rollback(config: &Config) -> Result<Found<Classifier>, Unchanged> {
    let change = Models::of(&config.state.dir).change()?;
    let found = before(config)
        .ok_or(Unchanged::NotInstalled)?
        .map_err(Unchanged::Refused)?;
    change.switch(found.candidate.name.as_deref(), None)?;
    Ok(found)
}
