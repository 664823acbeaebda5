//! ScanSentry.

pub mod engine;
pub mod imaging;
pub mod prediction;
