//! The integration tests: one crate, one module a topic.

// Helpers of tests may stop the test.
#![allow(clippy::unwrap_used)]

mod broker;
mod broker_faults;
mod cli;
mod contract;
mod crash;
mod dashboard;
mod decode;
mod dicom;
mod emulated;
mod engine;
mod fleet;
mod folder_faults;
mod home_assistant;
mod layers;
mod main_job;
mod messages;
mod models;
mod operating;
mod packaging;
mod parity;
mod power;
mod resource_faults;
mod security;
mod smoke;
mod soak;
mod store;
mod support;
mod systemd;
