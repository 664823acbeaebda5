//! Log output: text for people, JSON for collectors, fields for the systemd journal; always on standard error. The latest error is kept for
//! `health` and `status`.

use std::fs::File;
use std::io::IsTerminal as _;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use tracing::field::{Field, Visit};
use tracing::{Level, Metadata};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{Targets, filter_fn};
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::{Context, SubscriberExt as _};

use crate::config::{Log, LogFormat};
use crate::health;

/// Starts logging as `log` says. A second call in one process changes nothing.
pub fn init(log: &Log) {
    let filter: Targets = log
        .level
        .parse()
        .unwrap_or_else(|_| Targets::new().with_default(Level::INFO));
    let format = match log.format {
        LogFormat::Auto if std::io::stderr().is_terminal() => LogFormat::Text,
        LogFormat::Auto if std::env::var_os("JOURNAL_STREAM").is_some() => LogFormat::Journald,
        LogFormat::Auto => LogFormat::Json,
        format => format,
    };
    let stderr = tracing_subscriber::fmt::layer()
        .with_writer(standard_error())
        .with_target(false);
    let layer = match format {
        LogFormat::Journald => match tracing_journald::layer() {
            Ok(layer) => layer.boxed(),
            Err(_) => stderr.json().flatten_event(true).boxed(),
        },
        LogFormat::Json => stderr.json().flatten_event(true).boxed(),
        LogFormat::Text | LogFormat::Auto => stderr
            .with_ansi(std::io::stderr().is_terminal())
            .compact()
            .boxed(),
    };
    let subscriber = tracing_subscriber::registry()
        .with(layer.with_filter(filter).with_filter(filter_fn(ours)))
        .with(KeepLatest.with_filter(filter_fn(|metadata| {
            ours(metadata) && *metadata.level() <= Level::WARN
        })));
    // Not its `try_init`, which would also take what libraries log with the `log` crate, only to have it thrown away here.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

/// Standard error by a descriptor of its own: while a runtime loads or ends, descriptor 2 is another file, where lines of other threads would mix
/// with the runtime's.
fn standard_error() -> BoxMakeWriter {
    match std::io::stderr().as_fd().try_clone_to_owned() {
        Ok(descriptor) => BoxMakeWriter::new(Arc::new(File::from(descriptor))),
        Err(_) => BoxMakeWriter::new(std::io::stderr),
    }
}

/// Whether a line is one of this program. Those of libraries stay out, whatever `log.level` says: some quote what they read, headers of images too.
fn ours(metadata: &Metadata<'_>) -> bool {
    metadata.target().starts_with(env!("CARGO_CRATE_NAME"))
}

/// Keeps the latest of our own lines that is an error or says that a condition begins, whatever `log.level` is. A rejected image is neither.
struct KeepLatest;

impl<S: tracing::Subscriber> Layer<S> for KeepLatest {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        let mut line = Line::default();
        event.record(&mut line);
        if *metadata.level() == Level::ERROR || line.condition {
            health::note_error(&line.message);
        }
    }
}

/// What matters of an event.
#[derive(Default)]
struct Line {
    message: String,
    condition: bool,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            "condition" => self.condition = true,
            _ => {}
        }
    }
}

/// Sends panics to the log as one line with their place; the message itself may hold data of the file at hand, so it stays out.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(place, "a defect in the program (panic)");
    }));
}
