//! ScanSentry: an edge daemon that watches a scanner's export folder, classifies each new image with a quantized TFLite
//! model and publishes the results over MQTT. Research use only, not for diagnosis.

#[cfg(feature = "demo")]
pub mod broker;
pub mod classifier;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod engine;
pub mod health;
pub mod imaging;
pub mod manifest;
pub mod message;
pub mod mqtt;
pub mod phantom;
pub mod pipeline;
pub mod prediction;
pub mod publisher;
pub mod scan;
pub mod simulate;
pub mod store;
pub mod studies;
pub mod telemetry;
pub mod tensor;
pub mod watch;
