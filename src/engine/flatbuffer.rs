//! What is checked of a model file before a runtime sees it.
//!
//! LiteRT verifies the structure of the file by itself (every offset lies within it, every truncated file is refused), but
//! not that the numbers in it make sense together: an operator that names a tensor which does not exist ends the process.
//! So this walks the graphs and checks every such number. It cannot find everything that a hostile file may do: the hash
//! in a bundle's manifest is what keeps damaged files out, and a signature what keeps out hostile ones.
//!
//! A TFLite file is a [flatbuffer](https://flatbuffers.dev/internals/): little-endian; a table starts with the signed
//! distance back to its vtable, which lists the place of each field; a vector is a length and its elements; both are reached
//! by unsigned distances forward. The field numbers are those of the schema, `schema.fbs`, version 3.

use super::EngineError;

/// Smallest file with a root table.
const MIN_BYTES: usize = 32;

/// Flatbuffers use signed 32-bit offsets.
const MAX_BYTES: usize = i32::MAX as usize;

/// Operators, tensors and buffers of the largest models are some thousands. The limits bound the time that this takes.
const MAX_PARTS: usize = 1 << 16;
/// Graphs of a file; all but the first serve control flow.
const MAX_GRAPHS: usize = 16;
/// Inputs or outputs of a graph or an operator.
const MAX_ENDS: usize = 1024;

/// Dimensions of a tensor that LiteRT has room for.
const MAX_RANK: usize = 8;

/// Elements of a tensor that no model here needs.
const MAX_ELEMENTS: u64 = 1 << 30;

/// Refuses what is no TFLite model, and models whose graphs refer to what is not there.
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
    check_model(bytes)
        .map_err(|Broken(what)| EngineError::Load(format!("not an intact model file: {what}")))
}

/// What is wrong with a file.
#[derive(Debug, PartialEq, Eq)]
struct Broken(&'static str);

const OUTSIDE: Broken = Broken("it points outside itself");

fn check_model(bytes: &[u8]) -> Result<(), Broken> {
    let model = Table {
        bytes,
        at: follow(bytes, 0)?,
    };
    let codes = model.vector(1, MAX_PARTS)?.len;
    let buffers = model.vector(4, MAX_PARTS)?.len;
    let graphs = model.vector(2, MAX_GRAPHS)?;
    if graphs.len == 0 {
        return Err(Broken("it has no graph"));
    }
    for graph in 0..graphs.len {
        check_graph(&graphs.table(graph)?, codes, buffers)?;
    }
    Ok(())
}

fn check_graph(graph: &Table<'_>, codes: usize, buffers: usize) -> Result<(), Broken> {
    let tensors = graph.vector(0, MAX_PARTS)?;
    for i in 0..tensors.len {
        check_tensor(&tensors.table(i)?, buffers)?;
    }
    for ends in [1, 2] {
        graph.vector(ends, MAX_ENDS)?.each_is_one_of(
            0,
            tensors.len,
            "an end of its graph is not a tensor",
        )?;
    }
    let operators = graph.vector(3, MAX_PARTS)?;
    for i in 0..operators.len {
        let operator = operators.table(i)?;
        if operator.u32(0)? as usize >= codes {
            return Err(Broken("an operator is of no kind"));
        }
        // -1 stands for an optional input that is left out.
        operator.vector(1, MAX_ENDS)?.each_is_one_of(
            -1,
            tensors.len,
            "an operator's input is not a tensor",
        )?;
        operator.vector(2, MAX_ENDS)?.each_is_one_of(
            0,
            tensors.len,
            "an operator's output is not a tensor",
        )?;
    }
    Ok(())
}

fn check_tensor(tensor: &Table<'_>, buffers: usize) -> Result<(), Broken> {
    if tensor.u32(2)? as usize >= buffers {
        return Err(Broken("a tensor's data is not there"));
    }
    let shape = tensor.vector(0, MAX_RANK)?;
    let mut elements = 1_u64;
    for i in 0..shape.len {
        // A dynamic extent is 1 or -1 here; LiteRT reports it, and it is refused by name.
        let extent = shape.i32(i)?;
        elements = elements.saturating_mul(u64::from(extent.unsigned_abs()));
        if extent < -1 || elements > MAX_ELEMENTS {
            return Err(Broken("a tensor's size makes no sense"));
        }
    }
    Ok(())
}

/// A table at `at`, which lies within `bytes`.
struct Table<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Table<'a> {
    /// Where field `number` lies; `None` when it has its default.
    fn field(&self, number: usize) -> Result<Option<usize>, Broken> {
        let back = i32::from_le_bytes(array(self.bytes, self.at)?);
        let vtable = usize::try_from(self.at as i64 - i64::from(back)).map_err(|_| OUTSIDE)?;
        let size = u16::from_le_bytes(array(self.bytes, vtable)?);
        let slot = 4 + 2 * number;
        if slot + 2 > usize::from(size) {
            return Ok(None);
        }
        let offset = u16::from_le_bytes(array(self.bytes, vtable + slot)?);
        Ok((offset != 0).then(|| self.at + usize::from(offset)))
    }

    /// A number, 0 by default.
    fn u32(&self, number: usize) -> Result<u32, Broken> {
        self.field(number)?
            .map_or(Ok(0), |at| Ok(u32::from_le_bytes(array(self.bytes, at)?)))
    }

    /// A vector of elements of four bytes, at most `most` of them; empty by default.
    fn vector(&self, number: usize, most: usize) -> Result<Vector<'a>, Broken> {
        let Some(at) = self.field(number)? else {
            return Ok(Vector {
                bytes: self.bytes,
                at: 0,
                len: 0,
            });
        };
        let at = follow(self.bytes, at)?;
        let len = u32::from_le_bytes(array(self.bytes, at)?) as usize;
        if len > most {
            return Err(Broken("it has more parts than any model"));
        }
        if at + 4 + 4 * len > self.bytes.len() {
            return Err(OUTSIDE);
        }
        Ok(Vector {
            bytes: self.bytes,
            at: at + 4,
            len,
        })
    }
}

/// A vector of `len` elements of four bytes, which lie within `bytes`.
struct Vector<'a> {
    bytes: &'a [u8],
    at: usize,
    len: usize,
}

impl<'a> Vector<'a> {
    fn i32(&self, index: usize) -> Result<i32, Broken> {
        Ok(i32::from_le_bytes(array(self.bytes, self.at + 4 * index)?))
    }

    fn table(&self, index: usize) -> Result<Table<'a>, Broken> {
        Ok(Table {
            bytes: self.bytes,
            at: follow(self.bytes, self.at + 4 * index)?,
        })
    }

    /// All elements are at least `least` and below `count`.
    fn each_is_one_of(
        &self,
        least: i32,
        count: usize,
        otherwise: &'static str,
    ) -> Result<(), Broken> {
        for i in 0..self.len {
            let index = self.i32(i)?;
            if index < least || usize::try_from(index).is_ok_and(|index| index >= count) {
                return Err(Broken(otherwise));
            }
        }
        Ok(())
    }
}

/// Where the distance that stands at `at` leads.
fn follow(bytes: &[u8], at: usize) -> Result<usize, Broken> {
    let distance = u32::from_le_bytes(array(bytes, at)?) as usize;
    at.checked_add(distance)
        .filter(|&to| to < bytes.len())
        .ok_or(OUTSIDE)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], Broken> {
    let end = at.checked_add(N).ok_or(OUTSIDE)?;
    bytes
        .get(at..end)
        .and_then(|slice| slice.try_into().ok())
        .ok_or(OUTSIDE)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const MODEL: &[u8] = include_bytes!("../../tests/fixtures/models/uint8-two-outputs.tflite");

    #[test]
    fn a_sound_model_passes() {
        assert_eq!(check_model(MODEL), Ok(()));
    }

    #[test]
    fn every_changed_byte_and_every_cut_is_survived_and_each_kind_of_damage_is_seen() {
        let mut seen = BTreeSet::new();
        for at in 0..MODEL.len() {
            let mut damaged = MODEL.to_owned();
            for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
                damaged[at] = value;
                if let Err(Broken(what)) = check_model(&damaged) {
                    seen.insert(what);
                }
            }
            let _ = check_model(&MODEL[..at]);
        }
        for what in [
            "it points outside itself",
            "it has no graph",
            "it has more parts than any model",
            "an end of its graph is not a tensor",
            "an operator is of no kind",
            "an operator's input is not a tensor",
            "an operator's output is not a tensor",
            "a tensor's data is not there",
            "a tensor's size makes no sense",
        ] {
            assert!(seen.contains(what), "never seen: {what}");
        }
    }
}
