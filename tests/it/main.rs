//! The integration tests: one crate, one module a topic.

// Helpers of tests may stop the test.
#![allow(clippy::unwrap_used)]

mod broker;
mod cli;
mod contract;
mod dashboard;
mod decode;
mod dicom;
mod emulated;
mod engine;
mod home_assistant;
mod layers;
mod main_job;
mod messages;
mod models;
mod operating;
mod packaging;
mod parity;
mod security;
mod smoke;
mod store;
mod support;
mod systemd;
