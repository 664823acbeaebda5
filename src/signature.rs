//! Ed25519 signatures of model bundles: who may say what runs here.
//!
//! ```text
//! manifest.toml.sig   64 bytes, over the bytes of manifest.toml, which pins the model by its SHA-256
//! model.public_key    PEM file with the key's SubjectPublicKeyInfo, as `openssl pkey -pubout` writes it (RFC 8410)
//! ```

use std::path::Path;

use ed25519_dalek::pkcs8::DecodePublicKey as _;
use ed25519_dalek::{Signature, VerifyingKey};

use crate::manifest::read_bounded;

/// Largest key file, in bytes.
const MAX_KEY_FILE: u64 = 4096;

/// A public key that bundles must be signed for.
#[derive(Debug, Clone)]
pub struct PublicKey(VerifyingKey);

impl PublicKey {
    /// Reads the key that `model.public_key` names; `None` where it names none. The error is one line.
    pub fn of(path: &str) -> Result<Option<Self>, String> {
        if path.is_empty() {
            return Ok(None);
        }
        let text = read_bounded(Path::new(path), MAX_KEY_FILE)
            .map_err(|e| format!("model.public_key: {path} cannot be read ({e}); give a PEM file that the daemon's user can read"))?;
        Self::parse(&text).map(Some).ok_or_else(|| {
            format!("model.public_key: {path} is no Ed25519 public key in PEM; make one with openssl pkey -in KEY -pubout")
        })
    }

    /// The key in a PEM text; `None` for anything else, and for the few keys that fit many signatures.
    fn parse(text: &[u8]) -> Option<Self> {
        let key = VerifyingKey::from_public_key_pem(std::str::from_utf8(text).ok()?).ok()?;
        (!key.is_weak()).then_some(Self(key))
    }

    /// Whether `signature` is this key's over `message`, by the strict rules: there is one signature for a message and no other form of it.
    pub fn signed(&self, message: &[u8], signature: &[u8]) -> bool {
        Signature::from_slice(signature).is_ok_and(|s| self.0.verify_strict(message, &s).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `openssl pkey -pubout` of the key of RFC 8032, 7.1, test 2.
    const KEY: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAPUAXw+hDiVqStwqnTRt+vJyYLM8uxJaMwM1V8Sr0Zgw=\n-----END PUBLIC KEY-----\n";
    const SIGNATURE: &str = "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00";

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<_> = hex.chars().map(|c| c.to_digit(16).unwrap() as u8).collect();
        digits.chunks(2).map(|d| d[0] * 16 + d[1]).collect()
    }

    #[test]
    fn the_signature_of_the_standard_holds_and_nothing_near_it() {
        let key = PublicKey::parse(KEY.as_bytes()).unwrap();
        let signature = bytes(SIGNATURE);
        assert!(key.signed(b"\x72", &signature));
        assert!(!key.signed(b"\x73", &signature));
        assert!(!key.signed(b"\x72", &signature[..63]));
        assert!(!key.signed(b"\x72", &[signature.as_slice(), b"\n"].concat()));
        for index in [0, 31, 32, 63] {
            let mut changed = signature.clone();
            changed[index] ^= 1;
            assert!(!key.signed(b"\x72", &changed), "{index}");
        }
        // The same scalar plus the order of the group: valid without the strict rules of the standard.
        let order = bytes("edd3f55c1a631258d69cf7a2def9de1400000000000000000000000000000010");
        let mut other = signature.clone();
        let mut carry = 0_u16;
        for (byte, add) in other[32..].iter_mut().zip(order) {
            carry += u16::from(*byte) + u16::from(add);
            *byte = carry as u8;
            carry >>= 8;
        }
        assert!(!key.signed(b"\x72", &other));
    }

    #[test]
    fn only_an_ed25519_key_in_pem_is_a_key() {
        let weak = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAAQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n-----END PUBLIC KEY-----\n";
        let x25519 = KEY.replace("K2Vw", "K2Vu");
        for text in ["", "ssh-ed25519 AAAA", weak, &x25519, &KEY[..60]] {
            assert!(PublicKey::parse(text.as_bytes()).is_none(), "{text}");
        }
        assert!(PublicKey::of("").unwrap().is_none());
        let problem = PublicKey::of("/nowhere/key.pem").unwrap_err();
        assert!(
            problem.starts_with("model.public_key: /nowhere/key.pem cannot be read ("),
            "{problem}"
        );
    }
}
