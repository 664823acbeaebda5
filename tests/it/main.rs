//! The integration tests: one crate, one module a topic.

mod decode;
mod dicom;
mod parity;
mod smoke;
