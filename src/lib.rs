//! ScanSentry.

#[cfg(feature = "demo")]
pub mod broker;
pub mod engine;
pub mod imaging;
pub mod phantom;
pub mod prediction;
pub mod simulate;
