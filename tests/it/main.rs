//! The integration tests, in one crate.

// clippy.toml allows it in test functions, but not in their helpers.
#![allow(clippy::unwrap_used)]

#[cfg(feature = "demo")]
mod broker;
mod engine;
