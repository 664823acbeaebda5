//! DICOM.
use super::Picture;
use super::decode::{DecodeNote, Limits};
use crate::prediction::RejectReason;

/// What the pipeline needs from a DICOM header.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DicomHeader {
    /// Study.
    pub study_instance_uid: Option<String>,
    /// Acquired.
    pub acquired: Option<String>,
}

#[derive(Debug)]
pub(crate) struct DicomSource<'a>(std::marker::PhantomData<&'a ()>);
#[allow(clippy::unused_self)]
impl<'a> DicomSource<'a> {
    pub(crate) fn open(
        _: &'a [u8],
        _: &Limits,
        _: &mut Vec<DecodeNote>,
    ) -> Result<Self, RejectReason> {
        Err(super::decode::unsupported("DICOM"))
    }
    pub(crate) fn frame_count(&self) -> u32 {
        1
    }
    pub(crate) fn frame(
        &mut self,
        _: u32,
        _: &Limits,
        _: &mut Vec<DecodeNote>,
    ) -> Result<Picture, RejectReason> {
        Err(super::decode::unsupported("DICOM"))
    }
    pub(crate) fn header(&self) -> &DicomHeader {
        unreachable!()
    }
}
pub(crate) fn is_dicom(bytes: &[u8]) -> bool {
    bytes.get(128..132) == Some(b"DICM")
}
pub(crate) fn may_become_dicom(_: &[u8]) -> bool {
    false
}
