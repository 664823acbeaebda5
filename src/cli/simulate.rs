//! `simulate`: synthetic slices into a folder.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{Failure, say};
use crate::simulate::{ExportFormat, SimulateError, Simulator, Writing};

#[derive(Debug, Args)]
pub(super) struct SimulateArgs {
    /// Folder to export into; made if it is not there
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Images a second; 0 is as fast as possible
    #[arg(long, default_value_t = 1.0)]
    rate: f64,
    /// How many images; 0 is without end (with --images: every file once)
    #[arg(long, default_value_t = 0)]
    count: u64,
    /// Phantoms of one seed are the same on every machine
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Share of phantoms with a lesion, 0 to 1
    #[arg(long, default_value_t = 0.5)]
    lesions: f64,
    /// Format of phantoms
    #[arg(long, value_enum, default_value_t = Format::Png)]
    format: Format,
    /// Write under the final name from the first byte on, instead of renaming a temporary file
    #[arg(long)]
    direct: bool,
    /// Copy the image files below this folder instead of drawing phantoms
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    Png,
    Jpeg,
}

pub(super) fn simulate(args: &SimulateArgs) -> Result<(), Failure> {
    let simulator = Simulator {
        to: args.to.clone(),
        rate: args.rate,
        count: args.count,
        seed: args.seed,
        lesion_share: args.lesions,
        format: match args.format {
            Format::Png => ExportFormat::Png,
            Format::Jpeg => ExportFormat::Jpeg,
        },
        writing: if args.direct {
            Writing::Direct
        } else {
            Writing::Rename
        },
        images: args.images.clone(),
    };
    // Ctrl-C ends the process; a file that was being written keeps its temporary name.
    let exported = simulator.run(|| false, |_| {}).map_err(|e| failure(&e))?;
    say!("{exported} images exported to {}", args.to.display())?;
    Ok(())
}

/// A setting of the simulator that makes no sense is wrong usage of the command line, but clap has accepted it: exit 1 with the reason.
pub(super) fn failure(error: &SimulateError) -> Failure {
    Failure::Runtime(format!("simulate: {error}"))
}
