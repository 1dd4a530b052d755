//! One file: asked for from where it stopped, hashed as it is written beside its name, and named when its hash is right.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::client::{Answer, Client, Range};
use crate::error::{Error, Result};
use crate::hash::Hasher;
use crate::retry::Patience;
use crate::said::Said;
use crate::snapshot::{File, INCOMPLETE};

/// Read at once.
const BUFFER_BYTES: usize = 1 << 18;
/// A connection that brought so much may break as often as it likes.
const WORTHWHILE_BYTES: u64 = 16 << 20;

/// Gets the file at `path` of the server into `part`; `progress` hears how many of its bytes are there.
///
/// # Errors
/// No way to the server, a body of another length, another hash (the bytes are removed then), a disk that refuses.
pub(crate) fn download(
    client: &Client,
    path: &str,
    file: &File,
    part: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let mut partial = Partial::open(part, file)?;
    let was_begun = partial.len > 0;
    fill(client, path, &mut partial, progress)?;
    if !partial.is_right() && was_begun {
        // What an earlier start left was of another commit, or is damaged.
        partial.restart()?;
        fill(client, path, &mut partial, progress)?;
    }
    if !partial.is_right() {
        partial.remove()?;
        let name = file.name.clone();
        return Err(Error::Damaged { name });
    }
    partial.publish(&part.join(file.name.as_str()))
}

/// Whether the file is in `part` under its name, with its size and hash.
pub(crate) fn is_whole(part: &Path, file: &File) -> Result<bool> {
    let place = part.join(file.name.as_str());
    let has_size =
        fs::symlink_metadata(&place).is_ok_and(|meta| meta.is_file() && meta.len() == file.bytes);
    if !has_size {
        return Ok(false);
    }
    let mut hasher = file.hash.begin(file.bytes);
    let mut bytes = fs::File::open(&place).map_err(|source| failed("read", &place, source))?;
    hash_all(&mut bytes, &mut hasher).map_err(|source| failed("read", &place, source))?;
    Ok(file.hash.is_of(&hasher))
}

/// Bytes of a file that an earlier start left in `part`.
pub(crate) fn begun(part: &Path, file: &File) -> u64 {
    let meta = fs::symlink_metadata(incomplete(part, file));
    meta.map_or(0, |meta| meta.len().min(file.bytes))
}

/// Asks until all bytes are there.
fn fill(
    client: &Client,
    path: &str,
    partial: &mut Partial<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let mut patience = Patience::new();
    while partial.len < partial.file.bytes {
        let before = partial.len;
        if let Err(error) = receive(client, path, partial, progress) {
            if partial.len.saturating_sub(before) >= WORTHWHILE_BYTES {
                patience = Patience::new();
            }
            patience.bear(error)?;
        }
    }
    Ok(())
}

/// One request and its body.
fn receive(
    client: &Client,
    path: &str,
    partial: &mut Partial<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    // 1. what is missing
    let size = partial.file.bytes;
    let asked = Range {
        first: partial.len,
        last: size - 1,
    };
    let answer = client.get(path, Some(asked))?;

    // 2. what comes: that, a part of it, or the whole file anew
    let coming = match answer.is_partial {
        true => answer.part_of(asked, size)?,
        false => {
            partial.restart()?;
            size
        }
    };
    let host = answer.host.clone();
    if let Some(got) = answer.length().filter(|got| *got != coming) {
        let expected = coming;
        return Err(Error::Length {
            host,
            got,
            expected,
        });
    }

    // 3. so many bytes and no more
    copy(answer, coming, partial, progress)
}

fn copy(
    answer: Answer,
    coming: u64,
    partial: &mut Partial<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let host = answer.host.clone();
    let mut body = answer.reader();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut left = coming;
    loop {
        let read = match body.read(&mut buffer) {
            // All is there; who does not end after that is not waited for.
            Err(_) if left == 0 => return Ok(()),
            read => read,
        };
        let cut = |said| Error::Cut {
            host: host.clone(),
            got: coming - left,
            expected: coming,
            said,
        };
        let got = read.map_err(|error| cut(Said::new(error)))?;
        match got as u64 {
            0 if left == 0 => return Ok(()),
            0 => return Err(cut(Said::new("the connection was closed"))),
            more if more > left => {
                let expected = coming;
                partial.restart()?;
                return Err(Error::Overlong { host, expected });
            }
            some => left -= some,
        }
        partial.write(&buffer[..got])?;
        progress(partial.len);
    }
}

/// A file on its way: `<name>.incomplete`, with the hash of what is in it.
struct Partial<'a> {
    file: &'a File,
    path: PathBuf,
    bytes: fs::File,
    hasher: Hasher,
    len: u64,
}

impl<'a> Partial<'a> {
    /// Begins a file, or goes on with what an earlier start left of it.
    fn open(part: &Path, file: &'a File) -> Result<Partial<'a>> {
        let path = incomplete(part, file);
        let mut partial = Partial {
            file,
            bytes: files::open_plain(&path)?,
            hasher: file.hash.begin(file.bytes),
            len: 0,
            path,
        };
        let len = hash_all(&mut partial.bytes, &mut partial.hasher);
        partial.len = len.map_err(|source| failed("read", &partial.path, source))?;
        if partial.len > file.bytes {
            partial.restart()?;
        }
        Ok(partial)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.bytes.write_all(bytes);
        written.map_err(|source| failed("write", &self.path, source))?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> Result<()> {
        let emptied = self.bytes.set_len(0);
        let emptied = emptied.and_then(|()| self.bytes.seek(SeekFrom::Start(0)));
        emptied.map_err(|source| failed("write", &self.path, source))?;
        self.hasher = self.file.hash.begin(self.file.bytes);
        self.len = 0;
        Ok(())
    }

    fn is_right(&self) -> bool {
        self.len == self.file.bytes && self.file.hash.is_of(&self.hasher)
    }

    fn remove(self) -> Result<()> {
        drop(self.bytes);
        fs::remove_file(&self.path).map_err(|source| failed("remove", &self.path, source))
    }

    fn publish(self, place: &Path) -> Result<()> {
        Ok(files::move_file(self.bytes, &self.path, place)?)
    }
}

fn incomplete(part: &Path, file: &File) -> PathBuf {
    part.join(format!("{}{INCOMPLETE}", file.name))
}

/// Hashes a file that was just opened; how many bytes it has.
fn hash_all(bytes: &mut fs::File, hasher: &mut Hasher) -> std::io::Result<u64> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut len = 0;
    loop {
        let n = bytes.read(&mut buffer)?;
        if n == 0 {
            return Ok(len);
        }
        hasher.update(&buffer[..n]);
        len += n as u64;
    }
}

/// An error of the system, in the words of the crate `files`.
pub(crate) fn failed(action: &'static str, path: &Path, source: std::io::Error) -> Error {
    Error::Files(files::Error::Io {
        action,
        path: path.to_owned(),
        source,
    })
}
