//! A bounded walk over DICOM data elements, before any of them reaches a parser.
//!
//! `dicom-object` builds a tree of the whole file: it recurses once a nesting level (a few kilobytes of nested
//! sequences overflow the stack), keeps a hundred bytes and more for every empty 8-byte element, and copies the pixel data.
//! So this walk comes first. It reads headers only, skips by length, keeps its own stack with a limit, counts elements,
//! and finds the few elements that are wanted and where the pixels are. Only those few, flat and complete, are then given
//! to `dicom-object` to be read.

use std::ops::Range;

use dicom_object::Tag;

use super::super::decode::{corrupt, truncated};
use crate::prediction::RejectReason;

/// Deepest nesting of sequences that is followed; real files stay below 10.
const MAX_DEPTH: usize = 32;
/// Most elements and items looked at in one file. An enhanced MR file has some 50 a frame.
const MAX_ELEMENTS: u32 = 1_000_000;

const UNDEFINED: u32 = 0xffff_ffff;
const ITEM: Tag = Tag(0xfffe, 0xe000);
const ITEM_END: Tag = Tag(0xfffe, 0xe00d);
const SEQUENCE_END: Tag = Tag(0xfffe, 0xe0dd);

/// How element headers and numbers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Encoding {
    /// The value representation stands in each header.
    pub explicit: bool,
    /// Big endian.
    pub big: bool,
}

impl Encoding {
    /// The encoding of the file meta group and of all compressed files.
    pub const EXPLICIT_LITTLE: Self = Self {
        explicit: true,
        big: false,
    };
    /// DICOM's default.
    pub const IMPLICIT_LITTLE: Self = Self {
        explicit: false,
        big: false,
    };

    fn short(self, bytes: [u8; 2]) -> u16 {
        if self.big {
            u16::from_be_bytes(bytes)
        } else {
            u16::from_le_bytes(bytes)
        }
    }

    fn long(self, bytes: [u8; 4]) -> u32 {
        if self.big {
            u32::from_be_bytes(bytes)
        } else {
            u32::from_le_bytes(bytes)
        }
    }
}

/// Where one data element stands in the bytes.
#[derive(Debug, Clone)]
pub(super) struct Element {
    pub tag: Tag,
    /// The value representation; zeros where it is implicit.
    pub vr: [u8; 2],
    /// Header and value.
    pub whole: Range<usize>,
    /// The value; of an undefined length with its closing delimiter.
    pub value: Range<usize>,
    /// The length is undefined: items up to a delimiter.
    pub undefined: bool,
}

/// An element's header: tag, value representation, length, where the value begins.
struct Header {
    tag: Tag,
    vr: [u8; 2],
    length: u32,
    value: usize,
}

/// Walks the elements of one level.
#[derive(Debug)]
pub(super) struct Walk<'a> {
    bytes: &'a [u8],
    encoding: Encoding,
    at: usize,
    end: usize,
    budget: u32,
}

impl<'a> Walk<'a> {
    /// The elements of `bytes[range]`.
    pub fn new(bytes: &'a [u8], range: Range<usize>, encoding: Encoding) -> Self {
        Self {
            bytes,
            encoding,
            at: range.start,
            end: range.end.min(bytes.len()),
            budget: MAX_ELEMENTS,
        }
    }

    /// Where the next element begins.
    pub fn position(&self) -> usize {
        self.at
    }

    /// The next element, or `None` at the end.
    ///
    /// The value of the pixel data is not walked when its length is undefined: it is everything up to the end.
    pub fn next_element(&mut self) -> Result<Option<Element>, RejectReason> {
        if self.at >= self.end {
            return Ok(None);
        }
        let start = self.at;
        let header = self.header(start, self.encoding)?;
        let undefined = header.length == UNDEFINED;
        let end = if undefined && header.tag == super::PIXEL_DATA {
            self.end
        } else if undefined {
            self.skip_sequence(header.value, self.content_encoding(header.vr))?
        } else {
            self.within(header.value, header.length)?
        };
        self.at = end;
        let (tag, vr) = (header.tag, header.vr);
        Ok(Some(Element {
            tag,
            vr,
            whole: start..end,
            value: header.value..end,
            undefined,
        }))
    }

    /// The contents of a sequence's items, at most `most` of them.
    pub fn items(
        &mut self,
        sequence: &Element,
        most: usize,
    ) -> Result<Vec<Range<usize>>, RejectReason> {
        let encoding = self.content_encoding(sequence.vr);
        let mut at = sequence.value.start;
        let mut items = Vec::new();
        while at < sequence.value.end && items.len() < most {
            let header = self.header(
                at,
                Encoding {
                    explicit: false,
                    ..encoding
                },
            )?;
            match header.tag {
                ITEM if header.length == UNDEFINED => {
                    let end = self.skip(vec![Level::Item(encoding)], header.value)?;
                    items.push(header.value..end - 8);
                    at = end;
                }
                ITEM => {
                    at = self.within(header.value, header.length)?;
                    items.push(header.value..at);
                }
                _ => break,
            }
        }
        Ok(items)
    }

    /// The encapsulated fragments of pixel data: the offset table first, then the frames' pieces.
    pub fn fragments(&mut self, pixels: &Element) -> Result<Vec<Range<usize>>, RejectReason> {
        let mut at = pixels.value.start;
        let mut fragments = Vec::new();
        loop {
            let header = self.header(
                at,
                Encoding {
                    explicit: false,
                    ..self.encoding
                },
            )?;
            match header.tag {
                ITEM if header.length != UNDEFINED => {
                    at = self.within(header.value, header.length)?;
                    fragments.push(header.value..at);
                }
                SEQUENCE_END => return Ok(fragments),
                _ => {
                    return Err(corrupt(
                        "DICOM: something else between the pieces of the pixel data",
                    ));
                }
            }
        }
    }

    /// What an element of undefined length holds: of unknown kind, it is implicit little endian (PS3.5, 6.2.2).
    fn content_encoding(&self, vr: [u8; 2]) -> Encoding {
        if &vr == b"UN" {
            Encoding::IMPLICIT_LITTLE
        } else {
            self.encoding
        }
    }

    /// Skips the items of a sequence of undefined length; gives the position behind its delimiter.
    fn skip_sequence(&mut self, at: usize, encoding: Encoding) -> Result<usize, RejectReason> {
        self.skip(vec![Level::Sequence(encoding)], at)
    }

    /// Skips what is open, innermost last. Only undefined lengths need to be entered.
    fn skip(&mut self, mut open: Vec<Level>, mut at: usize) -> Result<usize, RejectReason> {
        while let Some(level) = open.last().copied() {
            let (encoding, in_sequence) = match level {
                Level::Sequence(encoding) => (encoding, true),
                Level::Item(encoding) => (encoding, false),
            };
            let header = self.header(at, encoding)?;
            at = header.value;
            match header.tag {
                SEQUENCE_END if in_sequence => drop(open.pop()),
                ITEM_END if !in_sequence => drop(open.pop()),
                ITEM if in_sequence && header.length == UNDEFINED => {
                    open.push(Level::Item(encoding));
                }
                ITEM if in_sequence => at = self.within(at, header.length)?,
                _ if in_sequence => {
                    return Err(corrupt("DICOM: a sequence holds something else than items"));
                }
                ITEM | ITEM_END | SEQUENCE_END => {
                    return Err(corrupt("DICOM: sequence delimiters do not match"));
                }
                _ if header.length == UNDEFINED => {
                    let inner = if &header.vr == b"UN" {
                        Encoding::IMPLICIT_LITTLE
                    } else {
                        encoding
                    };
                    open.push(Level::Sequence(inner));
                }
                _ => at = self.within(at, header.length)?,
            }
            if open.len() > MAX_DEPTH {
                return Err(corrupt(format!(
                    "DICOM: sequences are nested deeper than {} levels",
                    MAX_DEPTH / 2
                )));
            }
        }
        Ok(at)
    }

    /// Reads an element's header; items and delimiters have none of their own kind in any encoding.
    fn header(&mut self, at: usize, encoding: Encoding) -> Result<Header, RejectReason> {
        self.budget = self
            .budget
            .checked_sub(1)
            .ok_or_else(|| corrupt("DICOM: more data elements than any image has"))?;
        let ends = || truncated("DICOM: the data ends inside an element");
        let bytes = self.bytes.get(at..).ok_or_else(ends)?;
        let ([g0, g1, e0, e1, l @ ..], rest) = bytes.split_first_chunk::<8>().ok_or_else(ends)?;
        let tag = Tag(encoding.short([*g0, *g1]), encoding.short([*e0, *e1]));
        if !encoding.explicit || tag.0 == ITEM.0 {
            return Ok(Header {
                tag,
                vr: [0; 2],
                length: encoding.long(*l),
                value: at + 8,
            });
        }
        let [v0, v1, l0, l1] = *l;
        let vr = [v0, v1];
        match &vr {
            b"OB" | b"OD" | b"OF" | b"OL" | b"OV" | b"OW" | b"SQ" | b"SV" | b"UC" | b"UN"
            | b"UR" | b"UT" | b"UV" => {
                let length = rest.first_chunk::<4>().ok_or_else(ends)?;
                Ok(Header {
                    tag,
                    vr,
                    length: encoding.long(*length),
                    value: at + 12,
                })
            }
            _ if vr.iter().all(u8::is_ascii_uppercase) => Ok(Header {
                tag,
                vr,
                length: encoding.short([l0, l1]).into(),
                value: at + 8,
            }),
            _ => Err(corrupt("DICOM: an element has no value representation")),
        }
    }

    /// The end of a value, which must lie inside the data.
    fn within(&self, start: usize, length: u32) -> Result<usize, RejectReason> {
        match start.checked_add(length as usize) {
            Some(end) if end <= self.bytes.len() => Ok(end),
            _ => Err(truncated("DICOM: the data ends inside an element's value")),
        }
    }
}

/// An open level while skipping.
#[derive(Clone, Copy)]
enum Level {
    Sequence(Encoding),
    Item(Encoding),
}
