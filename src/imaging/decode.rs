//! Decode by content.
