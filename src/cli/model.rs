//! `model`: which bundle runs, checking one, installing one, going back.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde_json::{Value, json};

use super::{Failure, Global, become_owner, say};
use crate::classifier::{Bundle, Classifier, SignatureState};
use crate::config::Config;
use crate::daemon::bundles::{self, Candidate, Refusal, Unchanged};
use crate::store::{Models, Source, StateDir};

#[derive(Debug, Subcommand)]
pub(super) enum ModelVerb {
    /// Which model bundle runs here, and to which one `rollback` would go
    Show {
        /// One JSON object instead of lines for people
        #[arg(long)]
        json: bool,
    },
    /// Check a bundle completely: signature, hash, tensors, golden images; list every problem
    Verify {
        /// Folder of the bundle; default: the installed one, else the configured one
        dir: Option<PathBuf>,
    },
    /// Check a bundle and make it the one that runs; a running daemon takes it over within seconds
    Install {
        /// Folder of the bundle
        dir: PathBuf,
    },
    /// Go back to the bundle before the installed one, in the end to the configured one
    Rollback,
}

pub(super) fn model(global: &Global, verb: &ModelVerb) -> Result<(), Failure> {
    let config = global.load()?;
    rustix::process::umask(rustix::fs::Mode::from_bits_truncate(0o077));
    let needs_nothing_installed = matches!(verb, ModelVerb::Verify { dir: Some(_) });
    if !needs_nothing_installed
        && let Err(error) = Models::of(&config.state.dir).current()
        && error.kind() == ErrorKind::PermissionDenied
    {
        return Err(failure(&config, Unchanged::Failed(error)));
    }
    match verb {
        ModelVerb::Verify { dir: Some(_) } | ModelVerb::Install { .. } => {}
        // As the daemon sees it; and whatever its user may have put there is not root's to run.
        _ => become_owner(&config.state.dir)?,
    }
    match verb {
        ModelVerb::Show { json } => show(&config, *json),
        ModelVerb::Verify { dir } => verify(&config, dir.as_deref()),
        ModelVerb::Install { dir } => install(&config, dir),
        ModelVerb::Rollback => rollback(&config),
    }
}

fn show(config: &Config, as_json: bool) -> Result<(), Failure> {
    let found = bundles::first(config, |candidate| candidate.verify(config))
        .map_err(Failure::Configuration)?;
    let (classifier, candidate) = (found.loaded, found.candidate);
    let before = bundles::before(config);
    if as_json {
        let mut shown = described(&candidate, &classifier);
        shown["refused"] = json!(found.refused);
        shown["rollback"] = match &before {
            Some(Ok(found)) => described(&found.candidate, &found.loaded),
            _ => Value::Null,
        };
        say!("{shown}")?;
        return Ok(());
    }
    let bundle = classifier.bundle();
    let manifest = &bundle.manifest;
    let line = |name: &str, value: &str| say!("{name:<12} {value}");
    line("model", &title(bundle))?;
    line("", &manifest.description)?;
    line("use", &manifest.intended_use)?;
    line("sha256", &bundle.model_ref.sha256)?;
    line("manifest", &bundle.manifest_sha256)?;
    line("signature", signature_text(bundle.signature))?;
    line("labels", &labels(bundle))?;
    line("decision", &classifier.rule().to_string())?;
    let golden = &manifest.golden;
    let images = golden.image.len();
    line(
        "golden",
        &format!("{images} images within {}", golden.tolerance),
    )?;
    line("engine", &classifier.engine_info().to_string())?;
    line("place", &place(&candidate))?;
    let back = match &before {
        None => "nothing is installed".to_owned(),
        Some(Err(_)) => "no bundle that can be used".to_owned(),
        Some(Ok(found)) => {
            let title = title(found.loaded.bundle());
            format!("{title}, {}", place(&found.candidate))
        }
    };
    line("rollback to", &back)?;
    for problem in found.refused {
        line("refused", &problem)?;
    }
    Ok(())
}

fn title(bundle: &Bundle) -> String {
    format!("{} {}", bundle.model_ref.name, bundle.model_ref.version)
}

fn place(candidate: &Candidate) -> String {
    format!("{}: {}", candidate.place.as_str(), candidate.dir.display())
}

fn labels(bundle: &Bundle) -> String {
    let output = &bundle.manifest.output;
    let labels = output.labels.iter().map(|label| {
        let sign = if output.positive.contains(label) {
            " (positive)"
        } else {
            ""
        };
        format!("{label}{sign}")
    });
    labels.collect::<Vec<_>>().join(", ")
}

fn signature_text(state: SignatureState) -> &'static str {
    match state {
        SignatureState::Valid => "valid, by model.public_key",
        SignatureState::Unchecked => "not checked: model.public_key is not set",
        SignatureState::None => "none, and model.public_key is not set",
    }
}

fn described(candidate: &Candidate, classifier: &Classifier) -> Value {
    let bundle = classifier.bundle();
    let manifest = &bundle.manifest;
    json!({
        "place": candidate.place,
        "dir": candidate.dir.display().to_string(),
        "name": bundle.model_ref.name,
        "version": bundle.model_ref.version,
        "sha256": bundle.model_ref.sha256,
        "manifest_sha256": bundle.manifest_sha256,
        "signature": bundle.signature,
        "description": manifest.description,
        "intended_use": manifest.intended_use,
        "labels": manifest.output.labels,
        "positive": manifest.output.positive,
        "threshold": classifier.rule().rule.threshold,
        "indeterminate": classifier.rule().rule.indeterminate,
        "decision_rule": classifier.rule().owner,
        "golden": { "images": manifest.golden.image.len(), "tolerance": manifest.golden.tolerance },
        "engine": classifier.engine_info().to_string(),
    })
}

fn verify(config: &Config, dir: Option<&Path>) -> Result<(), Failure> {
    let checked = match dir {
        Some(dir) => bundles::verify(dir, config)
            .map(|classifier| (classifier, Vec::new()))
            .map_err(Refusal::lines),
        None => bundles::first(config, |candidate| candidate.verify(config))
            .map(|found| (found.loaded, found.refused)),
    };
    let (classifier, refused) = checked.map_err(Failure::Configuration)?;
    if !refused.is_empty() {
        return Err(Failure::Configuration(refused));
    }
    let bundle = classifier.bundle();
    say!(
        "ok: {}; {} golden images on {}; signature {}",
        title(bundle),
        bundle.manifest.golden.image.len(),
        classifier.engine_info(),
        signature_text(bundle.signature)
    )?;
    Ok(())
}

fn install(config: &Config, dir: &Path) -> Result<(), Failure> {
    // As whoever called, who may read what the daemon's user may not.
    let source = Source::open(dir).map_err(Failure::Configuration)?;
    become_owner(&config.state.dir)?;
    let (classifier, anew) =
        bundles::install(config, source).map_err(|unchanged| failure(config, unchanged))?;
    let title = title(classifier.bundle());
    if anew {
        StateDir::nudge(&config.state.dir);
        say!("installed: {title}; a running daemon takes it over within a few seconds")?;
    } else {
        say!("unchanged: {title} is installed already")?;
    }
    Ok(())
}

fn rollback(config: &Config) -> Result<(), Failure> {
    let found = bundles::rollback(config).map_err(|unchanged| failure(config, unchanged))?;
    for line in found.refused {
        eprintln!("{line}");
    }
    StateDir::nudge(&config.state.dir);
    say!(
        "back to: {} ({}); a running daemon takes it over within a few seconds",
        title(found.loaded.bundle()),
        found.candidate.place.as_str()
    )?;
    Ok(())
}

fn failure(config: &Config, unchanged: Unchanged) -> Failure {
    match unchanged {
        Unchanged::Refused(problems) => Failure::Configuration(problems),
        Unchanged::NotInstalled => Failure::Runtime(
            "model: nothing is installed, the configured bundle runs; there is nothing to go back from".into(),
        ),
        Unchanged::Failed(error) => {
            let hint = match error.kind() {
                ErrorKind::PermissionDenied => "; run as root or as the user of the daemon",
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "; make room on the disk",
                // Ours, with a hint of their own.
                ErrorKind::Other => "",
                _ => "; check the disk, and try again",
            };
            let dir = config.state.dir.display();
            Failure::Runtime(format!("state.dir: {dir}: {error}{hint}"))
        }
    }
}
