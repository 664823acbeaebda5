//! Previews: the picture that the model saw, as a message of bounded size, on its way from a worker to the publisher.
//!
//! Best effort, and nothing is written to the disk: what does not fit into the queue, or comes while the broker is away, is dropped
//! and counted. Only what lies inside the crop is ever shown.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use base64::Engine as _;
use image::imageops::{FilterType, resize};
use tokio::sync::mpsc;

use crate::imaging::Picture;
use crate::message::{ClassifiedPicture, Examined, HeatmapMessage, PreviewCounts, Reporter};
use crate::prediction::Heatmap;
use crate::scan::Pseudonym;

/// Previews that may wait for the publisher, and pictures of one file that may have one.
pub const QUEUE: usize = 64;

/// Most cells of a heatmap that is sent.
const CELLS: usize = 4096;

/// The shortest side to which a picture is halved before it is given up.
const LEAST_SIDE: u32 = 16;

#[derive(Debug, Default)]
struct Counters {
    sent: AtomicU64,
    dropped: AtomicU64,
}

/// The workers' end.
#[derive(Debug, Clone)]
pub struct Outlet {
    queue: mpsc::Sender<Vec<u8>>,
    counters: Arc<Counters>,
    max_bytes: usize,
}

/// The publisher's end.
#[derive(Debug)]
pub struct Inlet {
    queue: mpsc::Receiver<Vec<u8>>,
    counters: Arc<Counters>,
    /// Taken out of the queue; what belongs before them is sent first.
    waiting: VecDeque<Vec<u8>>,
}

/// A queue for previews of at most `max_bytes` each.
pub fn channel(max_bytes: usize) -> (Outlet, Inlet) {
    let (sender, queue) = mpsc::channel(QUEUE);
    let counters = Arc::new(Counters::default());
    let outlet = Outlet {
        queue: sender,
        counters: counters.clone(),
        max_bytes,
    };
    let waiting = VecDeque::new();
    let inlet = Inlet {
        queue,
        counters,
        waiting,
    };
    (outlet, inlet)
}

impl Outlet {
    /// Queues the previews of a scan, in order. `connected` is whether the broker is there: while it is not, the work is saved.
    pub fn offer(
        &self,
        reporter: &Reporter,
        examined: &Examined,
        study_id: Pseudonym,
        revision: u64,
        connected: bool,
    ) {
        for picture in &examined.pictures {
            if picture.outcome.is_err() {
                continue;
            }
            let payload = || {
                encode(
                    reporter,
                    examined,
                    picture,
                    study_id,
                    revision,
                    self.max_bytes,
                )
            };
            let room = connected && self.queue.capacity() > 0;
            let queued = room
                .then(payload)
                .flatten()
                .is_some_and(|payload| self.queue.try_send(payload).is_ok());
            if !queued {
                self.counters.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

impl Inlet {
    /// Takes what is queued; whether it took anything.
    pub fn take(&mut self) -> bool {
        let before = self.waiting.len();
        while self.waiting.len() < QUEUE
            && let Ok(payload) = self.queue.try_recv()
        {
            self.waiting.push_back(payload);
        }
        self.waiting.len() > before
    }

    /// The oldest that was taken, counted as sent.
    pub fn pop(&mut self) -> Option<Vec<u8>> {
        let payload = self.waiting.pop_front()?;
        self.counters.sent.fetch_add(1, Ordering::Relaxed);
        Some(payload)
    }

    /// The one that was popped last could not be sent.
    pub fn unsent(&self) {
        self.counters.sent.fetch_sub(1, Ordering::Relaxed);
        self.counters.dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// What became of the previews so far.
    pub fn counts(&self) -> PreviewCounts {
        PreviewCounts {
            sent: self.counters.sent.load(Ordering::Relaxed),
            dropped: self.counters.dropped.load(Ordering::Relaxed),
        }
    }
}

/// The payload for one picture, halved in size until it fits; `None` when there is no picture or it cannot be made to fit.
fn encode(
    reporter: &Reporter,
    examined: &Examined,
    picture: &ClassifiedPicture,
    study_id: Pseudonym,
    revision: u64,
    max_bytes: usize,
) -> Option<Vec<u8>> {
    let classified = picture.outcome.as_ref().ok()?;
    let heatmap = classified.prediction.heatmap.as_ref().and_then(levels);
    let mut seen = std::borrow::Cow::Borrowed(classified.seen.as_ref()?);
    loop {
        let size = (seen.width(), seen.height());
        let png = base64::engine::general_purpose::STANDARD.encode(png(&seen)?);
        let payload = reporter.preview(
            examined,
            picture.frame,
            &classified.prediction,
            (study_id, revision),
            (size, &png),
            heatmap.as_ref(),
        );
        if payload.len() <= max_bytes {
            return Some(payload);
        }
        let half = (size.0 / 2, size.1 / 2);
        if half.0.min(half.1) < LEAST_SIDE {
            return None;
        }
        let smooth = FilterType::Triangle;
        seen = std::borrow::Cow::Owned(match seen.as_ref() {
            Picture::Gray(image) => Picture::Gray(resize(image, half.0, half.1, smooth)),
            Picture::Rgb(image) => Picture::Rgb(resize(image, half.0, half.1, smooth)),
        });
    }
}

fn png(picture: &Picture) -> Option<Vec<u8>> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let format = image::ImageFormat::Png;
    let written = match picture {
        Picture::Gray(image) => image.write_to(&mut bytes, format),
        Picture::Rgb(image) => image.write_to(&mut bytes, format),
    };
    written.ok().map(|()| bytes.into_inner())
}

/// The map's values below 0 set to 0, divided by the largest, times 255.
fn levels(map: &Heatmap) -> Option<HeatmapMessage> {
    if map.cells.is_empty() || map.cells.len() > CELLS {
        return None;
    }
    let top = map.cells.iter().copied().fold(0.0, f32::max);
    let level = |cell: &f32| {
        if top > 0.0 {
            (cell.max(0.0) / top * 255.0).round() as u8
        } else {
            0
        }
    };
    let rows = map.cells.chunks(map.width);
    Some(HeatmapMessage {
        rows: map.height,
        columns: map.width,
        values: rows.map(|row| row.iter().map(level).collect()).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heatmap_is_clipped_at_zero_and_scaled_to_its_own_maximum() {
        let map = |cells: &[f32]| Heatmap {
            width: 2,
            height: cells.len() / 2,
            cells: cells.to_vec(),
        };
        let found = levels(&map(&[-1.0, 0.0, 1.0, 2.0])).unwrap();
        assert_eq!((found.rows, found.columns), (2, 2));
        assert_eq!(found.values, [[0, 0], [128, 255]]);
        let nothing = levels(&map(&[-1.0, -2.0])).unwrap();
        assert_eq!(nothing.values, [[0, 0]]);
        assert_eq!(levels(&map(&vec![1.0; CELLS + 2])), None);
    }
}
