//! Identity: a scan is its bytes, and outside this appliance it is known only by a keyed hash.
//!
//! ```text
//! bytes ──SHA-256──▶ digest ──HMAC-SHA-256, key of this appliance──▶ ScanId (128 bits)
//! ```
//!
//! The key is made at first start and never leaves the state directory, so nobody without it can tell whether a
//! known picture, patient or file name is behind an id. DICOM UIDs and folder names pass through the same hash, each
//! with its own domain word, before they leave the pipeline.

use std::fmt;
use std::path::{Path, PathBuf};

use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};

/// Length of the appliance's key in bytes.
pub const KEY_BYTES: usize = 32;

/// The appliance's secret key for pseudonyms.
#[derive(Clone)]
pub struct PseudonymKey([u8; KEY_BYTES]);

impl fmt::Debug for PseudonymKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PseudonymKey(..)")
    }
}

impl PseudonymKey {
    /// A key from its bytes.
    pub fn new(bytes: [u8; KEY_BYTES]) -> Self {
        Self(bytes)
    }

    /// The first 128 bits of HMAC-SHA-256 over `domain` and `parts`, each with its length, so that no two different
    /// lists of parts collide.
    pub fn pseudonym(&self, domain: &str, parts: &[&[u8]]) -> Pseudonym {
        let mut mac =
            Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes a key of any length");
        for part in std::iter::once(domain.as_bytes()).chain(parts.iter().copied()) {
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part);
        }
        let bytes = mac.finalize().into_bytes();
        let mut id = [0; 16];
        id.copy_from_slice(&bytes[..16]);
        Pseudonym(id)
    }

    /// The id of a file by the SHA-256 of its bytes.
    pub fn scan_id(&self, sha256: &[u8; 32]) -> ScanId {
        self.pseudonym("scan", &[sha256])
    }
}

/// A keyed 128-bit hash, written as 32 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pseudonym(pub [u8; 16]);

/// The pseudonymous identity of a scan.
pub type ScanId = Pseudonym;

impl fmt::Display for Pseudonym {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Pseudonym {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Pseudonym {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Pseudonym {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl std::str::FromStr for Pseudonym {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut id = [0; 16];
        let valid = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        if !valid {
            return Err(format!(
                "{text:?} is not an id; expected 32 hex digits as in a result's scan_id"
            ));
        }
        for (byte, pair) in id.iter_mut().zip(text.as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).expect("hex digits are ASCII");
            *byte = u8::from_str_radix(pair, 16).expect("two hex digits");
        }
        Ok(Self(id))
    }
}

/// Lower-case hex digits of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// SHA-256 of `bytes`.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// What the file system says about a file without opening it: the shortcut by which an unchanged file is recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stamp {
    /// Length in bytes.
    pub size: u64,
    /// Last modification of the content, nanoseconds since 1970. Programs may set it, so it does not suffice alone.
    pub mtime_ns: i64,
    /// Last change of content, name or permissions, nanoseconds since 1970. Only the kernel sets it.
    pub ctime_ns: i64,
    /// Inode number.
    pub inode: u64,
}

impl Stamp {
    /// The stamp in `metadata`.
    pub fn of(metadata: &std::fs::Metadata) -> Self {
        use std::os::unix::fs::MetadataExt as _;
        let nanoseconds =
            |seconds: i64, rest: i64| seconds.saturating_mul(1_000_000_000).saturating_add(rest);
        Self {
            size: metadata.len(),
            mtime_ns: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            ctime_ns: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
            inode: metadata.ino(),
        }
    }
}

/// A file in the export folder, as it was seen at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScanFile {
    /// Path below the export folder.
    pub path: PathBuf,
    /// Its stamp.
    pub stamp: Stamp,
}

/// The bytes of a path, for hashing and storing; paths need not be UTF-8.
pub fn path_bytes(path: &Path) -> &[u8] {
    use std::os::unix::ffi::OsStrExt as _;
    path.as_os_str().as_bytes()
}

/// The path of bytes that [`path_bytes`] gave.
pub fn path_from_bytes(bytes: Vec<u8>) -> PathBuf {
    use std::os::unix::ffi::OsStringExt as _;
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pseudonyms_are_stable_keyed_and_unambiguous() {
        let key = PseudonymKey::new([7; KEY_BYTES]);
        let id = key.pseudonym("scan", &[b"ab", b"c"]);
        assert_eq!(id, key.pseudonym("scan", &[b"ab", b"c"]));
        assert_ne!(id, key.pseudonym("scan", &[b"a", b"bc"]));
        assert_ne!(id, key.pseudonym("study", &[b"ab", b"c"]));
        assert_ne!(
            id,
            PseudonymKey::new([8; KEY_BYTES]).pseudonym("scan", &[b"ab", b"c"])
        );
        assert_eq!(id.to_string().parse::<Pseudonym>(), Ok(id));
        assert!("xyz".parse::<Pseudonym>().is_err());
        assert_eq!(format!("{key:?}"), "PseudonymKey(..)");
    }
}
