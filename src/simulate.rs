//! A scanner that is not there: exports synthetic slices, or copies of real files, into a folder at a steady rate.
//!
//! For the demo, for soak and load tests. It writes the two ways in which scanners export: under a temporary name that is
//! renamed when the file is complete, or under the final name from the start.

use std::fs;
use std::io::{self, Cursor, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use image::codecs::jpeg::JpegEncoder;
use image::{ImageError, ImageFormat};

use crate::phantom::Phantom;

/// How finely a wait is cut, so that a stop is heard.
const LONGEST_NAP: Duration = Duration::from_millis(50);

/// Quality of the JPEG files, 1 to 100.
const JPEG_QUALITY: u8 = 92;

/// File names that [`Simulator::images`] takes, by their extension.
const IMAGE_EXTENSIONS: [&str; 8] = ["bmp", "dcm", "jpeg", "jpg", "jpe", "png", "tif", "tiff"];

/// What to export, where to, and how fast.
#[derive(Debug, Clone)]
pub struct Simulator {
    /// The folder; made if it is not there.
    pub to: PathBuf,
    /// Images a second; 0 is as fast as possible.
    pub rate: f64,
    /// How many; 0 is without end for phantoms, and every file once for `images`.
    pub count: u64,
    /// Phantoms of one seed are the same on every machine.
    pub seed: u64,
    /// The share of phantoms with a lesion, 0 to 1, spread evenly: with one half, every second one.
    pub lesion_share: f64,
    /// The format of phantoms.
    pub format: ExportFormat,
    /// How a file appears.
    pub writing: Writing,
    /// Copy the image files below this folder, sorted by path, instead of drawing phantoms.
    pub images: Option<PathBuf>,
}

/// What a phantom is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportFormat {
    /// Lossless, 8-bit grey.
    Png,
    /// 8-bit grey.
    Jpeg,
}

/// How a file appears in the folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writing {
    /// Under a hidden temporary name beside it, renamed when complete.
    Rename,
    /// Under its own name from the first byte on, closed when complete.
    Direct,
}

/// One exported file.
#[derive(Debug, Clone, PartialEq)]
pub struct Exported {
    /// Its path.
    pub path: PathBuf,
    /// The number in its name.
    pub number: u64,
    /// Whether the phantom has a lesion; `None` for a copied file, of which nothing is known.
    pub lesion: Option<bool>,
}

/// Why the simulator stopped.
#[derive(Debug, thiserror::Error)]
pub enum SimulateError {
    /// A setting makes no sense.
    #[error("{0}")]
    Setting(String),
    /// There is nothing to copy.
    #[error("{0}: no image files in it")]
    NoImages(PathBuf),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A phantom could not be encoded.
    #[error("a phantom does not encode: {0}")]
    Encode(#[from] ImageError),
}

impl Simulator {
    /// Exports until all is done or `stop` says so, and tells `exported` of each file. Returns their number.
    ///
    /// Names are `slice-000001.png` and so on, counting on from what is in the folder. The number decides the picture, so
    /// a second run into the same folder brings new ones.
    pub fn run(
        &self,
        stop: impl Fn() -> bool,
        mut exported: impl FnMut(&Exported),
    ) -> Result<u64, SimulateError> {
        self.check()?;
        fs::create_dir_all(&self.to).map_err(at(&self.to))?;
        let sources = self.images.as_deref().map(image_files).transpose()?;
        let count = match (&sources, self.count) {
            (Some(files), 0) => files.len() as u64,
            (None, 0) => u64::MAX,
            (_, count) => count,
        };

        let first = next_number(&self.to)?;
        let start = Instant::now();
        for done in 0..count {
            if !self.wait(start, done, &stop) {
                return Ok(done);
            }
            let number = first + done;
            let written = match &sources {
                Some(files) => self.copy(&files[(done % files.len() as u64) as usize], number)?,
                None => self.export(number)?,
            };
            exported(&written);
        }
        Ok(count)
    }

    fn check(&self) -> Result<(), SimulateError> {
        if !(self.rate.is_finite() && self.rate >= 0.0) {
            return Err(SimulateError::Setting(format!(
                "rate: {} is not a number of images a second; expected 0 (as fast as possible) or more",
                self.rate
            )));
        }
        if !(0.0..=1.0).contains(&self.lesion_share) {
            return Err(SimulateError::Setting(format!(
                "lesion share: {} is not a share; expected 0 to 1",
                self.lesion_share
            )));
        }
        Ok(())
    }

    /// Waits until it is time for the image after `done` others; false when stopped.
    #[allow(clippy::disallowed_methods)] // the simulator may sleep
    fn wait(&self, start: Instant, done: u64, stop: &impl Fn() -> bool) -> bool {
        // A schedule from the start, not a pause between images, so that the time to draw one does not lower the rate.
        let due = if self.rate > 0.0 {
            Duration::from_secs_f64(done as f64 / self.rate)
        } else {
            Duration::ZERO
        };
        loop {
            if stop() {
                return false;
            }
            match due.checked_sub(start.elapsed()) {
                None | Some(Duration::ZERO) => return true,
                Some(left) => std::thread::sleep(left.min(LONGEST_NAP)),
            }
        }
    }

    fn export(&self, number: u64) -> Result<Exported, SimulateError> {
        let lesion = has_lesion(number, self.lesion_share);
        // Two numbers into one: the seeds of neighbouring runs do not overlap before 2^32 images.
        let phantom = Phantom::draw(self.seed.wrapping_mul(1 << 32).wrapping_add(number), lesion);
        let bytes = self.format.encode(&phantom)?;
        let path = self
            .to
            .join(format!("slice-{number:06}.{}", self.format.extension()));
        self.write(&path, &bytes)?;
        Ok(Exported {
            path,
            number,
            lesion: Some(lesion),
        })
    }

    fn copy(&self, source: &Path, number: u64) -> Result<Exported, SimulateError> {
        let bytes = fs::read(source).map_err(at(source))?;
        let extension = extension(source).unwrap_or_default();
        let path = self.to.join(format!("slice-{number:06}.{extension}"));
        self.write(&path, &bytes)?;
        Ok(Exported {
            path,
            number,
            lesion: None,
        })
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), SimulateError> {
        match self.writing {
            Writing::Rename => {
                let name = path
                    .file_name()
                    .and_then(|name| name.to_str())
                    .unwrap_or_default();
                let temporary = path.with_file_name(format!(".{name}.part"));
                fs::write(&temporary, bytes).map_err(at(&temporary))?;
                fs::rename(&temporary, path).map_err(at(path))
            }
            Writing::Direct => {
                // In two pieces, so that a watcher that looks too early sees half a file.
                let (first, rest) = bytes.split_at(bytes.len() / 2);
                let write = || {
                    let mut file = fs::File::create(path)?;
                    file.write_all(first)?;
                    file.write_all(rest)
                };
                write().map_err(at(path))
            }
        }
    }
}

impl ExportFormat {
    /// The extension of its file names.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg => "jpg",
        }
    }

    /// The bytes of a file with this picture.
    pub fn encode(self, phantom: &Phantom) -> Result<Vec<u8>, ImageError> {
        let mut bytes = Cursor::new(Vec::new());
        match self {
            Self::Png => phantom.image.write_to(&mut bytes, ImageFormat::Png)?,
            Self::Jpeg => phantom
                .image
                .write_with_encoder(JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY))?,
        }
        Ok(bytes.into_inner())
    }
}

/// Spreads lesions evenly over the numbers from 1 on: of any run of numbers, the share has one, give or take one.
fn has_lesion(number: u64, share: f64) -> bool {
    let up_to = |number: u64| (number as f64 * share).floor();
    up_to(number) > up_to(number - 1)
}

/// One more than the highest number that a file in `folder` has, at least 1.
fn next_number(folder: &Path) -> Result<u64, SimulateError> {
    let mut highest = 0;
    for entry in fs::read_dir(folder).map_err(at(folder))? {
        let name = entry.map_err(at(folder))?.file_name();
        let number = name
            .to_str()
            .and_then(|name| name.strip_prefix("slice-"))
            .and_then(|rest| rest.split('.').next())
            .and_then(|digits| digits.parse().ok());
        highest = highest.max(number.unwrap_or(0));
    }
    Ok(highest + 1)
}

/// The image files below `folder`, sorted by path; hidden ones are left out.
fn image_files(folder: &Path) -> Result<Vec<PathBuf>, SimulateError> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(at(&folder))? {
            let entry = entry.map_err(at(&folder))?;
            let path = entry.path();
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            // Links to files are followed, links to folders are not: they may lead round in circles.
            if entry.file_type().map_err(at(&path))?.is_dir() {
                folders.push(path);
            } else if path.is_file()
                && extension(&path).is_some_and(|e| IMAGE_EXTENSIONS.contains(&&e[..]))
            {
                files.push(path);
            }
        }
    }
    files.sort();
    if files.is_empty() {
        Err(SimulateError::NoImages(folder.to_owned()))
    } else {
        Ok(files)
    }
}

fn extension(path: &Path) -> Option<String> {
    Some(path.extension()?.to_str()?.to_ascii_lowercase())
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> SimulateError {
    let path = path.to_owned();
    move |source| SimulateError::File { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn simulator(to: &Path) -> Simulator {
        Simulator {
            to: to.to_owned(),
            rate: 0.0,
            count: 4,
            seed: 1,
            lesion_share: 0.5,
            format: ExportFormat::Png,
            writing: Writing::Rename,
            images: None,
        }
    }

    fn run(simulator: &Simulator) -> Vec<Exported> {
        let mut all = Vec::new();
        let count = simulator
            .run(|| false, |exported| all.push(exported.clone()))
            .unwrap();
        assert_eq!(count, all.len() as u64);
        all
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn exports_both_kinds_in_either_format_and_either_way() {
        for (format, extension) in [(ExportFormat::Png, "png"), (ExportFormat::Jpeg, "jpg")] {
            for writing in [Writing::Rename, Writing::Direct] {
                let folder = tempfile::tempdir().unwrap();
                let all = run(&Simulator {
                    format,
                    writing,
                    ..simulator(folder.path())
                });
                assert_eq!(
                    all.iter().map(|e| e.lesion.unwrap()).collect::<Vec<_>>(),
                    [false, true, false, true]
                );
                let expected: Vec<_> = (1..=4)
                    .map(|n| format!("slice-00000{n}.{extension}"))
                    .collect();
                assert_eq!(names(folder.path()), expected);
                for Exported { path, .. } in all {
                    assert!(
                        image::open(&path).unwrap().width() >= 180,
                        "{}",
                        path.display()
                    );
                }
            }
        }
    }

    #[test]
    fn a_seed_is_a_series_and_a_second_run_continues_it() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        run(&simulator(a.path()));
        run(&Simulator {
            count: 2,
            ..simulator(b.path())
        });
        run(&Simulator {
            count: 2,
            ..simulator(b.path())
        });
        let content = |folder: &Path| -> Vec<_> {
            names(folder)
                .iter()
                .map(|name| (name.clone(), fs::read(folder.join(name)).unwrap()))
                .collect()
        };
        assert_eq!(content(a.path()), content(b.path()));
        let other = tempfile::tempdir().unwrap();
        run(&Simulator {
            seed: 2,
            ..simulator(other.path())
        });
        assert!(
            content(a.path())
                .iter()
                .zip(content(other.path()))
                .all(|(a, b)| a.1 != b.1)
        );
    }

    #[test]
    fn lesions_are_spread_by_their_share() {
        let count = |share| {
            (1..=1000)
                .filter(|&number| has_lesion(number, share))
                .count()
        };
        assert_eq!([count(0.0), count(0.2), count(1.0)], [0, 200, 1000]);
    }

    #[test]
    fn copies_the_images_of_a_folder_in_order() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(from.path().join("deep")).unwrap();
        for (name, content) in [
            ("b.PNG", "b"),
            ("deep/a.jpg", "da"),
            ("notes.txt", "no"),
            (".hidden.png", "no"),
        ] {
            fs::write(from.path().join(name), content).unwrap();
        }
        let images = Some(from.path().to_owned());
        let all = run(&Simulator {
            images: images.clone(),
            count: 0,
            ..simulator(to.path())
        });
        assert_eq!(names(to.path()), ["slice-000001.png", "slice-000002.jpg"]);
        assert_eq!(fs::read(&all[1].path).unwrap(), b"da");
        let all = run(&Simulator {
            images,
            count: 3,
            ..simulator(to.path())
        });
        assert_eq!(fs::read(&all[2].path).unwrap(), b"b");
    }

    #[test]
    fn keeps_the_rate_and_stops_when_told() {
        let folder = tempfile::tempdir().unwrap();
        let start = Instant::now();
        run(&Simulator {
            rate: 20.0,
            count: 5,
            ..simulator(folder.path())
        });
        assert!(
            start.elapsed() >= Duration::from_millis(200),
            "{:?}",
            start.elapsed()
        );

        let start = Instant::now();
        let endless = Simulator {
            rate: 0.01,
            count: 0,
            ..simulator(folder.path())
        };
        let stop = || start.elapsed() > Duration::from_millis(100);
        assert_eq!(endless.run(stop, |_| {}).unwrap(), 1);
        assert!(start.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn bad_settings_and_empty_folders_are_said() {
        let folder = tempfile::tempdir().unwrap();
        let error = |simulator: Simulator| simulator.run(|| false, |_| {}).unwrap_err().to_string();
        assert_eq!(
            error(Simulator {
                rate: -1.0,
                ..simulator(folder.path())
            }),
            "rate: -1 is not a number of images a second; expected 0 (as fast as possible) or more"
        );
        assert_eq!(
            error(Simulator {
                lesion_share: 1.5,
                ..simulator(folder.path())
            }),
            "lesion share: 1.5 is not a share; expected 0 to 1"
        );
        let images = Some(folder.path().to_owned());
        assert!(
            error(Simulator {
                images,
                ..simulator(folder.path())
            })
            .ends_with("no image files in it")
        );
    }
}
