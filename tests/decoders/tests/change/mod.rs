//! Changes of a sound input: small ones, so that most of it stays sound and what comes later is reached.

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Map, Value, json};

/// One change. Where it happens is a fraction of whatever length the input has by then.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    /// One bit.
    Flip(Index, u8),
    /// One byte, from the edges of what a byte can be.
    Byte(Index, u8),
    /// The end goes.
    Cut(Index),
    /// A part goes.
    Remove(Index, u8),
    /// A part comes twice.
    Duplicate(Index, u8),
    /// Something is put in.
    Insert(Index, Vec<u8>),
    /// The rest is another input's.
    Splice(Index, Index),
    /// Eight bytes that are a number at an edge.
    Number(Index, u64),
    /// In JSON: another value in one place.
    Value(Index, u8),
    /// In JSON: a field or an element goes.
    Without(Index),
    /// In JSON: one place takes the value of another.
    Swap(Index, Index),
}

impl Arbitrary for Change {
    type Parameters = ();
    type Strategy = BoxedStrategy<Self>;

    fn arbitrary_with((): ()) -> Self::Strategy {
        let at = any::<Index>;
        let edge = prop_oneof![Just(0), Just(1), Just(0x7f), Just(0x80), Just(0xfe), Just(0xff)];
        let number = prop_oneof![
            Just(0),
            Just(1),
            Just(u64::from(u32::MAX)),
            Just(u64::MAX / 2),
            Just(u64::MAX - 1),
            Just(u64::MAX)
        ];
        prop_oneof![
            (at(), 0..8_u8).prop_map(|(at, bit)| Self::Flip(at, bit)),
            (at(), edge).prop_map(|(at, byte)| Self::Byte(at, byte)),
            at().prop_map(Self::Cut),
            (at(), any::<u8>()).prop_map(|(at, len)| Self::Remove(at, len)),
            (at(), any::<u8>()).prop_map(|(at, len)| Self::Duplicate(at, len)),
            (at(), prop::collection::vec(any::<u8>(), 1..20)).prop_map(|(at, bytes)| Self::Insert(at, bytes)),
            (at(), at()).prop_map(|(at, from)| Self::Splice(at, from)),
            (at(), number).prop_map(|(at, number)| Self::Number(at, number)),
            (at(), any::<u8>()).prop_map(|(at, value)| Self::Value(at, value)),
            at().prop_map(Self::Without),
            (at(), at()).prop_map(|(at, from)| Self::Swap(at, from)),
        ]
        .boxed()
    }
}

/// The input with all changes. JSON is changed first, and only where the input is `text`.
pub(crate) fn changed(seed: &[u8], other: &[u8], changes: &[Change], text: bool) -> Vec<u8> {
    let mut bytes = if text {
        as_json(seed, changes)
    } else {
        seed.to_vec()
    };
    for change in changes {
        let at = |index: &Index, bytes: &[u8]| index.index(bytes.len() + 1);
        match change {
            Change::Flip(index, bit) if !bytes.is_empty() => {
                let at = index.index(bytes.len());
                bytes[at] ^= 1 << bit;
            }
            Change::Byte(index, byte) if !bytes.is_empty() => {
                let at = index.index(bytes.len());
                bytes[at] = *byte;
            }
            Change::Cut(index) => bytes.truncate(at(index, &bytes)),
            Change::Remove(index, len) => {
                let at = at(index, &bytes);
                bytes.drain(at..(at + usize::from(*len)).min(bytes.len()));
            }
            Change::Duplicate(index, len) => {
                let at = at(index, &bytes);
                let part = bytes[at..(at + usize::from(*len)).min(bytes.len())].to_vec();
                bytes.splice(at..at, part);
            }
            Change::Insert(index, part) => {
                let at = at(index, &bytes);
                bytes.splice(at..at, part.iter().copied());
            }
            Change::Splice(index, from) => {
                bytes.truncate(at(index, &bytes));
                bytes.extend_from_slice(&other[from.index(other.len() + 1)..]);
            }
            Change::Number(index, number) => {
                let at = at(index, &bytes);
                let number = if text {
                    number.to_string().into_bytes()
                } else {
                    number.to_le_bytes().to_vec()
                };
                let end = (at + number.len()).min(bytes.len());
                bytes.splice(at..end, number);
            }
            // Nothing is there to be changed, or it was changed as JSON.
            Change::Flip(..)
            | Change::Byte(..)
            | Change::Value(..)
            | Change::Without(_)
            | Change::Swap(..) => {}
        }
    }
    bytes
}

/// Changes the JSON of each line; a byte that stands before the first stays.
fn as_json(seed: &[u8], changes: &[Change]) -> Vec<u8> {
    let begin = usize::from(seed.first().is_some_and(|byte| *byte < b' '));
    let mut bytes = seed[..begin].to_vec();
    for (n, line) in seed[begin..].split(|byte| *byte == b'\n').enumerate() {
        if n > 0 {
            bytes.push(b'\n');
        }
        match serde_json::from_slice::<Value>(line) {
            Ok(mut value) => {
                for change in changes {
                    change_value(&mut value, change);
                }
                bytes.extend_from_slice(value.to_string().as_bytes());
            }
            Err(_) => bytes.extend_from_slice(line),
        }
    }
    bytes
}

fn change_value(value: &mut Value, change: &Change) {
    let places = count(value);
    match change {
        Change::Value(index, n) => *place(value, &mut index.index(places)) = another(*n),
        Change::Swap(index, from) => {
            let other = place(value, &mut from.index(places)).clone();
            *place(value, &mut index.index(places)) = other;
        }
        Change::Without(index) => match place(value, &mut index.index(places)) {
            Value::Object(fields) => {
                if let Some(name) = fields.keys().next().cloned() {
                    fields.remove(&name);
                }
            }
            Value::Array(values) => drop(values.pop()),
            other => *other = Value::Null,
        },
        _ => {}
    }
}

/// How many values there are in it, itself among them.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(values) => values.iter().map(count).sum(),
        Value::Object(fields) => fields.values().map(count).sum::<usize>(),
        _ => 0,
    }
}

/// The `n`th of them.
fn place<'a>(value: &'a mut Value, n: &mut usize) -> &'a mut Value {
    if *n == 0 {
        return value;
    }
    *n -= 1;
    let inner: Vec<&mut Value> = match value {
        Value::Array(values) => values.iter_mut().collect(),
        Value::Object(fields) => fields.values_mut().collect(),
        _ => Vec::new(),
    };
    for value in inner {
        let all = count(value);
        if *n < all {
            return place(value, n);
        }
        *n -= all;
    }
    unreachable!("there are as many as were counted")
}

fn another(n: u8) -> Value {
    let deep = |levels: usize| (0..levels).fold(json!(1), |inner, _| json!([inner]));
    match n % 24 {
        0 => Value::Null,
        1 => json!(true),
        2 => json!(0),
        3 => json!(-1),
        4 => json!(u64::MAX),
        5 => json!(i64::MIN),
        6 => json!(u64::from(u32::MAX) + 1),
        7 => json!(1e308),
        8 => json!(0.1),
        9 => json!(""),
        10 => json!("a"),
        11 => json!("\u{0}\u{7f}\u{10ffff}"),
        12 => json!("x".repeat(5_000)),
        13 => json!([]),
        14 => json!({}),
        15 => Value::Object(Map::from_iter([("x".repeat(5_000), json!(1))])),
        16 => deep(40),
        17 => deep(110),
        18 => deep(122),
        19 => json!(["a", 5_000, 1]),
        20 => json!("18446744073709551615h"),
        21 => json!("18446744073709551615"),
        22 => json!("-0.5"),
        _ => json!([null, [null], {"a": null}]),
    }
}
