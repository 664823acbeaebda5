//! The integration tests: one crate, one module a topic.

// Helpers of tests may stop the test.
#![allow(clippy::unwrap_used)]

mod decode;
mod dicom;
mod engine;
mod parity;
mod smoke;
