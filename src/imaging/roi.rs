//! Crop.
