//! What is read and checked of a model file before a runtime sees it.
//!
//! LiteRT verifies the structure of the file by itself (every offset lies within it, every truncated file is refused),
//! TensorFlow Lite 1.15 not even that; and neither checks that the numbers in it make sense together: an operator that names
//! a tensor which does not exist ends the process. So this walks all tables of the file that a runtime follows, checks
//! every such number, and reads what the tensors at both ends of the main graph are. It cannot find everything that a
//! hostile file may do: the hash in a bundle's manifest is what keeps damaged files out, and a signature what keeps out
//! hostile ones.
//!
//! A TFLite file is a [flatbuffer](https://flatbuffers.dev/internals/): little-endian; a table starts with the signed
//! distance back to its vtable, which lists the place of each field; a vector is a length and its elements; both are reached
//! by unsigned distances forward. The field numbers are those of the schema, `schema.fbs`, version 3.

use super::{ElementType, EngineError, QuantParams, TensorSpec};

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

/// Tensors at an end of the graph above this size are a mistake, and would be allocated at once.
const MAX_END_BYTES: usize = 256 << 20;

/// Element types of the schema (`TensorType`).
const UINT8: u8 = 3;
const INT8: u8 = 9;

/// Kind of the operator that turns numbers into others of another type, scale or zero point (`BuiltinOperator` of the schema).
const QUANTIZE: u32 = 114;

/// What a model takes and gives, as its file says.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ModelFile {
    /// The picture.
    pub(super) input: TensorSpec,
    /// Outputs of the main graph in its order, at least one.
    pub(super) outputs: Vec<TensorSpec>,
    /// Operators of the main graph that are left.
    pub(super) operators: usize,
    /// Whether the picture has to have the top bit of each byte flipped before the runtime gets it ([`leave_out_sign_change`]).
    pub(super) flips: bool,
}

impl ModelFile {
    /// Refuses what is no TFLite model, models whose graphs refer to what is not there, and models that do not have exactly one
    /// input and outputs of fixed shape and an [`ElementType`]. From the others it takes an operator out that the caller does better
    /// ([`leave_out_sign_change`]).
    pub(super) fn take(bytes: &mut [u8]) -> Result<Self, EngineError> {
        let mut file = Self::read(bytes)?;
        if leave_out_sign_change(bytes)? {
            (file.flips, file.operators) = (true, file.operators - 1);
        }
        Ok(file)
    }

    /// The same, and takes nothing out.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, EngineError> {
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
        let main = check_model(bytes)?;

        let tensors = main.vector(0, MAX_PARTS)?;
        let ends = |number, kind: &str| {
            let ends = main.vector(number, MAX_ENDS)?;
            (0..ends.len)
                .map(|i| tensor_spec(&tensors.table(ends.i32(i)? as usize)?, kind, i))
                .collect::<Result<Vec<_>, EngineError>>()
        };
        let inputs = ends(1, "input")?;
        let outputs = ends(2, "output")?;
        let count = inputs.len();
        let Ok([input]) = <[TensorSpec; 1]>::try_from(inputs) else {
            return Err(EngineError::Load(format!(
                "{count} inputs; expected exactly one, the picture"
            )));
        };
        if outputs.is_empty() {
            return Err(EngineError::Load("no outputs".to_owned()));
        }
        let operators = main.vector(3, MAX_PARTS)?.len;
        Ok(Self {
            input,
            outputs,
            operators,
            flips: false,
        })
    }
}

/// A model of signed bytes that was converted to take unsigned ones begins with an operator for that. Where it only flips the top bit of each byte (the
/// same scale, a zero point that is 128 less), it is taken out, in place, and the picture becomes a tensor of signed bytes: XNNPACK leaves the
/// operator to a built-in kernel, which multiplies each byte, in one thread. Says whether there was one.
///
/// `bytes` is an intact file.
fn leave_out_sign_change(bytes: &mut [u8]) -> Result<bool, Broken> {
    let Some(changes) = sign_change(bytes)? else {
        return Ok(false);
    };
    for (at, changed) in changes {
        bytes[at..at + changed.len()].copy_from_slice(&changed);
    }
    // Parts of a strange file may lie within each other.
    check_model(bytes).map(|_| true)
}

/// Where bytes are changed, and into which.
type Changes = Vec<(usize, Vec<u8>)>;

/// What takes that operator out, if it is there.
fn sign_change(bytes: &[u8]) -> Result<Option<Changes>, Broken> {
    let model = Table::at(bytes, follow(bytes, 0)?)?;
    let (codes, graphs) = (model.vector(1, MAX_PARTS)?, model.vector(2, MAX_GRAPHS)?);
    if graphs.len != 1 {
        return Ok(None);
    }
    let graph = graphs.table(0)?;
    let tensors = graph.vector(0, MAX_PARTS)?;
    let operators = graph.vector(3, MAX_PARTS)?;
    if operators.len < 2 {
        return Ok(None);
    }
    let first = operators.table(0)?;
    let code = codes.table(first.u32(0)? as usize)?;
    let (taken, given) = (first.vector(1, MAX_ENDS)?, first.vector(2, MAX_ENDS)?);
    if code.u32(3)?.max(u32::from(code.u8(0)?)) != QUANTIZE || (taken.len, given.len) != (1, 1) {
        return Ok(None);
    }
    let (unsigned, signed) = (taken.i32(0)?, given.i32(0)?);
    if unsigned < 0 || !graph.vector(1, MAX_ENDS)?.has(unsigned) {
        return Ok(None);
    }
    let picture = tensors.table(unsigned as usize)?;
    let its_copy = tensors.table(signed as usize)?;
    let quantizations = (quantization(&picture)?, quantization(&its_copy)?);
    let (Some((scale, zero_point)), Some((its_scale, its_zero_point))) = quantizations else {
        return Ok(None);
    };
    let (shape, its_shape) = (picture.vector(0, MAX_RANK)?, its_copy.vector(0, MAX_RANK)?);
    let only_flips = (picture.u8(1)?, its_copy.u8(1)?) == (UINT8, INT8)
        && scale.to_bits() == its_scale.to_bits()
        && zero_point.checked_sub(128) == Some(its_zero_point)
        && shape.content() == its_shape.content();
    if !only_flips {
        return Ok(None);
    }
    // Nobody else may see the one or make the other.
    let mut readers = Vec::new();
    let mut made = vec![graph.vector(2, MAX_ENDS)?];
    for i in 1..operators.len {
        let operator = operators.table(i)?;
        let takes = operator.vector(1, MAX_ENDS)?;
        if takes.has(unsigned) {
            return Ok(None);
        }
        readers.extend(takes.places(signed));
        made.push(operator.vector(2, MAX_ENDS)?);
    }
    if made
        .iter()
        .any(|ends| ends.has(unsigned) || ends.has(signed))
    {
        return Ok(None);
    }
    // And what is changed of the picture's tensor belongs to no other.
    let own_parts = |tensor: &Table<'_>| -> Result<_, Broken> {
        let quantization = tensor.table(4)?;
        let zero_points = quantization.map(|q| q.long_vector(3, MAX_PARTS));
        Ok((tensor.field(1)?, zero_points.transpose()?.map(|z| z.at)))
    };
    let (Some(its_type), Some(its_zero_point_at)) = own_parts(&picture)? else {
        return Ok(None);
    };
    for i in (0..tensors.len).filter(|&i| i != unsigned as usize) {
        let (element, zero_points) = own_parts(&tensors.table(i)?)?;
        if element == Some(its_type) || zero_points == Some(its_zero_point_at) {
            return Ok(None);
        }
    }
    let Some(list) = graph.field(3)? else {
        return Ok(None);
    };
    let mut changes: Changes = readers
        .into_iter()
        .map(|at| (at, unsigned.to_le_bytes().to_vec()))
        .collect();
    changes.push((its_type, vec![INT8]));
    changes.push((its_zero_point_at, its_zero_point.to_le_bytes().to_vec()));
    // The list of operators begins at its second one, with its length in the place of the first.
    let (distance, left) = (operators.at - list, operators.len - 1);
    changes.push((list, (distance as u32).to_le_bytes().to_vec()));
    changes.push((operators.at, (left as u32).to_le_bytes().to_vec()));
    Ok(Some(changes))
}

/// What is wrong with a file.
#[derive(Debug, PartialEq, Eq)]
struct Broken(&'static str);

impl From<Broken> for EngineError {
    fn from(Broken(what): Broken) -> Self {
        Self::Load(format!("not an intact model file: {what}"))
    }
}

const OUTSIDE: Broken = Broken("it points outside itself");

/// Checks the whole file; its main graph.
fn check_model(bytes: &[u8]) -> Result<Table<'_>, Broken> {
    let model = Table::at(bytes, follow(bytes, 0)?)?;
    let codes = model.vector(1, MAX_PARTS)?;
    for i in 0..codes.len {
        codes.table(i)?.string(1)?;
    }
    let buffers = model.vector(4, MAX_PARTS)?;
    for i in 0..buffers.len {
        buffers.table(i)?.blob(0)?;
    }
    model.string(3)?;
    let graphs = model.vector(2, MAX_GRAPHS)?;
    if graphs.len == 0 {
        return Err(Broken("it has no graph"));
    }
    for graph in 0..graphs.len {
        check_graph(&graphs.table(graph)?, codes.len, buffers.len)?;
    }
    graphs.table(0)
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
    graph.string(4)?;
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
        // Its options: fields 3 (which kind of table) and 4 (the table); custom ones are bytes.
        operator.table(4)?;
        operator.blob(5)?;
    }
    Ok(())
}

fn check_tensor(tensor: &Table<'_>, buffers: usize) -> Result<(), Broken> {
    if tensor.u32(2)? as usize >= buffers {
        return Err(Broken("a tensor's data is not there"));
    }
    tensor.string(3)?;
    if let Some(quantization) = tensor.table(4)? {
        for number in 0..3 {
            quantization.vector(number, MAX_PARTS)?;
        }
        quantization.long_vector(3, MAX_PARTS)?;
    }
    let shape = tensor.vector(0, MAX_RANK)?;
    let mut elements = 1_u64;
    for i in 0..shape.len {
        // A dynamic extent is 1 or -1 here, and -1 in the shape's signature; `tensor_spec` refuses it by name.
        let extent = shape.i32(i)?;
        elements = elements.saturating_mul(u64::from(extent.unsigned_abs()));
        if extent < -1 || elements > MAX_ELEMENTS {
            return Err(Broken("a tensor's size makes no sense"));
        }
    }
    tensor.vector(7, MAX_RANK)?;
    Ok(())
}

/// What a checked tensor is, which lies at an end of the main graph.
fn tensor_spec(tensor: &Table<'_>, kind: &str, index: usize) -> Result<TensorSpec, EngineError> {
    let name = match tensor.string(3)? {
        Some(name) if !name.is_empty() => String::from_utf8_lossy(name).into_owned(),
        _ => format!("{kind} {index}"),
    };
    let refuse = |problem: String| EngineError::Tensor {
        name: name.clone(),
        problem,
    };
    let element = match tensor.u8(1)? {
        0 => ElementType::Float32,
        UINT8 => ElementType::UInt8,
        INT8 => ElementType::Int8,
        other => {
            return Err(refuse(format!(
                "has element type {}; expected int8, uint8 or float32",
                type_name(other)
            )));
        }
    };

    // The signature of the shape has -1 where the extent may change; it is left out where nothing may.
    let mut extents = tensor.vector(7, MAX_RANK)?;
    if extents.len == 0 {
        extents = tensor.vector(0, MAX_RANK)?;
    }
    let dimensions = (0..extents.len)
        .map(|i| extents.i32(i))
        .collect::<Result<Vec<_>, _>>()?;
    let shape = dimensions
        .iter()
        .map(|&extent| usize::try_from(extent).ok().filter(|&extent| extent > 0))
        .collect::<Option<Vec<usize>>>()
        .ok_or_else(|| {
            refuse(format!("has the shape {dimensions:?}; expected fixed sizes (convert with a fixed batch of 1)"))
        })?;
    let bytes = shape.iter().try_fold(element.size(), |product, &extent| {
        product.checked_mul(extent)
    });
    if bytes.is_none_or(|bytes| bytes > MAX_END_BYTES) {
        return Err(refuse(format!(
            "has the shape {shape:?}; expected at most {} MiB",
            MAX_END_BYTES >> 20
        )));
    }

    let quant = match element {
        ElementType::Float32 => None,
        ElementType::Int8 | ElementType::UInt8 => {
            let (scale, zero_point) = quantization(tensor)?.ok_or_else(|| {
                refuse("is an integer tensor without one scale and zero point; expected a fully quantized model".to_owned())
            })?;
            Some(sensible(scale, zero_point, element).map_err(refuse)?)
        }
    };
    Ok(TensorSpec {
        name,
        shape,
        element,
        quant,
    })
}

/// The tensor's scale and zero point; `None` where it has none, or more than one.
fn quantization(tensor: &Table<'_>) -> Result<Option<(f32, i64)>, Broken> {
    let Some(quantization) = tensor.table(4)? else {
        return Ok(None);
    };
    let scales = quantization.vector(2, MAX_PARTS)?;
    let zero_points = quantization.long_vector(3, MAX_PARTS)?;
    if scales.len != 1 || zero_points.len != 1 {
        return Ok(None);
    }
    let scale = f32::from_bits(scales.i32(0)?.cast_unsigned());
    let zero_point = i64::from_le_bytes(array(zero_points.bytes, zero_points.at)?);
    Ok(Some((scale, zero_point)))
}

fn sensible(scale: f32, zero_point: i64, element: ElementType) -> Result<QuantParams, String> {
    let levels = if element == ElementType::Int8 {
        -128..=127
    } else {
        0..=255
    };
    match i32::try_from(zero_point) {
        Ok(zero_point) if scale.is_finite() && scale > 0.0 && levels.contains(&zero_point) => {
            Ok(QuantParams { scale, zero_point })
        }
        _ => Err(format!(
            "has scale {scale} and zero point {zero_point}, which make no sense"
        )),
    }
}

fn type_name(element: u8) -> String {
    match element {
        1 => "float16".to_owned(),
        2 => "int32".to_owned(),
        4 => "int64".to_owned(),
        5 => "string".to_owned(),
        6 => "bool".to_owned(),
        7 => "int16".to_owned(),
        10 => "float64".to_owned(),
        other => format!("number {other}"),
    }
}

/// A table at `at`; it, its vtable and all its fields' places lie within `bytes`.
struct Table<'a> {
    bytes: &'a [u8],
    at: usize,
    vtable: usize,
    fields: usize,
}

impl<'a> Table<'a> {
    fn at(bytes: &'a [u8], at: usize) -> Result<Self, Broken> {
        let back = i32::from_le_bytes(array(bytes, at)?);
        let vtable = usize::try_from(at as i64 - i64::from(back)).map_err(|_| OUTSIDE)?;
        let size = usize::from(u16::from_le_bytes(array(bytes, vtable)?));
        let extent = usize::from(u16::from_le_bytes(array(bytes, vtable + 2)?));
        if size < 4 || size % 2 != 0 || vtable + size > bytes.len() || at + extent > bytes.len() {
            return Err(OUTSIDE);
        }
        let table = Self {
            bytes,
            at,
            vtable,
            fields: (size - 4) / 2,
        };
        for number in 0..table.fields {
            if table.offset(number)? >= extent.max(1) {
                return Err(OUTSIDE);
            }
        }
        Ok(table)
    }

    fn offset(&self, number: usize) -> Result<usize, Broken> {
        let slot = self.vtable + 4 + 2 * number;
        Ok(usize::from(u16::from_le_bytes(array(self.bytes, slot)?)))
    }

    /// Where field `number` lies; `None` when it has its default.
    fn field(&self, number: usize) -> Result<Option<usize>, Broken> {
        if number >= self.fields {
            return Ok(None);
        }
        let offset = self.offset(number)?;
        Ok((offset != 0).then(|| self.at + offset))
    }

    /// A number, 0 by default.
    fn u32(&self, number: usize) -> Result<u32, Broken> {
        self.field(number)?
            .map_or(Ok(0), |at| Ok(u32::from_le_bytes(array(self.bytes, at)?)))
    }

    /// A number of one byte, 0 by default.
    fn u8(&self, number: usize) -> Result<u8, Broken> {
        self.field(number)?
            .map_or(Ok(0), |at| Ok(array::<1>(self.bytes, at)?[0]))
    }

    /// A table in the table.
    fn table(&self, number: usize) -> Result<Option<Self>, Broken> {
        self.field(number)?
            .map(|at| Table::at(self.bytes, follow(self.bytes, at)?))
            .transpose()
    }

    /// A vector of elements of four bytes, at most `most` of them; empty by default.
    fn vector(&self, number: usize, most: usize) -> Result<Vector<'a>, Broken> {
        self.elements(number, most, 4)
    }

    /// A vector of elements of eight bytes, at most `most` of them; empty by default.
    fn long_vector(&self, number: usize, most: usize) -> Result<Vector<'a>, Broken> {
        self.elements(number, most, 8)
    }

    /// Bytes; empty by default.
    fn blob(&self, number: usize) -> Result<&'a [u8], Broken> {
        let bytes = self.elements(number, MAX_BYTES, 1)?;
        Ok(&bytes.bytes[bytes.at..bytes.at + bytes.len])
    }

    /// A text, which a zero byte follows.
    fn string(&self, number: usize) -> Result<Option<&'a [u8]>, Broken> {
        if self.field(number)?.is_none() {
            return Ok(None);
        }
        let text = self.elements(number, MAX_BYTES, 1)?;
        match self.bytes.get(text.at + text.len) {
            Some(0) => Ok(Some(&self.bytes[text.at..text.at + text.len])),
            _ => Err(Broken("a text in it has no end")),
        }
    }

    fn elements(&self, number: usize, most: usize, size: usize) -> Result<Vector<'a>, Broken> {
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
        let end = len
            .checked_mul(size)
            .and_then(|bytes| bytes.checked_add(at + 4));
        if end.is_none_or(|end| end > self.bytes.len()) {
            return Err(OUTSIDE);
        }
        Ok(Vector {
            bytes: self.bytes,
            at: at + 4,
            len,
        })
    }
}

/// A vector of `len` elements, which lie within `bytes`. The functions are for elements of four bytes.
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
        Table::at(self.bytes, follow(self.bytes, self.at + 4 * index)?)
    }

    /// The elements, as bytes.
    fn content(&self) -> &'a [u8] {
        &self.bytes[self.at..self.at + 4 * self.len]
    }

    /// Where the elements stand that are `value`.
    fn places(&self, value: i32) -> impl Iterator<Item = usize> {
        let (elements, _) = self.content().as_chunks();
        let of_value = move |(_, element): &(usize, &[u8; 4])| **element == value.to_le_bytes();
        let found = elements.iter().enumerate().filter(of_value);
        found.map(|(i, _)| self.at + 4 * i)
    }

    fn has(&self, value: i32) -> bool {
        self.places(value).next().is_some()
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
        assert!(check_model(MODEL).is_ok());
    }

    fn fixture(name: &str) -> Vec<u8> {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        std::fs::read(root.join(format!("tests/fixtures/models/{name}.tflite"))).unwrap()
    }

    #[test]
    fn an_operator_that_only_flips_the_top_bit_of_the_picture_is_taken_out() {
        for (name, operators) in [("uint8", 6), ("uint8-two-outputs", 8)] {
            let mut bytes = fixture(name);
            let whole = ModelFile::read(&bytes).unwrap();
            assert_eq!((whole.operators, whole.flips), (operators, false), "{name}");
            let left = ModelFile::take(&mut bytes).unwrap();
            assert_eq!((left.operators, left.flips), (operators - 1, true));
            assert_eq!((&left.input, &left.outputs), (&whole.input, &whole.outputs));
            // What the runtime sees.
            let seen = ModelFile::read(&bytes).unwrap();
            assert_eq!(seen.operators, operators - 1);
            assert_eq!(seen.input.element, ElementType::Int8);
            let zero_points = [&seen, &whole].map(|file| file.input.quant.unwrap().zero_point);
            assert_eq!(zero_points[0], zero_points[1] - 128);
            // There is only one.
            let again = bytes.clone();
            assert!(!ModelFile::take(&mut bytes).unwrap().flips && bytes == again);
        }
        for name in ["int8", "float32", "float32-four-labels"] {
            let mut bytes = fixture(name);
            let whole = bytes.clone();
            assert!(!ModelFile::take(&mut bytes).unwrap().flips);
            assert!(bytes == whole, "{name}");
        }
    }

    #[test]
    fn an_operator_that_does_more_stays() {
        let sound = fixture("uint8");
        let changes = sign_change(&sound).unwrap().unwrap();
        // The zero point of the picture is eight bytes; any other one needs more than a flip.
        let (at, _) = changes.iter().find(|(_, bytes)| bytes.len() == 8).unwrap();
        let mut other = sound.clone();
        other[*at] = 1;
        assert_eq!(sign_change(&other), Ok(None));
        // So does a picture of another type, which has one byte.
        let (at, _) = changes.iter().find(|(_, bytes)| bytes.len() == 1).unwrap();
        let mut other = sound;
        other[*at] = INT8;
        assert_eq!(sign_change(&other), Ok(None));
    }

    #[test]
    fn every_changed_byte_and_every_cut_is_survived_and_each_kind_of_damage_is_seen() {
        let mut seen = BTreeSet::new();
        for at in 0..MODEL.len() {
            let mut damaged = MODEL.to_owned();
            for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
                damaged[at] = value;
                match check_model(&damaged) {
                    Err(Broken(what)) => _ = seen.insert(what),
                    // What is left of one that passes is intact too, or it is refused.
                    Ok(_) => _ = leave_out_sign_change(&mut damaged.clone()),
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
            "a text in it has no end",
        ] {
            assert!(seen.contains(what), "never seen: {what}");
        }
    }
}
