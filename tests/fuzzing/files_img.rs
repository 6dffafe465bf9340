//! Any bytes as `files.img`: changed exactly when a dumb reference finds them well-formed with a
//! socket listening on the port and none on the new one, and then nothing but the ports of such
//! sockets differs.
//!
//! ```text
//! input: | old port (u16 LE) | new port (u16 LE) | files.img |
//! ```

use criu_image_streamer::fuzzing::files_img;

pub fn run(input: &[u8]) {
    let Some((old, rest)) = input.split_first_chunk() else {
        return;
    };
    let Some((new, before)) = rest.split_first_chunk() else {
        return;
    };
    let (old, new) = (u16::from_le_bytes(*old), u16::from_le_bytes(*new));
    let expected = parse(before).filter(|entries| {
        let fields = entries.iter().flatten();
        let ports: Vec<_> = fields.filter_map(listening_port).collect();
        let has = |port: u16| ports.contains(&u64::from(port));
        has(old) && (old == new || !has(new))
    });
    match (files_img(before, old, new), expected) {
        (Ok(after), Some(mut entries)) => {
            for entry in entries.iter_mut().flatten() {
                if listening_port(entry) == Some(u64::from(old))
                    && let Value::Socket(socket) = &mut entry.value
                {
                    let ports = socket.iter_mut().filter(|field| field.number == 7);
                    for Field { value, .. } in ports {
                        if let Value::Number(port) = value {
                            *port = u64::from(new);
                        }
                    }
                }
            }
            let after = parse(&after).expect("it is no files.img any more");
            assert!(after == entries, "something else than the port has changed");
        }
        (Ok(_), None) => panic!("changed, although the reference finds nothing to change"),
        (Err(error), Some(_)) => panic!("the reference finds a port to change: {error:#}"),
        (Err(_), None) => {}
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Field {
    number: u64,
    value: Value,
}

#[derive(Debug, PartialEq, Eq)]
enum Value {
    Number(u64),
    Bytes(Vec<u8>),
    Fixed(Vec<u8>),
    Socket(Vec<Field>),
}

/// The entries; `None` for anything that is not exactly the format.
fn parse(mut bytes: &[u8]) -> Option<Vec<Vec<Field>>> {
    if take(&mut bytes, 8)? != [0x19, 0x43, 0x56, 0x54, 0x38, 0x31, 0x30, 0x56] {
        return None;
    }
    let mut entries = Vec::new();
    while !bytes.is_empty() {
        let length = u32::from_le_bytes(take(&mut bytes, 4)?.try_into().unwrap());
        let mut entry = fields(take(&mut bytes, length as usize)?)?;
        for field in entry.iter_mut().filter(|field| field.number == 4) {
            if let Value::Bytes(socket) = &field.value {
                field.value = Value::Socket(fields(socket)?);
            }
        }
        entries.push(entry);
    }
    Some(entries)
}

/// As protobuf has it, the last value of a field counts.
fn listening_port(Field { value, .. }: &Field) -> Option<u64> {
    let Value::Socket(socket) = value else {
        return None;
    };
    let last = |number| {
        let values = socket.iter().rev().filter(|field| field.number == number);
        let mut numbers = values.filter_map(|field| match field.value {
            Value::Number(number) => Some(number),
            _ => None,
        });
        numbers.next()
    };
    (last(5) == Some(6) && last(6) == Some(10)).then(|| last(7))?
}

fn fields(mut message: &[u8]) -> Option<Vec<Field>> {
    let mut fields = Vec::new();
    while !message.is_empty() {
        let tag = u32::try_from(varint(&mut message)?).ok()?;
        if tag >> 3 == 0 {
            return None;
        }
        let value = match tag & 7 {
            0 => Value::Number(varint(&mut message)?),
            1 => Value::Fixed(take(&mut message, 8)?.to_vec()),
            2 => {
                let length = usize::try_from(varint(&mut message)?).ok()?;
                Value::Bytes(take(&mut message, length)?.to_vec())
            }
            5 => Value::Fixed(take(&mut message, 4)?.to_vec()),
            _ => return None,
        };
        fields.push(Field {
            number: u64::from(tag >> 3),
            value,
        });
    }
    Some(fields)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for index in 0..10 {
        let byte = take(bytes, 1)?[0];
        if index == 9 && byte > 1 {
            return None;
        }
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(count)?;
    *bytes = rest;
    Some(taken)
}
