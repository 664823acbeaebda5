//! What can be checked of a model file before a runtime sees it.

use super::EngineError;

/// Smallest file with a root table.
const MIN_BYTES: usize = 32;

/// Flatbuffers use signed 32-bit offsets.
const MAX_BYTES: usize = i32::MAX as usize;

/// Refuses what is no TFLite model at all.
pub(super) fn check(bytes: &[u8]) -> Result<(), EngineError> {
    if bytes.len() < MIN_BYTES || bytes.len() > MAX_BYTES {
        return Err(EngineError::Load(format!(
            "{} bytes; expected a TFLite model of {MIN_BYTES} bytes to 2 GiB",
            bytes.len()
        )));
    }
    if &bytes[4..8] != b"TFL3" {
        return Err(EngineError::Load(
            "not a TFLite model: its identifier is not TFL3".to_owned(),
        ));
    }
    Ok(())
}
