//! A TensorBoard event file written by hand: record framing and a few protobuf fields are all that scalars need.
//!
//! A record is: length u64 LE, masked CRC of those 8 bytes, data, masked CRC of the data. The data is one `tensorflow.Event`:
//! wall_time = 1 (double), step = 2 (int64), file_version = 3 (string), summary = 5; a `Summary` repeats value = 1,
//! a `Value` has tag = 1 (string) and simple_value = 2 (float).
//! Source: tensorflow `record_writer.h`, `event.proto`, `summary.proto`; CRC-32C (Castagnoli), RFC 3720 appendix B.4.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::error::{IoContext, Result};

/// TensorBoard finds its files by this part of their names.
const PREFIX: &str = "events.out.tfevents.";
const SUFFIX: &str = ".cyrene";

/// How far an event file had been written: what a checkpoint remembers, so that a resumed run doubles nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Its name, in the run's folder.
    pub file_name: String,
    /// Its length.
    pub bytes: u64,
}

/// Whether a name is one that an event file of a run can have: no folder, no place elsewhere.
fn is_own_name(name: &str) -> bool {
    let middle = name
        .strip_prefix(PREFIX)
        .and_then(|rest| rest.strip_suffix(SUFFIX));
    middle.is_some_and(|seconds| !seconds.is_empty() && seconds.bytes().all(|b| b.is_ascii_digit()))
}

/// An event file open for appending.
#[derive(Debug)]
pub struct EventFile {
    file: File,
    path: PathBuf,
    bytes: u64,
}

impl EventFile {
    /// Starts a new event file in `dir`.
    ///
    /// # Errors
    /// The file cannot be made or written.
    pub fn create(dir: &Path) -> Result<Self> {
        let name = format!("{PREFIX}{}{SUFFIX}", wall_time() as u64);
        let path = dir.join(name);
        let file = File::create(&path).during("creating", &path)?;
        let mut events = EventFile {
            file,
            path,
            bytes: 0,
        };
        let mut event = Vec::new();
        put_double(&mut event, 1, wall_time());
        put_bytes(&mut event, 3, b"brain.Event:2");
        events.record(&event)?;
        Ok(events)
    }

    /// Goes on with the file of an earlier start, without what it wrote after `position`; a new file if that one is gone, or if the name is
    /// not one that [`EventFile::create`] gives: a checkpoint may come from somebody else, and what it names is cut.
    ///
    /// # Errors
    /// The file cannot be opened, cut or written.
    pub fn resume(dir: &Path, position: &Position) -> Result<Self> {
        let path = dir.join(&position.file_name);
        let is_file = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_file());
        if !is_own_name(&position.file_name) || !is_file {
            return EventFile::create(dir);
        }
        let mut file = OpenOptions::new()
            .write(true)
            .open(&path)
            .during("opening", &path)?;
        let length = file.metadata().during("reading", &path)?.len();
        let bytes = length.min(position.bytes);
        file.set_len(bytes).during("cutting", &path)?;
        file.seek(SeekFrom::End(0)).during("seeking in", &path)?;
        Ok(EventFile { file, path, bytes })
    }

    /// Removes the event files that a run left which never reached a checkpoint.
    ///
    /// # Errors
    /// The folder cannot be read or a file not removed.
    pub fn remove_all(dir: &Path) -> Result<()> {
        for entry in fs::read_dir(dir).during("listing", dir)? {
            let path = entry.during("listing", dir)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(PREFIX) && name.ends_with(SUFFIX) {
                fs::remove_file(&path).during("removing", &path)?;
            }
        }
        Ok(())
    }

    /// Appends the values of one step.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut entry = Vec::new();
            put_bytes(&mut entry, 1, tag.as_bytes());
            put_float(&mut entry, 2, *value as f32);
            put_bytes(&mut summary, 1, &entry);
        }
        let mut event = Vec::new();
        put_double(&mut event, 1, wall_time());
        put_varint_field(&mut event, 2, step);
        put_bytes(&mut event, 5, &summary);
        self.record(&event)
    }

    /// Where the next record will go.
    pub fn position(&self) -> Position {
        Position {
            file_name: self
                .path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            bytes: self.bytes,
        }
    }

    /// Waits until everything written so far is on the disk.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().during("syncing", &self.path)
    }

    fn record(&mut self, data: &[u8]) -> Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(data.len() + 16);
        record.extend_from_slice(&length);
        record.extend_from_slice(&masked_crc32c(&length).to_le_bytes());
        record.extend_from_slice(data);
        record.extend_from_slice(&masked_crc32c(data).to_le_bytes());
        self.file.write_all(&record).during("writing", &self.path)?;
        self.bytes += record.len() as u64;
        Ok(())
    }
}

/// Seconds since 1970.
fn wall_time() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |elapsed| elapsed.as_secs_f64())
}

const WIRE_VARINT: u64 = 0;
const WIRE_64_BIT: u64 = 1;
const WIRE_LENGTH: u64 = 2;
const WIRE_32_BIT: u64 = 5;

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_varint_field(out: &mut Vec<u8>, field: u64, value: u64) {
    put_varint(out, field << 3 | WIRE_VARINT);
    put_varint(out, value);
}

fn put_bytes(out: &mut Vec<u8>, field: u64, data: &[u8]) {
    put_varint(out, field << 3 | WIRE_LENGTH);
    put_varint(out, data.len() as u64);
    out.extend_from_slice(data);
}

fn put_double(out: &mut Vec<u8>, field: u64, value: f64) {
    put_varint(out, field << 3 | WIRE_64_BIT);
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_float(out: &mut Vec<u8>, field: u64, value: f32) {
    put_varint(out, field << 3 | WIRE_32_BIT);
    out.extend_from_slice(&value.to_le_bytes());
}

/// CRC-32C with the reflected polynomial 0x82F63B78.
fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0, |crc: u32, byte| {
        crc >> 8 ^ CRC_TABLE[usize::from(crc as u8 ^ byte)]
    })
}

/// Rotated and offset, so that a CRC over data that holds CRCs stays a good one.
fn masked_crc32c(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 {
                crc >> 1 ^ 0x82f6_3b78
            } else {
                crc >> 1
            };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, PartialEq)]
    struct Parsed {
        step: u64,
        file_version: Option<String>,
        scalars: Vec<(String, f32)>,
    }

    enum Field<'a> {
        Number(u64),
        Bytes(&'a [u8]),
    }

    fn take_varint(data: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let byte = data[0];
            *data = &data[1..];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return value;
            }
        }
        unreachable!()
    }

    fn fields(mut data: &[u8]) -> Vec<(u64, Field<'_>)> {
        let mut out = Vec::new();
        while !data.is_empty() {
            let key = take_varint(&mut data);
            let length = match key & 7 {
                0 => {
                    out.push((key >> 3, Field::Number(take_varint(&mut data))));
                    continue;
                }
                1 => 8,
                2 => take_varint(&mut data) as usize,
                5 => 4,
                wire => panic!("wire type {wire}"),
            };
            out.push((key >> 3, Field::Bytes(&data[..length])));
            data = &data[length..];
        }
        out
    }

    fn parse(mut data: &[u8]) -> Vec<Parsed> {
        let mut events = Vec::new();
        while !data.is_empty() {
            let length = u64::from_le_bytes(data[..8].try_into().unwrap()) as usize;
            let crc = |at: usize| u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
            let event = &data[12..12 + length];
            assert_eq!(crc(8), masked_crc32c(&data[..8]));
            assert_eq!(crc(12 + length), masked_crc32c(event));
            data = &data[16 + length..];

            let mut parsed = Parsed::default();
            for field in fields(event) {
                match field {
                    (1, Field::Bytes(time)) => {
                        assert!(f64::from_le_bytes(time.try_into().unwrap()) > 1e9)
                    }
                    (2, Field::Number(step)) => parsed.step = step,
                    (3, Field::Bytes(version)) => {
                        parsed.file_version = Some(String::from_utf8(version.to_vec()).unwrap())
                    }
                    (5, Field::Bytes(summary)) => {
                        for (_, value) in fields(summary) {
                            let Field::Bytes(value) = value else { panic!() };
                            let [(1, Field::Bytes(tag)), (2, Field::Bytes(number))] =
                                fields(value)[..]
                            else {
                                panic!()
                            };
                            parsed.scalars.push((
                                String::from_utf8(tag.to_vec()).unwrap(),
                                f32::from_le_bytes(number.try_into().unwrap()),
                            ));
                        }
                    }
                    _ => panic!("unexpected field"),
                }
            }
            events.push(parsed);
        }
        events
    }

    #[test]
    fn crc32c_gives_the_check_value() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn event_file_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut events = EventFile::create(dir.path()).unwrap();
        events
            .scalars(1, &[("train/loss", 2.5), ("train/lr", 0.0)])
            .unwrap();
        events.scalars(300, &[("val/loss/all", -1.0)]).unwrap();
        let data = std::fs::read(&events.path).unwrap();
        assert_eq!(data.len() as u64, events.position().bytes);
        assert_eq!(
            parse(&data),
            [
                Parsed {
                    file_version: Some("brain.Event:2".into()),
                    ..Parsed::default()
                },
                Parsed {
                    step: 1,
                    scalars: vec![("train/loss".into(), 2.5), ("train/lr".into(), 0.0)],
                    ..Parsed::default()
                },
                Parsed {
                    step: 300,
                    scalars: vec![("val/loss/all".into(), -1.0)],
                    ..Parsed::default()
                },
            ]
        );
    }

    #[test]
    fn resume_drops_what_came_after_the_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let mut events = EventFile::create(dir.path()).unwrap();
        events.scalars(1, &[("a", 1.0)]).unwrap();
        let position = events.position();
        events.scalars(2, &[("a", 2.0)]).unwrap();
        drop(events);

        let mut events = EventFile::resume(dir.path(), &position).unwrap();
        events.scalars(2, &[("a", 3.0)]).unwrap();
        let parsed = parse(&std::fs::read(&events.path).unwrap());
        let seen: Vec<_> = parsed[1..]
            .iter()
            .map(|event| (event.step, event.scalars[0].1))
            .collect();
        assert_eq!(seen, [(1, 1.0), (2, 3.0)]);
    }
}
