//! Thrift's compact protocol, the part that Parquet's headers and footer need to be written in.
//! Source: thrift-compact-protocol.md of Apache Thrift.

/// Types of fields and list elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    I32 = 5,
    I64 = 6,
    Binary = 8,
    List = 9,
    Struct = 12,
}

/// Writes one struct after another; field ids must rise within a struct.
#[derive(Default)]
pub(super) struct Writer {
    bytes: Vec<u8>,
    last_field: i16,
}

impl Writer {
    /// The bytes of a struct.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.push(0);
        self.bytes
    }

    pub fn i32(&mut self, field: i16, value: i32) {
        self.field(field, Kind::I32);
        self.varint(zigzag(value.into()));
    }

    pub fn i64(&mut self, field: i16, value: i64) {
        self.field(field, Kind::I64);
        self.varint(zigzag(value));
    }

    pub fn text(&mut self, field: i16, value: &str) {
        self.field(field, Kind::Binary);
        self.binary(value);
    }

    pub fn structure(&mut self, field: i16, write: impl FnOnce(&mut Writer)) {
        self.field(field, Kind::Struct);
        self.element(write);
    }

    pub fn structures<T>(
        &mut self,
        field: i16,
        items: &[T],
        mut write: impl FnMut(&mut Writer, &T),
    ) {
        self.list(field, Kind::Struct, items.len());
        for item in items {
            self.element(|writer| write(writer, item));
        }
    }

    pub fn i32s(&mut self, field: i16, values: &[i32]) {
        self.list(field, Kind::I32, values.len());
        for value in values {
            self.varint(zigzag((*value).into()));
        }
    }

    pub fn texts(&mut self, field: i16, values: &[&str]) {
        self.list(field, Kind::Binary, values.len());
        for value in values {
            self.binary(value);
        }
    }

    fn element(&mut self, write: impl FnOnce(&mut Writer)) {
        let outer = std::mem::take(&mut self.last_field);
        write(self);
        self.bytes.push(0);
        self.last_field = outer;
    }

    fn field(&mut self, field: i16, kind: Kind) {
        let step = field - self.last_field;
        assert!(
            (1..16).contains(&step),
            "fields are written in rising order"
        );
        self.bytes.push((step as u8) << 4 | kind as u8);
        self.last_field = field;
    }

    fn list(&mut self, field: i16, kind: Kind, length: usize) {
        self.field(field, Kind::List);
        if length < 15 {
            self.bytes.push((length as u8) << 4 | kind as u8);
        } else {
            self.bytes.push(0xf0 | kind as u8);
            self.varint(length as u64);
        }
    }

    fn binary(&mut self, value: &str) {
        self.varint(value.len() as u64);
        self.bytes.extend_from_slice(value.as_bytes());
    }

    fn varint(&mut self, value: u64) {
        push_varint(&mut self.bytes, value);
    }
}

/// Seven bits a byte, the lowest first; the highest bit says that more follow.
pub(super) fn push_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn struct_has_the_bytes_of_the_specification() {
        let mut writer = Writer::default();
        writer.i32(1, -1);
        writer.i64(3, 300);
        writer.text(4, "ab");
        writer.structure(5, |inner| inner.i32(2, 1));
        writer.i32s(7, &[0; 15]);
        let mut expected = vec![
            0x15, 1, 0x26, 0xd8, 0x04, 0x18, 2, b'a', b'b', 0x1c, 0x25, 2, 0, 0x29, 0xf5, 15,
        ];
        expected.extend([0; 15]);
        expected.push(0);
        assert_eq!(writer.finish(), expected);
    }
}
